"""Speeches of Shakespeare as sparse rows: is one from a history? Nothing is downloaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import torch

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual import LinearDataModule
from lightning_decentral.primal_dual.rows import Numbers
from lightning_decentral.recipes.text_data import _read_plays
from lightning_decentral.recipes.zeroth_order import HISTORIES


class Speeches(LinearDataModule):
    """TF-IDF of the words, and pairs of words, of each speech; the class tells histories from all other plays.

    A feature is ``(1 + log count) log(speeches / speeches that have it)``; each row has the length 1.

    Args:
        pairs: whether pairs of neighbouring words are features, too: about ten times as many.
        fewest_words: of a speech; shorter ones are left out.
        rounds: see `LinearDataModule`.

    Raises:
        ConfigurationError: when the package with the text is not there.
    """

    def __init__(self, pairs: bool = True, fewest_words: int = 20, rounds: int = 100) -> None:
        if fewest_words < 1:
            raise ConfigurationError(f"Speeches got fewest_words={fewest_words}, needs at least 1. Use 20.")
        super().__init__(*speeches(pairs, fewest_words), rounds=rounds)


def speeches(pairs: bool = True, fewest_words: int = 20) -> tuple[torch.Tensor, Numbers]:
    """Return the rows of `Speeches` as a sparse tensor, and their classes, -1 and 1."""
    counts: list[Counter[str]] = []
    labels: list[float] = []
    for name, text in _read_plays().items():
        for speech in re.split(r"\n\s*\n", text):
            words = re.findall(r"[a-z']+", speech.lower())
            if len(words) < fewest_words:
                continue
            terms = Counter(words)
            if pairs:
                terms.update(f"{first} {second}" for first, second in pairwise(words))
            counts.append(terms)
            labels.append(1.0 if name in HISTORIES else -1.0)
    having = Counter(term for terms in counts for term in terms)
    places = {term: place for place, term in enumerate(sorted(term for term, count in having.items() if count > 1))}
    starts = [0]
    columns: list[int] = []
    values: list[Numbers] = []
    for terms in counts:
        known = sorted((places[term], term) for term in terms if term in places)
        row = np.array([(1 + math.log(terms[term])) * math.log(len(counts) / having[term]) for _, term in known])
        columns.extend(place for place, _ in known)
        values.append(row / max(float(np.linalg.norm(row)), 1e-12))
        starts.append(len(columns))
    matrix = torch.sparse_csr_tensor(
        torch.tensor(starts), torch.tensor(columns), torch.from_numpy(np.concatenate(values)),
        (len(counts), len(places)), check_invariants=False,
    )  # fmt: skip
    return matrix, np.array(labels)
