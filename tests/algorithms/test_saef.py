"""Proved here: SAEF, DEF and plain error feedback are their stacked reference step by step under jitter; of one worker,
with any compressor, optimizer and schedule, and of several that average their errors in every step, `x - e` is
uncompressed momentum SGD, which it is not without stepping ahead; nothing is lost in the sum, with any compressor; a
scalar quadratic contracts by the closed formula of a random sparsifier, so that EF diverges where SAEF does not; with a
compressor that shrinks, x is an average of the trajectory; half precision loses nothing either; messages are as small
as they should be; in Lightning everything but the gradient is at x; another number of workers takes over what was left
out; and what cannot work is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, Kept, buffer_of, equal_start, gradient_of, largest, simulate, stacked, states
from strategies.fits import Recorder, Regression, Remembered, flat, gossip, loader, make_trainer, saved
from torch import Tensor

from lightning_decentral import GossipStrategy
from lightning_decentral.algorithms import SAEF
from lightning_decentral.compression import (
    COMPRESSORS,
    QSGD,
    AbstractCompressor,
    Cast,
    ErrorFeedback,
    Identity,
    Int8,
    Lattice,
    PowerSGD,
    RandomBlock,
    RandomK,
    ScaledSign,
    SignSGD,
    Threshold,
    TopK,
    compressor,
)
from lightning_decentral.errors import CompressionError, ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.planning.planner import plan
from lightning_decentral.protocol import Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some hundred steps
Optimizers = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def momentum(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9, weight_decay=0.01)


def train(
    simulator: Simulator, problem: Quadratic, optimizers: Optimizers, rate: Callable[[int], float], steps: int
) -> Tensor:
    """Run with an optimizer for each worker; returns all that they subtracted, [workers, parameters]."""
    parameters = [torch.nn.Parameter(buffer_of(worker.snapshot)) for worker in simulator.workers]
    tools = [optimizers([parameter]) for parameter in parameters]
    subtracted = torch.zeros(problem.start.shape, dtype=torch.float64)
    gradient = gradient_of(problem)
    for request, worker in simulator.demands(max(worker.step for worker in simulator.workers) + steps):
        parameter, tool = parameters[worker.rank], tools[worker.rank]
        if isinstance(request, Gradient):
            parameter.grad = gradient(worker).buffers[0]
        else:
            assert request.at is worker.snapshot
            before = parameter.detach().clone()
            tool.param_groups[0]["lr"] = rate(worker.step)
            tool.step()
            subtracted[worker.rank] += before.double() - parameter.detach()
    return subtracted


def errors(simulator: Simulator) -> Tensor:
    return torch.stack([buffer_of(worker.state["error"]) for worker in simulator.workers])


def uncompressed(problem: Quadratic, optimizers: Optimizers, rate: Callable[[int], float], steps: int) -> Tensor:
    """One model that all workers train, with the mean of their gradients."""
    parameter = torch.nn.Parameter(problem.start[0].clone())
    tool = optimizers([parameter])
    for step in range(steps):
        parameter.grad = problem.gradient(parameter.detach().expand_as(problem.start)).mean(0)
        tool.param_groups[0]["lr"] = rate(step)
        tool.step()
    return parameter.detach()


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [None, 1, 3, 20])
@pytest.mark.parametrize("step_ahead", [0.0, 0.3, 1.0])
def test_it_is_the_reference_step_by_step_under_jitter(period: int | None, step_ahead: float) -> None:
    problem = equal_start(4)
    reference = methods.saef(problem.start, problem.gradient, rate, torch.eye, largest, period, step_ahead)
    simulator = simulate(SAEF(TopK(0.4), period, step_ahead), problem, JITTERED)
    for state in states(simulator, problem, rate, 40):
        assert torch.equal(state, state[:1].expand_as(state))  # the same bits on all workers
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_it_is_the_reference_where_messages_are_added_on_their_way() -> None:
    problem, step = equal_start(4), iter(range(40))

    def block(x: Tensor) -> Tensor:
        seed, scheme = next(step), RandomBlock(0.4)
        generators = [torch.Generator().manual_seed(seed) for _ in x]
        return torch.stack([scheme.decompress(scheme.compress(*pair)) for pair in zip(x, generators, strict=True)])

    reference = methods.saef(problem.start, problem.gradient, rate, torch.eye, block, 3)
    for state in states(simulate(SAEF(RandomBlock(0.4), 3), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_it_is_the_reference_with_the_servers_compression() -> None:
    problem = equal_start(4)
    reference = methods.saef(problem.start, problem.gradient, rate, torch.eye, largest, 3, 1.0, largest)
    for state in states(simulate(SAEF(TopK(0.4), 3, 1.0, TopK(0.4)), problem, JITTERED), problem, rate, 40):
        assert torch.equal(state, state[:1].expand_as(state))
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_without_stepping_ahead_it_is_error_feedback_of_updates() -> None:
    """The package's other implementation, with a memory for each worker."""
    problem = equal_start(3)
    memories = [ErrorFeedback(TopK(0.4), torch.zeros(5, dtype=torch.float64)) for _ in range(3)]
    x = problem.start[0].clone()
    for step, state in enumerate(states(simulate(SAEF(TopK(0.4), None, 0.0), problem), problem, rate, 40)):
        sent = []
        for rank, memory in enumerate(memories):
            sent.append(memory.compress(rate(step) * problem.gradient(x, rank))[1])
            memory.commit()
        x = x - torch.stack(sent).mean(0)
        torch.testing.assert_close(state[0], x, **ROUNDING)


OPTIMIZERS: dict[str, Optimizers] = {
    "momentum": momentum,
    "nesterov": lambda parameters: torch.optim.SGD(parameters, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
}
CONTRACTIONS = [TopK(0.1), ScaledSign(), Int8(), RandomK(0.2), PowerSGD(1), Cast("bfloat16"), Kept(0.3)]


@pytest.mark.parametrize("scheme", CONTRACTIONS, ids=repr)
@pytest.mark.parametrize("optimizers", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_worker_less_its_error_is_uncompressed_training(scheme: AbstractCompressor, optimizers: Optimizers) -> None:
    """With a schedule: the error has the unit of the parameters, so that nothing has to be rescaled."""
    problem = equal_start(1, 20)
    simulator = simulate(SAEF(scheme), problem)
    train(simulator, problem, optimizers, lambda step: 0.1 * rate(step), 60)
    expected = uncompressed(problem, optimizers, lambda step: 0.1 * rate(step), 60)
    assert float(errors(simulator).abs().max()) > 1e-9
    torch.testing.assert_close(stacked(simulator) - errors(simulator), expected[None], **ROUNDING)


def test_averaging_in_every_step_makes_it_momentum_sgd_and_stepping_ahead_nearly() -> None:
    problem, deviation = equal_start(4, 20), {}
    expected = uncompressed(problem, momentum, lambda step: 0.05, 40)
    for name, algorithm in {
        "every step": SAEF(TopK(0.1), 1),
        "every 20": SAEF(TopK(0.1), 20),
        "never": SAEF(TopK(0.1), None),
        "not ahead": SAEF(TopK(0.1), None, 0.0),
    }.items():
        simulator = simulate(algorithm, problem)
        train(simulator, problem, momentum, lambda step: 0.05, 40)
        deviation[name] = float((stacked(simulator) - errors(simulator).mean(0) - expected).abs().max())
    assert deviation["every step"] < 1e-14
    assert all(deviation[name] > 1e-3 for name in ("every 20", "never", "not ahead"))
    assert max(deviation["every 20"], deviation["never"]) < deviation["not ahead"]


NAMED = {
    name: compressor(name)
    for name, cls in COMPRESSORS.items()
    if name not in ("lattice", "threshold") and compressor(name).error_bound(20) < 1.0
}


SUMS: list[tuple[str, float, AbstractCompressor | None]] = [
    *((name, 1.0, None) for name in NAMED),
    # The same for all that are gathered, and all that are added.
    *((name, 0.3, None) for name in ("topk", "random_block")),
    *((name, step_ahead, Kept(0.5, 0.5)) for name in ("topk", "random_block") for step_ahead in (0.3, 1.0)),
]


@pytest.mark.parametrize(("name", "step_ahead", "server"), SUMS, ids=str)
def test_nothing_is_lost_in_the_sum(name: str, step_ahead: float, server: AbstractCompressor | None) -> None:
    problem = equal_start(4, 20)
    simulator = simulate(SAEF(NAMED[name], 5, step_ahead, server), problem, JITTERED)
    subtracted = train(simulator, problem, momentum, lambda step: 0.05 * rate(step), 12)  # two averages of errors
    expected = problem.start[0] - subtracted.mean(0) + errors(simulator).mean(0)
    if server is not None:
        left = [buffer_of(worker.state["server"]) for worker in simulator.workers]
        assert all(torch.equal(one, left[0]) for one in left)  # all compress alike, with random numbers too
        assert float(left[0].abs().max()) > 1e-9
        expected = expected + left[0]
    # Of casts the sum is rounded, on its way, to 8 bits: that is nobody's error.
    near = 2.0**-6 if name == "cast" else 1e-13
    torch.testing.assert_close(stacked(simulator)[0], expected, rtol=0.0, atol=near)


def test_the_list_above_has_what_users_take() -> None:
    assert {"identity", "int8", "scaled_sign", "topk", "randomk", "random_block", "powersgd", "dgc"} <= set(NAMED)


# -- stability ---------------------------------------------------------------------------------------------------------


def square_after_a_transmission(step_ahead: float, p: float, s: float) -> float:
    """The mean over many coordinates of `(x / x_before)^2` once each was sent, of `f(x) = s x^2 / 2` at rate 1."""
    count = 100_000
    start = torch.ones(count, dtype=torch.float64)
    simulator = Simulator(SAEF(Kept(p), None, step_ahead), [Vector([start.clone()])], seed=1)
    after = torch.full((count,), math.nan, dtype=torch.float64)
    for _ in range(round(math.log(1e-7) / math.log(1 - p))):
        simulator.run(lambda worker: Vector([s * buffer_of(worker.snapshot)]), 1.0, 1)
        x = stacked(simulator)[0]
        after = torch.where(after.isnan() & (x != start), x, after)
    return float(after[~after.isnan()].square().mean())


def formula(step_ahead: float, p: float, s: float) -> float:
    if step_ahead == 0.0:
        return 1 - 2 * s / p + (2 - p) * s**2 / p**2
    a, q = 1 / step_ahead, 1 - step_ahead * s
    first, second = p * q / (1 - (1 - p) * q), p * q**2 / (1 - (1 - p) * q**2)
    return (1 - a) ** 2 + 2 * (1 - a) * a * first + a**2 * second


@pytest.mark.parametrize("step_ahead", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("p", "s"), [(0.2, 0.15), (0.5, 0.6), (0.5, 0.75)])
def test_a_quadratic_contracts_by_the_formula(step_ahead: float, p: float, s: float) -> None:
    # Of 100,000 draws with a standard deviation below 4 times the mean: six deviations of the mean are 8 %.
    assert square_after_a_transmission(step_ahead, p, s) == pytest.approx(formula(step_ahead, p, s), rel=0.08)


def test_the_formula_has_the_known_limits_of_stability() -> None:
    """EF is stable up to 2 p / (2 - p), SAEF up to 2 whatever p is."""
    for p in (0.05, 0.2, 0.5, 0.9):
        limit = 2 * p / (2 - p)
        assert formula(0.0, p, 0.99 * limit) < 1 < formula(0.0, p, 1.01 * limit)
        assert formula(1.0, p, 1.99) < 1 < formula(1.0, p, 2.01)
        assert formula(1e-4, p, limit / 2) == pytest.approx(formula(0.0, p, limit / 2), rel=1e-2)


def test_shrunken_messages_make_x_an_average_of_the_trajectory() -> None:
    problem, share = equal_start(1), 0.25
    simulator = simulate(SAEF(Kept(share=share)), problem)
    x = y = problem.start
    for step, state in enumerate(states(simulator, problem, rate, 60)):
        y = y - rate(step) * problem.gradient(y)
        x = (1 - share) * x + share * y
        torch.testing.assert_close(state, x, **ROUNDING)


# -- precision and bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", [None, TopK(0.5)], ids=repr)
def test_half_precision_loses_nothing(server: AbstractCompressor | None) -> None:
    """What rounding x to 8 bits leaves out is remembered like what the messages leave out."""
    problem = equal_start(3, 50)
    start = [Vector([row.bfloat16()]) for row in problem.start]
    simulator = Simulator(SAEF(TopK(0.2), 5, 1.0, server), start)
    before = buffer_of(start[0]).double().clone()

    def optimizers(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters)

    problem.a, problem.b = problem.a.bfloat16(), problem.b.bfloat16()
    subtracted = train(simulator, problem, optimizers, lambda step: 0.02, 60)
    assert errors(simulator).dtype == torch.float32
    assert stacked(simulator).dtype == torch.bfloat16
    expected = before - subtracted.mean(0) + errors(simulator).double().mean(0)
    if server is not None:
        expected += buffer_of(simulator.workers[0].state["server"])
    # In float32; rounding x to 8 bits once in each of the steps would cost 60 * 2^-9 at worst.
    torch.testing.assert_close(stacked(simulator)[0].double(), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "messages"), [(TopK(0.1), 3), (ScaledSign(), 3), (RandomBlock(0.1), 1.5), (Identity(), 1.5)], ids=repr
)
def test_it_sends_what_it_says(scheme: AbstractCompressor, messages: float) -> None:
    start = [Vector([torch.ones(1000)]) for _ in range(4)]
    simulator = Simulator(SAEF(scheme, averaging_period=10), start)
    simulator.run(lambda worker: worker.snapshot, 0.1, 30)
    each = scheme.num_bits(1000) / 8
    for traffic in simulator.traffic:
        assert traffic.bytes_sent == pytest.approx(30 * messages * each + 3 * 1.5 * 4000, rel=1e-12)


def test_the_planner_counts_whole_periods() -> None:
    """However few steps it is asked for."""
    scheme, elements = TopK(0.05), 1000
    expected = 3 * scheme.num_bits(elements) / 8 + 1.5 * 4 * elements / 20
    for steps in (1, 6, 20, 25):
        planned = plan(SAEF(scheme, 20), 4, 4 * elements, Cluster(), steps)
        assert planned.bytes_per_step == pytest.approx(expected, rel=1e-12)


# -- in Lightning ------------------------------------------------------------------------------------------------------


class Places(Recorder):
    """Where the module's parameters are, whenever somebody may look."""

    def _note(self, place: str, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept.setdefault(place, []).append(flat(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note("batch start", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note("gradient", trainer, pl_module)
        self.kept.setdefault("x", []).append(buffer_of(trainer.strategy._steppers[0].x).clone())
        self.kept.setdefault("error", []).append(buffer_of(trainer.strategy._steppers[0].worker.state["error"]).clone())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note("validation", trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = [value.reshape(-1) for value in checkpoint["state_dict"].values()]
        self.kept.setdefault("checkpoint", []).append(torch.cat(weights).clone())

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")


def test_all_but_the_gradient_is_at_x(tmp_path: Path) -> None:
    """Validation after every batch, thus also between the two batches of a step."""
    trainer = make_trainer(
        tmp_path,
        gossip(SAEF(TopK(0.1), 3)),
        2,
        max_epochs=2,
        accumulate_grad_batches=2,
        val_check_interval=1,
        callbacks=[Places(tmp_path)],
    )
    module = Regression(size=32)
    trainer.fit(module, val_dataloaders=loader(8))
    for worker in saved(tmp_path, 2):
        steps = len(worker["x"])
        assert steps == 4
        assert [len(worker[place]) for place in ("batch start", "validation", "weights")] == [8, 8, 8]
        x = worker["x"]  # in the middle of each step: what it was at its beginning
        for step in range(steps):
            assert torch.equal(worker["gradient"][step], x[step] - worker["error"][step])
            assert torch.equal(worker["batch start"][2 * step], x[step])
            torch.testing.assert_close(worker["validation"][2 * step], x[step], rtol=0.0, atol=1e-15)
        for step in range(1, steps):
            assert torch.equal(worker["weights"][2 * step - 1], x[step])  # at the end of a step
            torch.testing.assert_close(worker["validation"][2 * step - 1], x[step], rtol=0.0, atol=1e-15)
            assert float((worker["gradient"][step] - x[step]).abs().max()) > 1e-4
        assert len(worker["checkpoint"]) == 1
        assert torch.equal(worker["checkpoint"][0], worker["weights"][-1])
    assert torch.equal(flat(module), worker["weights"][-1])


@pytest.mark.filterwarnings("ignore:The checkpoint is of 3 workers and 2 go on")
def test_another_number_of_workers_takes_over_what_was_left_out(tmp_path: Path) -> None:
    strategy = partial(gossip, SAEF(TopK(0.2), 100))
    make_trainer(tmp_path, strategy(), 3, max_epochs=1, callbacks=[Remembered(tmp_path, "old")]).fit(
        Regression(size=48)
    )
    trainer = make_trainer(tmp_path, strategy(), 2, max_epochs=2, callbacks=[Remembered(tmp_path, "new")])
    trainer.fit(Regression(size=48), ckpt_path=tmp_path / "end.ckpt")
    old = [worker["last"] for worker in saved(tmp_path, 3, "old")]
    error = torch.stack([worker["error"] for worker in old]).mean(0)
    assert float(error.abs().max()) > 1e-4
    for worker in saved(tmp_path, 2, "new"):
        torch.testing.assert_close(worker["first"]["error"], error, rtol=0.0, atol=1e-16)
        torch.testing.assert_close(worker["first"]["x"], old[0]["x"], rtol=0.0, atol=1e-15)  # the mean of equals
        assert worker["first"]["step"] == old[0]["step"] == 4

    (tmp_path / "end.ckpt.workers").rename(tmp_path / "moved")
    trainer = make_trainer(tmp_path, GossipStrategy(SAEF(TopK(0.2), 100)), 1, max_epochs=2)
    with pytest.raises(ConfigurationError, match=r"(?s)Cannot resume .*worker 0: .* is missing.*resume='consensus'"):
        trainer.fit(Regression(size=48), ckpt_path=tmp_path / "end.ckpt")


class TwoSteps(Regression):
    """Two steps of the optimizer in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(self.loss(batch))
            optimizer.step()  # type: ignore[union-attr]


def test_a_second_step_in_one_batch_counts_too(tmp_path: Path) -> None:
    alone = TwoSteps()
    make_trainer(tmp_path, "auto", 1, max_steps=4).fit(alone)
    for devices in (1, 2):
        module = TwoSteps()
        strategy = gossip(SAEF(Identity()))
        make_trainer(tmp_path, strategy, devices, max_steps=4, use_distributed_sampler=False).fit(module)
        torch.testing.assert_close(flat(module), flat(alone))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_numbers_out_of_range_are_refused() -> None:
    for period in (0, -1, 2.5, True, float("nan")):
        with pytest.raises(ConfigurationError, match=r"averaging_period=.*, needs a whole number of steps .* Use 20"):
            SAEF(averaging_period=period)  # type: ignore[arg-type]
    for share in (-0.1, 1.1, float("nan"), "1", True):
        with pytest.raises(ConfigurationError, match=r"step_ahead=.*, needs a number in \[0, 1\]. Use 1.0 for SAEF"):
            SAEF(step_ahead=share)  # type: ignore[arg-type]


def test_what_is_no_contraction_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"SAEF got Threshold\(threshold=1.0\), whose messages have no fixed"):
        SAEF(Threshold(1.0))
    start = [Vector([torch.zeros(1000)]) for _ in range(2)]
    for scheme in (SignSGD(), QSGD(), RandomK(0.01, scaled=True), Lattice(0.1), Cast("float16")):
        with pytest.raises(ConfigurationError, match=r"SAEF got .* needs a contraction, below 1. Use Int8"):
            Simulator(SAEF(scheme), start)
    with pytest.raises(ConfigurationError, match=r"SAEF's server_compressor got SignSGD.* needs a contraction"):
        Simulator(SAEF(server_compressor=SignSGD()), start)


def test_a_gradient_that_is_not_finite_is_reported() -> None:
    def gradient(worker: Worker) -> Vector:
        return Vector([torch.full((4,), math.nan)])

    with pytest.raises(CompressionError, match="got 4 NaN"):
        Simulator(SAEF(), [Vector([torch.zeros(4)]) for _ in range(2)]).run(gradient, 0.1, 1)
