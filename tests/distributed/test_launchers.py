"""Proved here: a plain script that names a strategy runs under every way of starting workers: the script started
once, torchrun, and spawned processes; the module ends as the mean of the workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightning

torch.set_num_threads(1)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(lightning.fabric.utilities.rank_zero.rank_zero_only.rank or 0)  # another start on each worker
        self.layer = nn.Linear(4, 1).double()

    def training_step(self, batch):
        return self.layer(batch[0]).sub(self.global_rank).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_train_end(self):
        assert self.trainer.world_size == 2
        weights = [parameter.detach().clone() for parameter in self.parameters()]
        torch.save((self.trainer.global_step, weights), f"{sys.argv[2]}/worker-{self.global_rank}.pt")


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 4, generator=generator, dtype=torch.float64))
    trainer = lightning.Trainer(
        strategy=sys.argv[1], accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(data, batch_size=8))
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    torch.save(weights, f"{sys.argv[2]}/end-{trainer.global_rank}.pt")
"""
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


@pytest.mark.parametrize(
    ("command", "strategy"),
    [
        (["warm"], "d2"),  # with a Python as it is: a test of docs/getting-started.md
        ([TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python", "warm"], "dpsgd"),
        (["warm"], "dpsgd_spawn"),  # which starts Python as it is
        (["warm"], "adpsgd"),
    ],
    ids=["a script", "torchrun", "spawn", "a script, asynchronous"],
)
def test_a_script_runs(command: list[str], strategy: str, tmp_path: Path, warm: str) -> None:
    import torch

    command = [warm if word == "warm" else word for word in command]
    if command[0] == TORCHRUN and not Path(TORCHRUN).exists():
        pytest.skip("there is no torchrun beside this interpreter")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = subprocess.run(
        [*command, str(script), strategy, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    workers = [torch.load(tmp_path / f"worker-{rank}.pt") for rank in range(2)]
    consensus = [(first + second) / 2 for first, second in zip(workers[0][1], workers[1][1], strict=True)]
    assert all(steps > 0 for steps, _ in workers)
    assert sum(steps for steps, _ in workers) == 16
    if strategy != "adpsgd":  # there a late call may still average the two
        assert not torch.equal(workers[0][1][0], workers[1][1][0]) or strategy == "d2"
        for mean, end in zip(consensus, torch.load(tmp_path / "end-0.pt"), strict=True):
            torch.testing.assert_close(end, mean, rtol=0.0, atol=1e-14)
