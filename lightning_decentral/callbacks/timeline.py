"""Who computed and who waited for whom, as a page and a picture."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.plots.canvas import require_matplotlib
from lightning_decentral.plots.timeline import draw_timeline, read_timelines, write_page
from lightning_decentral.strategies import AbstractDecentralizedStrategy, SimulatedStrategy
from lightning_decentral.traffic import Traffic


class Timeline(Callback):
    """Records when each worker computed, updated and waited, and for whom; draws it at the end of `fit`.

    The folder then has ``timeline.html``, one page to be opened by a browser, ``timeline.png``, and a file for each
    worker, ``worker-0.json``. Where the workers' machines share no disk, bring the files together in one folder and run
    ``lightning-decentral timeline FOLDER``; the same where a run ended with an error, which leaves the files alone.

    Where all meet before a validation, that is drawn as *meeting*. Other callbacks that take time in a step, as
    `Stragglers`, have to stand before this one in the Trainer's list to be counted as what they are part of.

    Times are those of the thread that trains: on an accelerator, which computes by itself, they are when its work was
    handed over. All clocks begin when the workers have met at the beginning, so those of two workers differ by no more
    than the time of a message. Nothing is sent while training, and a step costs some microseconds more.

    Under Lightning's own ``strategy="ddp"`` the backward pass includes waiting for the others, which cannot be told
    apart there: it is drawn as *gradient and waiting*. The virtual workers of `SimulatedStrategy` compute one after the
    other, so there is nothing to draw, and a warning says so.

    Args:
        folder: on a disk of this machine; relative to the trainer's ``default_root_dir``.
        first_step: how many batches each worker leaves out at the beginning, in which everything is slow.
        steps: how many it records then.

    Raises:
        ConfigurationError: if a number is out of range; at the beginning of `fit`, if matplotlib is not installed, or
            the folder is on no disk.

    Example:
        >>> callback = Timeline(steps=50)
    """

    def __init__(self, folder: str = "timeline", first_step: int = 3, steps: int = 100) -> None:
        if first_step < 0 or steps < 1:
            raise ConfigurationError(
                f"Timeline(first_step={first_step}, steps={steps}): needs first_step >= 0 and steps >= 1."
            )
        self.folder = folder
        self.first_step, self.steps = first_step, steps
        self._spans: list[tuple[str, float, float]] = []
        self._waits: list[Any] = []
        self._traffic: Traffic | None = None
        self._batches, self._zero, self._began, self._backward = 0, 0.0, 0.0, 0.0
        self._validation, self._real = 0.0, True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_matplotlib("The callback `Timeline`")
        self._real = not isinstance(trainer.strategy, SimulatedStrategy)
        if not self._real:
            rank_zero_warn(
                "Timeline got SimulatedStrategy, whose workers compute one after the other in one process; it needs "
                "real ones, and draws nothing. Leave the callback out, or use the strategy of the method."
            )

        if "://" in str(trainer.default_root_dir) and not Path(self.folder).is_absolute():
            raise ConfigurationError(
                f"Timeline got default_root_dir={str(trainer.default_root_dir)!r}, needs a folder of a disk. Give the "
                "callback one of its own: Timeline(folder='/tmp/timeline')."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spans, self._waits, self._batches = [], [], 0
        if isinstance(trainer.strategy, AbstractDecentralizedStrategy):
            self._traffic = trainer.strategy.traffic
        for path in (Path(trainer.default_root_dir) / self.folder).glob("worker-*.json"):
            path.unlink(missing_ok=True)  # of an earlier run, which may have had more workers
        trainer.strategy.barrier("the timeline's clock")
        self._zero = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._traffic is not None and self._batches == self.first_step:
            self._traffic.waits = self._waits
        self._began = self._backward = self._now()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._backward = self._now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_recording:
            gradient = "gradient" if self._traffic is not None or trainer.world_size == 1 else "gradient and waiting"
            self._spans += [(gradient, self._began, self._backward), ("update", self._backward, self._now())]
        self._batches += 1
        if self._traffic is not None and not self._is_recording:
            self._traffic.waits = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation = self._now()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_recording and not trainer.sanity_checking:  # the models are averaged now, for which all have met
            self._spans.append(("meeting", self._validation, self._now()))
        self._validation = self._now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_recording and not trainer.sanity_checking:
            self._spans.append(("validation", self._validation, self._now()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._real:
            return
        folder = self._write(trainer)
        trainer.strategy.barrier("the timeline's files")
        if trainer.is_global_zero:
            timelines = read_timelines(folder)
            write_page(timelines, folder / "timeline.html")
            draw_timeline(timelines, folder / "timeline.png")
            rank_zero_info(f"Timeline of {len(timelines)} workers: {folder}/timeline.html and timeline.png")
            if len(timelines) < trainer.world_size:
                rank_zero_info(
                    f"The files of {trainer.world_size - len(timelines)} workers are on other machines: copy them into "
                    f"{folder}, and run `lightning-decentral timeline {folder}`."
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._real and self._spans:
            self._write(trainer)

    @property
    def _is_recording(self) -> bool:
        return self.first_step <= self._batches < self.first_step + self.steps

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _write(self, trainer: Trainer) -> Path:
        """Write what this worker did; returns the folder."""
        folder = Path(trainer.default_root_dir) / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if self._traffic is not None:
            self._traffic.waits = None
        waits = [
            [
                wait.began - self._zero,
                wait.ended - self._zero,
                wait.asked - self._zero,
                wait.place,
                wait.word,
                wait.peers,
            ]
            for wait in self._waits
        ]
        strategy = trainer.strategy
        runs = strategy.algorithm if isinstance(strategy, AbstractDecentralizedStrategy) else strategy
        record = {
            "rank": trainer.global_rank,
            "host": socket.gethostname(),
            "workers": trainer.world_size,
            "method": type(runs).__name__,
            "spans": self._spans,
            "waits": waits,
        }
        (folder / f"worker-{trainer.global_rank}.json").write_text(json.dumps(record))
        return folder
