"""Rows for `PrimalDualModule`: read, divided among the workers, and counted in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual.rows import Numbers, Rows
from lightning_decentral.strategies import AbstractDecentralizedStrategy, SimulatedStrategy
from lightning_decentral.strategies.serving import trainers_of

_PREDICTED = 1024  # rows of a batch, at most


class LinearDataModule(LightningDataModule):
    """Sparse or dense rows with a target each, for `PrimalDualModule`.

    Rows stay with the worker that has their dual variables. So the training loader gives no rows but *rounds*: each is
    as many steps as the method says, in rows that the worker chooses itself. Asynchronous workers share the rounds of
    an epoch according to their speed.

    Args:
        data: the path of an svmlight file, or a matrix ``[rows, features]``: a NumPy array, a sparse matrix of SciPy,
            or a tensor, dense or sparse.
        targets: one for each row; of a file none.
        positive: the label of the class that is told from all others. ``None``: there are two labels, and the larger
            one is positive; or, for the squared loss, targets are numbers.
        intercept: whether each row gets a column of ones, the last one. Its weight is regularized as the others are.
        rounds: of each worker in an epoch, at least 1.
        shares: how many rows each worker that trains has, relative to the others: ``[10, 10, 10, 1]`` where the last
            one is ten times slower, so that all need as long for theirs. ``"measured"``: equally many, and by the speed
            of each from the first evaluation on; see `PrimalDualModule`. ``None``: equally many.
        zero_based: whether the columns of a file begin with 0, and not with 1.
        features: columns of a file; ``None``: as many as it has.

    Attributes:
        features: columns, that of the intercept included.

    Raises:
        ConfigurationError: for what cannot be read or trained on, with the line or the row.

    Example:
        >>> import numpy as np
        >>> LinearDataModule(np.eye(3), [1, 2, 2], intercept=True).features
        4
    """

    def __init__(
        self,
        data: Any,
        targets: Any = None,
        *,
        positive: float | None = None,
        intercept: bool = False,
        rounds: int = 100,
        shares: Sequence[float] | Literal["measured"] | None = None,
        zero_based: bool = False,
        features: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(shares, str) and shares != "measured":
            raise ConfigurationError(
                f"LinearDataModule got shares={shares!r}, needs a positive number for each worker, 'measured', or None."
            )
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            raise ConfigurationError(f"LinearDataModule got rounds={rounds!r}, needs a whole number of at least 1.")
        constant = 1.0 if intercept else None
        if isinstance(data, str | Path):
            if targets is not None:
                raise ConfigurationError(
                    f"LinearDataModule got the file {data} and targets, which the file has. Leave targets out."
                )
            self.rows = Rows.read(data, features, zero_based, constant)
        else:
            if targets is None:
                raise ConfigurationError("LinearDataModule got a matrix without targets. Pass one for each row.")
            self.rows = Rows.of(data, targets, constant)
        self.positive, self.rounds, self.shares = positive, rounds, shares
        self.features = self.rows.features

    def classes(self) -> Numbers:
        """Return the targets as classes of -1 and 1.

        Raises:
            ConfigurationError: if there are not two.
        """
        targets, labels = self.rows.targets, np.unique(self.rows.targets)
        positive = labels[-1] if self.positive is None else self.positive
        if (self.positive is None and len(labels) != 2) or positive not in labels or len(labels) < 2:
            shown = ", ".join(f"{label:g}" for label in labels[:5]) + (", ..." if len(labels) > 5 else "")
            asked = "" if self.positive is None else f" and positive={self.positive:g}"
            raise ConfigurationError(
                f"LinearDataModule got the labels {shown}{asked}, needs two classes. Pass positive=label to tell one "
                "of several labels from all others; for numbers, use loss='squared'."
            )
        return np.where(targets == positive, 1.0, -1.0)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the rounds of an epoch, of all workers together."""
        assert self.trainer is not None
        return DataLoader(_Numbers(self.rounds * len(ranks_with_rows(self.trainer))), batch_size=1)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return one number for each worker: it evaluates its own rows."""
        assert self.trainer is not None
        return DataLoader(_Numbers(self.trainer.world_size), batch_size=1)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the rows in their order, up to 1024 at a time, as sparse tensors; a batch at least for each worker."""
        workers = 1 if self.trainer is None else int(self.trainer.world_size)
        if workers > len(self.rows):
            raise ConfigurationError(
                f"LinearDataModule got {len(self.rows)} rows to predict and {workers} workers, needs a row for each. "
                "Predict with a Trainer of one device."
            )
        count = max(workers, -(-len(self.rows) // _PREDICTED))
        batches = [self.rows.some(part).tensor() for part in np.array_split(np.arange(len(self.rows)), count)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class _Numbers(Dataset[int]):
    """A data set of numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def ranks_with_rows(trainer: Any) -> list[int]:
    """Tell which workers train, real or virtual, and so have rows: all but a server that only serves.

    Args:
        trainer: of Lightning.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SimulatedStrategy):
        return trainers_of(strategy.algorithm, strategy.workers)
    if isinstance(strategy, AbstractDecentralizedStrategy):
        return trainers_of(strategy.algorithm, int(trainer.world_size))
    return list(range(int(trainer.world_size)))
