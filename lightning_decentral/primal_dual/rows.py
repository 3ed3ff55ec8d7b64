"""Rows of numbers with a target each, most of them zero, and the files they come in."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual.compiled import compiled

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """A sparse matrix in rows (CSR), with a target for each row; no dense copy is ever made.

    Args:
        starts: where each row begins in ``columns`` and ``values``, and where the last one ends.
        columns: of the non-zero values, row by row.
        values: of the same.
        targets: one for each row.
        features: columns of the matrix.

    Raises:
        ConfigurationError: for NaN and infinity, for a row without values, and if the sizes do not fit.

    Example:
        >>> rows = Rows.of(np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([1.0, -1.0]))
        >>> len(rows), rows.features, rows.scores(np.array([1.0, 10.0])).tolist()
        (2, 2, [20.0, 1.0])
    """

    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: Numbers
    targets: Numbers
    features: int

    @classmethod
    def of(cls, matrix: Any, targets: Any = None, constant: float | None = None, empty: bool = False) -> Self:
        """Take a matrix as it is: a NumPy array, a tensor (dense or sparse), or a sparse matrix of SciPy.

        Args:
            matrix: ``[rows, features]``.
            targets: one for each row; ``None``: there are none, and they are 0.
            constant: a value that each row gets in a column of its own, the last one, for an intercept.
            empty: whether rows may be without values.

        Raises:
            ConfigurationError: if it is no matrix, or the targets are not as many.
        """
        return cls._made(*_parts(matrix), targets, constant, empty)

    @classmethod
    def read(
        cls, path: str | Path, features: int | None = None, zero_based: bool = False, constant: float | None = None
    ) -> Self:
        """Read a file of svmlight, as LIBSVM's collection has: ``target column:value column:value ...`` in each line.

        Args:
            path: of the file; ``#`` begins a comment.
            features: columns of the matrix; ``None``: as many as the file has.
            zero_based: whether the first column is number 0; otherwise it is 1.
            constant: a value that each row gets in a column of its own, the last one, for an intercept.

        Raises:
            ConfigurationError: for a line that cannot be read, or has no values and gets no constant, with its number;
                for a file without lines.
        """
        return cls._made(*_read(path, features, zero_based, empty=constant is not None), constant)

    @classmethod
    def _made(
        cls,
        starts: Any,
        columns: Any,
        values: Any,
        features: int,
        targets: Any = None,
        constant: float | None = None,
        empty: bool = False,
    ) -> Self:
        rows = len(starts) - 1
        found = np.zeros(rows) if targets is None else np.asarray(targets, dtype=np.float64).reshape(-1)
        if len(found) != rows:
            raise ConfigurationError(f"Rows got {rows} rows and {len(found)} targets, needs as many. Correct one.")
        if constant is not None:
            values = np.insert(values, starts[1:], constant)
            columns = np.insert(columns, starts[1:], features)
            starts, features = starts + np.arange(rows + 1), features + 1
        made = cls(
            np.ascontiguousarray(starts, dtype=np.int64),
            np.ascontiguousarray(columns, dtype=np.int32),
            np.ascontiguousarray(values, dtype=np.float64),
            np.ascontiguousarray(found),
            features,
        )
        made.check(empty)
        return made

    def __len__(self) -> int:
        return len(self.targets)

    def check(self, empty: bool = False) -> None:
        """Refuse what cannot be trained on.

        Args:
            empty: whether rows may be without values.

        Raises:
            ConfigurationError: with the number of the row, counted from 0.
        """
        if not len(self):
            raise ConfigurationError("Rows got no rows, needs at least 1. Check the file or the array.")
        if self.features >= 2**31:
            raise ConfigurationError(f"Rows got {self.features} features, needs fewer than 2^31. Hash them to fewer.")
        for what, numbers in (("value", self.values), ("target", self.targets)):
            if not np.isfinite(numbers).all():
                place = int(np.flatnonzero(~np.isfinite(numbers))[0])
                row = int(np.searchsorted(self.starts, place, "right")) - 1 if what == "value" else place
                raise ConfigurationError(
                    f"Rows got the {what} {numbers[place]} in row {row}, needs finite numbers. Remove the row, or fill "
                    "in what is missing."
                )
        bare = np.flatnonzero(np.diff(self.starts) == 0)
        if len(bare) and not empty:
            raise ConfigurationError(
                f"Rows got row {bare[0]} without a value (and {len(bare) - 1} more), needs one at least: nothing can "
                "be learned from it. Remove it, or pass intercept=True, which gives every row one."
            )

    def some(self, which: NDArray[np.int64]) -> Self:
        """Return some of the rows, in the order of their numbers ``which``."""
        lengths = np.diff(self.starts)[which]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.starts[:-1][which] - starts[:-1], lengths) + np.arange(starts[-1])
        return type(self)(starts, self.columns[places], self.values[places], self.targets[which], self.features)

    def scores(self, model: Numbers) -> Numbers:
        """Return the product of each row with a model, ``[rows]``."""
        out = np.empty(len(self))
        _scores(self.starts, self.columns, self.values, model, out)
        return out

    def combined(self, weights: Numbers) -> Numbers:
        """Return the sum of all rows, each times its weight, ``[features]``."""
        out = np.zeros(self.features)
        _combine(self.starts, self.columns, self.values, weights, out)
        return out

    def squared_norms(self) -> Numbers:
        """Return ``||x_i||^2`` of each row."""
        return np.add.reduceat(np.append(np.square(self.values), 0.0), self.starts[:-1])

    def tensor(self) -> torch.Tensor:
        """Return the matrix as a sparse tensor in rows."""
        starts, values = torch.from_numpy(self.starts), torch.from_numpy(self.values)
        columns = torch.from_numpy(self.columns.astype(np.int64))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # what is used of it is stable
            return torch.sparse_csr_tensor(starts, columns, values, (len(self), self.features), check_invariants=False)


@compiled
def _scores(starts: Any, columns: Any, values: Any, model: Any, out: Any) -> None:
    for row in range(len(out)):
        score = 0.0
        for place in range(starts[row], starts[row + 1]):
            score += values[place] * model[columns[place]]
        out[row] = score


@compiled
def _combine(starts: Any, columns: Any, values: Any, weights: Any, out: Any) -> None:
    for row in range(len(weights)):
        weight = weights[row]
        for place in range(starts[row], starts[row + 1]):
            out[columns[place]] += weight * values[place]


def _parts(matrix: Any) -> tuple[Any, Any, Any, int]:
    """Take a matrix apart: where rows begin, columns, values, and the number of features."""
    if isinstance(matrix, torch.Tensor):
        if matrix.layout is torch.strided:
            matrix = matrix.numpy(force=True)
        else:
            found = matrix.to_sparse_csr()
            starts, columns = found.crow_indices().numpy(force=True), found.col_indices().numpy(force=True)
            return starts, columns, found.values().numpy(force=True), int(matrix.shape[1])
    if callable(getattr(matrix, "tocsr", None)):  # SciPy's, which is not needed otherwise
        found = matrix.tocsr()
        return found.indptr, found.indices, found.data, int(found.shape[1])
    dense = np.asarray(matrix, dtype=np.float64)
    if dense.ndim != 2:
        raise ConfigurationError(f"Rows got an array of shape {dense.shape}, needs [rows, features]. Reshape it.")
    rows, columns = np.nonzero(dense)
    starts = np.searchsorted(rows, np.arange(len(dense) + 1))
    return starts, columns, dense[rows, columns], dense.shape[1]


def _read(path: str | Path, features: int | None, zero_based: bool, empty: bool) -> tuple[Any, Any, Any, int, Numbers]:
    numbers, lengths, lines = array("d"), array("q"), array("q")
    for number, line in _lines(path):
        pairs = line.count(":")
        tokens = line.replace(":", " ").split()
        try:
            numbers.extend(map(float, tokens))
        except ValueError:
            raise _broken(path, number, line, "numbers") from None
        if len(tokens) != 2 * pairs + 1:
            raise _broken(path, number, line, "a target, and column:value after it")
        lengths.append(pairs)
        lines.append(number)
    if not lengths:
        raise ConfigurationError(f"{path} has no rows, needs one at least. Check that it is the right file.")
    counts, flat = np.frombuffer(lengths, dtype=np.int64), np.frombuffer(numbers)
    if len(bare := np.flatnonzero(counts == 0)) and not empty:
        raise ConfigurationError(
            f"{path}, line {lines[bare[0]]}: got a row without a value (and {len(bare) - 1} more), needs one at least: "
            "nothing can be learned from it. Remove it, or pass intercept=True, which gives every row one."
        )
    starts = np.concatenate([[0], np.cumsum(counts)])
    heads = 2 * starts[:-1] + np.arange(len(counts))
    body = np.delete(flat, heads).reshape(-1, 2)
    columns = body[:, 0] - (0 if zero_based else 1)
    falls = np.diff(columns, prepend=-1.0) <= 0.0
    falls[starts[:-1][counts > 0]] = False  # of the first in each row there is none before
    most = np.inf if features is None else features
    wrong = np.flatnonzero((columns < 0) | (columns % 1 != 0) | (columns >= most) | falls)
    if len(wrong):
        row = int(np.searchsorted(starts, wrong[0], "right")) - 1
        first = 0 if zero_based else 1
        needs = f"columns that are whole numbers, increase, and begin with {first}"
        if features is not None:
            needs += f", up to {features - 1 + first}"
        raise _broken(path, lines[row], f"column {body[wrong[0], 0]:g}", needs)
    if not np.isfinite(flat).all():
        place = int(np.flatnonzero(~np.isfinite(flat))[0])
        row = int(np.searchsorted(heads, place, "right")) - 1
        raise _broken(path, lines[row], f"{flat[place]:g}", "finite numbers")
    width = (int(columns.max()) + 1 if len(columns) else 1) if features is None else features
    return starts, columns, body[:, 1], width, flat[heads]


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Go through what is not empty, with the number of the line, counted from 1."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if text := line.partition("#")[0].strip():
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}), needs a text file of svmlight.") from error


def _broken(path: str | Path, number: int, got: str, needs: str) -> ConfigurationError:
    return ConfigurationError(f"{path}, line {number}: got {got[:80]!r}, needs {needs}. Correct the line.")
