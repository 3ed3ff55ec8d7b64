"""Image classification with few steps of large batches: warm-up against layer-wise rates."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import SGD, Optimizer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import CLARS, LAMB, LARS, GradualWarmup
from lightning_decentral.recipes.images import AbstractImageClassifier
from lightning_decentral.recipes.resnet import CIFARResNet


class LargeBatchResNet(AbstractImageClassifier):
    """A residual network for small images, trained with a large batch.

    The learning rate rises from ``learning_rate`` to ``learning_rate * scale`` over ``warmup_steps``, then falls with
    power 2 to 0 at the end of the training. What is logged is that of `ResNetClassifier`.

    Args:
        optimizer: ``"sgd"`` (momentum), ``"lars"``, ``"clars"`` or ``"lamb"``. CLARS needs the callback
            `MicroBatchNorms`, and ``accumulate_grad_batches`` or several workers.
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110.
        width: Channels of the first stage.
        in_channels: 1 for grey images, 3 for RGB.
        num_classes: Number of classes.
        learning_rate: Before the warm-up; for the batch that it was chosen for.
        scale: The batch of a step (all workers, all parts of an accumulation) over that batch: linear scaling.
        warmup_steps: Steps of linear warm-up; 0: none.
        momentum: In [0, 1); for ``"lamb"`` the first beta.
        weight_decay: L2 penalty (decoupled for ``"lamb"``), on weights and not on biases and normalization.
        trust: The factor of the layers' rates, for ``"lars"`` and ``"clars"``. Their papers' 1e-3 and 1e-2 are for
            thousands of steps; a training of some dozen steps needs more.
        max_rate: The largest rate of a layer, for ``"clars"``. 0.1 in the authors' code. With a large `trust` it has
            to be larger: where it is what limits a layer, CLARS is momentum SGD. The default limits none.
        rate_in_buffer: For ``"clars"``: the rate inside of the momentum buffer, as in LARS.
        label_smoothing: In [0, 1); of the training loss only.

    Raises:
        ConfigurationError: An unknown optimizer.

    Example:
        >>> model = LargeBatchResNet(optimizer="clars", depth=8, width=8)
        >>> sum(parameter.numel() for parameter in model.parameters())
        19074
    """

    def __init__(
        self,
        optimizer: Literal["sgd", "lars", "clars", "lamb"] = "clars",
        depth: int = 8,
        width: int = 8,
        in_channels: int = 1,
        num_classes: int = 10,
        learning_rate: float = 0.1,
        scale: float = 8.0,
        warmup_steps: int = 0,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        trust: float = 0.1,
        max_rate: float = 1000.0,
        rate_in_buffer: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        if optimizer not in ("sgd", "lars", "clars", "lamb"):
            raise ConfigurationError(
                f"LargeBatchResNet got optimizer={optimizer!r}, it needs 'sgd', 'lars', 'clars' or 'lamb'. Use one of "
                "them, or override configure_optimizers."
            )
        super().__init__(
            CIFARResNet(depth, in_channels, num_classes, width),
            num_classes,
            learning_rate,
            momentum,
            nesterov=False,
            weight_decay=weight_decay,
            warmup_epochs=0,
            schedule="constant",
            milestones=(),
            gamma=1.0,
            label_smoothing=label_smoothing,
        )
        self.optimizer_name = optimizer
        self.scale = scale
        self.trust = trust
        self.max_rate = max_rate
        self.rate_in_buffer = rate_in_buffer
        self.warmup_steps = warmup_steps
        self.save_hyperparameters()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with linear scaling, warm-up and decay at every step."""
        weights = [parameter for parameter in self.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        groups = [{"params": weights, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer: Optimizer
        if self.optimizer_name == "clars":
            optimizer = CLARS(
                groups,
                lr=self.learning_rate,
                momentum=self.momentum,
                trust=self.trust,
                max_rate=self.max_rate,
                rate_in_buffer=self.rate_in_buffer,
            )
        elif self.optimizer_name == "lars":
            optimizer = LARS(groups, lr=self.learning_rate, momentum=self.momentum, trust=self.trust)
        elif self.optimizer_name == "lamb":
            optimizer = LAMB(groups, lr=self.learning_rate, betas=(self.momentum, 0.999))
        else:
            optimizer = SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = GradualWarmup(optimizer, self.scale, self.warmup_steps, max(steps, self.warmup_steps + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
