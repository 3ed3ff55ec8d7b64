"""Proved here: rows are the same from every kind of matrix and from a file; products with them are those of the dense
matrix; whatever is wrong with them is named, with the row or the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from scipy.sparse import csr_matrix
from sklearn.datasets import dump_svmlight_file

from lightning_decentral import AsyncStrategy
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual import LinearDataModule
from lightning_decentral.primal_dual.rows import Rows

DENSE = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, -3.0], [0.0, 0.0, 0.5], [4.0, 0.0, 0.0]])
TARGETS = np.array([1.0, -1.0, 1.0, -1.0])


@pytest.mark.parametrize(
    "matrix", [DENSE, csr_matrix(DENSE), torch.tensor(DENSE), torch.tensor(DENSE).to_sparse(), DENSE.tolist()]
)
def test_every_kind_of_matrix_gives_the_same_rows(matrix: Any) -> None:
    rows = Rows.of(matrix, TARGETS)
    assert torch.equal(rows.tensor().to_dense(), torch.tensor(DENSE))
    model = np.array([0.5, 1.5, -2.0])
    np.testing.assert_array_equal(rows.scores(model), DENSE @ model)
    np.testing.assert_array_equal(rows.combined(TARGETS), TARGETS @ DENSE)
    np.testing.assert_array_equal(rows.squared_norms(), (DENSE**2).sum(1))
    some = rows.some(np.array([3, 1]))
    assert torch.equal(some.tensor().to_dense(), torch.tensor(DENSE[[3, 1]]))
    assert some.targets.tolist() == [-1.0, -1.0]


def test_an_intercept_is_a_column_of_its_own() -> None:
    with_zeros = np.vstack([DENSE, np.zeros((1, 3))])
    rows = Rows.of(with_zeros, np.append(TARGETS, 1.0), constant=2.0)
    expected = np.hstack([with_zeros, np.full((5, 1), 2.0)])
    assert torch.equal(rows.tensor().to_dense(), torch.tensor(expected))
    np.testing.assert_array_equal(rows.squared_norms(), (expected**2).sum(1))


@pytest.mark.parametrize(
    ("matrix", "targets", "message"),
    [
        (np.vstack([DENSE, np.zeros((1, 3))]), [1, -1, 1, -1, 1], r"row 4 without a value .* intercept=True"),
        (np.where(DENSE == -3.0, np.nan, DENSE), TARGETS, "the value nan in row 1, needs finite"),
        (DENSE, [1.0, np.inf, 1.0, 1.0], "the target inf in row 1"),
        (DENSE, [1.0, 1.0], "4 rows and 2 targets"),
        (DENSE[0], [1.0], r"shape \(3,\), needs \[rows, features\]"),
        (DENSE[:0], [], "no rows"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(matrix: Any, targets: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Rows.of(matrix, targets)


@pytest.mark.parametrize("zero_based", [False, True])
def test_a_file_is_what_was_written(tmp_path: Path, zero_based: bool) -> None:
    dump_svmlight_file(DENSE, TARGETS, str(tmp_path / "data"), zero_based=zero_based, comment="made by a test")
    rows = Rows.read(tmp_path / "data", zero_based=zero_based)
    assert torch.equal(rows.tensor().to_dense(), torch.tensor(DENSE))
    assert rows.targets.tolist() == TARGETS.tolist()
    assert LinearDataModule(tmp_path / "data", zero_based=zero_based).classes().tolist() == TARGETS.tolist()
    with pytest.raises(ConfigurationError, match="and targets, which the file has"):
        LinearDataModule(tmp_path / "data", TARGETS)
    assert Rows.read(tmp_path / "data", features=7, zero_based=zero_based).tensor().shape == (4, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1:2\n# a comment\n\n-1 3:x\n", "line 4: got '-1 3:x', needs numbers"),
        ("1 1:2\n-1 3 4\n", "line 2: got '-1 3 4', needs a target, and column:value"),
        ("1 1:2\n-1 3:4 2:1\n", "line 2: got 'column 2', needs columns that are whole numbers, increase"),
        ("1 1:2\n-1 0:4\n", "line 2: got 'column 0', .* begin with 1"),
        ("1 1:2\n-1 1.5:4\n", r"line 2: got 'column 1\.5'"),
        ("1 1:2\n-1 9:4\n", "line 2: got 'column 9', .* up to 5"),
        ("1 1:2\n\n-1 2:nan\n", "line 3: got 'nan', needs finite numbers"),
        ("1 1:2\ninf 2:1\n", "line 2: got 'inf', needs finite numbers"),
        ("1 1:2\n# a comment\n-1\n1 2:3\n1\n", r"line 3: got a row without a value \(and 1 more\)"),
        ("# nothing\n", "has no rows"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        Rows.read(tmp_path / "data", features=5)


def test_each_worker_has_rows_to_predict() -> None:
    """Lightning gives worker ``k`` of ``n`` every ``n``-th batch, and fails if there are fewer."""
    data = LinearDataModule(DENSE, TARGETS)
    for workers, batches in ((1, 1), (3, 3), (4, 4)):
        data.trainer = Trainer(accelerator="cpu", devices=workers, strategy=AsyncStrategy(), logger=False)
        parts = [batch.to_dense() for batch in data.predict_dataloader()]
        assert len(parts) == batches
        assert torch.equal(torch.cat(parts), torch.tensor(DENSE))
    data.trainer = Trainer(accelerator="cpu", devices=5, strategy=AsyncStrategy(), logger=False)
    with pytest.raises(ConfigurationError, match="4 rows to predict and 5 workers"):
        data.predict_dataloader()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Rows.read(tmp_path / "nothing")
