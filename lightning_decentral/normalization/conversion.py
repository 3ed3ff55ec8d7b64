"""From BatchNorm to something else, everywhere in a model, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization.base import AbstractNorm
from lightning_decentral.normalization.batch_renorm import BatchRenorm
from lightning_decentral.normalization.full_norm import (
    AbstractFullNorm,
    FullNorm1d,
    FullNorm2d,
    FullNorm3d,
    Momentum,
    full_norm_layers,
)
from lightning_decentral.normalization.ghost_batch_norm import GhostBatchNorm
from lightning_decentral.normalization.moving_average_batch_norm import MovingAverageBatchNorm, center_weights

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
"""What is replaced."""

_FULL: dict[type, type[FullNorm1d | FullNorm2d | FullNorm3d]] = {
    nn.BatchNorm1d: FullNorm1d,
    nn.BatchNorm2d: FullNorm2d,
    nn.BatchNorm3d: FullNorm3d,
}


def replace_batch_norm(module: nn.Module, make: Callable[[BatchNorm], nn.Module]) -> nn.Module:
    """Replace every BatchNorm in a module, in place; one that is used at several places stays one.

    Args:
        module: a BatchNorm itself, or whatever contains some.
        make: the layer that takes the place of one.

    Returns:
        The module, or its replacement if it is a BatchNorm itself.

    Raises:
        ConfigurationError: there is no BatchNorm; a lazy one, whose size is not known yet; a `torch.nn.SyncBatchNorm`.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4))
        >>> replace_batch_norm(model, lambda norm: nn.GroupNorm(2, norm.num_features))[0].num_groups
        2
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for layer in module.modules():
        if isinstance(layer, nn.LazyBatchNorm1d | nn.LazyBatchNorm2d | nn.LazyBatchNorm3d):
            raise ConfigurationError(
                f"{type(module).__name__} contains a {type(layer).__name__}, whose number of channels is not known "
                "yet. Run one forward pass before the conversion."
            )
        if isinstance(layer, nn.SyncBatchNorm):
            raise ConfigurationError(
                f"{type(module).__name__} contains a SyncBatchNorm, which does not say for how many dimensions it is. "
                "Convert the BatchNorm it was made of instead, before sync_batchnorm."
            )
        if isinstance(layer, BatchNorm):
            replaced[layer] = make(layer).train(layer.training)
    if not replaced:
        raise _nothing_to_replace(module)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(module, module)


def convert_full_norm(
    module: nn.Module, forward_momentum: Momentum | None = None, backward_momentum: Momentum | None = None
) -> nn.Module:
    """Replace every BatchNorm by a FullNorm with its weights and running moments.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`; parameters stay the same objects, so an optimizer made before
    goes on working. A trained model keeps its output in evaluation mode.

    Args:
        module: a BatchNorm itself, or whatever contains some.
        forward_momentum: in [0, 1] or a schedule; ``None``: that of the BatchNorm.
        backward_momentum: likewise.

    Returns:
        The module, or its replacement if it is a BatchNorm itself.

    Raises:
        ConfigurationError: there is no BatchNorm, or see `replace_batch_norm`.

    Example:
        >>> convert_full_norm(nn.BatchNorm2d(8), forward_momentum=0.05)
        FullNorm2d(8, eps=1e-05, affine=True, forward_momentum=0.05, backward_momentum=0.1)
    """

    def make(norm: BatchNorm) -> nn.Module:
        layer = _FULL[next(cls for cls in type(norm).__mro__ if cls in _FULL)](
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            device=_device(norm),
            dtype=_dtype(norm),
            forward_momentum=forward_momentum,
            backward_momentum=backward_momentum,
        )
        _take_over(norm, layer)
        if norm.running_mean is not None and norm.running_var is not None:
            layer.running_square.copy_(norm.running_var.to(layer.running_square.dtype) + layer.running_mean.square())
        return layer

    return replace_batch_norm(module, make)


def convert_full_norm_to_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every FullNorm by the BatchNorm that is the same in evaluation mode: to export it, or to fuse it.

    Args:
        module: a FullNorm itself, or whatever contains some.

    Returns:
        The module, or its replacement if it is a FullNorm itself. BatchNorm's ``running_var`` is unbiased when it is
        trained, which this variance is not.

    Raises:
        ConfigurationError: there is no FullNorm.

    Example:
        >>> type(convert_full_norm_to_batch_norm(FullNorm1d(3))).__name__
        'BatchNorm1d'
    """
    layers = full_norm_layers(module)
    if not layers:
        raise ConfigurationError(
            f"{type(module).__name__} contains no FullNorm1d, FullNorm2d or FullNorm3d, and needs one to replace. A "
            "model with BatchNorm is what this would give already."
        )
    replaced = {layer: _batch_norm(layer) for layer in layers}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, AbstractFullNorm):
                setattr(parent, name, replaced[child])
    return replaced[module] if isinstance(module, AbstractFullNorm) else module


@torch.no_grad()
def _batch_norm(layer: AbstractFullNorm) -> nn.Module:
    kind = next(batch for batch, full in _FULL.items() if isinstance(layer, full))
    like = layer.running_mean if layer.weight is None else layer.weight
    norm: nn.BatchNorm1d = kind(
        layer.num_features, layer.eps, layer.momentum, layer.affine, device=like.device, dtype=like.dtype
    )
    norm.weight, norm.bias = layer.weight, layer.bias  # type: ignore[assignment]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.running_mean.copy_(layer.running_mean)
    norm.running_var.copy_(layer.variance())
    norm.num_batches_tracked.copy_(layer.num_batches_tracked)
    return norm.train(layer.training)


def _nothing_to_replace(module: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"{type(module).__name__} contains no BatchNorm1d, BatchNorm2d or BatchNorm3d, and needs one to replace. "
        "Convert after the layers are made, and only once; a model without BatchNorm needs no conversion."
    )


def _device(norm: BatchNorm) -> torch.device | None:
    return next((tensor.device for tensor in (*norm.parameters(), *norm.buffers())), None)


def _dtype(norm: BatchNorm) -> torch.dtype | None:
    tensors = (*norm.parameters(), *norm.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


@torch.no_grad()
def _take_over(norm: BatchNorm, layer: AbstractNorm) -> None:
    """Give a new layer the parameters themselves, and copies of whatever estimates both have."""
    layer.weight, layer.bias = norm.weight, norm.bias
    theirs, own = dict(norm.named_buffers()), dict(layer.named_buffers())
    for name in theirs.keys() & own.keys():
        own[name].copy_(theirs[name])


@dataclass(frozen=True)
class AbstractNormalization(ABC):
    """What takes the place of BatchNorm, as a setting: see the callback `NormalizationSwap`."""

    @abstractmethod
    def convert(self, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm in a module, in place.

        Args:
            module: whatever contains some.

        Returns:
            The module, or its replacement if it is a BatchNorm itself.

        Raises:
            ConfigurationError: there is none, or it cannot be replaced.
        """


@dataclass(frozen=True)
class FullNormalization(AbstractNormalization):
    """`FullNorm1d`, `FullNorm2d`, `FullNorm3d`.

    Args:
        forward_momentum: in [0, 1] or a schedule such as `PowerDecay`; ``None``: that of each BatchNorm.
        backward_momentum: likewise.

    Example:
        >>> FullNormalization(0.05, 0.05).convert(nn.BatchNorm1d(2))
        FullNorm1d(2, eps=1e-05, affine=True, forward_momentum=0.05, backward_momentum=0.05)
    """

    forward_momentum: Momentum | None = None
    backward_momentum: Momentum | None = None

    def convert(self, module: nn.Module) -> nn.Module:
        return convert_full_norm(module, self.forward_momentum, self.backward_momentum)


@dataclass(frozen=True)
class GroupNormalization(AbstractNormalization):
    """`torch.nn.GroupNorm`: no estimates and nothing shared between samples. Weights are taken over.

    Args:
        groups: that the channels are divided into; a layer with fewer channels, or a number of channels that it does
            not divide, gets the largest divisor below.

    Raises:
        ConfigurationError: fewer than one group.

    References:
        Yuxin Wu, Kaiming He. Group Normalization. ECCV 2018, arXiv:1803.08494.

    Example:
        >>> GroupNormalization(32).convert(nn.BatchNorm2d(48)).num_groups
        24
    """

    groups: int = 32

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ConfigurationError(f"{self}: needs at least one group. The paper has 32.")

    def convert(self, module: nn.Module) -> nn.Module:
        return replace_batch_norm(module, self._make)

    def _make(self, norm: BatchNorm) -> nn.Module:
        groups = next(g for g in range(min(self.groups, norm.num_features), 0, -1) if norm.num_features % g == 0)
        layer = nn.GroupNorm(groups, norm.num_features, norm.eps, norm.affine)
        layer.weight, layer.bias = norm.weight, norm.bias
        return layer


@dataclass(frozen=True)
class BatchRenormalization(AbstractNormalization):
    """`BatchRenorm`, with weights and running moments taken over.

    Args:
        momentum: in [0, 1].
        r_max: at least 1.
        d_max: at least 0.
        start_steps: steps as BatchNorm.
        warmup_steps: steps until both limits are reached.

    Example:
        >>> BatchRenormalization(start_steps=100, warmup_steps=200).convert(nn.BatchNorm1d(2))
        BatchRenorm(2, eps=1e-05, affine=True, momentum=0.01, r_max=3.0, d_max=5.0)
    """

    momentum: float = 0.01
    r_max: float = 3.0
    d_max: float = 5.0
    start_steps: int = 5_000
    warmup_steps: int = 40_000

    def convert(self, module: nn.Module) -> nn.Module:
        return replace_batch_norm(module, self._make)

    def _make(self, norm: BatchNorm) -> nn.Module:
        layer = BatchRenorm(
            norm.num_features,
            norm.eps,
            self.momentum,
            norm.affine,
            self.r_max,
            self.d_max,
            self.start_steps,
            self.warmup_steps,
            _device(norm),
            _dtype(norm),
        )
        _take_over(norm, layer)
        return layer


@dataclass(frozen=True)
class GhostNormalization(AbstractNormalization):
    """`GhostBatchNorm`, with weights and running moments taken over.

    Args:
        ghost_size: samples that are normalized together.

    Example:
        >>> GhostNormalization(16).convert(nn.BatchNorm1d(2))
        GhostBatchNorm(2, eps=1e-05, affine=True, ghost_size=16, momentum=0.1)
    """

    ghost_size: int = 128

    def convert(self, module: nn.Module) -> nn.Module:
        return replace_batch_norm(module, self._make)

    def _make(self, norm: BatchNorm) -> nn.Module:
        momentum = 0.1 if norm.momentum is None else norm.momentum
        size, device, dtype = self.ghost_size, _device(norm), _dtype(norm)
        layer = GhostBatchNorm(norm.num_features, size, norm.eps, momentum, norm.affine, device, dtype)
        _take_over(norm, layer)
        return layer


@dataclass(frozen=True)
class MovingAverageNormalization(AbstractNormalization):
    """`MovingAverageBatchNorm`, and all convolutions with centred weights; a new network, not for trained weights.

    Args:
        buffer_size: batches to average over.
        momentum: of the long average.
        warmup_steps: steps that use the batch alone.
        renorm_after_steps: steps before the long average is used.

    Example:
        >>> MovingAverageNormalization(buffer_size=8).convert(nn.BatchNorm1d(2))
        MovingAverageBatchNorm(2, eps=1e-05, affine=True, buffer_size=8, momentum=0.02)
    """

    buffer_size: int = 16
    momentum: float = 0.02
    warmup_steps: int = 100
    renorm_after_steps: int = 1_000

    def convert(self, module: nn.Module) -> nn.Module:
        return center_weights(replace_batch_norm(module, self._make))

    def _make(self, norm: BatchNorm) -> nn.Module:
        layer = MovingAverageBatchNorm(
            norm.num_features,
            self.buffer_size,
            norm.eps,
            self.momentum,
            norm.affine,
            self.warmup_steps,
            self.renorm_after_steps,
            _device(norm),
            _dtype(norm),
        )
        layer.weight, layer.bias = norm.weight, norm.bias
        return layer


@dataclass(frozen=True)
class SyncNormalization(AbstractNormalization):
    """`torch.nn.SyncBatchNorm`: BatchNorm over the batches of all workers. torch has it for CUDA devices only.

    Example:
        >>> type(SyncNormalization().convert(nn.BatchNorm1d(2))).__name__
        'SyncBatchNorm'
    """

    def convert(self, module: nn.Module) -> nn.Module:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        if not any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules()):
            raise _nothing_to_replace(module)
        return converted
