"""Zeroth-order training in Lightning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import AbstractZerothOrder, ZOProxSAGA, ZOProxSVRG
from lightning_decentral.optimizers.zeroth_order import Loss
from lightning_decentral.strategies import AbstractDecentralizedStrategy


class AbstractZerothOrderModule(LightningModule, ABC):
    """A module that is trained by a zeroth-order optimizer: nothing calls ``backward``.

    A subclass has `losses` and ``configure_optimizers``, which returns one of `ZOProxSVRG`, `ZOProxSAGA`, `ZOProxSGD`,
    `ZOSGD`. The rest is done here: the training step; the snapshot at the beginning of an epoch (`ZOProxSVRG`); modules
    in ``eval`` mode while losses are evaluated; and under ``strategy="ddp"`` the exchange, in which each worker sends
    one number for each direction (and for each sample of its batch with `ZOProxSAGA`) and no gradient. What comes out
    are the bits of one process that has the batches of all workers.

    Logged: ``train_loss`` per step, of this worker.

    Raises:
        ConfigurationError: Another optimizer, or several; a strategy other than one device and DDP.

    Example:
        >>> import torch
        >>> from lightning_decentral.optimizers import L1, ZOProxSVRG
        >>> class Sparse(AbstractZerothOrderModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(20, 1)
        ...     def losses(self, batch):
        ...         inputs, targets = batch
        ...         return (self.layer(inputs).squeeze(1) - targets).square()  # one for each sample
        ...     def configure_optimizers(self):
        ...         return ZOProxSVRG(self.parameters(), lr=0.01, prox=L1(0.1))
        >>> module = Sparse()
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    @abstractmethod
    def losses(self, batch: Any) -> Tensor:
        """Return the losses of the samples of a batch, ``[samples]``, or their mean; forward only.

        Depends on the parameters and the batch alone. It is called under ``torch.vmap``: no ``self.log``, no
        ``.item()``, unless the optimizer has ``chunk_size=1``.
        """

    def component_indices(self, batch: Any) -> Tensor:
        """Return, for `ZOProxSAGA`, the numbers of the samples of a batch, ``[samples]``.

        A data set has to return them, because a loader shuffles.
        """
        raise ConfigurationError(
            f"{type(self).__name__} is trained with ZOProxSAGA but does not say which samples are in a batch; it needs "
            "a method component_indices(batch). Let the data set return each sample's number, or use ZOProxSVRG."
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Make one estimate and one proximal step."""
        optimizer = self._optimizer()
        with self._evaluating():
            if isinstance(optimizer, ZOProxSAGA):
                loss = optimizer.estimate(self._loss_of(batch), indices=self.component_indices(batch))
            else:
                loss = optimizer.estimate(self._loss_of(batch))  # type: ignore[attr-defined]
        self.optimizers().step()  # type: ignore[union-attr]
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_start(self) -> None:
        """Take the snapshot of `ZOProxSVRG`; call it from a method of your own that replaces it."""
        optimizer = self._optimizer()
        if isinstance(optimizer, ZOProxSVRG):
            with self._evaluating():
                optimizer.snapshot(self._losses_of_all_batches())

    def _losses_of_all_batches(self) -> Iterator[Loss]:
        loader = self.trainer.train_dataloader
        if loader is None:
            raise ConfigurationError(
                f"{type(self).__name__} got no training data; ZOProxSVRG needs all of them. Add a loader."
            )
        for batch in loader:
            yield self._loss_of(self.trainer.strategy.batch_to_device(batch))

    def _loss_of(self, batch: Any) -> Loss:
        optimizer = self._optimizer()
        names = {id(parameter): f"module.{name}" for name, parameter in self.named_parameters()}
        ordered = [
            names[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        called = _Losses(self)

        def loss(parameters: list[Tensor]) -> Tensor:
            replaced = dict(zip(ordered, parameters, strict=True))
            return torch.func.functional_call(called, replaced, (batch,))  # type: ignore[no-any-return]

        return loss

    def _optimizer(self) -> AbstractZerothOrder:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, AbstractZerothOrder):
            got = type(optimizer).__name__ if not isinstance(optimizer, list) else f"{len(optimizer)} optimizers"
            raise ConfigurationError(
                f"{type(self).__name__} got {got}; it needs one zeroth-order optimizer. Return ZOProxSVRG, ZOProxSAGA, "
                "ZOProxSGD or ZOSGD from configure_optimizers."
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, AbstractDecentralizedStrategy) or not isinstance(
            strategy, (SingleDeviceStrategy, DDPStrategy)
        ):
            raise ConfigurationError(
                f"{type(self).__name__} got {type(strategy).__name__}; it needs workers that take the same steps. Use "
                'strategy="ddp" or one device.'
            )
        optimizer.share_scalars(self._gather if self.trainer.world_size > 1 else None)
        return optimizer

    def _gather(self, rows: Tensor) -> Tensor:
        gathered = self.all_gather(rows)
        assert isinstance(gathered, Tensor)
        return gathered

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put all modules into ``eval`` mode, and back to what each was."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Losses(nn.Module):
    """Makes `losses` what is called, for ``functional_call``."""

    def __init__(self, module: AbstractZerothOrderModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        losses: Tensor = self.module.losses(batch)
        return losses
