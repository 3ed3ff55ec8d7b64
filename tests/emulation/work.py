"""What a host of `test_training` runs: ``python work.py PART ...``, with the variables of the emulator and no others.

Parts, one after the other in one process, because importing Lightning on so many hosts takes longer than all of them:
``all_reduce`` with torch alone, a fit of some steps with ``dpsgd`` or ``adpsgd``, and one ``for_ever``.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 500  # of a square matrix: a message has a megabyte
STEPS = 8
HEARD = "HEARD"  # the folder with a file for each line that the test has heard


def all_reduce() -> None:
    """The sum over all hosts of a vector of a megabyte."""
    dist.init_process_group("gloo")
    vector = torch.full((SIZE * SIZE,), float(dist.get_rank() + 1))
    dist.all_reduce(vector)
    print("sum", dist.get_world_size(), vector.min().item(), vector.max().item(), flush=True)
    dist.destroy_process_group()


def fit(part: str) -> None:
    """Train; print when everybody is ready, and what the strategy has counted when everybody has made all steps."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from lightning_decentral import AsyncStrategy, GossipStrategy
    from lightning_decentral.algorithms import ADPSGD, DPSGD
    from lightning_decentral.callbacks import Stragglers

    endless = part == "for_ever"

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(SIZE, SIZE, bias=False)

        def training_step(self, batch: Any) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return DataLoader(torch.randn(100_000 if endless else 4 * STEPS, SIZE), batch_size=1)

    class Marks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.mark(trainer, "ready", lambda: f"{socket.gethostname()} {stragglers.own_factor}")

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.mark(trainer, "done", lambda: f"{trainer.strategy.traffic.bytes_sent} {trainer.global_step}")

        def mark(self, trainer: Trainer, word: str, rest: Callable[[], str]) -> None:
            trainer.strategy.barrier()  # until here others may still call
            time.sleep(0.1)
            print(word, part, rest(), flush=True)
            heard = Path(os.environ[HEARD]) / f"{word} {part} {socket.gethostname()}"
            while not heard.exists():  # until the test has read the counter of the interface
                time.sleep(0.01)
            trainer.strategy.barrier()

    stragglers = Stragglers()
    strategy = GossipStrategy(DPSGD()) if part == "dpsgd" else AsyncStrategy(ADPSGD())
    trainer = Trainer(
        strategy=strategy,
        num_nodes=int(os.environ["WORLD_SIZE"]),
        devices=1,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Marks(), stragglers],
    )
    trainer.fit(Module())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, name in enumerate(sys.argv[1:]):
        os.environ["MASTER_PORT"] = str(29500 + number)  # no part meets what another one has left
        all_reduce() if name == "all_reduce" else fit(name)
