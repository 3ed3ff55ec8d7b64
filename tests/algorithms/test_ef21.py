"""Proved here: EF21 is its stacked reference step by step under jitter; constant gradients are learnt by the closed
formula; on data that differs between workers it comes to the exact optimum, where error feedback with the same messages
does not; all workers know the mean of the estimates; another number of workers goes on from that; and what cannot work
is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from reference import methods
from reference.runs import JITTERED, Kept, buffer_of, equal_start, gradient_of, largest, simulate, stacked, states
from strategies.fits import Regression, Remembered, gossip, make_trainer, saved

from lightning_decentral.algorithms import EF21, SAEF
from lightning_decentral.compression import Identity, Lattice, SignSGD, Threshold, TopK
from lightning_decentral.errors import CompressionError, ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.simulation.simulator import Simulator

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = methods.ef21(problem.start, problem.gradient, rate, torch.eye, largest)
    simulator = simulate(EF21(TopK(0.4)), problem, JITTERED)
    for state in states(simulator, problem, rate, 40):
        assert torch.equal(state, state[:1].expand_as(state))
        torch.testing.assert_close(state, next(reference), **ROUNDING)
        own = torch.stack([buffer_of(worker.state["estimate"]) for worker in simulator.workers]).mean(0)
        for worker in simulator.workers:
            torch.testing.assert_close(buffer_of(worker.state["mean"]), own, **ROUNDING)


def test_without_loss_it_is_synchronous_sgd() -> None:
    problem = equal_start(4)
    reference = methods.sync_sgd(problem.start, problem.gradient, rate, torch.eye)
    for state in states(simulate(EF21(Identity()), problem), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_constant_gradients_are_learnt_by_the_closed_formula() -> None:
    """A message is a share of the difference: after t of them the estimate is ``1 - (1 - share)^t`` of the gradient."""
    share, slopes = 0.25, torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    simulator = Simulator(EF21(Kept(share=share)), [Vector([torch.zeros(2, dtype=torch.float64)]) for _ in slopes])
    simulator.run(lambda worker: Vector([slopes[worker.rank].clone()]), 0.1, 30)
    learnt = sum(1 - (1 - share) ** (step + 1) for step in range(30))
    torch.testing.assert_close(stacked(simulator)[0], -0.1 * learnt * slopes.mean(0), **ROUNDING)


def test_it_comes_to_the_optimum_where_error_feedback_does_not() -> None:
    scheme, problem, distance = TopK(0.4), equal_start(4), {}
    for algorithm in (EF21(scheme), SAEF(scheme, None, 0.0)):
        simulator = simulate(algorithm, problem)
        simulator.run(gradient_of(problem), 0.1, 250)
        distance[type(algorithm)] = float((stacked(simulator) - problem.optimum).abs().max())
    assert distance[EF21] < 1e-9
    assert distance[SAEF] > 1e-3


def test_half_precision_remembers_in_float32() -> None:
    start = [Vector([torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()]) for _ in range(3)]
    simulator = Simulator(EF21(TopK(0.2)), start)
    simulator.run(lambda worker: worker.snapshot, 0.1, 30)
    for worker in simulator.workers:
        assert buffer_of(worker.x).dtype == torch.bfloat16
        assert {buffer_of(vector).dtype for vector in worker.state.values()} == {torch.float32}
    assert bool((stacked(simulator) == stacked(simulator)[:1]).all())


@pytest.mark.filterwarnings("ignore:The checkpoint is of 3 workers and 2 go on")
def test_another_number_of_workers_goes_on_from_what_all_know(tmp_path: Path) -> None:
    old_trainer = make_trainer(
        tmp_path, gossip(EF21(TopK(0.2))), 3, max_epochs=1, callbacks=[Remembered(tmp_path, "old")]
    )
    old_trainer.fit(Regression(size=48))
    trainer = make_trainer(tmp_path, gossip(EF21(TopK(0.2))), 2, max_epochs=2, callbacks=[Remembered(tmp_path, "new")])
    trainer.fit(Regression(size=48), ckpt_path=tmp_path / "end.ckpt")
    known = saved(tmp_path, 3, "old")[0]["last"]["mean"]
    assert float(known.abs().max()) > 1e-4
    for worker in saved(tmp_path, 2, "new"):
        for name in ("estimate", "mean"):
            torch.testing.assert_close(worker["first"][name], known, rtol=0.0, atol=1e-14)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"EF21 got Threshold\(threshold=1.0\), whose messages have no fixed"):
        EF21(Threshold(1.0))
    start = [Vector([torch.zeros(1000)]) for _ in range(2)]
    for scheme in (SignSGD(), Lattice(0.1)):
        with pytest.raises(ConfigurationError, match=r"EF21 got .* needs a contraction, below 1"):
            Simulator(EF21(scheme), start)
    with pytest.raises(CompressionError, match="got 4 NaN"):
        Simulator(EF21(), [Vector([torch.zeros(4)])]).run(lambda worker: Vector([torch.full((4,), torch.nan)]), 0.1, 1)
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    trainer = make_trainer(tmp_path, "ef21", 1, max_steps=1, plugins=scaled)
    with pytest.raises(ConfigurationError, match=r"EF21 got a gradient scaler .* Use 'bf16-mixed' or '32-true'"):
        trainer.fit(Regression())
