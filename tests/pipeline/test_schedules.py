"""Proved here: every schedule backwards every batch once, drain included, with the staleness that its formula says; at
rate 0 each stage's gradient is the exact one of its batch; without delays it is backpropagation bit for bit; methods
follow a reference of the delayed update, and are stable exactly where the delayed quadratic is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from reference.pipelines import delayed
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.methods import PIPELINES
from lightning_decentral.pipeline.clock import seconds_per_batch, timeline, used
from lightning_decentral.pipeline.local import LocalPipeline
from lightning_decentral.pipeline.random_numbers import random_numbers_of
from lightning_decentral.pipeline.runner import Update
from lightning_decentral.pipeline.schedules import (
    SCHEDULES,
    Schedule,
    ddg,
    dsp,
    features_replay,
    gpipe,
    one_f_one_b,
    ouroboros,
    pipe_2bw,
    pipedream,
)

STAGES = 4
CUTS = (2, 4, 6)  # a stage is a layer and its tanh
FORMULAS: dict[str, Callable[[int], int]] = {
    "dsp": lambda k: 2 * (STAGES - 1 - k),
    "ddg": lambda k: STAGES - 1 - k,
    "features_replay": lambda k: STAGES - 1 - k,
    "ouroboros": lambda k: STAGES - 1 - k,
    "pipedream": lambda k: STAGES - 1 - k,
    "pipe_2bw": lambda k: 1,
    "gpipe": lambda k: 0,
    "one_f_one_b": lambda k: 0,
}


def make(name: str) -> Schedule:
    return SCHEDULES[name](STAGES, 4) if name in ("gpipe", "one_f_one_b", "pipe_2bw") else SCHEDULES[name](STAGES)


def model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(STAGES)]
    return nn.Sequential(*layers).double()


def batches(count: int, rows: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(
    schedule: Schedule, net: nn.Module, data: list[Tensor], rate: float, momentum: float = 0.0, drain: bool = True
) -> tuple[list[Update], LocalPipeline]:
    seen: list[Update] = []
    pipeline = LocalPipeline(
        schedule,
        net,
        lambda x: net(x).square().mean(),
        lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum),
        CUTS[: schedule.stages - 1],
        on_update=seen.append,
    )
    for batch in data:
        pipeline.train(batch)
    if drain:
        pipeline.drain()
    return seen, pipeline


def test_the_table_has_every_schedule() -> None:
    assert set(PIPELINES) == set(SCHEDULES) == set(FORMULAS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_batch_is_backwarded_once_and_exactly(name: str) -> None:
    """At rate 0 stale weights are the same weights: what is kept, replayed or stashed must give the true gradient."""
    net, data = model(), batches(9)
    seen, pipeline = run(make(name), net, data, rate=0.0)
    assert Counter((update.stage, update.batch) for update in seen) == Counter(
        (stage, batch) for stage in range(STAGES) for batch in range(len(data))
    )
    for update in seen:
        own = list(net[update.stage].parameters())
        exact = torch.autograd.grad(net(data[update.batch]).square().mean(), own)
        for parameter, gradient in zip(own, exact, strict=True):
            torch.testing.assert_close(update.gradients[parameter], gradient, rtol=1e-12, atol=1e-15)
    assert pipeline.under_way == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_staleness_is_that_of_the_formula(name: str) -> None:
    schedule = make(name)
    _, pipeline = run(schedule, model(), batches(16), rate=0.01, drain=False)
    assert pipeline.staleness == schedule.staleness == tuple(map(FORMULAS[name], range(STAGES)))


def test_the_papers_notation_and_other_queues() -> None:
    assert dsp(3, forward_delays=(1, 1, 0), staleness=(4, 2, 0)) == dsp(3)
    assert dsp(4).lags == (6, 4, 2, 0)
    assert dsp(3, forward_delays=(2, 2, 0), staleness=(6, 3, 0)).lags == (6, 3, 0)  # queues of 2 and 1


@pytest.mark.parametrize("name", ["dsp", "ddg", "features_replay", "pipe_2bw", "gpipe"])
def test_one_stage_is_backpropagation_bit_for_bit(name: str) -> None:
    ours, theirs, data = model(), model(), batches(6)
    run(SCHEDULES[name](1), ours, data, rate=0.2, momentum=0.9)
    _backpropagate(theirs, data, rate=0.2, momentum=0.9)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["dsp", "ddg"])
def test_delays_grow_in_a_warm_up(name: str) -> None:
    """By one for each three batches, over a drain; the first three are backpropagation's, and none is lost."""
    ours, theirs, data = model(), model(), batches(30)
    schedule = SCHEDULES[name](STAGES).warmed_up(3)
    seen: list[Update] = []
    pipeline = LocalPipeline(
        schedule,
        ours,
        lambda x: ours(x).square().mean(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.2),
        CUTS,
        on_update=seen.append,
    )
    for batch in data[:3]:
        pipeline.train(batch)
    _backpropagate(theirs, data[:3], rate=0.2, momentum=0.0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    behind = []
    for count, batch in enumerate(data[3:], 3):
        pipeline.train(batch)
        behind.append(pipeline.stages[0].under_way)
        if count == 6:
            assert pipeline.staleness[0] == 1
            pipeline.drain()
    assert pipeline.staleness == schedule.lags
    assert behind[:4] == [1, 1, 1, 2]
    pipeline.drain()
    assert Counter(update.stage for update in seen) == dict.fromkeys(range(STAGES), len(data))
    ticks = len(data) + schedule.drain_ticks
    for stage in range(STAGES):
        works = [work for tick in range(ticks) for work in schedule.program(stage, tick, len(data))]
        for backward in (False, True):
            assert [work.batch for work in works if work.backward == backward] == list(range(len(data)))


def test_no_delays_are_backpropagation_bit_for_bit() -> None:
    ours, theirs, data = model(), model(), batches(6)
    run(dsp(STAGES, forward_delays=(0, 0, 0, 0)), ours, data, rate=0.2, momentum=0.9)
    _backpropagate(theirs, data, rate=0.2, momentum=0.9)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("schedule", [gpipe(STAGES, 4), one_f_one_b(STAGES, 4)])
def test_synchronous_schedules_are_exact(schedule: Schedule) -> None:
    """But for the order in which the gradients of micro-batches are added."""
    ours, theirs, data = model(), model(), batches(6)
    run(schedule, ours, data, rate=0.2, momentum=0.9)
    _backpropagate(theirs, data, rate=0.2, momentum=0.9)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def _backpropagate(net: nn.Module, data: list[Tensor], rate: float, momentum: float) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
    for batch in data:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("schedule", "replays"),
    [
        (dsp(STAGES), True),
        (features_replay(STAGES), True),
        (dsp(STAGES, recompute=False), False),
        (ddg(STAGES), False),
        (ouroboros(STAGES), False),
        (pipedream(STAGES), False),
        (dsp(STAGES).predicted().slowed(8), True),
        (features_replay(STAGES).predicted(0.5), True),
        (ddg(STAGES).predicted(0.7), False),
        (dsp(STAGES, recompute=False).predicted().slowed(20), False),
    ],
)
def test_follows_the_reference(schedule: Schedule, replays: bool) -> None:
    net, data, rate = model(), batches(12), 0.3
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    run(schedule, net, data, rate)
    expected = delayed(weights, data, rate, schedule.lags, replays, schedule.prediction, schedule.slow_start)
    for parameter, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-11, atol=1e-13)


def test_pipe_2bw_takes_each_gradient_one_update_earlier() -> None:
    """Its published rule, ``W(t+1) = W(t) - rate grad f(W(t-1))``, on the whole model."""
    net, data, rate = model(), batches(8), 0.3
    now = [parameter.detach().clone() for parameter in net.parameters()]
    before = now
    run(pipe_2bw(STAGES), net, data, rate)
    for batch in data:
        at = [value.clone().requires_grad_() for value in before]
        hidden = batch
        for weight, bias in zip(at[::2], at[1::2], strict=True):
            hidden = torch.tanh(hidden @ weight.T + bias)
        gradients = torch.autograd.grad(hidden.square().mean(), at)
        before, now = now, [value - rate * gradient for value, gradient in zip(now, gradients, strict=True)]
    for parameter, value in zip(net.parameters(), now, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-11, atol=1e-13)


def test_the_clock_knows_the_closed_forms() -> None:
    """GPipe and 1F1B use ``m / (m + K - 1)`` of the time; without a flush all of it, replays being work."""
    for stages, parts in ((2, 4), (4, 8)):
        for schedule in (gpipe(stages, parts), one_f_one_b(stages, parts)):
            assert used(timeline(schedule, 5), schedule) == pytest.approx(parts / (parts + stages - 1))
        alone = seconds_per_batch(gpipe(1, 1), forward_seconds=float(stages), backward_seconds=2.0 * stages)
        for schedule in (ddg(stages), pipe_2bw(stages), dsp(stages, recompute=False)):
            assert alone / seconds_per_batch(schedule) == pytest.approx(stages)
        hidden = seconds_per_batch(dsp(stages), send_seconds=0.5)
        assert hidden == pytest.approx(seconds_per_batch(dsp(stages)))
        assert alone / hidden == pytest.approx(stages * 3 / 4)  # a replay is a third of a pass more


def test_untied_ouroboros_is_ddg_and_pipedream() -> None:
    nets = [model() for _ in range(3)]
    for schedule, net in zip((ouroboros(STAGES), ddg(STAGES), pipedream(STAGES)), nets, strict=True):
        run(schedule, net, batches(7), rate=0.2)
    for values in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])


class Tied(nn.Module):
    """A table that embeds, and whose transpose is the output."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_a_tied_table_gets_both_gradients() -> None:
    """On a constant batch at rate 0 their sum is the gradient of the tied model, once both ends are busy."""
    torch.manual_seed(2)
    table = nn.Embedding(5, 3)
    net = nn.Sequential(table, nn.Linear(3, 3), nn.Tanh(), Tied(table)).double()
    tokens = torch.tensor([0, 3, 3, 1])

    def step(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(batch), batch)

    seen: list[Update] = []
    pipeline = LocalPipeline(
        ouroboros(3), net, step, lambda parameters: torch.optim.SGD(parameters, lr=0.0), (1, 3), on_update=seen.append
    )
    for _ in range(6):
        pipeline.train(tokens)
    exact = torch.autograd.grad(step(tokens), table.weight)[0]
    owner = [update for update in seen if table.weight in update.gradients]
    assert all(update.stage == 2 for update in owner)
    torch.testing.assert_close(owner[-1].gradients[table.weight], exact, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(owner[0].gradients[table.weight], exact)  # the delayed half has not come yet


class Scalar(nn.Module):
    """One number, so that a stage is a quadratic of it: see `test_is_stable_below_the_closed_form_rate`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


@pytest.mark.parametrize("schedule", [ddg(1), ddg(2), ddg(3), dsp(2), dsp(3)])
def test_is_stable_below_the_closed_form_rate(schedule: Schedule) -> None:
    """A quadratic of curvature 1 with a gradient ``delay`` updates old: stable below ``2 sin(pi / (2 (2 delay + 1)))``.

    Only the first stage is trained; those behind it, which are frozen, make its gradient stale.
    """
    delay = schedule.lags[0]
    limit = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    sizes = []
    for rate in (0.95 * limit, 1.05 * limit):
        blocks = [Scalar() for _ in range(schedule.stages)]
        for block in blocks[1:]:
            block.weight.requires_grad_(False).zero_()
        net = nn.Sequential(*blocks)
        pipeline = LocalPipeline(
            schedule,
            net,
            lambda x, net=net: net(x).square().sum() / 2,
            lambda parameters, rate=rate: torch.optim.SGD(list(parameters), lr=rate),
            tuple(range(1, schedule.stages)),
        )
        reached = []
        for _ in range(150):
            pipeline.train(torch.zeros(1, dtype=torch.float64))
            reached.append(abs(float(blocks[0].weight.detach())))
        sizes.append(max(reached[-20:]))  # it swings
    assert sizes[0] < 0.6
    assert sizes[1] > 2.0


def test_what_is_kept_is_what_the_table_says() -> None:
    """DSP keeps ``S_k + 1`` inputs and no copy of weights, DDG ``tau_k + 1`` graphs, PipeDream-2BW two versions."""
    kept = {}
    for schedule in (dsp(STAGES), ddg(STAGES), features_replay(STAGES), pipe_2bw(STAGES)):
        _, pipeline = run(schedule, model(), batches(16), rate=0.01)
        kept[schedule.name] = [(s.most_inputs, s.most_graphs, s.most_versions) for s in pipeline.stages]
    assert kept["dsp"] == [(7, 0, 0), (5, 0, 0), (3, 0, 0), (0, 1, 0)]
    assert kept["features_replay"] == [(4, 0, 0), (3, 0, 0), (2, 0, 0), (0, 1, 0)]
    assert kept["ddg"] == [(0, 4, 4), (0, 3, 3), (0, 2, 2), (0, 1, 0)]
    assert all(versions <= 2 for _, _, versions in kept["pipe_2bw"])


def test_running_statistics_are_updated_once_and_dropout_is_replayed() -> None:
    """The replayed pass has the masks of the first one: at rate 0 its gradient is that of the loss which was seen."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    seen: list[Update] = []
    pipeline = LocalPipeline(
        dsp(2),
        net,
        lambda x: net(x).square().mean(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        (3,),
        on_update=seen.append,
    )
    data = batches(5)
    losses = [pipeline.train(batch) for batch in data]
    pipeline.drain()
    assert int(net[1].num_batches_tracked) == len(data)
    for update in (update for update in seen if update.stage == 0):
        with random_numbers_of(torch.device("cpu"), 0, update.batch, 0, 0):
            loss = net[3](net[:3](data[update.batch])).square().mean()
        assert loss == losses[update.batch]
        exact = torch.autograd.grad(loss, net[1].bias)[0]
        torch.testing.assert_close(update.gradients[net[1].bias], exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dsp(3, staleness=(1, 2, 0)), "no queue shorter than 0"),
        (lambda: dsp(3, forward_delays=(1, 1, 1)), "the last 0"),
        (lambda: dsp(2, parts=4), "takes whole batches"),
        (lambda: pipe_2bw(4, parts=2), "at least as many as stages"),
        (lambda: ouroboros(1), "at least 2"),
        (lambda: ddg(0), "at least 1"),
        (lambda: Schedule("own", (1, 2)), "do not grow"),
        (lambda: gpipe(2, 4).warmed_up(5), "its delays are 0 or 1"),
        (lambda: pipe_2bw(2).slowed(5), "slow_start=5, and needs none"),
        (lambda: pipe_2bw(2).predicted(), "prediction=0.0"),
        (lambda: dsp(2).predicted(1.0), "from 0 to below 1"),
    ],
)
def test_impossible_schedules_are_refused(make: Callable[[], Schedule], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()
