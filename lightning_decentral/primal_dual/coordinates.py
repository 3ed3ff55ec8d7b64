"""Stochastic dual coordinate ascent over the rows of one worker (Shalev-Shwartz and Zhang, JMLR 2013)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual.compiled import compiled
from lightning_decentral.primal_dual.losses import Loss, Numbers, new_dual
from lightning_decentral.primal_dual.rows import Rows


class Coordinates:
    """The dual variables of some rows, and steps in them.

    Rows come in a random order, each once in a pass, anew in every pass: which are next follows from the seed and from
    how many steps were made.

    Args:
        rows: of this worker.
        loss: of a row.
        regularization: ``lambda``, above 0.
        total: ``n``, the number of rows of all workers.
        seed: of the order; other workers have others.

    Attributes:
        duals: ``alpha``, one for each row; 0 at first.
        steps: made so far.

    Example:
        >>> import numpy as np
        >>> rows = Rows.of(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([1.0, 3.0]))
        >>> own = Coordinates(rows, Loss("squared"), 0.1, total=2)
        >>> w = np.zeros(2)
        >>> for _ in range(100):
        ...     own.ascend(w, count=2)
        >>> abs(own.gap(w)) < 1e-12
        True
    """

    def __init__(
        self, rows: Rows, loss: Loss, regularization: float, total: int, seed: int | tuple[int, ...] = 0
    ) -> None:
        self.rows, self.loss, self.regularization, self.total = rows, loss, regularization, total
        self.seed = (seed,) if isinstance(seed, int) else seed
        self.duals: Numbers = np.zeros(len(rows))
        self.steps = 0
        self._squares = rows.squared_norms()
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._pass = -1

    def ascend(self, model: Numbers, count: int, safety: float = 1.0, damping: float = 1.0) -> None:
        """Make steps in ``count`` coordinates, each with the model that those before it have left.

        Args:
            model: where the steps begin: ``w(alpha)``, if this worker is alone. It becomes
                ``model + safety / (lambda n) sum_i delta_i x_i``.
            count: how many.
            safety: ``sigma'``: by how much a worker's own steps count more than they will for all; 1 if it is alone.
            damping: ``gamma``: the share of the change that the dual variables keep.
        """
        before = self.duals.copy() if damping != 1.0 else self.duals
        size, scale = len(self.rows), safety / (self.regularization * self.total)
        while count > 0:
            number, first = divmod(self.steps, size)
            if number != self._pass:
                self._order, self._pass = np.random.default_rng([*self.seed, number]).permutation(size), number
            some = self._order[first : first + count]
            _ascend(
                *(self.rows.starts, self.rows.columns, self.rows.values, self.rows.targets, self._squares),
                *(some, self.duals, model, scale, self.loss.code, self.loss.smoothing),
            )
            self.steps += len(some)
            count -= len(some)
        if damping != 1.0:
            self.duals += (damping - 1.0) * (self.duals - before)

    def model(self) -> Numbers:
        """Return what these dual variables add to ``w(alpha)``; all of it, if there are no other workers."""
        return self.rows.combined(self.duals / (self.regularization * self.total))

    def gap(self, model: Numbers, whole: Numbers | None = None) -> float:
        """Return the duality gap at a model and at these dual variables.

        Args:
            model: ``w``.
            whole: ``w(alpha)`` of all workers; ``None``: of this one, which is alone.
        """
        whole = self.model() if whole is None else whole
        parts = self.loss.gaps(self.rows.scores(model), self.duals, self.rows.targets).sum() / self.total
        return float(parts + self.regularization / 2 * np.square(model - whole).sum())

    def primal(self, model: Numbers) -> float:
        """Return ``P(w)``, of these rows alone."""
        losses = self.loss.values(self.rows.scores(model), self.rows.targets).sum() / self.total
        return float(losses + self.regularization / 2 * np.square(model).sum())


@compiled
def _ascend(
    starts: Any, columns: Any, values: Any, targets: Any, squares: Any,
    order: Any, duals: Any, model: Any, scale: Any, code: Any, smoothing: Any,
) -> None:  # fmt: skip
    for row in order:
        score = 0.0
        for place in range(starts[row], starts[row + 1]):
            score += values[place] * model[columns[place]]
        dual = new_dual(code, smoothing, duals[row], targets[row], score, scale * squares[row])
        change = dual - duals[row]
        if change != 0.0:
            duals[row] = dual
            change *= scale
            for place in range(starts[row], starts[row + 1]):
                model[columns[place]] += change * values[place]


def compile_steps() -> None:
    """Compile the steps and the gap, or load what was compiled, so that the first take no longer than others."""
    one = Coordinates(Rows.of(np.ones((1, 1)), np.ones(1)), Loss("squared"), 1.0, total=1)
    one.ascend(np.zeros(1), count=1)
    one.gap(np.zeros(1))


def divided(rows: int, workers: int, seed: int = 0, shares: Sequence[float] | None = None) -> list[NDArray[np.int64]]:
    """Tell which rows belong to which worker: at random, the same wherever it is asked.

    Args:
        rows: how many there are.
        workers: how many there are.
        seed: of the division.
        shares: how many rows each worker has, relative to the others; ``None``: as many as they.

    Raises:
        ConfigurationError: if some worker would have none, or the shares are not one positive number for each.
    """
    if workers > rows:
        raise ConfigurationError(
            f"There are {rows} rows and {workers} workers, needs a row for each worker at least. Use fewer workers."
        )
    order = np.random.default_rng(seed).permutation(rows)
    if shares is None:
        return [np.sort(some) for some in np.array_split(order, workers)]
    if len(shares) != workers or not all(math.isfinite(share) and share > 0.0 for share in shares):
        raise ConfigurationError(
            f"There are {workers} workers and shares={list(shares)}, needs one positive number for each worker. Give "
            "each its speed, as [10, 10, 10, 1], or leave shares out."
        )
    # Each has a row; the others are divided by the shares.
    ends = np.round(np.cumsum(shares) / np.sum(shares) * (rows - workers)).astype(np.int64) + np.arange(1, workers + 1)
    return [np.sort(some) for some in np.split(order, ends[:-1])]
