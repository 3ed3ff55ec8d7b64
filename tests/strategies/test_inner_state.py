"""Proved here: what becomes of the momenta of the workers' own optimizers when local updates are averaged (kept, reset,
averaged) is what as many optimizers in one process do, on real workers, in the simulator and in a loop of Fabric; other
numbers of momenta and rounds that leave no moment for it are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.quadratic import Quadratic
from reference.runs import equal_start, gradient_of, simulate
from torch import Tensor, nn

from lightning_decentral import GossipStrategy, SimulatedStrategy
from lightning_decentral.algorithms import DiLoCo, LocalSGD, StreamingDiLoCo
from lightning_decentral.engine.memory import OptimizerMemory
from lightning_decentral.errors import ConfigurationError
from strategies.fits import QuadraticModule, fit_kept, make_trainer

WORKERS, EVERY, STEPS = 2, 3, 8
POLICIES: tuple[Any, ...] = ("kept", "reset", "averaged")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.9))


class Rows(QuadraticModule):
    """In one process the number of a batch says whose quadratic it is of."""

    def training_step(self, batch: Tensor) -> Tensor:
        row = self.global_rank if self.trainer.world_size > 1 else int(batch[0]) % WORKERS
        a, b = self.quadratic.a[row], self.quadratic.b[row]
        return (a * (self.x - b) ** 2).sum() / 2

    def configure_optimizers(self) -> Any:
        return adam(self.parameters())


def one(step: int) -> float:
    return 1.0


def in_one_process(problem: Quadratic, policy: str) -> Tensor:
    """The mean of the models after all steps."""
    models = [nn.Parameter(row.clone()) for row in problem.start]
    optimizers = [adam([model]) for model in models]
    for step in range(1, STEPS + 1):
        for model, optimizer, gradient in zip(
            models, optimizers, problem.gradient(torch.stack([*models])), strict=True
        ):
            model.grad = gradient.detach()
            optimizer.step()
        if step % EVERY == 0:
            together = [[model.data for model in models]]
            if policy == "averaged":
                remembered = [optimizer.state[model] for model, optimizer in zip(models, optimizers, strict=True)]
                together += [[each[name] for each in remembered] for name in ("exp_avg", "exp_avg_sq")]
            for tensors in together:
                mean = torch.stack(tensors).mean(0)
                for tensor in tensors:
                    tensor.copy_(mean)
            if policy == "reset":
                for optimizer in optimizers:
                    optimizer.state.clear()
    return torch.stack([model.data for model in models]).mean(0)


def test_it_is_what_as_many_optimizers_do(tmp_path: Path) -> None:
    problem, ends = equal_start(WORKERS), []
    for policy in POLICIES:
        expected = in_one_process(problem, policy)
        method = LocalSGD(EVERY, inner_state=policy)
        module = Rows(problem, one)
        fit_kept(tmp_path, GossipStrategy(method, exchange_timeout_seconds=60.0), WORKERS, module, max_steps=STEPS)
        torch.testing.assert_close(module.x.detach(), expected, rtol=0.0, atol=1e-13)
        module = Rows(problem, one)
        make_trainer(tmp_path, SimulatedStrategy(method, workers=WORKERS), 1, max_steps=STEPS * WORKERS).fit(module)
        torch.testing.assert_close(module.x.detach(), expected, rtol=0.0, atol=1e-13)
        ends.append(expected)
    assert all((one - other).abs().max() > 1e-3 for one, other in ((ends[0], ends[1]), (ends[0], ends[2])))


def test_other_numbers_of_momenta_are_refused() -> None:
    problem = equal_start(WORKERS)
    simulator = simulate(LocalSGD(2, inner_state="averaged"), problem)
    for worker in simulator.workers:
        parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        state = {parameters[0]: {"momentum_buffer": torch.ones(3)}}
        if worker.rank == 1:
            state[parameters[1]] = {"momentum_buffer": torch.ones(3)}
        worker.memory = OptimizerMemory(lambda state=state: state, parameters)  # type: ignore[misc]
    with pytest.raises(ConfigurationError, match="12 bytes that the optimizer of worker 0 remembers after step 2"):
        simulator.run(gradient_of(problem), 0.1, 2)


def test_what_leaves_no_moment_for_it_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs 'kept', 'reset' or 'averaged'"):
        DiLoCo(inner_state="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="got fragments=4 and delay=5; it needs one fragment and no delay"):
        StreamingDiLoCo(inner_state="reset")
    assert repr(LocalSGD(2)) == repr(LocalSGD(2, inner_state="kept"))
    assert "inner_state='reset'" in repr(LocalSGD(2, inner_state="reset"))
