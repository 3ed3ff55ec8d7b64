"""Proved here: buffers="gossip" averages running statistics on the method's graph, in its rounds or pairs, as stacked
references do, beside what forward passes change; "local" leaves each worker its own, in the consensus too; what must
not be averaged is not; what becomes of statistics beside one model is told; what cannot be is refused with words."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from reference.buffers import running_statistics
from torch import Tensor, nn

from lightning_decentral import (
    AsyncStrategy,
    AutoStrategy,
    Cluster,
    GossipStrategy,
    OpenStrategy,
    SimulatedStrategy,
    Strategy,
)
from lightning_decentral.algorithms import (
    ADPSGD,
    APSGD,
    D2,
    DPSGD,
    SGP,
    FedAvg,
    GossipPGA,
    HierarchicalGossip,
    Hogwild,
    LocalSGD,
    NoLoCo,
    Swarm,
)
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies.buffers import tell_of_statistics
from lightning_decentral.topology import DirectedGraph, OnePeerExponential, Ring
from strategies.fits import Abreast, Recorder, Regression, fit_kept, make_trainer, saved

WORKERS, STEPS = 4, 5


def matrix(algorithm: AbstractAlgorithm, step: int) -> tuple[Tensor, bool]:
    """What multiplies the statistics in a step, and whether what the forward pass changes is multiplied, too."""
    mean = torch.full((WORKERS, WORKERS), 1.0 / WORKERS, dtype=torch.float64)
    if isinstance(algorithm, HierarchicalGossip):
        host = algorithm.workers_per_host
        return torch.kron(algorithm.hosts.mixing_matrix(step), mean[:host, :host] * WORKERS / host), True
    every = algorithm.every if isinstance(algorithm, (LocalSGD, GossipPGA)) else 1
    if isinstance(algorithm, LocalSGD) or not hasattr(algorithm, "topology"):
        return (mean if (step + 1) % every == 0 else torch.eye(WORKERS, dtype=torch.float64)), True
    if isinstance(algorithm, GossipPGA) and (step + 1) % every == 0:
        return mean, True
    return algorithm.graph.mixing_matrix(step), False


class Normed(Regression):
    """BatchNorm of inputs that no parameter comes before, so that its statistics are known; and other buffers."""

    def __init__(self, learning_rate: float = 0.05, replaces: bool = False) -> None:
        norm = nn.BatchNorm1d(4)
        super().__init__(nn.Sequential(norm, nn.Linear(4, 1)).double(), learning_rate, size=4 * WORKERS * STEPS)
        self.replaces = replaces
        self.rank: int | None = None  # of the virtual worker that has it now, if there are such
        self.register_buffer("constant", torch.full((3,), 1.0 / 3.0))
        self.register_buffer("bias_mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("centre", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)

    def loss(self, batch: Any) -> Tensor:
        rank = self.global_rank if self.rank is None else self.rank
        self.unsaved += rank
        drawn = torch.full((2,), float(rank), dtype=torch.float64)
        if self.replaces:
            self.centre = 0.9 * self.centre + 0.1 * drawn
        else:
            self.centre.mul_(0.9).add_(drawn, alpha=0.1)
        return nn.functional.mse_loss(self.network(batch[0] * (1 + rank) + rank), batch[1])


class Statistics(Recorder):
    """What BatchNorm sees in each batch, and the buffers after it."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rank = trainer.global_rank
        self.kept.setdefault("inputs", []).append(batch[0] * (1 + rank) + rank)
        self.kept.setdefault("steps", []).append(statistics(pl_module))
        self.kept["count"] = int(pl_module.network[0].num_batches_tracked)
        self.kept["beside"] = (pl_module.constant.clone(), pl_module.bias_mask.clone(), float(pl_module.unsaved))


def statistics(module: LightningModule) -> Tensor:
    norm = module.network[0]
    return torch.cat([norm.running_mean, norm.running_var, module.centre]).detach().clone()


@pytest.mark.parametrize(
    "algorithm",
    [
        D2(Ring(WORKERS, lazy=True)),
        DPSGD(OnePeerExponential, order="atc"),
        GossipPGA(Ring, every=3),
        LocalSGD(every=2),
        HierarchicalGossip(workers_per_host=2),
    ],
    ids=lambda each: type(each).__name__,
)
def test_statistics_travel_as_a_stacked_reference_has_them(algorithm: AbstractAlgorithm, tmp_path: Path) -> None:
    strategy = GossipStrategy(algorithm, buffers="gossip", average_at_end=False)
    replaces = isinstance(algorithm, LocalSGD)
    module = Normed(replaces=replaces)
    fit_kept(tmp_path, strategy, WORKERS, module, max_steps=STEPS, callbacks=[Statistics(tmp_path)])
    workers = saved(tmp_path, WORKERS)
    inputs = list(zip(*(worker["inputs"] for worker in workers), strict=True))
    expected = running_statistics(partial(matrix, algorithm.resolved(WORKERS)), inputs)
    for rank, worker in enumerate(workers):
        torch.testing.assert_close(torch.stack(worker["steps"]), expected[:, rank], rtol=1e-12, atol=1e-13)
        constant, mask, unsaved = worker["beside"]
        assert torch.equal(constant, torch.full((3,), 1.0 / 3.0))
        assert torch.equal(mask, torch.tensor([0.0, -torch.inf]))
        assert unsaved == rank * STEPS
        assert worker["count"] == STEPS


class OfVirtualWorkers(Callback):
    """What each worker sees in its batches, and its buffers before."""

    def __init__(self) -> None:
        self.inputs: list[list[Tensor]] = [[] for _ in range(WORKERS)]
        self.begins: list[list[Tensor]] = [[] for _ in range(WORKERS)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rank = trainer.strategy.due_rank
        pl_module.rank = rank
        self.inputs[rank].append(batch[0] * (1 + rank) + rank)
        self.begins[rank].append(statistics(pl_module))


@pytest.mark.parametrize("algorithm", [DPSGD(Ring), LocalSGD(every=2), HierarchicalGossip(workers_per_host=2)])
def test_those_of_virtual_workers_travel_likewise(algorithm: AbstractAlgorithm, tmp_path: Path) -> None:
    seen, module = OfVirtualWorkers(), Normed()
    cluster = Cluster(jitter="lognormal", bandwidth_bytes_per_second=1e4)
    strategy = SimulatedStrategy(algorithm, WORKERS, cluster, buffers="gossip")
    make_trainer(tmp_path, strategy, 1, callbacks=[seen], max_epochs=1).fit(module)
    steps = min(map(len, seen.begins)) - 1
    assert steps >= 3
    inputs = [[each[step] for each in seen.inputs] for step in range(steps)]
    expected = running_statistics(partial(matrix, algorithm.resolved(WORKERS)), inputs)
    begins = torch.stack([torch.stack(each[1 : 1 + steps]) for each in seen.begins], dim=1)
    torch.testing.assert_close(begins, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(module.bias_mask, torch.tensor([0.0, -torch.inf]))


class Resumed(Statistics):
    """Leaves a checkpoint of the first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.folder / "first.ckpt")


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    options = {"workers": WORKERS, "max_epochs": 2, "limit_train_batches": 2}
    for name, start in (("whole", None), ("resumed", tmp_path / "first.ckpt")):
        strategy = GossipStrategy(DPSGD(OnePeerExponential), buffers="gossip")
        callbacks = [Resumed(tmp_path, name)]
        fit_kept(tmp_path, strategy, module=Normed(), callbacks=callbacks, ckpt_path=start, **options)
    whole, resumed = saved(tmp_path, WORKERS, "whole"), saved(tmp_path, WORKERS, "resumed")
    for one, other in zip(whole, resumed, strict=True):
        torch.testing.assert_close(torch.stack(one["steps"][2:]), torch.stack(other["steps"]), rtol=1e-12, atol=1e-13)


class Once(Normed):
    """A buffer that the first batch of each worker changes, and nothing after it."""

    begun = False

    def loss(self, batch: Any) -> Tensor:
        if not self.begun:
            self.begun = True
            self.centre.add_(float(self.global_rank))
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])


class Rested(Recorder):
    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.quiesce()
        self.kept["centre"] = pl_module.centre.clone()
        centre, pl_module.centre = pl_module.centre, torch.zeros(3)
        with pytest.raises(ConfigurationError, match=r"'centre' has shape \(3,\), and had \(2,\)"):
            trainer.strategy.quiesce()
        pl_module.centre = centre


def test_pairs_average_buffers_and_keep_their_sum(tmp_path: Path) -> None:
    strategy = AsyncStrategy(ADPSGD(max_pending_steps=1), buffers="gossip", share_epoch=False, average_at_end=False)
    callbacks = [Rested(tmp_path), Abreast(1)]
    fit_kept(tmp_path, strategy, 3, Once(learning_rate=0.0), max_steps=6, callbacks=callbacks)
    centres = torch.stack([worker["centre"] for worker in saved(tmp_path, 3)])
    torch.testing.assert_close(centres.sum(0), torch.full((2,), 3.0).double(), rtol=0.0, atol=1e-12)
    assert float(centres.max() - centres.min()) < 0.5  # 2 at first; each of 6 steps halves some distances


class InTheConsensus(Statistics):
    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept["evaluated"] = statistics(pl_module)

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "end.ckpt")


def test_local_ones_stay_where_they_are(tmp_path: Path) -> None:
    module = Normed()
    module.val_dataloader = module.train_dataloader  # type: ignore[method-assign]
    strategy = GossipStrategy(DPSGD(), buffers="local")
    callbacks = [InTheConsensus(tmp_path)]
    fit_kept(
        tmp_path, strategy, 2, module, max_epochs=1, limit_train_batches=3, limit_val_batches=1, callbacks=callbacks
    )
    first, second = saved(tmp_path, 2)
    for worker in (first, second):
        assert torch.equal(worker["evaluated"], worker["steps"][-1])
    assert not torch.equal(first["evaluated"], second["evaluated"])
    weights = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"]
    for state in (weights, module.state_dict()):  # the file, and the module after fit
        torch.testing.assert_close(state["network.0.running_mean"], first["state"]["network.0.running_mean"])
        mean = (first["state"]["network.1.weight"] + second["state"]["network.1.weight"]) / 2
        torch.testing.assert_close(state["network.1.weight"], mean)


def test_what_becomes_of_statistics_beside_one_model_is_told(caplog: pytest.LogCaptureFixture) -> None:
    two = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    with caplog.at_level("INFO"):
        for algorithm, module in ((DPSGD(Ring(3)), two), (APSGD(), nn.GroupNorm(1, 3)), (APSGD(), nn.Linear(3, 3))):
            tell_of_statistics(algorithm.resolved(3), "evaluation", module, 3)
        assert caplog.messages == []
        tell_of_statistics(APSGD(server="dedicated").resolved(3), "evaluation", two, 3)
        tell_of_statistics(Hogwild(), "local", two[:2], 3)
    served, shared = caplog.messages
    assert "APSGD has one model" in served
    assert "2 layers, such as '0'" in served
    assert "the mean over the 2 workers that train is evaluated and saved" in served
    assert "('0') are each worker's own" in shared
    assert "each worker evaluates with its own, and a checkpoint has worker 0's" in shared


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Strategy(buffers="mean"), "needs one of 'local', 'evaluation', 'gossip'"),
        *(
            (lambda each=each: Strategy(each, buffers="gossip"), "has no average of models that buffers could")
            for each in (NoLoCo(), Swarm(), APSGD(), FedAvg(), SGP(DirectedGraph([[1, 2], [2], [0]])))
        ),
        (lambda: AutoStrategy(buffers="gossip"), "name the method"),
        (lambda: OpenStrategy(buffers="gossip"), "the same workers all the time"),
        (lambda: SimulatedStrategy(DPSGD(), buffers="local"), "which evaluates each worker with its own"),
        (lambda: SimulatedStrategy(ADPSGD(), buffers="gossip"), "call each other for their models only"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
