"""Proved here: QG-DSGDm is its stacked reference step by step; its momentum moves no fixed point, where a local one
multiplies the error; a second momentum is refused."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, buffer_of, fixed_point, gradient_of, rests_at, simulate, stacked

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import DPSGD, QGDSGDm
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import LocalStep
from lightning_decentral.topology import OnePeerExponential, Ring


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.8, "follow": 0.7, "nesterov": True}, {"momentum": 0.0, "follow": 0.0}],
    ids=["default", "nesterov", "none"],
)
@pytest.mark.parametrize("topology", [Ring, OnePeerExponential])
def test_it_is_the_reference_step_by_step_under_jitter(topology: Any, options: dict[str, Any]) -> None:
    assert_steps_equal(QGDSGDm(topology, **options), methods.qg_dsgdm, 5, **options)


def test_it_rests_where_dpsgd_without_momentum_does() -> None:
    problem = Quadratic(5)
    x = rests_at(QGDSGDm(Ring(5), momentum=0.8), problem, 0.05)
    torch.testing.assert_close(x, fixed_point(problem, Ring(5), 0.05, "atc"), rtol=0.0, atol=1e-10)


def test_a_local_momentum_multiplies_the_error() -> None:
    problem, graph = Quadratic(5), Ring(5)
    simulator = simulate(DPSGD(graph, order="atc"), problem)
    gradient = gradient_of(problem)
    parameters = [torch.nn.Parameter(buffer_of(worker.x)) for worker in simulator.workers]
    optimizers = [torch.optim.SGD([each], 0.01, momentum=0.8) for each in parameters]
    for worker in simulator.workers:
        worker.read_gradient = lambda worker=worker: gradient(worker)  # type: ignore[misc]
    for request, worker in simulator.demands(1500):
        if type(request) is LocalStep:
            parameters[worker.rank].grad = buffer_of(worker.gradient)
            optimizers[worker.rank].step()
    expected = fixed_point(problem, graph, 0.01 / (1 - 0.8), "atc")
    torch.testing.assert_close(stacked(simulator), expected, rtol=0.0, atol=1e-10)


def test_a_second_momentum_is_refused() -> None:
    class Model(BoringModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    trainer = L.Trainer(
        strategy=SimulatedStrategy(QGDSGDm(), workers=3),
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ConfigurationError, match=r"QGDSGDm got SGD with momentum=0.9, needs one without"):
        trainer.fit(Model())
    with pytest.raises(ConfigurationError, match=r"momentum=1.0, needs a number in \[0, 1\)"):
        QGDSGDm(momentum=1.0)
