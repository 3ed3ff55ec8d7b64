"""Proved here: a mistake is refused as early as it can be seen, mostly in ``Trainer(...)`` before any process starts,
with what was got, what is needed, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from lightning import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricsMixedPrecision
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_decentral import AsyncStrategy, FabricStrategy, GossipStrategy
from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, DiLoCo, FedBuff, FedMom, LocalSGD, NoLoCo, SyncSGD
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.topology import BipartiteRing, FromGraph, FromMatrix, Ring
from strategies.fits import Regression, asynchronous, gossip, make_trainer

pytestmark = pytest.mark.usefixtures("kept_forks")


@pytest.mark.parametrize(
    ("make", "devices", "nodes"),
    [
        (lambda: gossip(DPSGD(Ring(4))), 3, 1),
        (lambda: gossip(D2(Ring(4, lazy=True))), 8, 1),
        (lambda: asynchronous(ADPSGD(BipartiteRing(4))), 2, 1),
        (lambda: gossip(DPSGD(Ring(4))), 4, 2),
    ],
)
def test_a_topology_for_another_number_of_workers(make: Any, devices: int, nodes: int, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"for 4 workers, but {devices * nodes} take part. Make the topology for"
    ):
        make_trainer(tmp_path, make(), devices, num_nodes=nodes)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda each=each: GossipStrategy(each) for each in (DiLoCo(), FedMom(), NoLoCo())),
        lambda: AsyncStrategy(FedBuff()),
    ],
)
def test_a_gradient_scaler_with_an_outer_gradient(make: Any, tmp_path: Path) -> None:
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    trainer = make_trainer(tmp_path, make(), 1, plugins=scaled, max_steps=1)
    with pytest.raises(ConfigurationError, match=r"(?s)gradient scaler .* and has an outer gradient.*Use 'bf16-mixed'"):
        trainer.fit(Regression())


def test_a_gradient_scaler_with_an_outer_gradient_in_a_loop_of_ones_own() -> None:
    for algorithm, refused in ((DiLoCo(), True), (LocalSGD(every=1), False)):
        scaled = FabricsMixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricStrategy(algorithm), plugins=scaled)
        fabric.launch()
        layer = nn.Linear(2, 1)
        model, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
        if refused:
            with pytest.raises(ConfigurationError, match="DiLoCo got a gradient scaler"):
                model(torch.ones(1, 2))
        else:
            fabric.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()


def test_a_topology_for_all_nodes_together_is_right(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gossip(DPSGD(Ring(4))), 2, num_nodes=2)
    assert trainer.world_size == 4


def test_a_graph_in_two_parts(tmp_path: Path) -> None:
    graph = nx.Graph([(0, 1), (2, 3)])
    with pytest.raises(ConfigurationError, match="connected"):
        make_trainer(tmp_path, gossip(DPSGD(FromGraph(graph))), 4)
    identity = torch.eye(3).tolist()
    with pytest.raises(ConfigurationError, match="connected"):
        make_trainer(tmp_path, asynchronous(ADPSGD(FromMatrix(identity))), 3)


def test_d2_on_a_graph_on_which_it_diverges() -> None:
    with pytest.raises(TopologyError, match=r"eigenvalues above -1/3.*lazy"):
        D2(FromMatrix([[0.0, 1.0], [1.0, 0.0]]))


def test_an_algorithm_for_the_other_strategy() -> None:
    with pytest.raises(ConfigurationError, match=r"needs a synchronous algorithm, got ADPSGD.*Use AsyncStrategy"):
        GossipStrategy(ADPSGD())
    for algorithm in (DPSGD(), SyncSGD(), D2()):
        with pytest.raises(ConfigurationError, match=r"needs an asynchronous algorithm, got .*Use GossipStrategy"):
            AsyncStrategy(algorithm)


def test_an_algorithm_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="'dpsgd'"):
        GossipStrategy("dpsgd")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="DPSGD"):
        GossipStrategy(DPSGD)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="'adpsgd'"):
        AsyncStrategy("adpsgd")  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
@pytest.mark.parametrize("kind", [GossipStrategy, AsyncStrategy])
def test_a_time_out_that_is_not_positive(kind: Any, seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"exchange_timeout_seconds={seconds}\): needs a positive number"):
        kind(exchange_timeout_seconds=seconds)


def test_an_unknown_way_to_resume() -> None:
    with pytest.raises(ConfigurationError, match="resume='exactly'"):
        GossipStrategy(resume="exactly")  # type: ignore[arg-type]


def test_an_unknown_option_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="find_unused_parameters"):
        GossipStrategy(find_unused_parameters=True)  # type: ignore[call-arg]


class Different(Regression):
    """Worker 2 has a wider layer."""

    def configure_model(self) -> None:
        if self.global_rank == 2:
            self.extra = nn.Linear(2, 2).double()


class Ordered(Regression):
    """As many parameters on every worker, in another order on worker 1."""

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return torch.optim.SGD(parameters[::-1] if self.global_rank == 1 else parameters, lr=0.1)


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
@pytest.mark.parametrize(("module", "rank"), [(Different, 2), (Ordered, 1)])
def test_models_that_depend_on_the_rank(strategy: str, module: Any, rank: int, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=rf"Workers \[{rank}\] have other .*parameters.* than worker 0"):
        make_trainer(tmp_path, strategy, 3, max_steps=2).fit(module())


def test_one_worker_with_another_number_of_optimizers(tmp_path: Path) -> None:
    class More(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            groups = [parameters[:2], parameters[2:]] if self.global_rank == 1 else [parameters]
            return [torch.optim.SGD(group, lr=0.1) for group in groups]

    with pytest.raises(Exception, match=r"Workers \[1\] have other trainable parameters than worker 0"):
        make_trainer(tmp_path, "dpsgd_fork", 2, max_steps=2).fit(More())
