"""Training from values of the loss alone: sparse logistic regression on text, and an attack on a classifier."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import (
    L1,
    AbstractEstimator,
    AbstractZerothOrder,
    Box,
    CooSGE,
    GauSGE,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)
from lightning_decentral.optimizers.proximal import Proximal
from lightning_decentral.optimizers.zeroth_order_module import AbstractZerothOrderModule
from lightning_decentral.recipes.images import ResNetClassifier
from lightning_decentral.recipes.text_data import _read_plays

Method = Literal["svrg", "saga", "sgd"]
"""ZO-ProxSVRG, ZO-ProxSAGA, or ZO-ProxSGD."""

HISTORIES = (
    *("edward-iii", "henry-iv-part-1", "henry-iv-part-2", "henry-v", "henry-vi-part-1", "henry-vi-part-2"),
    *("henry-vi-part-3", "henry-viii", "king-john", "richard-ii", "richard-iii"),
)
VALIDATION_PLAYS = ("henry-v", "richard-ii", "king-john", "hamlet", "twelfth-night", "coriolanus", "as-you-like-it")


def _optimizer(
    method: Method, params: Any, lr: float, estimator: AbstractEstimator, prox: Proximal, components: int
) -> AbstractZerothOrder:
    if method == "svrg":
        return ZOProxSVRG(params, lr, estimator, prox)
    if method == "saga":
        return ZOProxSAGA(params, lr, components, estimator, prox)
    if method == "sgd":
        return ZOProxSGD(params, lr, estimator, prox)
    raise ConfigurationError(f"Got method={method!r}, need 'svrg', 'saga' or 'sgd'. Use one of them.")


class PlayPassages(LightningDataModule):
    """Passages of Shakespeare: is it from a history? Frequencies of common words; nothing is downloaded.

    A sample is ``(features [words], label, number of the sample)``. Validation passages come from plays of their own. A
    feature is the number of times a word occurs, standardized over the training passages.

    Args:
        words: that many most frequent words of the training plays.
        passage_words: length of a passage.
        batch_size: passages per step of *each* worker.

    Raises:
        ConfigurationError: A number below 1; in ``setup``, when the package with the text is not there.
    """

    def __init__(self, words: int = 200, passage_words: int = 300, batch_size: int = 32) -> None:
        super().__init__()
        if min(words, passage_words, batch_size) < 1:
            raise ConfigurationError(
                f"PlayPassages got words={words}, passage_words={passage_words} and batch_size={batch_size}; each "
                "needs to be at least 1. Correct it."
            )
        self.words = words
        self.passage_words = passage_words
        self.batch_size = batch_size
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Counts words; the same on every worker and in every run."""
        if self.parts:
            return
        texts = {name: re.findall(r"[a-z']+", text.lower()) for name, text in _read_plays().items()}
        train = {name: text for name, text in texts.items() if name not in VALIDATION_PLAYS}
        common = Counter(word for text in train.values() for word in text).most_common(self.words)
        places = {word: place for place, (word, _) in enumerate(common)}
        counts: dict[str, list[Tensor]] = {"train": [], "val": []}
        labels: dict[str, list[float]] = {"train": [], "val": []}
        for name, text in texts.items():
            part = "val" if name in VALIDATION_PLAYS else "train"
            for first in range(0, len(text) - self.passage_words + 1, self.passage_words):
                known = [places[word] for word in text[first : first + self.passage_words] if word in places]
                counts[part].append(
                    torch.bincount(torch.tensor(known, dtype=torch.int64), minlength=self.words).float()
                )
                labels[part].append(float(name in HISTORIES))
        stacked = {part: torch.stack(rows) for part, rows in counts.items()}  # [passages, words]
        mean, deviation = stacked["train"].mean(0), stacked["train"].std(0).clamp_min(1e-6)
        self.parts = {
            part: TensorDataset((rows - mean) / deviation, torch.tensor(labels[part]), torch.arange(len(rows)))
            for part, rows in stacked.items()
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; an incomplete last batch is dropped."""
        return DataLoader(self.parts["train"], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the passages in their order."""
        return DataLoader(self.parts["val"], batch_size=256)


class SparseTextClassifier(AbstractZerothOrderModule):
    """Logistic regression with l1, trained without a gradient.

    Logged: ``train_loss``; ``val_loss``, ``val_accuracy`` and ``zeros``, the share of weights that are exactly zero.

    Args:
        method: ``"svrg"``, ``"saga"`` or ``"sgd"``.
        words: features; as many as the data have.
        passages: of the training, for ``"saga"``, whose table has a copy of the weights for each.
        l1: weight of the penalty on the weights; the bias has none.
        learning_rate: step size, the same for all steps.
        directions: of GauSGE; 0: CooSGE, all coordinates.
        mu: length of the differences.
        seed: of the directions.

    Example:
        >>> SparseTextClassifier(words=5).losses((torch.ones(2, 5), torch.zeros(2)))
        tensor([0.6931, 0.6931], grad_fn=<BinaryCrossEntropyWithLogitsBackward0>)
    """

    def __init__(
        self,
        method: Method = "svrg",
        words: int = 200,
        passages: int = 4096,
        l1: float = 0.01,
        learning_rate: float = 0.05,
        directions: int = 0,
        mu: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.method: Method = method
        self.passages = passages
        self.l1 = l1
        self.learning_rate = learning_rate
        self.estimator = GauSGE(directions, mu, seed) if directions else CooSGE(mu)
        self.weight = nn.Parameter(torch.zeros(words))
        self.bias = nn.Parameter(torch.zeros(1))

    def losses(self, batch: Any) -> Tensor:
        """Logistic loss of each passage (nats)."""
        scores = batch[0] @ self.weight + self.bias
        return F.binary_cross_entropy_with_logits(scores, batch[1], reduction="none")

    def component_indices(self, batch: Any) -> Tensor:
        """Return the numbers of the passages."""
        numbers: Tensor = batch[2]
        return numbers

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_loss``, ``val_accuracy`` and ``zeros``."""
        right = ((batch[0] @ self.weight + self.bias > 0) == (batch[1] > 0)).float().mean()
        self.log("val_loss", self.losses(batch).mean(), sync_dist=True, batch_size=len(batch[1]))
        self.log("val_accuracy", right, prog_bar=True, sync_dist=True, batch_size=len(batch[1]))
        self.log("zeros", (self.weight == 0).float().mean(), prog_bar=True, sync_dist=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> AbstractZerothOrder:
        """Put l1 on the weights only."""
        groups = [{"params": [self.weight]}, {"params": [self.bias], "prox": None}]
        return _optimizer(self.method, groups, self.learning_rate, self.estimator, L1(self.l1), self.passages)


class UniversalAttack(AbstractZerothOrderModule):
    """One perturbation for all images that makes a classifier fail; the classifier is asked for scores and nothing
    else.

    ``min over |delta| <= bound of mean_i max(score of the right class - best other score, 0)`` at image i plus delta.

    Logged: ``train_loss``; ``val_fooled``, the share of rightly classified images that are no longer.

    Args:
        classifier: checkpoint of a `ResNetClassifier`; ``None``: one with random weights, to try it out.
        method: ``"svrg"``, ``"saga"`` or ``"sgd"``.
        bound: largest change of a number of a normalized image.
        learning_rate: step size.
        directions: of GauSGE.
        mu: length of the differences.
        image_size: height and width; the classifier has to take it.
        seed: of the directions.

    Raises:
        ConfigurationError: An unknown method; `"saga"`, since the images have no numbers.
    """

    def __init__(
        self,
        classifier: str | None = None,
        method: Method = "sgd",
        bound: float = 1.0,
        learning_rate: float = 1.0,
        directions: int = 16,
        mu: float = 1e-2,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if method == "saga":
            raise ConfigurationError(
                "UniversalAttack got method='saga', which needs the number of each image. Use 'svrg' or 'sgd'."
            )
        self.save_hyperparameters()
        self.classifier = (
            ResNetClassifier(depth=8, in_channels=1, width=8)
            if classifier is None
            else ResNetClassifier.load_from_checkpoint(classifier, map_location="cpu")
        )
        self.classifier.requires_grad_(False)
        self.method: Method = method
        self.bound = bound
        self.learning_rate = learning_rate
        self.estimator = GauSGE(directions, mu, seed)
        channels = int(self.classifier.hparams["in_channels"])
        self.delta = nn.Parameter(torch.zeros(channels, image_size, image_size))

    def losses(self, batch: Any) -> Tensor:
        """Return by how much the right class of each image still leads."""
        images, labels = batch
        scores = self.classifier(images + self.delta)  # [images, classes]
        own = F.one_hot(labels, scores.shape[1]).bool()
        right = torch.where(own, scores, 0.0).sum(1)
        best_other = torch.where(own, -torch.inf, scores).amax(1)
        return F.relu(right - best_other)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_fooled``."""
        images, labels = batch
        before = self.classifier(images).argmax(1) == labels
        after = self.classifier(images + self.delta).argmax(1) == labels
        fooled = (before & ~after).sum() / before.sum().clamp_min(1)
        self.log("val_fooled", fooled, prog_bar=True, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> AbstractZerothOrder:
        """Return the optimizer of the perturbation only, in its box."""
        box = Box(-self.bound, self.bound)
        return _optimizer(self.method, [self.delta], self.learning_rate, self.estimator, box, 0)
