"""Proved here: Full Normalization is its formulas step by step; with momenta 1 it is BatchNorm; with settled estimates
its mean gradient over batches of one class each is the gradient of the full-data loss, where BatchNorm's is not; the
estimates survive loss scales, accumulation, checkpointing, compilation, memory formats, half precision and copies;
what cannot be normalized is refused or has a defined result."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.full_norm import Reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization import (
    FullNorm1d,
    FullNorm2d,
    FullNorm3d,
    PowerDecay,
    average_statistics,
    convert_full_norm,
    full_norm_layers,
    keep_statistics_local,
    set_loss_scale,
)

SHAPES = [(6, 3), (6, 3, 5), (4, 3, 5, 6), (4, 3, 2, 5, 3)]
BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
ESTIMATES = ("running_mean", "running_square", "running_gradient", "running_correlation")
ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # float64, values around 1, sums of up to 200 terms


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def estimates(module: nn.Module) -> list[Tensor]:
    return [getattr(layer, name).clone() for layer in full_norm_layers(module) for name in ESTIMATES]


def step(module: nn.Module, x: Tensor, output_gradient: Tensor) -> list[Tensor]:
    """Output, and gradients by the input and the parameters, of one training step."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = module(x)
    output.backward(output_gradient)
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_momenta_1_it_is_batch_norm_forward_and_backward(shape: tuple[int, ...], affine: bool) -> None:
    norm = BATCH_NORM[len(shape)](3, affine=affine).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, -2, 2)
    full = convert_full_norm(copy.deepcopy(norm), 1.0, 1.0)
    for seed in range(3):
        x, output_gradient = 3 * normal(*shape, seed=seed) + 2, normal(*shape, seed=10 + seed)
        x[:, 1] = 0.25  # a constant channel: only eps is left of its standard deviation, 1 / std = 316
        expected, got = step(norm, x, output_gradient), step(full, x, output_gradient)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("forward", "backward"), [(0.1, 0.3), (1.0, 0.05), (0.0, 0.0), (PowerDecay(2.0, 0.75), PowerDecay(minimum=0.1))]
)
def test_it_is_its_formulas_step_by_step(shape: tuple[int, ...], forward: Any, backward: Any) -> None:
    layer = convert_full_norm(BATCH_NORM[len(shape)](3).double(), forward, backward)
    assert isinstance(layer, FullNorm1d | FullNorm2d | FullNorm3d)
    nn.init.uniform_(layer.weight, -2, 2)  # type: ignore[arg-type]
    nn.init.uniform_(layer.bias, -2, 2)  # type: ignore[arg-type]
    a, b = (momentum if callable(momentum) else (lambda t, value=momentum: value) for momentum in (forward, backward))
    reference = Reference(
        layer.weight.detach(),  # type: ignore[union-attr]
        layer.bias.detach(),  # type: ignore[union-attr]
        layer.eps,
        lambda t: float(a(torch.tensor(float(t), dtype=torch.float64))),
        lambda t: float(b(torch.tensor(float(t), dtype=torch.float64))),
    )

    def rows(x: Tensor) -> Tensor:
        return x.movedim(1, -1).reshape(-1, 3)

    for seed in range(6):
        x, output_gradient = normal(*shape, seed=seed) * (1 + seed) + seed, normal(*shape, seed=10 + seed)
        output, x_gradient, *parameters = step(layer, x, output_gradient)
        expected_output = reference.forward(rows(x))
        expected_gradient, *expected_parameters = reference.backward(rows(output_gradient))
        torch.testing.assert_close(rows(output), expected_output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows(x_gradient), expected_gradient, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parameters, expected_parameters, rtol=1e-12, atol=1e-12)
        kept = [reference.mean, reference.square, reference.gradient, reference.correlation]
        torch.testing.assert_close(estimates(layer), kept, rtol=1e-12, atol=1e-12)


def test_a_schedule_is_told_the_number_of_the_update_and_counts_as_1_at_most() -> None:
    layer = FullNorm1d(1, forward_momentum=lambda t: 4.0 / t, backward_momentum=0.0, dtype=torch.float64)
    values = [1.0, 5.0, 9.0, 13.0, 23.0]
    for value in values:
        layer(torch.tensor([[value], [value]], dtype=torch.float64))
    assert layer.running_mean.item() == pytest.approx(13.0 + 0.8 * 10.0, rel=1e-12)  # 4 / t is 1 up to the fourth


# -- the fixed point --------------------------------------------------------------------------------------------------

CLASSES, PER_CLASS, INPUTS, HIDDEN = 3, 10, 4, 6


class Problem:
    """Three classes, batches of one class each, and a network with two normalization layers."""

    def __init__(self) -> None:
        centers = 2.0 * normal(CLASSES, INPUTS, seed=1)
        self.labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
        self.inputs = centers[self.labels] + normal(CLASSES * PER_CLASS, INPUTS, seed=2)
        self.batches = list(torch.arange(CLASSES * PER_CLASS).split(PER_CLASS // 2))

    def network(self) -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Linear(INPUTS, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.Tanh(),
            nn.Linear(HIDDEN, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES),
        ).double()  # fmt: skip

    def gradient(self, network: nn.Module, indices: Tensor) -> Tensor:
        network.zero_grad()
        F.cross_entropy(network(self.inputs[indices]), self.labels[indices]).backward()
        return torch.cat([p.grad.reshape(-1) for p in network.parameters() if p.grad is not None])

    def epoch_mean(self, network: nn.Module) -> Tensor:
        return torch.stack([self.gradient(network, batch) for batch in self.batches]).mean(0)

    def full_data(self) -> Tensor:
        """The gradient by plain autograd: BatchNorm on all data at once has no batches to be wrong about."""
        return self.gradient(self.network(), torch.arange(len(self.inputs)))


def settle(problem: Problem, network: nn.Module) -> None:
    """Replace each estimate by its mean over the batches at these weights, until nothing moves: 2 sweeps per layer.

    This is where running averages with a momentum that goes to 0 end, and can be reached to the last digit.
    """
    layers = full_norm_layers(network)
    inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_hook(lambda layer, args, _: inputs[layer].append(args[0].detach())) for layer in layers
    ]
    for _ in range(2 * len(layers) + 1):
        sums: dict[nn.Module, list[list[Tensor]]] = {layer: [] for layer in layers}
        for batch in problem.batches:
            problem.gradient(network, batch)
            for layer in layers:
                x = inputs[layer].pop()
                weight, by_weight, by_bias = layer.weight.detach(), layer.weight.grad, layer.bias.grad  # type: ignore[union-attr]
                sums[layer].append([x.mean(0), x.square().mean(0), weight * by_bias, weight * by_weight])  # type: ignore[operator]
        for layer in layers:
            for name, values in zip(ESTIMATES, zip(*sums[layer], strict=True), strict=True):
                getattr(layer, name).copy_(torch.stack(values).mean(0))
    for hook in hooks:
        hook.remove()


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_settled_estimates_give_the_gradient_of_the_full_data_from_batches_of_one_class() -> None:
    problem = Problem()
    network = convert_full_norm(problem.network(), 0.0, 0.0)
    problem.gradient(network, problem.batches[0])  # the first batch sets the estimates, whatever the momentum
    settle(problem, network)
    assert relative(problem.epoch_mean(network), problem.full_data()) < 1e-9
    assert relative(problem.epoch_mean(problem.network()), problem.full_data()) > 0.5  # BatchNorm


def test_without_the_backward_estimates_the_gradient_is_wrong() -> None:
    problem = Problem()
    network = convert_full_norm(problem.network(), 0.0, 0.0)
    problem.gradient(network, problem.batches[0])
    settle(problem, network)
    for layer in full_norm_layers(network):
        layer.running_gradient.zero_()
        layer.running_correlation.zero_()
    assert relative(problem.epoch_mean(network), problem.full_data()) > 0.2


def test_the_gradient_is_orthogonal_to_the_weights_of_every_channel() -> None:
    """But for eps, the scale of a weight before a normalization does not matter: the sign of a correct backward."""
    problem = Problem()
    network = convert_full_norm(problem.network(), 0.0, 0.0)
    problem.gradient(network, problem.batches[0])
    settle(problem, network)
    problem.epoch_mean(network)
    gradient = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    for batch in problem.batches:
        problem.gradient(network, batch)
        gradient += network[3].weight.grad / len(problem.batches)  # type: ignore[index, operator, union-attr]
    weight = network[3].weight.detach()  # type: ignore[index, operator, union-attr]
    assert (weight * gradient).sum(1).abs().max() < 1e-4 * (weight * gradient).abs().sum(1).max()  # eps / variance


def test_running_estimates_go_to_the_same_gradient() -> None:
    """The layer's own averages, with a momentum that goes to 0, over batches in random order."""
    problem = Problem()
    network = convert_full_norm(problem.network(), PowerDecay(2.0, 0.75), PowerDecay(2.0, 0.75))
    generator = torch.Generator().manual_seed(5)
    for _ in range(150):
        for i in torch.randperm(len(problem.batches), generator=generator):
            problem.gradient(network, problem.batches[i])
    for layer in full_norm_layers(network):
        layer.forward_momentum = layer.backward_momentum = 0.0
    # At the end an estimate is the mean of about 150 batches, of which there are 6 kinds.
    assert relative(problem.epoch_mean(network), problem.full_data()) < 0.05


def test_the_variance_is_that_of_all_data_where_batch_norm_loses_what_lies_between_batches() -> None:
    problem = Problem()
    full, batch = FullNorm1d(INPUTS, momentum=None).double(), nn.BatchNorm1d(INPUTS, momentum=None).double()
    for indices in problem.batches:
        full(problem.inputs[indices])
        batch(problem.inputs[indices])
    variance = problem.inputs.var(0, correction=0)
    torch.testing.assert_close(full.variance(), variance, **ROUNDING)
    assert batch.running_var is not None
    assert (batch.running_var / variance).min() < 0.7


# -- training and evaluation ------------------------------------------------------------------------------------------


def test_evaluation_uses_the_estimates_and_leaves_them() -> None:
    layer = FullNorm2d(3, forward_momentum=0.2).double()
    for seed in range(3):
        step(layer, normal(4, 3, 5, 5, seed=seed), normal(4, 3, 5, 5, seed=9))
    before, x = estimates(layer), normal(2, 3, 5, 5, seed=4)
    layer.eval()
    torch.testing.assert_close(layer(x), (x - mean_of(layer)) / std_of(layer), **ROUNDING)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (1 / std_of(layer)).expand_as(x), **ROUNDING)
    torch.testing.assert_close(estimates(layer), before, rtol=0, atol=0)
    layer.forward_momentum = 0.0
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), **ROUNDING)


def mean_of(layer: FullNorm2d) -> Tensor:
    return layer.running_mean.view(1, -1, 1, 1)


def std_of(layer: FullNorm2d) -> Tensor:
    return (layer.running_square - layer.running_mean**2 + layer.eps).sqrt().view(1, -1, 1, 1)


def test_a_constant_factor_of_the_loss_only_scales_gradients() -> None:
    """So gradient accumulation, which divides every loss by the number of batches, needs nothing."""
    one, other = (convert_full_norm(nn.BatchNorm1d(3).double(), 0.1, 0.1) for _ in range(2))
    for seed in range(5):
        x, output_gradient = normal(6, 3, seed=seed), normal(6, 3, seed=20 + seed)
        whole, quarter = step(one, x, output_gradient), step(other, x, output_gradient / 4)
        torch.testing.assert_close(quarter[1:], [value / 4 for value in whole[1:]], **ROUNDING)


def scaled_run(scales: list[float], tell: bool) -> list[Tensor]:
    """Input gradients of some batches, divided by the loss scale that they had."""
    layer, gradients = FullNorm1d(3, forward_momentum=0.1, backward_momentum=0.3).double(), []
    for seed, scale in enumerate(scales):
        if tell:
            set_loss_scale(layer, scale)
        gradients.append(step(layer, normal(6, 3, seed=seed), scale * (1 + normal(6, 3, seed=20 + seed)))[1] / scale)
    return gradients


def test_a_loss_scale_that_changes_does_not_matter_once_it_is_told() -> None:
    plain, scales = scaled_run([1.0] * 6, tell=False), [1.0, 1.0, 65536.0, 65536.0, 0.25, 1024.0]
    torch.testing.assert_close(scaled_run(scales, tell=True), plain, rtol=1e-9, atol=1e-9)
    untold = scaled_run(scales, tell=False)
    assert (untold[4] - plain[4]).abs().max() > 1.0


def test_a_grad_scaler_that_overflows_and_grows_trains_as_none() -> None:
    def train(scaler: torch.amp.GradScaler | None) -> Tensor:
        torch.manual_seed(0)
        network = convert_full_norm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), 0.1, 0.1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for seed in range(8):
            if scaler is not None:
                set_loss_scale(network, scaler.get_scale())
            loss = network(normal(6, 4, seed=seed, dtype=torch.float32)).square().mean()
            optimizer.zero_grad()
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        return torch.cat([p.detach().reshape(-1) for p in network.parameters()])

    growing = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_factor=4.0, growth_interval=2)
    torch.testing.assert_close(train(growing), train(None), rtol=1e-5, atol=1e-6)  # float32
    assert growing.get_scale() > 2.0**8


def test_a_gradient_that_overflows_leaves_the_estimates() -> None:
    layer = FullNorm1d(3)
    step(layer, normal(6, 3, dtype=torch.float32), normal(6, 3, dtype=torch.float32))
    before = estimates(layer)
    bad = normal(6, 3, dtype=torch.float32)
    bad[0, 1] = math.inf
    gradients = step(layer, normal(6, 3, dtype=torch.float32), bad)
    assert not gradients[1][:, 1].isfinite().all()  # a GradScaler has to see it
    for name, old in zip(ESTIMATES[2:], before[2:], strict=True):
        assert getattr(layer, name)[1] == old[1]
        assert (getattr(layer, name)[[0, 2]] != old[[0, 2]]).all()


def network_2d(**momenta: float) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)]
    converted = convert_full_norm(nn.Sequential(*layers).double(), 0.2, 0.3)
    assert isinstance(converted, nn.Sequential)
    return converted


def run(network: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Weights and estimates after some steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for seed in range(4):
        optimizer.zero_grad()
        output = call(normal(4, 2, 7, 7, seed=seed).requires_grad_())
        (output * normal(*output.shape, seed=30 + seed)).mean().backward()
        optimizer.step()
    return [value.detach().clone() for value in network.state_dict().values()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain, recomputed = network_2d(), network_2d()

    def call(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(recomputed, x, use_reentrant=reentrant)
        return result

    torch.testing.assert_close(run(recomputed, call), run(plain, plain), **ROUNDING)  # the variance is computed twice


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilation_changes_nothing(backend: str) -> None:
    plain, other = network_2d(), network_2d()
    compiled = torch.compile(other, backend=backend)
    torch.testing.assert_close(run(other, compiled), run(plain, plain), **ROUNDING)
    other.eval(), plain.eval()
    x = normal(4, 2, 7, 7)
    torch.testing.assert_close(compiled(x), plain(x), **ROUNDING)


@pytest.mark.parametrize(
    ("shape", "memory_format"), [((4, 3, 5, 6), torch.channels_last), ((4, 3, 2, 5, 3), torch.channels_last_3d)]
)
def test_channels_last_is_kept_and_changes_nothing(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    one, other = (convert_full_norm(BATCH_NORM[len(shape)](3).double(), 0.2, 0.3) for _ in range(2))
    for seed in range(3):
        x, output_gradient = normal(*shape, seed=seed), normal(*shape, seed=10 + seed)
        expected = step(one, x, output_gradient)
        got = step(other, x.contiguous(memory_format=memory_format), output_gradient)  # of the other format
        torch.testing.assert_close(got, expected, **ROUNDING)
        assert got[0].is_contiguous(memory_format=memory_format)
        assert got[1].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(estimates(other), estimates(one), **ROUNDING)


def test_any_strides_and_an_expanded_gradient() -> None:
    one, other = FullNorm2d(3).double(), FullNorm2d(3).double()
    x = normal(4, 6, 5, 10)
    expected = step(one, x[:, ::2, :, ::2].contiguous(), torch.ones(4, 3, 5, 5, dtype=torch.float64))
    sliced = x.requires_grad_()[:, ::2, :, ::2]
    sliced.retain_grad()
    other(sliced).sum().backward()
    assert sliced.grad is not None
    torch.testing.assert_close(sliced.grad, expected[1], **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_statistics_in_float32(dtype: torch.dtype) -> None:
    exact, half = FullNorm2d(3), FullNorm2d(3)
    for layer in (exact, half):
        step(layer, normal(4, 3, 5, 5, dtype=torch.float32), normal(4, 3, 5, 5, dtype=torch.float32))
    half.to(dtype)
    assert half.weight is not None
    assert half.weight.dtype == dtype
    torch.testing.assert_close(estimates(half), estimates(exact), rtol=0, atol=0)  # float32, no digit lost
    precision = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    for seed in range(3):
        x, output_gradient = normal(4, 3, 5, 5, seed=seed, dtype=dtype), normal(4, 3, 5, 5, seed=8, dtype=dtype)
        expected, got = step(exact, x.float(), output_gradient.float()), step(half, x, output_gradient)
        assert {value.dtype for value in got} == {dtype}
        torch.testing.assert_close(
            [value.float() for value in got[:2]], expected[:2], rtol=precision["rtol"], atol=0.05
        )
        # Inputs are equal, so estimates in float32 are those of the exact layer, up to the order of sums.
        torch.testing.assert_close(estimates(half), estimates(exact), rtol=1e-4, atol=1e-4)
    twice = FullNorm2d(3).double().to(dtype)
    assert twice(normal(2, 3, 4, 4, dtype=dtype)).dtype == dtype
    assert twice.running_mean.dtype == torch.float32
    assert half.to(torch.float32).running_mean.dtype == torch.float32
    assert half.double().running_mean.dtype == torch.float64


def test_autocast() -> None:
    torch.manual_seed(0)
    network = convert_full_norm(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(normal(4, 2, 7, 7, dtype=torch.float32))
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
    assert estimates(network)[0].dtype == torch.float32


def test_memory_is_four_numbers_per_channel_and_what_batch_norm_keeps() -> None:
    layer, norm = FullNorm2d(8), nn.BatchNorm2d(8)
    floating = [buffer for buffer in layer.buffers() if buffer.is_floating_point()]
    assert sum(buffer.numel() for buffer in floating) == 4 * 8

    def kept(module: nn.Module) -> int:
        sizes: dict[int, int] = {}
        x = normal(16, 8, 9, 9, dtype=torch.float32).requires_grad_()

        def pack(saved: Tensor) -> Tensor:
            sizes[saved.data_ptr()] = saved.numel()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            module(x)
        return sum(sizes.values())

    assert kept(layer) <= kept(norm) + 2 * 8


# -- weights that come and go -----------------------------------------------------------------------------------------


def trained_batch_norm() -> nn.Sequential:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()
    nn.init.uniform_(network[1].weight, 1, 2)  # type: ignore[arg-type]
    for seed in range(4):
        network(normal(4, 2, 7, 7, seed=seed))
    return network


def test_weights_of_batch_norm_load_and_evaluate_to_the_same() -> None:
    network = trained_batch_norm()
    full = convert_full_norm(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double())
    full[1].running_gradient.fill_(7.0)  # type: ignore[index, operator, union-attr]
    full.load_state_dict(network.state_dict(), strict=True)
    x = normal(5, 2, 7, 7, seed=9)
    torch.testing.assert_close(full.eval()(x), network.eval()(x), **ROUNDING)
    layer = full_norm_layers(full)[0]
    assert int(layer.num_batches_tracked) == 4  # so the next batch moves the estimates and does not replace them


def test_own_weights_load() -> None:
    one, other = network_2d(), network_2d()
    run(one, one)
    other.load_state_dict(one.state_dict(), strict=True)
    torch.testing.assert_close(run(other, other), run(one, one), rtol=0, atol=0)


def test_copies_and_pickles_go_on_the_same() -> None:
    original = network_2d()
    run(original, original)
    copied, pickled = copy.deepcopy(original), pickle.loads(pickle.dumps(original))
    expected = run(original, original)
    torch.testing.assert_close(run(copied, copied), expected, rtol=0, atol=0)
    torch.testing.assert_close(run(pickled, pickled), expected, rtol=0, atol=0)


def test_averaged_statistics_are_those_of_all_data() -> None:
    problem, vectors = Problem(), []
    workers = [FullNorm1d(INPUTS).double() for _ in range(CLASSES)]
    for label, worker in enumerate(workers):  # each has seen one class
        worker(problem.inputs[problem.labels == label])
        average_statistics(worker, lambda vector: (vectors.append(vector), vector)[1])
    mean = torch.stack(vectors).mean(0)
    assert mean.shape == (4 * INPUTS,)
    average_statistics(workers[0], lambda vector: mean)
    torch.testing.assert_close(workers[0].running_mean, problem.inputs.mean(0), **ROUNDING)
    torch.testing.assert_close(workers[0].variance(), problem.inputs.var(0, correction=0), **ROUNDING)


def test_names_that_ddp_leaves_alone() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), FullNorm1d(2), nn.Sequential(FullNorm1d(2)))
    network._ddp_params_and_buffers_to_ignore = ["0.running_mean"]  # type: ignore[assignment]
    keep_statistics_local(network)
    ignored = set(network._ddp_params_and_buffers_to_ignore)  # type: ignore[arg-type]
    assert ignored == {"0.running_mean"} | {
        f"{path}.{name}" for path in ("1", "2.0") for name in (*ESTIMATES, "num_batches_tracked")
    }


# -- bad input --------------------------------------------------------------------------------------------------------


def test_batches_of_one_value_per_channel_train() -> None:
    """The first one has no variance to go by: it is taken to be 1, and forgotten like any other estimate."""
    layer = FullNorm1d(2, forward_momentum=0.1, backward_momentum=0.1).double()
    values, expected_mean, expected_square = normal(200, 1, 2), None, None
    for value in values:
        output, gradient, *_ = step(layer, value, torch.ones(1, 2, dtype=torch.float64))
        if expected_mean is None:
            torch.testing.assert_close(output, torch.zeros(1, 2, dtype=torch.float64), **ROUNDING)
            torch.testing.assert_close(gradient, torch.full_like(gradient, 0.9), rtol=1e-5, atol=0)  # eps
            expected_mean, expected_square = value[0], value[0].square() + 1
        else:
            assert expected_square is not None
            expected_mean = 0.9 * expected_mean + 0.1 * value[0]
            expected_square = 0.9 * expected_square + 0.1 * value[0].square()
        assert gradient.isfinite().all()
    assert expected_mean is not None
    torch.testing.assert_close(layer.running_mean, expected_mean, **ROUNDING)
    torch.testing.assert_close(layer.running_square, expected_square, **ROUNDING)


def test_a_constant_channel_gives_the_bias_and_finite_gradients() -> None:
    layer = FullNorm1d(2)
    nn.init.constant_(layer.bias, 0.5)  # type: ignore[arg-type]
    for _ in range(3):
        output, gradient, *_ = step(layer, torch.full((4, 2), 3.0), torch.ones(4, 2))
    torch.testing.assert_close(output, torch.full((4, 2), 0.5), rtol=0, atol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_output_and_is_not_remembered(bad: float) -> None:
    layer, clean = FullNorm1d(2), FullNorm1d(2)
    x = normal(6, 2, dtype=torch.float32)
    for each in (layer, clean):
        each(x)
    broken = x.clone()
    broken[0, 1] = bad
    output = layer(broken)
    clean(torch.stack([x[:, 0], x[:, 1]], 1))
    assert output[:, 0].isfinite().all()
    assert not output[:, 1].isfinite().all()
    assert layer.running_mean[0] == clean.running_mean[0]
    assert layer.running_mean.isfinite().all()
    assert layer.running_square.isfinite().all()
    assert layer(x).isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    layer = FullNorm2d(3)
    x = normal(2, 3, 4, 4, dtype=torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match=r"got backward\(create_graph=True\).*use BatchNorm2d or GroupNorm"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(layer.eval()(x).square().sum(), x, create_graph=True)  # nothing is estimated here


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (FullNorm1d(3), (2, 3, 4, 4), r"FullNorm1d got an input of shape \(2, 3, 4, 4\), needs 2 or 3 dimensions"),
        (FullNorm2d(3), (2, 3, 4), "needs 4 dimensions"),
        (FullNorm3d(3), (2, 3, 4, 4), "needs 5 dimensions"),
        (FullNorm2d(3), (2, 4, 4, 3), "got 4 channels, needs 3. Pass num_features=4"),
        (FullNorm2d(3), (0, 3, 4, 4), "got an empty input"),
    ],
)
def test_inputs_that_are_refused(layer: nn.Module, shape: tuple[int, ...], message: str) -> None:
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            layer.train(mode)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullNorm1d(0), "at least one channel"),
        (lambda: FullNorm1d(2, eps=0.0), "positive number"),
        (lambda: FullNorm1d(2, momentum=1.5), r"1.5, needs a number in \[0, 1\]"),
        (lambda: FullNorm1d(2, backward_momentum=-0.1), "the backward pass is -0.1"),
        (lambda: FullNorm2d(2, track_running_stats=False), "Use BatchNorm2d"),
        (lambda: PowerDecay(scale=0.0), "positive scale"),
        (lambda: PowerDecay(exponent=2.0), "exponent"),
        (lambda: set_loss_scale(FullNorm1d(2), 0.0), "positive, finite"),
        (lambda: set_loss_scale(FullNorm1d(2), math.inf), "positive, finite"),
    ],
)
def test_settings_that_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("momentum", [0.2, PowerDecay(2.0, 0.75)])
def test_a_gpu_computes_the_same(dtype: torch.dtype, momentum: Any) -> None:
    layers = [FullNorm2d(3, forward_momentum=momentum, backward_momentum=momentum, dtype=dtype) for _ in range(2)]
    layers[1].cuda()
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 5e-2}
    for seed in range(4):
        x, output_gradient = normal(4, 3, 5, 6, seed=seed, dtype=dtype), normal(4, 3, 5, 6, seed=9, dtype=dtype)
        expected, got = step(layers[0], x, output_gradient), step(layers[1], x.cuda(), output_gradient.cuda())
        torch.testing.assert_close([value.cpu() for value in got], expected, **close)
    torch.testing.assert_close([value.cpu() for value in estimates(layers[1])], estimates(layers[0]), **close)
