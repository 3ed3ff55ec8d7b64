"""Full Normalization (Lian and Liu, 2019): BatchNorm for batches that do not look like the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization.base import AbstractNorm, batch_norm_variance
from lightning_decentral.normalization.channels import correlation, moments, scale_and_shift, values_per_channel

Schedule = Callable[[Tensor], "Tensor | float"]
"""A momentum that changes: from the number of the update (1, 2, ..., a scalar tensor) to a number; above 1 counts as 1.

It gets a tensor so that a GPU need not be waited for; arithmetic such as ``2 * t**-0.75`` works as it stands.
"""

Momentum = float | Schedule
"""How far an estimate moves towards the value of the present batch: in [0, 1], constant or scheduled."""

ESTIMATES = ("running_mean", "running_square", "running_gradient", "running_correlation")
"""The buffers of a layer, each ``[num_features]``."""


@dataclass(frozen=True)
class PowerDecay:
    """The momentum ``min(1, scale t^-exponent)``, at least ``minimum``, where ``t`` = 1, 2, ... is the update.

    With ``scale=1, exponent=1`` an estimate is the mean of all batches so far. For convergence to the exact gradient
    the momentum must go to 0 more slowly than the learning rate.

    Args:
        scale: positive.
        exponent: in [0, 1].
        minimum: in [0, 1]; above 0 the estimates can always follow the weights.

    Example:
        >>> PowerDecay(exponent=0.5)(torch.tensor(4.0))
        tensor(0.5000)
    """

    scale: float = 1.0
    exponent: float = 1.0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and 0 <= self.exponent <= 1 and 0 <= self.minimum <= 1):
            raise ConfigurationError(f"{self} needs a positive scale, and exponent and minimum in [0, 1].")

    def __call__(self, t: Tensor) -> Tensor:
        return (self.scale * t**-self.exponent).clamp(self.minimum, 1.0)


class AbstractFullNorm(AbstractNorm):
    r"""Full Normalization: normalizes by the moments of *all* data, in the forward and in the backward pass.

    BatchNorm minimizes a function of how the data are dealt to batches: its loss is an expectation over batches of
    something that is not linear in the batch's moments. Full Normalization minimizes the loss in which the moments are
    those of the whole data set. Its gradient contains a product of two expectations, so both are estimated over
    batches: the moments, and the loss's derivatives with respect to them.

    For a channel with ``m`` values in the batch, and ``delta_i = weight * gradient_i``::

        forward:   mean   <- (1 - a) mean   + a mean_i(x_i)
                   square <- (1 - a) square + a mean_i(x_i^2)             (before they are used)
                   y_i = (x_i - mean) / s,   s^2 = square - mean^2 + eps,   output = weight y + bias
        backward:  gradient    <- (1 - b) gradient    + b sum_i delta_i
                   correlation <- (1 - b) correlation + b sum_i delta_i y_i
                   dx_i = (delta_i - (gradient + y_i correlation) / m) / s
        evaluation: the same map, with the estimates as they are.

    With momenta ``a = b = 1`` this is BatchNorm, forward and backward. Variances are tracked by ``E[x^2]``: the mean of
    the batches' variances, which BatchNorm keeps, leaves out how the batches' means differ. The two backward estimates
    do not change when ``x`` is scaled, unlike the derivatives by the moments themselves, which diverge at large
    learning rates.

    The first batch sets the moments (if it has one value per channel, it sets the mean, and the variance stays 1 until
    more is known), and the backward estimates start at 0. A channel whose batch is not finite gives a non-finite
    output, and leaves its estimates as they were; so does a gradient that is not finite.

    Args:
        num_features: channels, the second dimension of the input.
        eps: added to the variance (BatchNorm: 1e-5).
        momentum: of both passes, where they do not have their own. ``None``: the mean of all batches so far.
        affine: whether there are a weight and a bias per channel.
        track_running_stats: must be true: the layer is its running estimates.
        device: of parameters and estimates.
        dtype: of parameters; estimates are in float32 for everything narrower.
        forward_momentum: ``a``, in [0, 1] or a schedule. The more the batches differ, the smaller: on batches of one
            class each, 0.01 to 0.1. The paper's value was not accessible to us.
        backward_momentum: ``b``, likewise.

    Raises:
        ConfigurationError: a momentum outside of [0, 1], no channels, ``track_running_stats=False``.
        ValueError: in ``forward``: an input with other dimensions or channels, or an empty one.
        RuntimeError: in ``backward`` with ``create_graph=True``: the estimates of earlier batches have no derivative.

    Cost:
        One pass over the activations more than BatchNorm's formulas need; of a batch it keeps what BatchNorm keeps, and
        of all batches 4 numbers per channel (BatchNorm: 2). Nothing is sent: see `average_statistics`.

    Hazards:
        *Loss scale.* The backward estimates have the units of the loss. Where it is multiplied by a factor that
        changes (`torch.amp.GradScaler`, a changing number of accumulated batches), call `set_loss_scale` before each
        batch; the callback `NormalizationSwap` does. *DistributedDataParallel* overwrites buffers by rank 0's unless
        told otherwise: see `keep_statistics_local`. *Activation checkpointing* recomputes the forward pass within the
        backward pass; the estimates are then not moved, and are those of the last forward pass: run one forward pass
        per backward pass. *torch.compile* breaks its graph here.

    Not to be confused with:
        BatchNorm in evaluation mode while training ("frozen" statistics), which has no backward estimates: the weights'
        scale is then not controlled. `BatchRenorm`, whose backward pass is the batch's own.

    References:
        Xiangru Lian, Ji Liu. Revisit Batch Normalization: New Understanding and Refinement via Composition
        Optimization. AISTATS 2019, PMLR 89:3254-3263, arXiv:1810.06177.

    Example:
        >>> layer = FullNorm1d(3, forward_momentum=0.1, backward_momentum=PowerDecay(2.0, 0.75, minimum=0.02))
        >>> layer(torch.randn(1, 3)).shape  # a batch of one sample is nothing special
        torch.Size([1, 3])
    """

    running_mean: Tensor
    running_square: Tensor
    running_gradient: Tensor
    running_correlation: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        forward_momentum: Momentum | None = None,
        backward_momentum: Momentum | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        name = type(self).__name__
        if not track_running_stats:
            raise ConfigurationError(
                f"{name}(track_running_stats=False): needs its running estimates, they are what it normalizes by. Use "
                f"{name.replace('Full', 'Batch')} to normalize by the batch alone."
            )
        shared: Momentum = PowerDecay() if momentum is None else momentum
        self.momentum = momentum
        self.forward_momentum = shared if forward_momentum is None else forward_momentum
        self.backward_momentum = shared if backward_momentum is None else backward_momentum
        for key, value in (("forward", self.forward_momentum), ("backward", self.backward_momentum)):
            if not callable(value) and not 0 <= value <= 1:
                raise ConfigurationError(
                    f"{name}: the momentum of the {key} pass is {value}, needs a number in [0, 1] or a schedule. "
                    "0.1 moves an estimate by a tenth of the way to the batch's value."
                )
        self.loss_scale = 1.0
        self.add_estimates(running_mean=0.0, running_square=1.0, running_gradient=0.0, running_correlation=0.0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        weight, bias = self.scale_and_bias(self.running_mean)
        if not self.training:
            mean, variance = self.running_mean, self.variance()
            return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)
        if _in_backward():
            mean, variance = self.running_mean.clone(), self.variance()
        else:
            mean, variance = self._track_moments(x.detach())
        normalized: Tensor = _FullNormalization.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, mean, variance, self
        )
        return normalized

    def variance(self) -> Tensor:
        """Return the present estimate of every channel's variance, ``[num_features]``."""
        return (self.running_square - self.running_mean.square()).clamp_(min=0)

    @torch.no_grad()
    def _track_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Move the estimates towards the batch's moments; mean and variance to normalize this batch by."""
        t = self.num_batches_tracked.add_(1)
        before, variance = self.running_mean, self.variance()
        rate = _rate(self.forward_momentum, t, before.dtype, first=1.0)
        batch_mean, batch_variance = moments(x)
        if values_per_channel(x) == 1:
            batch_variance = torch.where(t == 1, variance, batch_variance)
        mean = torch.lerp(before, batch_mean, rate)
        # The same as averaging E[x^2], without the rounding of large squares.
        spread = (batch_mean - before).square_().mul_(rate * (1 - rate))
        variance = torch.lerp(variance, batch_variance, rate).add_(spread)
        square = torch.addcmul(variance, mean, mean)
        finite = _is_finite(square)
        torch.where(finite, square, self.running_square, out=self.running_square)
        torch.where(finite, mean, before, out=self.running_mean)
        return mean, variance

    @torch.no_grad()
    def _track_gradients(self, gradient: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """Move the backward estimates towards those of the batch; both with the present loss scale."""
        rate = _rate(self.backward_momentum, self.num_batches_tracked, gradient.dtype)
        used = []
        for estimate, value in ((self.running_gradient, gradient), (self.running_correlation, correlation)):
            moved = torch.lerp(estimate, value.div_(self.loss_scale), rate)
            torch.where(_is_finite(moved), moved, estimate, out=estimate)
            used.append(moved.mul_(self.loss_scale))
        return used[0], used[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        batch_norm_variance(state_dict, prefix, {name: getattr(self, name) for name in ESTIMATES})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, forward_momentum={self.forward_momentum}, "
            f"backward_momentum={self.backward_momentum}"
        )


class FullNorm1d(AbstractFullNorm):
    """Full Normalization of ``[batch, channels]`` or ``[batch, channels, length]``; see `AbstractFullNorm`.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: of both passes, where they do not have their own; ``None``: the mean of all batches.
        affine: whether there are a weight and a bias per channel.
        track_running_stats: must be true.
        device: of parameters and estimates.
        dtype: of parameters.
        forward_momentum: in [0, 1] or a schedule.
        backward_momentum: in [0, 1] or a schedule.

    Raises:
        ConfigurationError: see `AbstractFullNorm`.

    Example:
        >>> FullNorm1d(2)(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).round(decimals=2).tolist()
        [[-1.0, 0.0], [1.0, 0.0]]

    References:
        Xiangru Lian, Ji Liu. AISTATS 2019, arXiv:1810.06177.
    """

    dimensions = (2, 3)


class FullNorm2d(AbstractFullNorm):
    """Full Normalization of ``[batch, channels, height, width]``; see `AbstractFullNorm`.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: of both passes, where they do not have their own; ``None``: the mean of all batches.
        affine: whether there are a weight and a bias per channel.
        track_running_stats: must be true.
        device: of parameters and estimates.
        dtype: of parameters.
        forward_momentum: in [0, 1] or a schedule.
        backward_momentum: in [0, 1] or a schedule.

    Raises:
        ConfigurationError: see `AbstractFullNorm`.

    Example:
        >>> FullNorm2d(2)(torch.ones(1, 2, 3, 3)).abs().max().item()
        0.0

    References:
        Xiangru Lian, Ji Liu. AISTATS 2019, arXiv:1810.06177.
    """

    dimensions = (4,)


class FullNorm3d(AbstractFullNorm):
    """Full Normalization of ``[batch, channels, depth, height, width]``; see `AbstractFullNorm`.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: of both passes, where they do not have their own; ``None``: the mean of all batches.
        affine: whether there are a weight and a bias per channel.
        track_running_stats: must be true.
        device: of parameters and estimates.
        dtype: of parameters.
        forward_momentum: in [0, 1] or a schedule.
        backward_momentum: in [0, 1] or a schedule.

    Raises:
        ConfigurationError: see `AbstractFullNorm`.

    Example:
        >>> FullNorm3d(2)(torch.ones(1, 2, 3, 3, 3)).abs().max().item()
        0.0

    References:
        Xiangru Lian, Ji Liu. AISTATS 2019, arXiv:1810.06177.
    """

    dimensions = (5,)


class _FullNormalization(torch.autograd.Function):
    """The map of the class above, and its backward pass with estimates in the place of the batch's own sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, layer: AbstractFullNorm
    ) -> Tensor:
        inverse_std = torch.rsqrt(variance + layer.eps)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.layer = layer
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=layer.eps)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer: AbstractFullNorm = ctx.layer
        if torch.is_grad_enabled():
            name = type(layer).__name__
            raise RuntimeError(
                f"{name} got backward(create_graph=True), needs a first derivative only: its gradient contains "
                "estimates over earlier batches, which have no derivative. Leave out create_graph, or use "
                f"{name.replace('Full', 'Batch')} or GroupNorm where the gradient itself is differentiated."
            )
        x, weight, mean, inverse_std = ctx.saved_tensors
        if output_gradient.stride() != x.stride():  # the kernels want one memory format
            output_gradient = torch.empty_like(x).copy_(output_gradient)
        projected, total = correlation(output_gradient, x, mean, inverse_std)
        gradient, correlated = layer._track_gradients(weight * total, weight * projected)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            share = inverse_std / values_per_channel(x)
            slope = -share * inverse_std * correlated
            x_gradient = scale_and_shift(x, slope, -share * gradient - slope * mean)
            channelwise = (1, -1, *(1,) * (x.dim() - 2))
            x_gradient.addcmul_(output_gradient, (weight * inverse_std).view(channelwise))
        return x_gradient, projected, total, None, None, None


def _rate(momentum: Momentum, t: Tensor, dtype: torch.dtype, first: float | None = None) -> Tensor | float:
    """Return the momentum of update ``t``, or ``first`` for the first; a tensor on a device that one would wait for."""
    value = momentum(t.to(dtype)) if callable(momentum) else momentum
    if t.device.type == "cpu":
        return first if first is not None and int(t) == 1 else min(1.0, float(value))
    full = value if isinstance(value, Tensor) else torch.full((), value, device=t.device)
    rate = full.to(dtype).clamp(max=1.0)
    return rate if first is None else torch.where(t == 1, first, rate)


def _is_finite(x: Tensor) -> Tensor:
    """Do as `torch.isfinite`, by fewer operations: on a vector per channel each takes longer to start than to run."""
    return (x - x) == 0


def _in_backward() -> bool:
    """Tell whether this is the forward pass that activation checkpointing repeats, which it does in the backward pass.

    torch's own checkpoint asks the same way; there is no public name for it.
    """
    return torch._C._current_graph_task_id() != -1


def full_norm_layers(module: nn.Module) -> list[AbstractFullNorm]:
    """Return all Full Normalization layers in a module, itself included; each once.

    Example:
        >>> len(full_norm_layers(nn.Sequential(FullNorm1d(2), nn.ReLU())))
        1
    """
    return [layer for layer in module.modules() if isinstance(layer, AbstractFullNorm)]


def set_loss_scale(module: nn.Module, loss_scale: float) -> None:
    """Tell all Full Normalization layers what the loss of the coming batches is multiplied by.

    With `torch.amp.GradScaler`: ``set_loss_scale(model, scaler.get_scale())`` before each forward pass. With a changing
    number ``k`` of accumulated batches: ``1 / k``. A constant factor needs nothing.

    Args:
        module: that contains the layers.
        loss_scale: positive and finite.

    Raises:
        ConfigurationError: another number.

    Example:
        >>> set_loss_scale(nn.Sequential(FullNorm1d(2)), 65536.0)
    """
    if not 0 < loss_scale < float("inf"):
        raise ConfigurationError(
            f"set_loss_scale got {loss_scale}, needs a positive, finite number. Pass what the loss is multiplied by, "
            "1.0 without a GradScaler."
        )
    for layer in full_norm_layers(module):
        layer.loss_scale = float(loss_scale)


@torch.no_grad()
def average_statistics(module: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Replace the four estimates of all Full Normalization layers by their mean over the workers.

    All of them travel as one vector of ``4 x channels`` numbers. The mean of second moments is the second moment over
    all workers' data, how their means differ included. All workers must call it together.

    Args:
        module: that contains the layers; the same on all workers.
        mean: returns the mean of a vector over the workers, such as ``trainer.strategy.reduce``.

    Example:
        >>> average_statistics(nn.Sequential(FullNorm1d(2)), lambda vector: vector)  # one worker
    """
    estimates = [getattr(layer, name) for layer in full_norm_layers(module) for name in ESTIMATES]
    if estimates:
        averaged = mean(torch.cat(estimates))
        for estimate, value in zip(estimates, torch.split(averaged, [e.numel() for e in estimates]), strict=True):
            estimate.copy_(value)


def keep_statistics_local(module: nn.Module) -> None:
    """Keep `torch.nn.parallel.DistributedDataParallel` from overwriting the estimates by those of rank 0.

    It broadcasts all buffers before each forward pass, so that only the data of rank 0 would count. Call it on the very
    module that is then wrapped. What other modules (BatchNorm) have is broadcast as before.

    Args:
        module: to be wrapped.

    Example:
        >>> keep_statistics_local(nn.Sequential(FullNorm1d(2)))
    """
    names = list(module.__dict__.get("_ddp_params_and_buffers_to_ignore", []))  # of others, or of an earlier call
    names += [
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules()
        if isinstance(layer, AbstractFullNorm)
        for name in (*ESTIMATES, "num_batches_tracked")
    ]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]
