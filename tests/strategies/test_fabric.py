"""Proved here: in a loop around Fabric every synchronous method makes, step by step, what the simulator makes, with as
many bytes, over shared memory and TCP; AD-PSGD keeps the mean; a loop with clipping, accumulation and momentum is the
Trainer's, for methods that exchange gradients and for those that exchange models; evaluation is on the consensus, and
training goes on as without it; a checkpoint in the middle of a round goes on exactly, and on another number of workers
from the mean; a worker that raises is named by the others; one that waits in a step for another, which meets all the
others, goes on; and what cannot work is refused with words."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers.workers import kept_workers
from lightning.fabric import Fabric
from reference.buffers import running_statistics
from reference.quadratic import Quadratic
from reference.runs import equal_start, fitted, simulate, states
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_decentral import FabricStrategy, GossipStrategy, SimulatedStrategy, Strategy
from lightning_decentral.algorithms import (
    ACPD,
    ADPSGD,
    D2,
    DPSGD,
    SAEF,
    SGP,
    DiLoCo,
    FedAvg,
    FedNova,
    GradientTracking,
    StreamingDiLoCo,
    SyncSGD,
)
from lightning_decentral.errors import ConfigurationError, PeerLost, WorkerFailed
from lightning_decentral.federated import Clients
from lightning_decentral.methods import METHODS
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.topology import DirectedGraph, HypercubeMatching, Ring
from lightning_decentral.traffic import Traffic
from lightning_decentral.transport import shared_memory
from strategies.fits import Recorder, Regression, fit_kept, flat, loader, saved

WORKERS, STEPS = 4, 12


def launch(function: Callable[..., Any], workers: int = WORKERS) -> None:
    """Run a function on workers who meet in one process group; it may make any number of `run_of`."""
    kept_workers(workers).run(_work, function, workers)


def _work(rank: int, function: Callable[[Fabric], None], workers: int) -> None:
    fabric = Fabric(strategy=FabricStrategy(), accelerator="cpu", devices=workers)
    fabric.launch()
    function(fabric)
    fabric.strategy.teardown()


@contextmanager
def run_of(algorithm: AbstractAlgorithm, **options: Any) -> Iterator[tuple[Fabric, FabricStrategy]]:
    """A run in a process that another Fabric has started."""
    world = torch.distributed.get_world_size()
    os.environ |= {"LOCAL_RANK": str(torch.distributed.get_rank()), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    strategy = FabricStrategy(algorithm, **{"exchange_timeout_seconds": 60.0, **options})
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=world)
    fabric.launch()
    yield fabric, strategy
    strategy.teardown()


class Own(nn.Module):
    """Every worker's own quadratic."""

    def __init__(self, problem: Quadratic, rank: int) -> None:
        super().__init__()
        self.a, self.b = problem.a[rank], problem.b[rank]
        self.x = nn.Parameter(problem.start[0].clone())

    def forward(self) -> Tensor:
        return (self.a * (self.x - self.b) ** 2).sum() / 2


def rate(step: int) -> float:
    return 0.4 / (1.0 + 0.3 * step)


EVERY_METHOD: dict[str, AbstractAlgorithm] = {
    **{name: fitted(name) for name, method in METHODS.items() if not method.asynchronous},
    "gradient_tracking, atc": GradientTracking(Ring(4), order="atc"),
    "dpsgd, atc": DPSGD(Ring(4), order="atc"),
    "sgp, directed": SGP(DirectedGraph([[1, 2], [2], [0, 3], [0]])),
    "sgp, late": SGP(DirectedGraph([[1, 2], [2], [0, 3], [0]]), overlap=2),
}


def every_method(folder: Path, fabric: Fabric) -> None:
    """On two hosts: a worker exchanges by shared memory and by TCP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "host_name", lambda: f"host {fabric.global_rank // 2}")
        for name, algorithm in EVERY_METHOD.items():
            made, traffic = steps_of(algorithm)
            sent = (traffic.bytes_sent, traffic.messages, traffic.exchanges)
            torch.save((made, sent), folder / f"{name}-{fabric.global_rank}.pt")


def steps_of(algorithm: AbstractAlgorithm) -> tuple[Tensor, Traffic]:
    with run_of(algorithm) as (inner, strategy):
        module = Own(equal_start(WORKERS), inner.global_rank)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        model, optimizer = inner.setup(module, optimizer)
        made = []
        for _ in range(STEPS):
            inner.backward(model())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            made.append(flat(module))
        return torch.stack(made), strategy.traffic


def test_every_synchronous_method_makes_what_the_simulator_makes(tmp_path: Path) -> None:
    launch(partial(every_method, tmp_path))
    for name, algorithm in EVERY_METHOD.items():
        problem = equal_start(WORKERS)
        simulator = simulate(algorithm, problem)
        expected = torch.stack(list(states(simulator, problem, rate, STEPS)))
        results = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(WORKERS)]
        made = torch.stack([steps for steps, _ in results], dim=1)
        torch.testing.assert_close(made, expected, rtol=0.0, atol=1e-12, msg=lambda text, name=name: name + text)
        counted = [(each.bytes_sent, each.messages, each.exchanges) for each in simulator.traffic]
        assert [sent for _, sent in results] == counted, name
        assert all(each.bytes_sent > 0 for each in simulator.traffic), name


def without_learning(fabric: Fabric) -> None:
    with run_of(ADPSGD()) as (inner, strategy):
        module = Own(equal_start(WORKERS), inner.global_rank)
        model, optimizer = inner.setup(module, torch.optim.SGD(module.parameters(), lr=0.0))
        start = flat(module)
        with torch.no_grad():
            module.x.add_(inner.global_rank)
        for _ in range(8):
            inner.backward(model())
            optimizer.step()
            inner.barrier()  # or the first might make all of its steps before another one's first
        with strategy.consensus():
            torch.testing.assert_close(flat(module), start + 1.5, rtol=0.0, atol=1e-12)
        distance = strategy.last_consensus_distance
        assert distance is not None
        assert distance < 0.5 * 5 * 1.25  # of 5 values, at which workers 0 to 3 have a variance of 1.25
        strategy.average()
        torch.testing.assert_close(flat(module), start + 1.5, rtol=0.0, atol=1e-12)


def test_an_asynchronous_method_keeps_the_mean_and_brings_the_workers_together() -> None:
    launch(without_learning)


def waiting(fabric: Fabric) -> None:
    """The group of the fourth step needs both, and one of them has made all of its steps."""
    with run_of(ACPD(group=1, max_delay=4)) as (inner, strategy):
        module = Own(equal_start(2), inner.global_rank)
        model, optimizer = inner.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        strategy.start()
        time.sleep(0.2 * inner.global_rank)
        for _ in range(3):
            inner.backward(model())
            optimizer.step()
        assert inner.all_reduce(torch.tensor(float(inner.global_rank)), reduce_op="sum") == 1.0
        assert strategy.steps == 3


def test_whoever_waits_for_one_that_meets_the_others_is_told_so() -> None:
    launch(waiting, 2)


class Ranked(Regression):
    """Every worker has the same batches, and a loss of its own."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + torch.distributed.get_rank() * self.network[0].weight.square().sum()


ALIKE = SyncSGD(), DiLoCo(every=3, inner_state="averaged"), D2()


def accumulated(folder: Path, clipped: float, fabric: Fabric) -> None:
    for algorithm in ALIKE:
        with run_of(algorithm) as (inner, strategy):
            module = Ranked()
            model, optimizer = inner.setup(module, cast("torch.optim.Optimizer", module.configure_optimizers()))
            model.mark_forward_method("training_step")
            module.log = lambda *_, **__: None  # type: ignore[method-assign]  # needs the Trainer
            for index, batch in enumerate(inner.setup_dataloaders(loader(), use_distributed_sampler=False)):
                accumulating = index % 2 == 0
                with inner.no_backward_sync(model, enabled=accumulating):
                    inner.backward(model.training_step(batch) / 2)
                if not accumulating:
                    inner.clip_gradients(model, optimizer, max_norm=clipped)
                    optimizer.step()
                    optimizer.zero_grad()
                if index == 3:  # in the middle of a round, and of an accumulation
                    with strategy.consensus(), torch.no_grad():
                        model.training_step(batch)
            torch.save(flat(module), folder / f"{type(algorithm).__name__}-{inner.global_rank}.pt")


def test_a_loop_makes_what_the_trainer_makes(tmp_path: Path) -> None:
    launch(partial(accumulated, tmp_path, 0.1), 2)
    for algorithm in ALIKE:
        options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 1}
        options["use_distributed_sampler"] = False
        name = f"trainer-{type(algorithm).__name__}"
        options["callbacks"] = Recorder(tmp_path, name)
        fit_kept(tmp_path, GossipStrategy(algorithm, exchange_timeout_seconds=60.0), 2, Ranked(), **options)
        for rank, record in enumerate(saved(tmp_path, 2, name)):
            made = torch.load(tmp_path / f"{type(algorithm).__name__}-{rank}.pt")
            assert torch.equal(made, record["weights"][-1]), (algorithm, rank)


ROUND = StreamingDiLoCo(every=6, fragments=3, delay=1)


def interrupted(folder: Path, pause: int, fabric: Fabric) -> None:
    path = folder / "run.ckpt"

    def train(first: int, last: int, resumes: bool) -> Tensor:
        with run_of(ROUND) as (inner, strategy):
            torch.manual_seed(inner.global_rank if resumes else 0)  # worker 0's weights are everybody's
            module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 1)).double()
            optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
            model, optimizer = inner.setup(module, optimizer)
            state = {"model": model, "optimizer": optimizer, "step": 0}
            if resumes:
                assert inner.load(path, state) == {}
                assert state["step"] == pause
            for step in range(first, last):
                inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                inner.backward((model(inputs + inner.global_rank) - step % 3).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                if step + 1 == pause and not resumes:
                    inner.save(path, {**state, "step": pause})
            own = torch.cat([flat(module), module[1].running_mean])
            strategy.average()
            if resumes:
                main = torch.load(path)["model"]
                assert main.keys() == module.state_dict().keys()
            return own

    torch.manual_seed(0)
    whole = train(0, 14, resumes=False)
    torch.manual_seed(7)
    assert torch.equal(train(pause, 14, resumes=True), whole)


@pytest.mark.parametrize("pause", [5, 7])  # with a mean under way, and without
def test_a_checkpoint_in_the_middle_of_a_round_goes_on_exactly(pause: int, tmp_path: Path) -> None:
    launch(partial(interrupted, tmp_path, pause), 2)
    assert len(list((tmp_path / "run.ckpt.workers").iterdir())) == 2

    def alone(fabric: Fabric) -> None:
        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 1)).double()
        model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.05))
        fabric.load(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer, "step": 0})
        main = torch.load(tmp_path / "run.ckpt")["model"]
        assert all(torch.equal(main[name], value) for name, value in module.state_dict().items())

    if pause == 7:
        single = Fabric(strategy=FabricStrategy(ROUND), accelerator="cpu", devices=1)
        single.launch()
        with pytest.warns(UserWarning, match="of 2 workers and 1 go on"):
            alone(single)
        cast("FabricStrategy", single.strategy).teardown()


class Normed(nn.Module):
    """BatchNorm of inputs that no parameter comes before, so that its statistics are known; and another buffer."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.norm, self.layer = rank, nn.BatchNorm1d(4).double(), nn.Linear(4, 1).double()
        self.register_buffer("centre", torch.zeros(2, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.centre.mul_(0.9).add_(float(self.rank), alpha=0.1)
        return self.layer(self.norm(inputs)).square().mean()

    def statistics(self) -> Tensor:
        return torch.cat([self.norm.running_mean, self.norm.running_var, self.centre]).clone()


def inputs_of(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return (1 + rank) * torch.randn(6, 4, dtype=torch.float64, generator=generator) + rank


def travelling_buffers(folder: Path, fabric: Fabric) -> None:
    for resumes in (False, True):
        with run_of(DPSGD(Ring), buffers="gossip") as (inner, strategy):
            rank, made = inner.global_rank, []
            module = Normed(rank)
            model, optimizer = inner.setup(module, torch.optim.SGD(module.parameters(), lr=0.05))
            if resumes:
                inner.load(folder / "run.ckpt", {"model": model, "optimizer": optimizer})
            for step in range(2 if resumes else 0, 5):
                inner.backward(model(inputs_of(rank, step)))
                optimizer.step()
                optimizer.zero_grad()
                made.append(module.statistics())
                if step == 1:
                    inner.save(folder / "run.ckpt", {"model": model, "optimizer": optimizer})
            torch.save(torch.stack(made), folder / f"{rank}-{resumes}.pt")
            with strategy.consensus():
                means = module.statistics()
            torch.save(means, folder / f"{rank}-mean.pt")


def test_buffers_travel_with_the_models(tmp_path: Path) -> None:
    launch(partial(travelling_buffers, tmp_path))
    inputs = [[inputs_of(rank, step) for rank in range(WORKERS)] for step in range(5)]
    expected = running_statistics(lambda step: (Ring(WORKERS).mixing_matrix(), False), inputs)
    made = torch.stack([torch.load(tmp_path / f"{rank}-False.pt") for rank in range(WORKERS)], dim=1)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-13)
    resumed = torch.stack([torch.load(tmp_path / f"{rank}-True.pt") for rank in range(WORKERS)], dim=1)
    torch.testing.assert_close(resumed, expected[2:], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.load(tmp_path / "1-mean.pt"), expected[-1].mean(0), rtol=1e-12, atol=1e-13)


def raising(folder: Path, skips: bool, fabric: Fabric) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the parent sends as soon as one has raised
    model, optimizer = fabric.setup(
        module := Own(equal_start(2), fabric.global_rank), torch.optim.SGD(module.parameters())
    )
    try:
        for step in range(5 if skips else 100):
            fabric.backward(model())
            if step != 3 or fabric.global_rank != 1:
                optimizer.step()
            elif not skips:
                raise ValueError("a bad batch")
        fabric.all_gather(torch.zeros(1))
    except (WorkerFailed, PeerLost) as error:
        (folder / "told").write_text(str(error))
        raise


@pytest.mark.parametrize(
    ("skips", "told"),
    [
        (False, "a bad batch"),
        (True, "is at fabric.all_gather after 4 exchanges, and worker 0 waits for its exchange number 5"),
    ],
    ids=["raises", "skips a step"],
)
def test_a_worker_that_raises_or_skips_a_step_is_named_by_the_others(skips: bool, told: str, tmp_path: Path) -> None:
    fabric = Fabric(strategy=FabricStrategy(start_method="fork"), accelerator="cpu", devices=2)
    with pytest.raises(Exception, match=told):
        fabric.launch(partial(raising, tmp_path, skips))
    assert told in (tmp_path / "told").read_text()


def alone(algorithm: AbstractAlgorithm) -> Fabric:
    fabric = Fabric(strategy=FabricStrategy(algorithm), accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


def test_what_cannot_work_is_refused() -> None:
    wrong: list[dict[str, Any]] = [{"resume": "none"}, {"exchange_timeout_seconds": 0.0}, {"poisoned": "no"}]
    for options in (*wrong, {"algorithm": "dpsgd"}, {"buffers": "mean"}, {"algorithm": SAEF(), "buffers": "gossip"}):
        with pytest.raises(ConfigurationError, match="needs"):
            FabricStrategy(**options)
    with pytest.raises(ConfigurationError, match="HypercubeMatching"):
        Fabric(strategy=FabricStrategy(DPSGD(HypercubeMatching(4))), accelerator="cpu", devices=3)
    with pytest.raises(ConfigurationError, match="APSGD, whose server makes updates while its own"):
        Fabric(strategy="apsgd", accelerator="cpu", devices=2)
    with pytest.raises(ConfigurationError, match="Hogwild, whose workers have one model in memory"):
        Fabric(strategy="hogwild", accelerator="cpu", devices=2)
    for algorithm in (FedAvg(clients=Clients(100, 10, local_steps=2)), FedNova().of_population(Clients(4, 2))):
        with pytest.raises(
            ConfigurationError, match=rf"with Clients\(.* leave clients out: {type(algorithm).__name__}"
        ):
            Fabric(strategy=FabricStrategy(algorithm), accelerator="cpu", devices=2)
    for strategy in (FabricStrategy, Strategy, SimulatedStrategy):
        with pytest.raises(ConfigurationError, match=rf"{strategy.__name__} got OpenRounds.* use OpenStrategy"):
            strategy(DiLoCo().opened())
    for layer in (nn.SyncBatchNorm(2), MeanMetric(dist_sync_on_step=True)):
        with pytest.raises(ConfigurationError, match=r"FabricStrategy got 0, a .* all workers wait for each other"):
            alone(ADPSGD()).setup(nn.Sequential(layer, nn.Linear(2, 1)))


def test_steps_that_cannot_be_made_are_refused() -> None:
    fabric = alone(SAEF())
    module, late = nn.Linear(2, 1), nn.Linear(1, 1)
    late.requires_grad_(requires_grad=False)
    parameters = [*module.parameters(), *late.parameters()]
    model, optimizer = fabric.setup(nn.Sequential(module, late), torch.optim.SGD(parameters, lr=0.1))
    strategy = cast("FabricStrategy", fabric.strategy)
    module(torch.ones(1, 2)).sum().backward()  # past the model that Fabric knows
    with pytest.raises(ConfigurationError, match="Compute the loss by calling that module"):
        optimizer.step()
    with strategy.consensus(), pytest.raises(ConfigurationError, match="Make steps outside of it"):
        optimizer.step()
    with pytest.raises(ConfigurationError, match="before the first forward pass"):
        fabric.setup(nn.Linear(1, 1))
    late.requires_grad_()
    with pytest.raises(ConfigurationError, match="2 trainable parameters that it did not have"):
        model(torch.ones(1, 2))
    strategy.teardown()


def test_an_optimizer_with_a_line_search_makes_one_step() -> None:
    fabric = alone(D2())
    module = Own(equal_start(1), 0)
    model, optimizer = fabric.setup(module, torch.optim.LBFGS(module.parameters(), max_iter=30))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        fabric.backward(loss)
        return loss

    optimizer.step(closure)
    strategy = cast("FabricStrategy", fabric.strategy)
    assert strategy.steps == 1
    torch.testing.assert_close(module.x.detach(), module.b, rtol=0.0, atol=1e-3)  # it has stopped by its tolerance
    strategy.teardown()
