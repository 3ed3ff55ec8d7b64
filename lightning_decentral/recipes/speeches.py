"""Speeches of Shakespeare as sparse rows: is one from a history? Nothing is downloaded."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_decentral.callbacks import Stragglers
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual import LinearDataModule, Loss
from lightning_decentral.primal_dual.coordinates import divided
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
        shares: see `LinearDataModule`.

    Raises:
        ConfigurationError: when the package with the text is not there.
    """

    def __init__(
        self,
        pairs: bool = True,
        fewest_words: int = 20,
        rounds: int = 100,
        shares: Sequence[float] | Literal["measured"] | None = None,
    ) -> None:
        if fewest_words < 1:
            raise ConfigurationError(f"Speeches got fewest_words={fewest_words}, needs at least 1. Use 20.")
        super().__init__(*speeches(pairs, fewest_words), rounds=rounds, shares=shares)


class RowSeconds(Stragglers):
    """Lets a step take its time for each row that it looks at, and more of it on a slow worker: see `Stragglers`.

    What a step takes besides, whatever its rows, is no longer on a slow worker.

    Args:
        seconds: for each row, of a worker that is not slow.
        slowdown: see `Stragglers`.
    """

    def __init__(self, seconds: float, slowdown: Mapping[int, float] | None = None) -> None:
        super().__init__(slowdown)
        if not seconds >= 0.0:
            raise ConfigurationError(f"RowSeconds got seconds={seconds}, needs 0 or more. Use 6e-4.")
        self.seconds = seconds

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sleep what the step's rows ask for."""
        rows = pl_module.rows_of_step
        assert isinstance(rows, int)
        left = self._began + self.seconds * rows * self.own_factor - time.perf_counter()
        if left > 0.0:
            time.sleep(left)
        self._began = time.perf_counter()


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # what is used of it is stable
        matrix = torch.sparse_csr_tensor(
            torch.tensor(starts), torch.tensor(columns), torch.from_numpy(np.concatenate(values)),
            (len(counts), len(places)), check_invariants=False,
        )  # fmt: skip
    return matrix, np.array(labels)


class LinearSGD(LightningModule):
    """Logistic regression by SGD on batches of rows: what methods of dual coordinates are compared with.

    It takes a `LinearDataModule`, whose rows are divided among the workers as for `PrimalDualModule`. A round is a
    batch of a worker's rows. Logged at each evaluation: ``primal``, the objective, and ``gap``: the duality gap at the
    dual variables that follow from the scores; it is 0 at the optimum.

    Args:
        features: as the data have.
        regularization: ``lambda``, above 0.
        learning_rate: of SGD.
        batch_size: rows of each worker in a step; all that it has, if it has fewer.
        seed: of the division of the rows and of the batches.
    """

    def __init__(
        self,
        features: int,
        regularization: float = 1e-4,
        learning_rate: float = 1.0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = nn.Parameter(torch.zeros(features, dtype=torch.float64))
        self.regularization, self.learning_rate = regularization, learning_rate
        self.batch_size, self.seed = batch_size, seed

    @property
    def rows_of_step(self) -> int:
        """How many rows a step looks at."""
        return self.batch_size

    def setup(self, stage: str) -> None:
        """Take the rows."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, LinearDataModule) or data.features != self.weight.numel():
            got = f"{data.features} features" if isinstance(data, LinearDataModule) else type(data).__name__
            raise ConfigurationError(
                f"LinearSGD got {got} for its data, needs a LinearDataModule of {self.weight.numel()} features. "
                "Pass one."
            )
        self._rows, self._classes = data.rows, data.classes()
        if isinstance(data.shares, str):
            raise ConfigurationError(
                "LinearSGD got shares='measured', needs them as numbers, or none. Give each its speed."
            )
        parts = divided(len(data.rows), self.trainer.world_size, self.seed, data.shares)
        self._own = parts[self.trainer.global_rank]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the objective on a batch; which rows are in it follows from the number of the round."""
        rng = np.random.default_rng([self.seed, self.current_epoch, int(batch)])
        chosen = rng.choice(self._own, min(self.batch_size, len(self._own)), replace=False)
        some, targets = self._rows.some(chosen), torch.from_numpy(self._classes[chosen])
        place = torch.arange(len(some)).repeat_interleave(torch.from_numpy(np.diff(some.starts)))
        values = torch.from_numpy(some.values) * self.weight[torch.from_numpy(some.columns).long()]
        scores = torch.zeros(len(some), dtype=torch.float64).index_add(0, place, values)
        loss = nn.functional.softplus(-targets * scores).mean()
        return loss + self.regularization / 2 * self.weight.square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate nothing yet: see `on_validation_epoch_end`."""

    def on_validation_epoch_end(self) -> None:
        """Log the objective and the gap, of all rows."""
        model, loss, size = self.weight.detach().numpy(), Loss("logistic"), len(self._rows)
        scores = self._rows.scores(model)
        duals = self._classes / (1.0 + np.exp(self._classes * scores))
        whole = self._rows.combined(duals / (self.regularization * size))
        primal = loss.values(scores, self._classes).mean() + self.regularization / 2 * np.square(model).sum()
        gap = loss.gaps(scores, duals, self._classes).mean() + self.regularization / 2 * np.square(model - whole).sum()
        for name, value in (("gap", gap), ("primal", primal)):
            self.log(
                name,
                torch.tensor(float(value), dtype=torch.float64),
                prog_bar=name == "gap",
                batch_size=1,
                sync_dist=True,
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD([self.weight], lr=self.learning_rate)
