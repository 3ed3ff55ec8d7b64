"""Proved here, of a model that is divided over several servers: where messages take no time it is trained as at one
server, update by update; where they do, each server follows its rule for the gradients that it gets, at copies whose
shards have versions of their own. With all gradients in each update it is synchronous SGD with the user's SGD, momentum
or Adam. Compression loses nothing; the planner's limit grows with the servers; a lost server is named; what cannot work
is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.test_servers import LoggedAPSGD, LoggedBackupWorkers, LoggedStalenessAware
from lightning.pytorch.callbacks import ModelCheckpoint
from reference import servers
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, simulate
from reference.served import SECONDS, served, updates
from reference.shards import replayed
from strategies.fits import Regression, flat, loader, make_trainer
from torch import nn

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import APSGD, BackupWorkers, Malenia, Rennala, Ringleader, StalenessAware, SyncSGD
from lightning_decentral.algorithms.server import AbstractServer
from lightning_decentral.compression import ScaledSign
from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.flat import FlatParameters, Vector
from lightning_decentral.planning.planner import plan
from lightning_decentral.protocol import Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator

AT_ONE_SERVER: dict[str, tuple[AbstractServer, Any]] = {
    "apsgd": (APSGD(4, shards=5), lambda *given: servers.apsgd(*given, 4)),
    "staleness-aware": (StalenessAware(2, shards=2), lambda *given: servers.staleness_aware(*given, 3)),
    "backup workers": (BackupWorkers(4, shards=3), lambda *given: servers.backup_workers(*given, 4)),
    "ringleader": (Ringleader(shards=2), servers.ringleader),
    "rennala": (Rennala(7, shards=2), lambda *given: servers.rennala(*given, 7)),
    "malenia": (Malenia(5, shards=2), lambda *given: servers.malenia(*given, 5)),
}


@pytest.mark.parametrize("name", AT_ONE_SERVER)
def test_without_a_network_it_is_one_server_update_by_update(name: str) -> None:
    method, reference = AT_ONE_SERVER[name]
    problem = equal_start(6)
    expected = reference(problem.start[0], problem.gradient, 0.1, SECONDS)
    got = islice(updates(served(method, problem), problem, 0.1), method.shards - 1, None, method.shards)
    for mine, theirs in islice(zip(got, expected, strict=False), 60):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        (LoggedAPSGD(shards=3), 1),
        (LoggedAPSGD(2, shards=2, server="dedicated"), 2),
        (LoggedStalenessAware(shards=2), 1),
        (LoggedBackupWorkers(3, shards=2), 3),
    ],
)
def test_each_server_follows_its_rule_at_copies_of_many_versions(method: Any, needed: int) -> None:
    problem, shards = equal_start(5), method.shards
    simulator = simulate(method, problem, JITTERED)
    simulator.run(gradient_of(problem), 0.05, 20)
    sizes = [piece.numel for piece in Vector([problem.start[0]]).slices(shards)]
    logs = [worker.state["log"] for worker in simulator.workers[:shards]]
    expected = replayed(
        problem.start[0].split(sizes), problem.gradient, logs, needed, lambda server, x, way: x - 0.05 * way
    )
    torch.testing.assert_close(buffer_of(simulator.consensus()), torch.cat(expected), rtol=0.0, atol=1e-13)
    assert (logs[0] != logs[1]) == (method.server == "beside")  # whose own gradients take another way


def make(name: str, parameters: Any) -> Any:
    if name == "adam":
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.0 if name == "sgd" else 0.9, weight_decay=0.1)


class Trained(Regression):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return make(self.optimizer, self.parameters())


def fit(folder: Path, method: Any, optimizer: str, workers: int = 4, path: Path | None = None, **options: Any) -> Any:
    module, given = Trained(optimizer), {"max_epochs": 2, **options}
    make_trainer(folder, SimulatedStrategy(method, workers=workers), 1, **given).fit(module, loader(64), ckpt_path=path)
    return module


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_with_all_gradients_it_is_synchronous_sgd(optimizer: str, tmp_path: Path) -> None:
    expected = flat(fit(tmp_path, SyncSGD(), optimizer))
    for shards in (2, 4):
        got = flat(fit(tmp_path, BackupWorkers(4, shards=shards), optimizer))
        torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-12)
    saves = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(tmp_path, "half")]}
    fit(tmp_path, BackupWorkers(4, shards=3), optimizer, max_epochs=1, **saves)
    for method in (BackupWorkers(4, shards=3), SyncSGD()):  # with the state of all servers' optimizers
        resumed = flat(fit(tmp_path, method, optimizer, path=tmp_path / "half.ckpt"))
        torch.testing.assert_close(resumed, expected, rtol=0.0, atol=1e-12)


def test_nothing_that_was_computed_is_lost_by_compression() -> None:
    workers, numbers, sign = 4, 41, ScaledSign()
    draw, total = torch.Generator().manual_seed(3), torch.zeros(numbers, dtype=torch.float64)
    start = [Vector([torch.zeros(numbers, dtype=torch.float64)]) for _ in range(workers)]
    method = APSGD(shards=3, compressor=sign, model_compressor=sign)
    simulator = Simulator(method, start, replace(JITTERED, latency_seconds=0.3))
    given: dict[int, Vector] = {}
    for worker in simulator.workers:
        worker.read_gradient = lambda rank=worker.rank: given[rank].clone()  # type: ignore[misc]
    for request, worker in simulator.demands(20):
        if type(request) is Gradient:
            values = torch.randn(numbers, generator=draw, dtype=torch.float64)
            total += values
            given[worker.rank] = Vector([values])
        else:
            request.target(worker).add_(request.gradient, alpha=-1.0)  # type: ignore[union-attr]
    applied = -buffer_of(simulator.consensus())
    for worker in simulator.workers:
        applied += buffer_of(worker.state["left out"])
        for server, piece in enumerate(worker.state["known"].slices(3)):
            if server != worker.rank:
                known = simulator.workers[server].state[f"known: {worker.rank}"]
                assert torch.equal(buffer_of(piece), buffer_of(known))
                assert torch.equal(buffer_of(piece), buffer_of(worker.x.slices(3)[server]))
    torch.testing.assert_close(applied, total, rtol=0.0, atol=1e-12)


def test_the_planners_limit_grows_with_the_servers() -> None:
    """A model takes 0.2 s on a link: one server carries 5 gradients in a second, and four 20."""
    cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=25e6)
    plans = {shards: plan(APSGD(shards=shards, server="dedicated"), 16, 5_000_000, cluster) for shards in (1, 2, 4)}
    for shards, each in plans.items():
        assert each.limit_steps_per_second == pytest.approx(5 * shards)
        assert 0.9 < each.steps_per_second / each.limit_steps_per_second <= 1.01
        assert each.bytes_per_step == pytest.approx(10_000_000, rel=0.05)  # a gradient, and a model


def test_a_lost_server_is_named() -> None:
    problem = equal_start(4)
    simulator = simulate(APSGD(shards=2), problem, Cluster(compute_seconds=1.0, failures={1: 5.5}))
    with pytest.raises(PeerLost, match="waits for worker 1"):
        simulator.run(gradient_of(problem), 0.1, 20)
    with pytest.raises(ConfigurationError, match="A model in 2 shards needs the workers that keep them, got 1"):
        simulator.consensus()


def test_shards_are_cut_between_parameters_of_any_kind() -> None:
    kinds = [
        *((torch.float32, (3, 2)), (torch.float64, (5,)), (torch.complex64, (2,)), (torch.float32, (3,))),
        *((torch.float64, ()), (torch.float32, (2, 4)), (torch.bfloat16, (0,)), (torch.bfloat16, (7,))),
    ]
    module = [nn.Parameter(torch.randn(shape, dtype=dtype)) for dtype, shape in kinds]
    parameters = FlatParameters(module)
    parameters.parameters[3].requires_grad_(False)
    x = parameters.x
    for count in (1, 2, 3, 4):
        seen: list[int] = []
        for number, piece in enumerate(x.slices(count, x.parameter_borders)):
            apart = Vector(buffer.clone() for buffer in piece.buffers)
            for position, view in enumerate(parameters.views_of(apart, (number, count))):
                if view is not None:
                    seen.append(position)
                    assert torch.equal(view, parameters.parameters[position].detach())
        assert sorted(seen) == [0, 1, 2, 4, 5, 7], "each once, but what is frozen or empty"


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"APSGD\(shards=0\): needs a whole number of at least 1"):
        APSGD(shards=0)
    with pytest.raises(ConfigurationError, match=r"shards=5\): needs at most 4, the number of workers"):
        StalenessAware(shards=5).resolved(4)
    with pytest.raises(ConfigurationError, match=r"'dedicated', shards=4\) got 4 workers, which would serve"):
        APSGD(shards=4, server="dedicated").resolved(4)
    with pytest.raises(ConfigurationError, match="got a model of 4 parameters, needs one for each server"):
        fit(tmp_path, APSGD(shards=5), "sgd", workers=5)
    with pytest.raises(ConfigurationError, match=r"APSGD\(shards=2\) got gradient_clip_val=1.0"):
        fit(tmp_path, APSGD(shards=2), "sgd", gradient_clip_val=1.0)
    fit(tmp_path, APSGD(shards=2), "sgd", gradient_clip_val=1.0, gradient_clip_algorithm="value", max_epochs=1)
