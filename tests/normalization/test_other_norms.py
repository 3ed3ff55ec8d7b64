"""Proved here: Batch Renorm, Ghost BatchNorm and MABN are their formulas, forward and backward, and refuse what they
cannot normalize."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization import BatchRenorm, GhostBatchNorm, MovingAverageBatchNorm, center_weights
from lightning_decentral.normalization.channels import moments

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64, values around 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(layer: nn.Module) -> nn.Module:
    """With weights that matter."""
    for parameter in layer.double().parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return layer


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 6)], ids=str)
def test_moments(shape: tuple[int, ...]) -> None:
    x = 3 * normal(*shape) + 5
    dimensions = [d for d in range(len(shape)) if d != 1]
    torch.testing.assert_close(moments(x), (x.mean(dimensions), x.var(dimensions, correction=0)), **ROUNDING)


# -- Batch Renorm -----------------------------------------------------------------------------------------------------


def renorm_of(x: Tensor, layer: BatchRenorm, r_max: float, d_max: float) -> Tensor:
    """Its formula by autograd, with the statistics from before."""
    mean, std = x.mean(0), (x.var(0, correction=0) + layer.eps).sqrt()
    running = (layer.running_var + layer.eps).sqrt()
    r = (std / running).detach().clamp(1 / r_max, r_max)
    d = ((mean - layer.running_mean) / running).detach().clamp(-d_max, d_max)
    assert layer.weight is not None
    assert layer.bias is not None
    return layer.weight * ((x - mean) / std * r + d) + layer.bias


def test_batch_renorm_is_its_formula_while_its_limits_rise() -> None:
    layer = affine(BatchRenorm(3, momentum=0.2, r_max=2.0, d_max=0.5, start_steps=2, warmup_steps=6))
    assert isinstance(layer, BatchRenorm)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for t in range(1, 10):
        x, output_gradient = (3 * normal(6, 3, seed=t) + 2).requires_grad_(), normal(6, 3, seed=20 + t)
        risen = min(1.0, max(0.0, (t - 2) / 4))
        expected = renorm_of(x, layer, 1 + risen, risen * 0.5)
        wanted = torch.autograd.grad(expected, [x, *layer.parameters()], output_gradient)
        output = layer(x)
        torch.testing.assert_close(output, expected, **ROUNDING)
        torch.testing.assert_close(
            torch.autograd.grad(output, [x, *layer.parameters()], output_gradient), wanted, **ROUNDING
        )
        mean, variance = torch.lerp(mean, x.mean(0), 0.2), torch.lerp(variance, x.var(0, correction=0), 0.2)
        torch.testing.assert_close([layer.running_mean, layer.running_var], [mean.detach(), variance.detach()])


def test_batch_renorm_is_batch_norm_at_first_and_unclipped_it_normalizes_by_the_running_moments() -> None:
    x, norm = normal(6, 3) + 1, nn.BatchNorm1d(3).double()
    torch.testing.assert_close(BatchRenorm(3).double()(x), norm(x), **ROUNDING)
    layer = BatchRenorm(3, r_max=1e9, d_max=1e9, start_steps=0, warmup_steps=0).double()
    layer.running_mean.fill_(0.5)
    layer.running_var.fill_(4.0)
    torch.testing.assert_close(layer(x), (x - 0.5) / (4.0 + layer.eps) ** 0.5, **ROUNDING)


# -- Ghost BatchNorm --------------------------------------------------------------------------------------------------


def test_ghost_batch_norm_is_batch_norm_of_each_part() -> None:
    layer, norm = affine(GhostBatchNorm(3, ghost_size=4, momentum=0.2)), nn.BatchNorm2d(3, momentum=0.2).double()
    norm.load_state_dict(layer.state_dict())
    x, output_gradient = normal(10, 3, 5, 5).requires_grad_(), normal(10, 3, 5, 5, seed=1)
    expected = torch.cat([norm(part) for part in x.split(4)])  # 4, 4 and 2 samples
    wanted = torch.autograd.grad(expected, [x, *norm.parameters()], output_gradient)
    output = layer(x)
    torch.testing.assert_close(output, expected, **ROUNDING)
    torch.testing.assert_close(torch.autograd.grad(output, [x, *layer.parameters()], output_gradient), wanted)
    torch.testing.assert_close(layer.state_dict(), norm.state_dict(), **ROUNDING)
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x), **ROUNDING)


# -- MABN -------------------------------------------------------------------------------------------------------------


def test_mabn_is_its_formulas_step_by_step() -> None:
    layer = affine(MovingAverageBatchNorm(3, buffer_size=4, momentum=0.1, warmup_steps=6, renorm_after_steps=8))
    assert isinstance(layer, MovingAverageBatchNorm)
    weight, bias = (p.detach() for p in layer.parameters())
    running, squares, correlations = torch.ones(3, dtype=torch.float64), [], []
    for t in range(1, 16):
        x, output_gradient = (2 * normal(6, 3, seed=t)).requires_grad_(), normal(6, 3, seed=20 + t)
        squares.append(x.detach().square().mean(0))
        square = squares[-1] if t <= 6 else torch.stack(squares[-4:]).mean(0)
        std = (square + layer.eps).sqrt()
        r = torch.ones(3, dtype=torch.float64) if t <= 8 else (std / (running + layer.eps).sqrt()).clamp(0.2, 5)
        z, g = x.detach() / std, r * weight * output_gradient
        correlations.append((g * z).mean(0))
        correlation = correlations[-1] if t <= 6 else torch.stack(correlations[-4:]).mean(0)
        running = 0.9 * running + 0.1 * square
        output = layer(x)
        torch.testing.assert_close(output, weight * r * z + bias, **ROUNDING)
        got = torch.autograd.grad(output, [x, *layer.parameters()], output_gradient)
        expected = ((g - z * correlation) / std, (output_gradient * r * z).sum(0), output_gradient.sum(0))
        torch.testing.assert_close(got, expected, **ROUNDING)
        torch.testing.assert_close(layer.running_square, running, **ROUNDING)
    x = normal(6, 3)
    torch.testing.assert_close(layer.eval()(x), weight * x / (running + layer.eps).sqrt() + bias, **ROUNDING)


def test_centred_weights_have_mean_zero_and_so_has_the_output_of_constant_inputs() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)).double()
    assert center_weights(center_weights(network)) is network  # twice is once
    output = network[0](torch.full((1, 3, 5, 5), 7.0, dtype=torch.float64))
    assert output.abs().max() < 1e-12
    network(normal(2, 3, 5, 5)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchRenorm(3, r_max=0.5), "r_max >= 1"),
        (lambda: BatchRenorm(3, start_steps=5, warmup_steps=4), "start_steps <= warmup_steps"),
        (lambda: BatchRenorm(3, momentum=2.0), "momentum in"),
        (lambda: GhostBatchNorm(3, ghost_size=0), "at least one sample"),
        (lambda: MovingAverageBatchNorm(3, buffer_size=0), "at least one batch"),
    ],
)
def test_settings_that_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    "layer", [BatchRenorm(3), GhostBatchNorm(3, ghost_size=1)], ids=lambda layer: type(layer).__name__
)
def test_one_value_per_channel_is_refused_in_training_only(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"one value per channel, and needs two or more"):
        layer(torch.zeros(1, 3))
    assert layer.eval()(torch.zeros(1, 3)).shape == (1, 3)


@pytest.mark.parametrize("make", [BatchRenorm, GhostBatchNorm, MovingAverageBatchNorm])
def test_inputs_that_are_refused(make: Callable[[int], nn.Module]) -> None:
    for shape, message in (((2, 4), "got 4 channels, needs 3"), ((3,), "at least 2 dimensions"), ((0, 3), "empty")):
        with pytest.raises(ValueError, match=message):
            make(3)(torch.zeros(shape))
