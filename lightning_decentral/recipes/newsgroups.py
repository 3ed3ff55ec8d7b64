"""Posts to 20 newsgroups as sparse rows: is one about a subject? The posts come from scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual import LinearDataModule


class Newsgroups(LinearDataModule):
    """TF-IDF of the words of each post of the training set; the class tells some of the groups from all others.

    Headers, signatures and quotations are left out, and so are posts without a word then. Each row has the length 1.
    About 11,000 rows.

    Args:
        subject: with which the names of the groups begin that are told from all others: ``"sci"`` for four of them, or
            a whole name as ``"sci.space"``.
        words: how many of the most frequent ones are features, at most; there are about twice as many.
        folder: where scikit-learn keeps its data; ``None``: where it does by default.
        download: whether to fetch the posts, 14 MB, where they are not there yet.
        rounds: see `LinearDataModule`.
        shares: see `LinearDataModule`.

    Raises:
        ConfigurationError: if the posts are not there and not to be fetched; or if no group begins so, or each does;
            or if there is to be no word.
    """

    def __init__(
        self,
        subject: str = "sci",
        words: int = 50_000,
        folder: str | None = None,
        download: bool = False,
        rounds: int = 100,
        shares: Sequence[float] | Literal["measured"] | None = None,
    ) -> None:
        from sklearn.datasets import fetch_20newsgroups
        from sklearn.feature_extraction.text import TfidfVectorizer

        if words < 1:
            raise ConfigurationError(f"Newsgroups got words={words}, needs at least 1. Use 50000.")
        try:
            posts = fetch_20newsgroups(
                data_home=folder,
                subset="train",
                shuffle=False,
                remove=("headers", "footers", "quotes"),
                download_if_missing=download,
            )
        except OSError as error:
            raise ConfigurationError(
                f"Newsgroups found no posts in scikit-learn's folder ({error}), needs them. Pass download=True where "
                "there is a network, or copy the folder scikit_learn_data of another machine and pass folder=."
            ) from error
        chosen = np.array([name.startswith(subject) for name in posts.target_names])
        if not chosen.any() or chosen.all():
            raise ConfigurationError(
                f"Newsgroups got subject={subject!r}, with which {'all' if chosen.all() else 'no'} groups begin. Use "
                f"the beginning of some of {', '.join(posts.target_names)}."
            )
        rows = TfidfVectorizer(sublinear_tf=True, max_features=words).fit_transform(posts.data)
        some = np.diff(rows.indptr) > 0
        super().__init__(rows[some], chosen[posts.target[some]].astype(float), rounds=rounds, shares=shares)
