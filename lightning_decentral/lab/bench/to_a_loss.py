"""Other packages in the race to a loss: the loops that their users write, with the recipe's model, data and pace.

    RANK=0 WORLD_SIZE=4 ... python -m lightning_decentral.lab.bench.to_a_loss "Decent-DP" SETTINGS.json FOLDER

A worker runs with an interpreter that has the package. It leaves ``FOLDER/curve/metrics.csv``, as Lightning's logger
does. Evaluated is the mean of all models, as for this package's methods, and bringing them together counts as training;
where a worker may be lost, worker 0 evaluates its own, since nothing that needs all of them can be asked of all.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_decentral.commands.telling import SECONDS
from lightning_decentral.lab.bench.contenders.loop import gloo_group, sum_over_all
from lightning_decentral.lab.bench.record import interface_bytes
from lightning_decentral.recipes import Shakespeare, TransformerLM
from lightning_decentral.simulation.cluster_file import SLOWDOWN_VARIABLE

PEERS = {"torchft, Streaming DiLoCo": "torchft_streaming_diloco_32", "Decent-DP": "decent_dp_one_peer"}
"""Which contender of the races of steps has the environment that each needs."""
CLIP = 1.0
"""To which norm gradients are clipped, as in the recipe."""


class Loop:
    """One worker's training, whatever a package makes of it.

    Args:
        settings: of `frontier`.
        folder: for the curve.
    """

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.folder = folder
        self.may_lose = bool(settings["may_lose"])
        self._target, self._limit = float(settings["target"]), float(settings["seconds"])
        self._pace = float(settings["compute_seconds"]) * float(os.environ.get(SLOWDOWN_VARIABLE, "1"))
        torch.manual_seed(settings["seed"])
        self.model = TransformerLM(**settings["model"])
        data = Shakespeare(**settings["data"])
        data.setup()
        self._train, self._held_out = data.splits["train"], data.splits["val"]
        self._batch_size, self._seed = data.batch_size, settings["seed"]
        self._points: list[dict[str, float]] = []
        self._seconds = 0.0
        self._sent_before = self._sent()

    def run(self, step: Callable[[Tensor], None], together: Callable[[], Any], apart: Callable[[], Any]) -> None:
        """Train until the target, or until the time is up.

        Args:
            step: makes one, with a batch.
            together: lets the model be what is evaluated.
            apart: takes that back.
        """
        sampler = DistributedSampler(self._train, self.world_size, self.rank, seed=self._seed)  # type: ignore[var-annotated]
        loader = DataLoader(self._train, self._batch_size, sampler=sampler, drop_last=True)
        epoch, ends = 0, False
        while not ends:
            sampler.set_epoch(epoch)
            began = time.perf_counter()
            for batch in loader:
                step(batch)
            together()
            self._seconds += time.perf_counter() - began
            ends = self._evaluate(epoch)
            apart()
            epoch += 1

    def pass_through(self, model: nn.Module, batch: Tensor, before_backward: Callable[[], Any]) -> None:
        """Compute a gradient, and sleep until a batch takes as long as it shall."""
        began = time.perf_counter()
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        before_backward()
        loss.backward()  # type: ignore[no-untyped-call]
        time.sleep(max(0.0, began + self._pace - time.perf_counter()))

    def _sent(self) -> float:
        counted = interface_bytes(os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
        return 0.0 if counted is None else float(counted[0])

    @torch.no_grad()
    def _evaluate(self, epoch: int) -> bool:
        mine = list(range(self.rank, len(self._held_out), self.world_size))  # type: ignore[arg-type]
        if self.may_lose:
            mine = list(range(len(self._held_out)))  # type: ignore[arg-type]
        windows = torch.stack([self._held_out[index] for index in mine])
        logits = self.model(windows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        sent = (self._sent() - self._sent_before) / 1e6
        if "GLOO_SOCKET_IFNAME" not in os.environ:  # loopback counts what all workers send
            sent /= self.world_size
        values = torch.tensor([float(loss) / self.world_size, sent, self._seconds / self.world_size])
        if self.may_lose:
            values *= self.world_size
            values[1] = float("nan")  # nobody knows what the others have sent
        else:
            sum_over_all(values)
        loss_of_all, megabytes, seconds = values.tolist()
        point = {"epoch": epoch, SECONDS: seconds, "progress/megabytes": megabytes, "val_loss": loss_of_all}
        self._points.append(point)
        if self.rank == 0:
            path = self.folder / "curve" / "metrics.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(point))
                writer.writeheader()
                writer.writerows(self._points)
        # Where a worker may be lost, the others end when worker 0 does, who coordinates them.
        return (loss_of_all <= self._target or seconds >= self._limit) and not (self.may_lose and self.rank > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Train one worker; returns the exit status."""
    name, settings, folder = argv if argv is not None else sys.argv[1:]
    torch.set_num_threads(1)
    loop = Loop(json.loads(Path(settings).read_text(encoding="utf-8")), Path(folder))
    package = "torchft" if name.startswith("torchft") else "decent_dp"
    adapter = import_module(f"lightning_decentral.lab.bench.contenders.{package}")
    with nullcontext() if loop.may_lose and package == "torchft" else gloo_group():  # it needs no other one
        adapter.race_to_a_loss(loop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
