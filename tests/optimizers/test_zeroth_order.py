"""Proved here: CooSGE is exact on quadratics and GauSGE unbiased, with the variance of its formula; SVRG's estimate at
the snapshot is the full one, and SAGA's corrections cancel over all data; proximal operators minimize what they say
they do, and l1 gives exact zeros; fixed points are stationary; what is evaluated together does not matter; mistakes are
refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import (
    L1,
    ZOSGD,
    AbstractEstimator,
    AbstractProximal,
    AbstractZerothOrder,
    Box,
    CooSGE,
    GauSGE,
    GroupLasso,
    Ridge,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)
from lightning_decentral.optimizers.zeroth_order import Loss

SAMPLES = 12


class LeastSquares:
    """``f_i(x) = (a_i' x - b_i)^2 / 2``, with parameters of two shapes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(SAMPLES, 7, generator=generator, dtype=dtype)
        self.targets = torch.randn(SAMPLES, generator=generator, dtype=dtype)
        self.start = [
            torch.randn(2, 3, generator=generator, dtype=dtype),
            torch.randn(1, generator=generator, dtype=dtype),
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(tensor.clone()) for tensor in self.start]

    def loss(self, rows: slice | list[int] = slice(None)) -> Loss:
        def losses(parameters: list[Tensor]) -> Tensor:
            x = torch.cat([parameter.flatten() for parameter in parameters])
            return (self.inputs[rows] @ x - self.targets[rows]).square() / 2

        return losses

    def gradient(self, parameters: list[nn.Parameter], rows: slice | list[int] = slice(None)) -> Tensor:
        x = torch.cat([parameter.detach().flatten() for parameter in parameters])
        inputs = self.inputs[rows]
        return inputs.T @ (inputs @ x - self.targets[rows]) / len(inputs)


def flat_gradient(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


# -- the estimators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [1e-4, 1e-1, 10.0])
def test_coordinates_are_exact_on_quadratics(mu: float) -> None:
    problem = LeastSquares()
    parameters = problem.parameters()
    value = ZOSGD(parameters, lr=0.1, estimator=CooSGE(mu)).estimate(problem.loss())
    # rounding: epsilon |f| / mu
    torch.testing.assert_close(flat_gradient(parameters), problem.gradient(parameters), rtol=0, atol=1e-14 / min(mu, 1))
    assert parameters[0].grad is not None
    assert parameters[0].grad.shape == (2, 3)
    if mu < 1e-3:
        assert value.item() == pytest.approx(problem.loss()(list(parameters)).mean().item(), abs=10 * mu**2)


def test_random_directions_are_unbiased_with_the_known_variance() -> None:
    """On a linear function E g = gradient, and E||g||^2 = (d + 2) ||gradient||^2 for one direction."""
    slope = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.0], dtype=torch.float64)
    x = torch.zeros(6, dtype=torch.float64)
    estimator = GauSGE(directions=1, mu=1e-3)
    directions = torch.cat([next(estimator.blocks(1, x, draw)) for draw in range(1000)])
    quotients = (directions @ slope).unsqueeze(1)  # of a linear function, for any mu
    estimates = quotients * directions
    deviation = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - slope).abs() / deviation).max() < 4  # standard errors, of six numbers
    squares = estimates.square().sum(1)
    assert (squares.mean() / slope.square().sum()).item() == pytest.approx(8, rel=0.05)  # about 3 standard errors


def test_random_directions_are_unbiased_on_quadratics() -> None:
    """Odd moments vanish: even a large mu leaves no bias. 4,000 directions at once."""
    problem = LeastSquares()
    parameters = problem.parameters()
    count, wanted = 4000, problem.gradient(parameters)
    optimizer = ZOSGD(parameters, lr=0.1, estimator=GauSGE(directions=count, mu=0.5))
    estimates = []
    for _ in range(5):
        optimizer.estimate(problem.loss())
        estimates.append(flat_gradient(parameters))
    error = torch.stack(estimates).mean(0) - wanted
    # variance of a coordinate: about ||g||^2 + g_j^2, and a term of mu^2 that a factor of 2 covers
    assert error.abs().max() < 4 * 2 * math.sqrt(2 / (5 * count)) * wanted.norm()


def test_estimators_draw_anew_each_time_and_the_same_for_the_same_seed() -> None:
    problem = LeastSquares()
    results = []
    for seed in (0, 0, 1):
        parameters = problem.parameters()
        optimizer = ZOSGD(parameters, lr=0.1, estimator=GauSGE(3, seed=seed))
        both = []
        for _ in range(2):
            optimizer.estimate(problem.loss())
            both.append(flat_gradient(parameters))
        assert not torch.equal(*both)
        results.append(torch.cat(both))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("estimator", [CooSGE(), GauSGE(5)], ids=repr)
def test_what_is_evaluated_together_does_not_matter(estimator: AbstractEstimator) -> None:
    """Directions are the same for every chunk; sums may be rounded in another order."""
    problem = LeastSquares()
    results = []
    for chunk_size in (None, 1, 2, 100):
        parameters = problem.parameters()
        ZOProxSGD(parameters, 0.1, estimator, chunk_size=chunk_size).estimate(problem.loss())
        results.append(flat_gradient(parameters))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-10)  # epsilon |f| / mu


def test_a_black_box_may_return_a_float() -> None:
    problem = LeastSquares()
    parameters = problem.parameters()
    optimizer = ZOSGD(parameters, lr=0.1, chunk_size=1)
    optimizer.estimate(lambda values: problem.loss()(values).mean().item())  # type: ignore[arg-type, return-value]
    torch.testing.assert_close(flat_gradient(parameters), problem.gradient(parameters), rtol=0, atol=1e-11)


# -- SVRG and SAGA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [CooSGE(), GauSGE(5)], ids=repr)
def test_at_the_snapshot_svrg_is_the_full_estimate(estimator: AbstractEstimator) -> None:
    problem = LeastSquares()
    parameters = problem.parameters()
    optimizer = ZOProxSVRG(parameters, 0.1, estimator)
    optimizer.snapshot([problem.loss(slice(0, 5)), problem.loss(slice(5, 12))])
    full = torch.cat([optimizer.state[p]["full_gradient"].flatten() for p in parameters])
    for rows in (slice(0, 1), slice(3, 9)):
        optimizer.estimate(problem.loss(rows))
        assert torch.equal(flat_gradient(parameters), full)
    if isinstance(estimator, CooSGE):  # batches of unequal size: every sample counts the same
        torch.testing.assert_close(full, problem.gradient(parameters), rtol=0, atol=1e-11)


def test_svrg_is_unbiased_over_batches_and_less_noisy_than_sgd() -> None:
    problem = LeastSquares()
    parameters = problem.parameters()
    optimizer = ZOProxSVRG(parameters, 0.01)
    optimizer.snapshot([problem.loss()])
    optimizer.estimate(problem.loss([0]))
    optimizer.step()  # a little away from the snapshot
    wanted, reduced, plain = problem.gradient(parameters), [], []
    for row in range(SAMPLES):
        optimizer.estimate(problem.loss([row]))
        reduced.append(flat_gradient(parameters))
        plain.append(problem.gradient(parameters, [row]))
    torch.testing.assert_close(torch.stack(reduced).mean(0), wanted, rtol=0, atol=1e-11)
    assert torch.stack(reduced).var(0).sum() < 0.05 * torch.stack(plain).var(0).sum()


def test_saga_corrections_cancel_over_all_data() -> None:
    problem = LeastSquares()
    parameters = problem.parameters()
    optimizer = ZOProxSAGA(parameters, 0.01, components=SAMPLES)
    for rows in ([0, 3], [5, 1], [7, 11, 2]):
        optimizer.estimate(problem.loss(rows), indices=rows)
        optimizer.step()
    saved, estimates = copy.deepcopy(optimizer.state_dict()), []
    for row in range(SAMPLES):
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.estimate(problem.loss([row]), indices=[row])
        estimates.append(flat_gradient(parameters))
    # unbiased: the mean over all choices of a component is the gradient, whatever the table holds
    torch.testing.assert_close(torch.stack(estimates).mean(0), problem.gradient(parameters), rtol=0, atol=1e-11)


def test_saga_keeps_the_mean_of_its_table_also_with_repetitions() -> None:
    problem = LeastSquares()
    parameters = problem.parameters()
    optimizer = ZOProxSAGA(parameters, 0.01, SAMPLES, GauSGE(3))
    for rows in ([0, 3, 0], [3, 3], list(range(SAMPLES))):
        optimizer.estimate(problem.loss(rows), indices=torch.tensor(rows))
        optimizer.step()
        state = optimizer.state[parameters[0]]
        torch.testing.assert_close(state["table"].mean(0), state["table_mean"], rtol=1e-10, atol=1e-12)  # rounding
    assert (state["table"] != 0).all()


def solution(problem: LeastSquares, weight: float) -> Tensor:
    """Of least squares with l1, by many exact proximal steps (ISTA)."""
    x = torch.zeros(7, dtype=torch.float64)
    for _ in range(1000):
        gradient = problem.inputs.T @ (problem.inputs @ x - problem.targets) / SAMPLES
        x = L1(weight)(x - 0.1 * gradient, 0.1)
    return x


@pytest.mark.parametrize("method", ["svrg", "saga"])
def test_variance_reduced_methods_reach_the_sparse_solution(method: str) -> None:
    """With single samples and a constant rate, where SGD would go on jumping about; exact zeros in the same places."""
    problem, weight = LeastSquares(), 0.1
    parameters = problem.parameters()
    generator = torch.Generator().manual_seed(0)
    optimizer: ZOProxSVRG | ZOProxSAGA
    if method == "svrg":
        optimizer = ZOProxSVRG(parameters, 0.06, prox=L1(weight))
    else:
        optimizer = ZOProxSAGA(parameters, 0.06, SAMPLES, prox=L1(weight))
    for _ in range(40):
        if isinstance(optimizer, ZOProxSVRG):
            optimizer.snapshot([problem.loss()])
        for row in torch.randperm(SAMPLES, generator=generator).tolist():
            if isinstance(optimizer, ZOProxSAGA):
                optimizer.estimate(problem.loss([row]), indices=[row])
            else:
                optimizer.estimate(problem.loss([row]))
            optimizer.step()
    found, wanted = torch.cat([p.detach().flatten() for p in parameters]), solution(problem, weight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # what is left of linear convergence
    assert 0 < (found == 0).sum() < 7
    assert torch.equal(found == 0, wanted == 0)
    assert optimizer.gradient_mapping() < 1e-3


def test_a_fixed_point_is_stationary() -> None:
    problem = LeastSquares()
    x = solution(problem, 0.1)
    parameters = [nn.Parameter(x[:6].view(2, 3).clone()), nn.Parameter(x[6:].clone())]
    optimizer = ZOProxSGD(parameters, 0.1, prox=L1(0.1))
    optimizer.estimate(problem.loss())
    assert optimizer.gradient_mapping() < 1e-9
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in parameters]), x, rtol=0, atol=1e-10)


# -- proximal operators -----------------------------------------------------------------------------------------------

OPERATORS = [L1(0.4), Ridge(0.7), Box(-0.5, 0.3), GroupLasso(0.8), GroupLasso(0.8, dim=1), GroupLasso(0.4, dim=-2)]


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_proximal_operators_minimize_their_objective(operator: AbstractProximal) -> None:
    """Strictly convex: no random displacement, large or small, is better."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        z, lr = torch.randn(3, 4, generator=generator, dtype=torch.float64), 0.6

        def objective(x: Tensor, z: Tensor = z, lr: float = lr) -> float:
            return (operator.value(x) + (x - z).square().sum() / (2 * lr)).item()

        best = operator(z, lr)
        for scale in (1e-4, 1e-2, 1.0):
            for _ in range(20):
                moved = best + scale * torch.randn(3, 4, generator=generator, dtype=torch.float64)
                assert objective(best) < objective(moved)


@pytest.mark.parametrize("operator", [L1(0.0), Ridge(0.0), GroupLasso(0.0)], ids=repr)
def test_weight_zero_does_nothing(operator: AbstractProximal) -> None:
    x = torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    assert torch.equal(operator(x, 0.1), x)


def test_zeros_are_exact_and_groups_leave_together() -> None:
    x = torch.tensor([[0.05, 3.0], [-0.05, 4.0]])
    assert torch.equal(L1(1.0)(x, 0.1)[:, 0], torch.zeros(2))
    assert torch.equal(GroupLasso(1.0, dim=1)(x, 0.1)[:, 0], torch.zeros(2))
    assert GroupLasso(1.0, dim=1)(x, 0.1)[:, 1].norm().item() == pytest.approx(4.9)
    assert torch.equal(GroupLasso(1.0)(torch.zeros(3), 0.1), torch.zeros(3))  # and not 0 / 0


def test_groups_and_functions_of_ones_own() -> None:
    weight, bias = nn.Parameter(torch.full((2,), 0.05)), nn.Parameter(torch.full((2,), 0.05))

    def halve(tensor: Tensor, lr: float) -> Tensor:
        return tensor / 2

    optimizer = ZOProxSGD([{"params": [weight], "prox": L1(1.0)}, {"params": [bias]}], lr=0.1, prox=halve)
    optimizer.estimate(lambda parameters: sum(p.sum() for p in parameters) * 0)  # type: ignore[arg-type, return-value]
    optimizer.step()
    assert torch.equal(weight, torch.zeros(2))
    assert torch.equal(bias, torch.full((2,), 0.025))


# -- bad input --------------------------------------------------------------------------------------------------------

Make = Callable[[list[nn.Parameter]], AbstractZerothOrder]
MAKERS: list[Make] = [lambda p: ZOProxSGD(p, 0.1), lambda p: ZOProxSGD(p, 0.1, chunk_size=1)]
EACH = pytest.mark.parametrize("make", MAKERS, ids=["vmap", "one by one"])


def estimate(optimizer: AbstractZerothOrder, loss: object) -> None:
    assert isinstance(optimizer, ZOProxSGD)
    optimizer.estimate(loss)  # type: ignore[arg-type]


@EACH
def test_a_loss_that_returns_nothing(make: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"got a loss that returns NoneType; it needs a tensor"):
        estimate(make([nn.Parameter(torch.zeros(3))]), lambda parameters: None)


@EACH
def test_a_loss_of_too_many_dimensions(make: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"returns shape \(2, 3\)"):
        estimate(make([nn.Parameter(torch.zeros(3))]), lambda parameters: torch.outer(torch.ones(2), parameters[0]))


@EACH
def test_a_loss_that_calls_backward(make: Make) -> None:
    def loss(parameters: list[Tensor]) -> Tensor:
        value = parameters[0].square().sum()
        value.backward()
        return value

    with pytest.raises(ConfigurationError, match="calls backward"):
        estimate(make([nn.Parameter(torch.ones(3))]), loss)


@EACH
def test_a_loss_that_calls_backward_on_the_model(make: Make) -> None:
    x = nn.Parameter(torch.ones(3))

    def loss(parameters: list[Tensor]) -> Tensor:
        with torch.enable_grad():
            x.square().sum().backward()
        return parameters[0].square().sum()

    with pytest.raises(ConfigurationError, match="calls backward"):
        estimate(make([x]), loss)


def test_a_value_in_the_place_of_a_function() -> None:
    with pytest.raises(ConfigurationError, match=r"got Tensor; it needs a function"):
        estimate(ZOProxSGD([nn.Parameter(torch.ones(3))], 0.1), torch.tensor(1.0))


@pytest.mark.parametrize("method", ["item", "random"])
def test_what_cannot_be_vectorized_is_explained(method: str) -> None:
    def loss(parameters: list[Tensor]) -> Tensor:
        if method == "item":
            return torch.tensor(parameters[0].sum().item())
        return (parameters[0] * torch.rand(3)).sum()

    with pytest.raises(ConfigurationError, match=r"torch.vmap cannot evaluate .* chunk_size=1"):
        estimate(ZOProxSGD([nn.Parameter(torch.ones(3))], 0.1), loss)


@pytest.mark.parametrize(("dtype", "size", "mu"), [(torch.float32, 1e4, 1e-3), (torch.bfloat16, 1.0, 1e-3)])
def test_mu_that_is_lost_in_rounding(dtype: torch.dtype, size: float, mu: float) -> None:
    x = nn.Parameter(torch.full((3,), size, dtype=dtype))
    optimizer = ZOProxSGD([x], 0.1, CooSGE(mu))
    with pytest.raises(ConfigurationError, match=r"needs mu of at least .* lost to rounding"):
        optimizer.estimate(lambda parameters: parameters[0].sum())


@EACH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(make: Make, bad: float) -> None:
    x = nn.Parameter(torch.ones(3))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        estimate(make([x]), lambda parameters: parameters[0].sum() * bad)
    assert x.grad is None
    assert torch.equal(x, torch.ones(3))


def test_svrg_needs_a_snapshot_of_something() -> None:
    optimizer = ZOProxSVRG([nn.Parameter(torch.ones(3))], 0.1)
    with pytest.raises(ConfigurationError, match="before the first snapshot"):
        optimizer.estimate(lambda parameters: parameters[0].sum())
    with pytest.raises(ConfigurationError, match="got no losses"):
        optimizer.snapshot(iter(()))
    with pytest.raises(ConfigurationError, match="got nothing"):
        optimizer.snapshot()


@pytest.mark.parametrize(
    ("indices", "message"), [([0], "2 losses and 1 indices"), ([0, 9], "0 to 3"), ([0.0, 1.0], "needs integers")]
)
def test_saga_checks_its_indices(indices: list[int], message: str) -> None:
    optimizer = ZOProxSAGA([nn.Parameter(torch.ones(2))], 0.1, components=4)
    with pytest.raises(ConfigurationError, match=message):
        optimizer.estimate(lambda parameters: parameters[0], indices=indices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CooSGE(0.0), "mu=0"),
        (lambda: GauSGE(0), "directions=0"),
        (lambda: GauSGE(mu=-1.0), "mu=-1"),
        (lambda: L1(-1.0), "weight=-1"),
        (lambda: Box(1.0, 0.0), "low <= high"),
        (lambda: GroupLasso(1.0, dim=1)(torch.ones(3), 0.1), r"shape \(3,\)"),
        (lambda: ZOSGD([nn.Parameter(torch.ones(1))], 0.0), "lr=0"),
        (lambda: ZOSGD([nn.Parameter(torch.ones(1))], 0.1, chunk_size=0), "chunk_size=0"),
        (lambda: ZOSGD([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).double())], 0.1), "one floating-point"),
        (lambda: ZOProxSAGA([nn.Parameter(torch.ones(1))], 0.1, components=0), "components=0"),
    ],
)
def test_impossible_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_closure_may_estimate() -> None:
    problem = LeastSquares()
    optimizer = ZOSGD(parameters := problem.parameters(), lr=0.1)
    losses = [optimizer.step(lambda: optimizer.estimate(problem.loss())) for _ in range(5)]  # type: ignore[arg-type, return-value]
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]
    assert len(parameters) == 2


@pytest.mark.parametrize("method", ["sgd", "svrg", "saga"])
def test_a_resumed_run_is_an_uninterrupted_one(method: str) -> None:
    """Random directions too: the counter of draws is saved."""
    problem = LeastSquares()

    def make(parameters: list[nn.Parameter]) -> AbstractZerothOrder:
        if method == "sgd":
            return ZOProxSGD(parameters, 0.02, GauSGE(3))
        if method == "svrg":
            return ZOProxSVRG(parameters, 0.02, GauSGE(3))
        return ZOProxSAGA(parameters, 0.02, SAMPLES, GauSGE(3))

    def advance(optimizer: AbstractZerothOrder, steps: range) -> None:
        for step in steps:
            if isinstance(optimizer, ZOProxSAGA):
                optimizer.estimate(problem.loss([step]), indices=[step])
            else:
                estimate_any(optimizer, problem.loss([step]))
            optimizer.step()

    def estimate_any(optimizer: AbstractZerothOrder, loss: Loss) -> None:
        assert isinstance(optimizer, (ZOProxSGD, ZOProxSVRG))
        optimizer.estimate(loss)

    whole, half = problem.parameters(), problem.parameters()
    first, second = make(whole), make(half)
    for optimizer in (first, second):
        if isinstance(optimizer, ZOProxSVRG):
            optimizer.snapshot([problem.loss()])
    advance(first, range(6))
    advance(second, range(3))
    rest = [nn.Parameter(parameter.detach().clone()) for parameter in half]
    resumed = make(rest)
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    advance(resumed, range(3, 6))
    for one, other in zip(whole, rest, strict=True):
        assert torch.equal(one, other)
