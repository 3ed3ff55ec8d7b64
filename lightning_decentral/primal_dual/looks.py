"""Looks at the duality gap inside an epoch, for which nobody waits and no model travels."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual.losses import Loss
from lightning_decentral.primal_dual.rows import Numbers, Rows
from lightning_decentral.strategies import AsyncStrategy

_DUALS = "dual variables"


class Looks:
    """What worker 0 knows of the gap inside an epoch: at the server's model, and at what all have posted last.

    ``P(w) - D(alpha)`` is 0 or more for *every* model and *every* dual variables. So each worker posts its own now and
    then, which are as many numbers as it has rows, in float32: rounded ones are a dual point as good. Worker 0, which
    has all rows, takes the model as it is then and computes ``P``, ``D`` and ``w(alpha)`` by itself, on a thread: steps
    go on, those of the others and its own.

    Args:
        every: how many steps of a worker lie between two times that it posts, and of worker 0 between two looks.
        strategy: that trains.
        rows: of all workers, with their targets.
        loss: of a row.
        regularization: ``lambda``.
        parts: which rows each worker has, by rank.
        division: how often rows have been divided: what was posted before the last time is of other rows.
    """

    def __init__(
        self,
        every: int,
        strategy: AsyncStrategy,
        rows: Rows,
        loss: Loss,
        regularization: float,
        parts: dict[int, Any],
        division: int = 0,
    ) -> None:
        self._every, self._strategy, self._rows, self._loss = every, strategy, rows, loss
        self._regularization, self._parts = regularization, parts
        self._steps, self._name = 0, f"{_DUALS}/{division}"
        self._thread: threading.Thread | None = None
        self._found: float | Exception | None = None

    def step(self, rank: int, duals: Numbers) -> float | None:
        """Post, or look, if it is time; return what a look has found that has come to its end.

        Args:
            rank: this worker.
            duals: its own, before its step.
        """
        found = self._taken()
        self._steps += 1
        if self._steps % self._every == 0:
            if rank:
                self._strategy.post(self._name, duals.astype(np.float32).tobytes())
            elif self._thread is None and (known := self._all_duals(duals)) is not None:
                (model,) = self._strategy.current_models()
                weights = np.concatenate([buffer.numpy(force=True) for buffer in model.buffers])
                self._thread = threading.Thread(target=self._look, args=(weights, known), daemon=True)
                self._thread.start()
        return found

    def close(self) -> None:
        """Wait for a look that is under way, and forget it."""
        if self._thread is not None:
            self._thread.join()
        self._thread, self._found = None, None

    def _taken(self) -> float | None:
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread, found = None, self._found
        if isinstance(found, Exception):
            raise found
        return found

    def _all_duals(self, own: Numbers) -> Numbers | None:
        """Return the dual variables of all rows, as far as they are known; nothing until all have posted."""
        duals = np.empty(len(self._rows))
        for rank, part in self._parts.items():
            if rank == 0:
                duals[part] = own
                continue
            posted = self._strategy.posted(self._name, rank)
            if posted is None:
                return None
            if len(posted) != 4 * len(part):
                raise ConfigurationError(
                    f"Worker {rank} has posted {len(posted)} bytes of dual variables, needs {4 * len(part)} for its "
                    f"{len(part)} rows. Give all workers the same data."
                )
            duals[part] = np.frombuffer(posted, dtype=np.float32)
        return duals

    def _look(self, model: Numbers, duals: Numbers) -> None:
        try:
            rows, size = self._rows, len(self._rows)
            whole = rows.combined(duals / (self._regularization * size))
            parts = self._loss.gaps(rows.scores(model), duals, rows.targets).sum() / size
            self._found = float(parts + self._regularization / 2 * np.square(model - whole).sum())
        except Exception as error:  # raised where the next step looks
            self._found = error
