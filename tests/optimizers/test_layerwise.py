"""Proved here, for CLARS, LARS, LAMB and the warm-up: steps are their formulas; the rate of CLARS is never above that
of LARS (Jensen) and is the same where micro-batches agree; steps of CLARS do not change with the scale of the loss;
LARS decreases quadratics exactly up to its known bound; zero weights, zero gradients, NaN have defined results."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import CLARS, LAMB, LARS, GradualWarmup

Make = Callable[..., Optimizer]


def clars(params: object, **options: float) -> CLARS:
    """CLARS as it is used outside of Lightning."""
    optimizer = CLARS(params, **options)  # type: ignore[arg-type]
    optimizer.observe()
    return optimizer


EACH = pytest.mark.parametrize("make", [clars, LARS, LAMB], ids=["CLARS", "LARS", "LAMB"])


def layers(seed: int = 0) -> list[nn.Parameter]:
    """A matrix, a kernel and a bias, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 5), (2, 3, 3, 3), (4,))
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def gradients(seed: int) -> list[Tensor]:
    return [parameter.detach() * 0.3 for parameter in layers(seed)]


def backward(parameters: Sequence[Tensor], micro_batches: Sequence[Sequence[Tensor]], scale: float = 1.0) -> None:
    """One backward pass for each micro-batch, whose mean loss has these gradients."""
    for given in micro_batches:
        loss = sum((p * g).sum() for p, g in zip(parameters, given, strict=True)) * scale / len(micro_batches)
        assert isinstance(loss, Tensor)
        loss.backward()


# -- the formulas, one number at a time -------------------------------------------------------------------------------


def norm(tensor: Tensor) -> float:
    return math.sqrt(sum(value * value for value in tensor.detach().flatten().tolist()))


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0]) / len(tensors)


def test_clars_is_its_formula() -> None:
    lr, momentum, decay, trust, cap = 0.7, 0.9, 0.05, 0.02, 0.062
    parameters, expected = layers(), [parameter.detach().clone() for parameter in layers()]
    buffers = [torch.zeros_like(w) for w in expected]
    optimizer = clars(parameters, lr=lr, momentum=momentum, weight_decay=decay, trust=trust, max_rate=cap)
    capped = 0
    for step in range(5):
        parts = [gradients(10 * step + i) for i in range(3)]
        optimizer.zero_grad()
        backward(parameters, parts)
        optimizer.step()
        for k, w in enumerate(expected):
            denominator = sum(norm(part[k]) for part in parts) / 3 + decay * norm(w)
            rate = 1.0 if w.dim() < 2 else min(cap, trust * norm(w) / denominator)
            capped += rate == cap
            buffers[k] = momentum * buffers[k] + mean([part[k] for part in parts]) + decay * w
            expected[k] = w - lr * rate * buffers[k]
            assert optimizer.state[parameters[k]]["rate"].item() == pytest.approx(rate, rel=1e-12)
        for w, parameter in zip(expected, parameters, strict=True):
            torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=1e-12)  # rounding of float64
    assert 0 < capped < 10, "both sides of the cap should be seen"


def test_lars_is_its_formula() -> None:
    lr, momentum, decay, trust = 0.7, 0.9, 0.05, 0.02
    parameters, expected = layers(), [parameter.detach().clone() for parameter in layers()]
    buffers = [torch.zeros_like(w) for w in expected]
    optimizer = LARS(parameters, lr=lr, momentum=momentum, weight_decay=decay, trust=trust)
    for step in range(5):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for k, w in enumerate(expected):
            g = gradients(step)[k]
            rate = 1.0 if w.dim() < 2 else trust * norm(w) / (norm(g) + decay * norm(w))
            buffers[k] = momentum * buffers[k] + rate * (g + decay * w)
            expected[k] = w - lr * buffers[k]
        for w, parameter in zip(expected, parameters, strict=True):
            torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=1e-12)  # rounding of float64


def test_lamb_is_its_formula() -> None:
    lr, (beta1, beta2), eps, decay, largest = 0.1, (0.8, 0.95), 1e-3, 0.05, 4.0
    parameters, expected = layers(), [parameter.detach().clone() for parameter in layers()]
    first, second = [torch.zeros_like(w) for w in expected], [torch.zeros_like(w) for w in expected]
    optimizer = LAMB(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, max_norm=largest)
    for step in range(1, 6):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for k, w in enumerate(expected):
            g = gradients(step)[k]
            first[k] = beta1 * first[k] + (1 - beta1) * g
            second[k] = beta2 * second[k] + (1 - beta2) * g * g
            r = first[k] / (1 - beta1**step) / ((second[k] / (1 - beta2**step)).sqrt() + eps) + decay * w
            expected[k] = w - lr * (1.0 if w.dim() < 2 else min(norm(w), largest) / norm(r)) * r
        for w, parameter in zip(expected, parameters, strict=True):
            torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=1e-12)  # rounding of float64


def test_lamb_does_not_depend_on_how_tensors_lie_in_memory() -> None:
    plain, other = (nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    double = nn.Parameter(torch.ones(3, dtype=torch.float64))  # in the same group: another kernel
    optimizers = [LAMB([plain], lr=0.1), LAMB([other, double], lr=0.1)]
    for step in range(4):
        if step == 2:  # a model that changes its memory format on the way, as one that a checkpoint is loaded into
            other.data = other.data.contiguous(memory_format=torch.channels_last)
        gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        plain.grad = gradient.clone()
        other.grad = None
        other.grad = gradient.contiguous(memory_format=torch.channels_last) if step % 2 else gradient.clone()
        double.grad = torch.ones_like(double)
        for optimizer in optimizers:
            optimizer.step()
    # Sums of 108 numbers in another order: some roundings of float32.
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


@EACH
def test_groups_have_their_own_settings(make: Make) -> None:
    parameters, alone = layers(), layers()
    together = make([{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:]}], lr=0.1)
    separate = [make(alone[:1], lr=0.5), make(alone[1:], lr=0.1)]
    for step in range(3):
        for optimizer, tensors in ((together, parameters), (separate[0], alone), (separate[1], alone)):
            if optimizer is not separate[1]:
                backward(tensors, [gradients(step)])
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(parameters, alone, strict=True):
        assert torch.equal(one, other)


# -- what is special about CLARS --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
def test_rate_is_never_above_that_of_lars(micro_batches: int, decay: float) -> None:
    for seed in range(20):
        ours, theirs = layers(seed), layers(seed)
        settings = {"lr": 0.1, "weight_decay": decay, "trust": 0.01}
        complete, baseline = clars(ours, max_rate=1e9, **settings), LARS(theirs, **settings)
        backward(ours, parts := [gradients(100 * seed + i) for i in range(micro_batches)])
        backward(theirs, parts)
        complete.step()
        baseline.step()
        for one, other in zip(ours, theirs, strict=True):
            if one.dim() > 1:
                rate, bound = complete.state[one]["rate"].item(), baseline.state[other]["rate"].item()
                if micro_batches == 1:
                    assert rate == pytest.approx(bound, rel=1e-12)
                else:
                    assert rate < bound


@pytest.mark.parametrize(("momentum", "rate_in_buffer"), [(0.0, False), (0.0, True), (0.9, True)])
def test_equal_micro_batches_are_lars(momentum: float, rate_in_buffer: bool) -> None:
    """With the rate outside of the buffer, as published, only without momentum."""
    ours, theirs = layers(), layers()
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1, "trust": 1e-3}
    complete = clars(ours, max_rate=1e9, rate_in_buffer=rate_in_buffer, **options)
    baseline = LARS(theirs, **options)
    for step in range(3):
        for optimizer, tensors in ((complete, ours), (baseline, theirs)):
            optimizer.zero_grad()
            backward(tensors, [gradients(step)] * 4)
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # rounding of float64


def test_noise_lowers_the_rate_by_the_root_of_the_number_of_micro_batches() -> None:
    """||mean of n independent vectors|| is 1 / sqrt(n) of a norm: 0.25 for 16, and 4000 numbers leave 5 % at most."""
    weight = nn.Parameter(torch.randn(40, 100, generator=torch.Generator().manual_seed(0)))
    noise = torch.randn(16, 40, 100, generator=torch.Generator().manual_seed(1))
    rates = []
    for make in (clars, LARS):
        optimizer = make([weight], lr=1e-6, trust=1e-2) if make is LARS else clars([weight], lr=1e-6, max_rate=1e9)
        optimizer.zero_grad()
        backward([weight], [[part] for part in noise])
        optimizer.step()
        rates.append(optimizer.state[weight]["rate"].item())
    assert rates[0] / rates[1] == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("scale", [2.0**-20, 8.0, 2.0**20])
def test_steps_do_not_change_with_the_scale_of_the_loss(scale: float) -> None:
    """Powers of two: so it has to be exact. Below the cap, which is a rate per unit of gradient."""
    results = []
    for factor in (1.0, scale):
        parameters = layers()[:2]
        optimizer = clars(parameters, lr=0.1, max_rate=1e12)
        for step in range(4):
            optimizer.zero_grad()
            backward(parameters, [gradients(step)[:2], gradients(step + 50)[:2]], factor)
            optimizer.step()
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_whether_the_loss_is_divided_by_the_micro_batches_does_not_matter() -> None:
    results = []
    for factor in (1.0, 4.0):
        parameters = layers()[:2]
        optimizer = clars(parameters, lr=0.1, max_rate=1e12)
        backward(parameters, [gradients(i)[:2] for i in range(4)], factor)
        optimizer.step()
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    """A GradScaler that found an infinity does not call `step`; `zero_grad` begins anew."""
    results = []
    for abandon in (False, True):
        parameters = layers()
        optimizer = clars(parameters, lr=0.1)
        if abandon:
            backward(parameters, [[torch.full_like(g, torch.inf) for g in gradients(0)]])
            optimizer.zero_grad()
        backward(parameters, [gradients(1)])
        optimizer.step()
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_workers_that_share_the_mean_take_the_step_of_one() -> None:
    """Two workers by hand: each sees its micro-batches, gradients and norms are averaged."""
    parts = [gradients(i) for i in range(4)]
    single = layers()
    optimizer = clars(single, lr=0.1)
    backward(single, parts)
    optimizer.step()
    workers = [layers(), layers()]
    optimizers = [CLARS(tensors, lr=0.1) for tensors in workers]
    for own, tensors, share in zip(optimizers, workers, (parts[:2], parts[2:]), strict=True):
        own.observe()
        backward(tensors, share)
    vectors = [_seen(own) for own in optimizers]
    means = [(one.grad + other.grad) / 2 for one, other in zip(*workers, strict=True)]  # type: ignore[operator]
    for own, tensors, share in zip(optimizers, workers, (parts[:2], parts[2:]), strict=True):
        own.observe(lambda vector: sum(vectors) / 2)  # type: ignore[arg-type, return-value]
        own.zero_grad()
        backward(tensors, share)
        for tensor, gradient in zip(tensors, means, strict=True):
            tensor.grad = gradient.clone()
        own.step()
        for tensor, expected in zip(tensors, single, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)  # sums in another order


def _seen(optimizer: CLARS) -> Tensor:
    """What a worker would hand over, taken without changing its parameters."""
    kept: list[Tensor] = []

    def keep(vector: Tensor) -> Tensor:
        kept.append(vector.clone())
        raise InterruptedError

    optimizer._mean_over_workers = keep
    with pytest.raises(InterruptedError):
        optimizer.step()
    return kept[0]


@pytest.mark.parametrize("condition", [2.0, 10.0])
def test_lars_decreases_a_quadratic_up_to_its_bound(condition: float) -> None:
    """Without momentum f(x) = x'Hx/2 falls from every x if and only if trust <= 3 sqrt(3) k(k+1) / (k^2+k+1)^(3/2)."""
    bound = 3 * math.sqrt(3) * condition * (condition + 1) / (condition**2 + condition + 1) ** 1.5
    angles = torch.linspace(0.01, math.pi / 2 - 0.01, 2000, dtype=torch.float64)
    curvature = torch.tensor([1.0, condition], dtype=torch.float64)
    for trust, falls in ((0.999 * bound, True), (1.001 * bound, False)):
        points = [nn.Parameter(torch.stack([angle.cos(), angle.sin()])) for angle in angles]
        before = torch.stack([(curvature * x.detach() ** 2).sum() / 2 for x in points])
        for x in points:
            x.grad = curvature * x.detach()
        LARS(points, lr=1.0, momentum=0.0, trust=trust, min_dimensions=1).step()
        after = torch.stack([(curvature * x.detach() ** 2).sum() / 2 for x in points])
        assert bool((after <= before).all()) is falls


# -- bad input and edges ----------------------------------------------------------------------------------------------


@EACH
def test_zero_weights_learn_and_zero_gradients_stay(make: Make) -> None:
    zero, still = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = make([zero, still], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (zero.sum() + 0 * still.sum()).backward()
        optimizer.step()
    assert torch.isfinite(zero).all()
    assert (zero < 0).all()
    assert torch.equal(still, torch.ones(2, 3))


def test_the_rate_of_a_zero_layer_is_the_cap() -> None:
    zero = nn.Parameter(torch.zeros(2, 3))
    optimizer = clars([zero], lr=0.1, max_rate=0.05)
    zero.sum().backward()
    optimizer.step()
    assert optimizer.state[zero]["rate"].item() == pytest.approx(0.05)


@EACH
def test_nan_stays_in_its_layer(make: Make) -> None:
    sick, well = layers()[:2]
    optimizer = make([sick, well], lr=0.1)
    (sick.sum() * torch.nan + well.sum()).backward()
    optimizer.step()
    assert torch.isnan(sick).all()
    assert torch.isfinite(well).all()


@EACH
def test_sparse_gradients_are_refused(make: Make) -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = make(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match=r"sparse gradient .* \(4, 3\).*sparse=False"):
        optimizer.step()


def test_lamb_refuses_complex_parameters() -> None:
    with pytest.raises(ConfigurationError, match=r"complex parameter of shape \(2, 3\), needs real ones"):
        LAMB([nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))], lr=0.1)


def test_clars_says_when_it_has_not_seen_the_micro_batches() -> None:
    parameters = layers()
    optimizer = CLARS(parameters, lr=0.1)
    backward(parameters, [gradients(0)])
    with pytest.raises(ConfigurationError, match=r"did not see .*MicroBatchNorms\(\) .*observe\(\)"):
        optimizer.step()
    optimizer.observe()  # too late for this gradient
    with pytest.raises(ConfigurationError, match="did not see"):
        optimizer.step()


def test_clars_says_when_a_layer_was_unfrozen() -> None:
    frozen, trained = nn.Parameter(torch.ones(2, 2), requires_grad=False), nn.Parameter(torch.ones(2, 2))
    optimizer = clars([frozen, trained], lr=0.1)
    frozen.requires_grad_()
    (frozen.sum() + trained.sum()).backward()
    with pytest.raises(ConfigurationError, match="again when parameters are unfrozen"):
        optimizer.step()
    optimizer.observe()
    optimizer.zero_grad()
    (frozen.sum() + trained.sum()).backward()
    optimizer.step()
    assert (frozen < 1).all()


@EACH
@pytest.mark.parametrize("option", [{"lr": 0.0}, {"lr": math.nan}, {"weight_decay": -1.0}])
def test_impossible_settings(make: Make, option: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        make(layers(), **{"lr": 0.1, **option})


@pytest.mark.parametrize("make", [clars, LARS])
def test_impossible_momentum(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="momentum=1"):
        make(layers(), lr=0.1, momentum=1.0)


@EACH
def test_a_resumed_run_is_an_uninterrupted_one(make: Make) -> None:
    def advance(optimizer: Optimizer, parameters: Sequence[Tensor], steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(parameters, [gradients(step)])
            optimizer.step()

    whole, first = layers(), layers()
    advance(make(whole, lr=0.1), whole, range(6))
    optimizer = make(first, lr=0.1)
    advance(optimizer, first, range(3))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = make(second, lr=0.3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(resumed, second, range(3, 6))
    for one, other in zip(whole, second, strict=True):
        assert torch.equal(one, other)


@EACH
def test_half_precision(make: Make) -> None:
    """Squares of these would overflow float16: norms are taken in float32."""
    weight = nn.Parameter(torch.full((64, 64), 100.0, dtype=torch.float16))
    optimizer = make([weight], lr=10.0)
    (weight * 100.0).sum().backward()
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert (weight < 100).all()


@EACH
def test_closure_gives_the_loss(make: Make) -> None:
    parameters = layers()
    optimizer = make(parameters, lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in parameters)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]  # type: ignore[call-overload]
    assert losses == sorted(losses, reverse=True)


# -- the warm-up ------------------------------------------------------------------------------------------------------


def test_warmup_rises_to_the_scaled_rate_and_decays() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = GradualWarmup(optimizer, scale=8.0, warmup_steps=4, total_steps=8, power=2.0)
    seen = []
    for _ in range(9):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [0.5, 1.375, 2.25, 3.125, 4.0, 4.0 * 9 / 16, 1.0, 0.25, 0.0]
    assert seen == pytest.approx(expected)


def test_linear_scaling_without_warmup_starts_at_the_top() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    GradualWarmup(optimizer, scale=8.0)
    assert optimizer.param_groups[0]["lr"] == 4.0


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"warmup_steps": -1}, {"warmup_steps": 5, "total_steps": 5}])
def test_impossible_schedules(options: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ConfigurationError, match="GradualWarmup got"):
        GradualWarmup(optimizer, **{"scale": 2.0, **options})  # type: ignore[arg-type]
