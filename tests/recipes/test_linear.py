"""Proved here: SGD on rows, which methods of dual coordinates are compared with, takes each worker's own; newsgroups
become rows."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils import Bunch
from strategies.fits import fit_kept

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual import LinearDataModule
from lightning_decentral.primal_dual.coordinates import divided
from lightning_decentral.recipes.newsgroups import Newsgroups
from lightning_decentral.recipes.speeches import LinearSGD


@pytest.mark.parametrize("shares", [None, [3, 1]])
def test_batches_of_all_own_rows_are_steps_of_gradient_descent(shares: list[float] | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, classes = rng.standard_normal((24, 3)), np.where(rng.random(24) > 0.5, 1.0, -1.0)
    module = LinearSGD(features=3, regularization=0.1, learning_rate=0.5, batch_size=24)
    data = LinearDataModule(rows, classes, rounds=4, shares=shares)
    fit_kept(tmp_path, "ddp", 2, module, datamodule=data, max_epochs=1)
    weights = np.zeros(3)
    parts = divided(24, 2, 0, shares)
    assert sorted(np.concatenate(parts)) == list(range(24))
    for _ in range(4):
        slopes = -classes / (1.0 + np.exp(classes * (rows @ weights)))
        gradient = np.mean([slopes[part] @ rows[part] / len(part) for part in parts], axis=0)
        weights -= 0.5 * (gradient + 0.1 * weights)
    torch.testing.assert_close(module.weight.detach(), torch.from_numpy(weights))


def test_newsgroups_are_read_from_where_scikit_learn_keeps_them(tmp_path: Path) -> None:
    names = ["rec.autos", "sci.med", "sci.space"]
    posts = ["the engine, and the oil", "a dose of the drug", "an orbit of the moon", "> quoted\n"]
    train = Bunch(
        data=[f"From: somebody\nSubject: it\n\n{post}\n" for post in posts],
        target=np.array([0, 1, 2, 1]),
        target_names=names,
        filenames=np.array([f"{place}" for place in range(4)]),
    )
    saved = codecs.encode(pickle.dumps({"train": train, "test": train}), "zlib_codec")
    (tmp_path / "20news-bydate_py3.pkz").write_bytes(saved)
    data = Newsgroups(folder=str(tmp_path))
    assert len(data.rows) == 3  # the last one has no words of its own
    np.testing.assert_array_equal(data.classes(), [-1.0, 1.0, 1.0])
    np.testing.assert_allclose(data.rows.scores(np.zeros(data.features)), 0.0)
    lengths = [np.square(data.rows.some(np.array([row])).values).sum() for row in range(3)]
    np.testing.assert_allclose(lengths, 1.0)
    with pytest.raises(ConfigurationError, match=r"subject='talk', with which no groups begin. .*sci\.med"):
        Newsgroups("talk", folder=str(tmp_path))


def test_newsgroups_that_are_not_there_are_not_fetched_unasked(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="download=True"):
        Newsgroups(folder=str(tmp_path))
