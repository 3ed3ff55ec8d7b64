"""Image classification: a residual network with SGD, momentum and a learning rate that changes once per epoch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes.resnet import CIFARResNet, Shortcut

Schedule = Literal["constant", "cosine", "milestones"]
"""Names of the learning-rate schedules, see `learning_rate_factor`."""


def learning_rate_factor(
    epoch: int, max_epochs: int, warmup_epochs: int, schedule: Schedule, milestones: tuple[float, ...], gamma: float
) -> float:
    """Tell what the learning rate is multiplied by during an epoch.

    Only whole epochs are counted: an asynchronous worker does not know how many batches its epoch will have, so
    nothing here may depend on the total number of steps.

    Args:
        epoch: Number of finished epochs, from 0.
        max_epochs: Length of the training in epochs.
        warmup_epochs: The factor rises linearly over the first ``warmup_epochs`` epochs and is 1 from then on.
        schedule: ``"constant"``; ``"cosine"``: half a cosine from 1 at the end of the warm-up towards 0 at
            ``max_epochs``; ``"milestones"``: times ``gamma`` at each milestone.
        milestones: Fractions of ``max_epochs`` in (0, 1), ascending; used by ``"milestones"`` only.
        gamma: Factor applied at a milestone.

    Returns:
        A factor in (0, 1].

    Example:
        >>> [learning_rate_factor(e, 4, 1, "milestones", (0.5, 0.75), 0.1) for e in range(4)]
        [0.5, 1.0, 0.1, 0.010000000000000002]
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    if schedule == "cosine":
        progress = (epoch - warmup_epochs) / max(1, max_epochs - warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "milestones":
        return gamma ** sum(epoch >= milestone * max_epochs for milestone in milestones)
    return 1.0


class AbstractImageClassifier(LightningModule):
    """Cross entropy, SGD with momentum, accuracies. A subclass brings the network and the defaults.

    Logged: ``train_loss`` per step and ``train_accuracy`` per epoch, both of this worker alone (nothing is communicated
    while training, which is what an asynchronous strategy needs); ``val_loss`` and ``val_accuracy``, ``test_loss`` and
    ``test_accuracy`` over all workers.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        learning_rate: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        warmup_epochs: int,
        schedule: Schedule,
        milestones: Sequence[float],
        gamma: float,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        self.network = network
        if nesterov and not momentum:
            raise ConfigurationError("Nesterov momentum needs momentum > 0, got momentum=0. Set nesterov=False.")
        if list(milestones) != sorted(milestones) or not all(0 < milestone < 1 for milestone in milestones):
            raise ConfigurationError(
                f"Milestones are ascending fractions of max_epochs between 0 and 1, got {list(milestones)}. "
                "Divide epochs by max_epochs: [0.5, 0.75] of 160 epochs are 80 and 120."
            )
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.nesterov = nesterov
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.schedule: Schedule = schedule
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", sync_on_compute=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``[batch, num_classes]`` of normalized images ``[batch, channels, height, width]``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch (nats per image)."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_accuracy``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_accuracy``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Predicted classes, ``[batch]``."""
        logits: Tensor = self(batch[0])
        return logits.argmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{split}_loss", loss, sync_dist=True, batch_size=len(labels))
        self.log(f"{split}_accuracy", accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD and a schedule that is advanced once per epoch.

        Raises:
            ConfigurationError: The schedule needs the number of epochs and the trainer has none.
        """
        optimizer = SGD(
            self.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )
        max_epochs = self.trainer.max_epochs or -1
        if self.schedule != "constant" and max_epochs < 1:
            raise ConfigurationError(
                f"The {self.schedule!r} schedule needs a number of epochs, got max_epochs={self.trainer.max_epochs}. "
                'Set trainer.max_epochs, or schedule="constant".'
            )
        factor = functools.partial(
            learning_rate_factor,
            max_epochs=max_epochs,
            warmup_epochs=self.warmup_epochs,
            schedule=self.schedule,
            milestones=self.milestones,
            gamma=self.gamma,
        )
        scheduler = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


class ResNetClassifier(AbstractImageClassifier):
    """A residual network for small images (MNIST, Fashion-MNIST, CIFAR-10) with the training of its paper.

    ``v <- momentum v + g + weight_decay x;  x <- x - learning_rate factor(epoch) (g + momentum v)`` with Nesterov
    momentum. The learning rate is the one each worker applies to its own batch; Lightning does not scale it with the
    number of workers, and neither do we.

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110. ResNet-20 has 0.27 M parameters.
        in_channels: 1 for grey images, 3 for RGB.
        num_classes: Number of classes.
        width: Channels of the first stage (paper: 16).
        shortcut: ``"A"``: zero padding (paper); ``"B"``: 1x1 projections.
        learning_rate: Step size after the warm-up (paper: 0.1 for 128 images per step).
        momentum: In [0, 1) (paper: 0.9).
        nesterov: Nesterov momentum instead of the heavy ball (paper: heavy ball).
        weight_decay: L2 penalty, on all parameters (paper: 1e-4).
        warmup_epochs: Whole epochs of linear warm-up.
        schedule: ``"constant"``, ``"cosine"`` or ``"milestones"``; changes once per epoch, see `learning_rate_factor`.
        milestones: Fractions of ``max_epochs`` where the learning rate is multiplied by ``gamma`` (paper: 0.5, 0.75).
        gamma: Factor at a milestone (paper: 0.1).
        label_smoothing: In [0, 1); of the training loss only.

    Raises:
        ConfigurationError: A depth that is not 6n + 2, or milestones that are not ascending fractions.

    Example:
        >>> model = ResNetClassifier(depth=20, in_channels=3, num_classes=10)
        >>> sum(parameter.numel() for parameter in model.parameters())
        269722

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385.
    """

    def __init__(
        self,
        depth: int = 20,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 16,
        shortcut: Shortcut = "A",
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        schedule: Schedule = "cosine",
        milestones: Sequence[float] = (0.5, 0.75),
        gamma: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            CIFARResNet(depth, in_channels, num_classes, width, shortcut),
            num_classes,
            learning_rate,
            momentum,
            nesterov,
            weight_decay,
            warmup_epochs,
            schedule,
            milestones,
            gamma,
            label_smoothing,
        )
        self.save_hyperparameters()

    def configure_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """Name the network's blocks, for a pipeline."""
        assert isinstance(self.network, CIFARResNet)
        return self.network.configure_stages()


class TorchvisionClassifier(AbstractImageClassifier):
    """Any classifier of ``torchvision.models``, by default ResNet-50 on ImageNet as in the papers' largest experiments.

    Needs torchvision, which the package does not install.

    Args:
        architecture: Name known to ``torchvision.models.get_model``; weights start at random.
        num_classes: Number of classes (ImageNet-1k: 1000).
        learning_rate: Step size after the warm-up (Goyal et al.: 0.1 per 256 images of the *global* batch).
        momentum: In [0, 1) (Goyal et al.: 0.9).
        nesterov: Nesterov momentum instead of the heavy ball.
        weight_decay: L2 penalty, on all parameters (Goyal et al.: 1e-4).
        warmup_epochs: Whole epochs of linear warm-up (Goyal et al.: 5).
        schedule: ``"constant"``, ``"cosine"`` or ``"milestones"``; changes once per epoch.
        milestones: Fractions of ``max_epochs`` (Goyal et al.: epochs 30, 60 and 80 of 90).
        gamma: Factor at a milestone.
        label_smoothing: In [0, 1); of the training loss only.

    Raises:
        ConfigurationError: torchvision is not installed, or does not know the architecture.

    References:
        P. Goyal et al.: Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour. 2017, arXiv:1706.02677.
    """

    def __init__(
        self,
        architecture: str = "resnet50",
        num_classes: int = 1000,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 5,
        schedule: Schedule = "milestones",
        milestones: Sequence[float] = (30 / 90, 60 / 90, 80 / 90),
        gamma: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            _torchvision_network(architecture, num_classes),
            num_classes,
            learning_rate,
            momentum,
            nesterov,
            weight_decay,
            warmup_epochs,
            schedule,
            milestones,
            gamma,
            label_smoothing,
        )
        self.save_hyperparameters()


def _torchvision_network(architecture: str, num_classes: int) -> nn.Module:
    if find_spec("torchvision") is None:
        raise ConfigurationError(
            f"TorchvisionClassifier({architecture!r}) needs torchvision, which is not installed. Install it "
            "(pip install torchvision), or use lightning_decentral.recipes.ResNetClassifier, which does not need it."
        )
    from torchvision.models import get_model, list_models

    if architecture not in list_models():
        raise ConfigurationError(
            f"torchvision has no model named {architecture!r}; it needs a name such as resnet50. "
            "See torchvision.models.list_models()."
        )
    network: nn.Module = get_model(architecture, weights=None, num_classes=num_classes)
    return network
