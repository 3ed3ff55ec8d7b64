"""Proved here: methods of every kind train parameters of every type, shape and memory layout, and what has sparse
gradients; what cannot be laid out anew is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import ACPD, ADPSGD, DPSGD, SyncSGD
from strategies.fits import Indices, make_trainer

# One of each way in which a vector is laid out, sent and read: gradients and models, compressed or in slices, by calls,
# through memory that all have, and with virtual workers.
EVERY_WAY = [
    *("sync_sgd_fork", "dpsgd_fork", "gradient_tracking_fork", "choco_sgd_fork", "saef_fork", "streaming_diloco_fork"),
    *("adpsgd_fork", "acid_fork", "swarm_fork", "apsgd_fork", "hogwild_fork"),
    *(SyncSGD(), DPSGD(), ACPD(ratio=0.7)),
]
EXACT = ["sync_sgd_fork", "dpsgd_fork", "adpsgd_fork", SyncSGD(), ADPSGD()]


def fit(folder: Path, method: Any, model: LightningModule) -> None:
    """With two workers: real ones, or virtual ones if the method is an algorithm."""
    name, devices, batches = method, 2, 64
    if not isinstance(method, str):
        name, devices, batches = SimulatedStrategy(method, workers=2), 1, 128
    make_trainer(folder, name, devices, max_steps=batches).fit(model, DataLoader(Indices(512), batch_size=1))


class EveryKind(LightningModule):
    """Each parameter wants to be 1, or 1 + 1j."""

    def __init__(self) -> None:
        super().__init__()
        parameter = nn.Parameter
        self.odd = parameter(torch.zeros(3))
        self.spectral = parameter(torch.zeros(5, dtype=torch.complex64))
        self.turned = parameter(torch.zeros(2, 3, dtype=torch.complex64).t())
        self.wide_spectral = parameter(torch.zeros((), dtype=torch.complex128))
        self.scalar = parameter(torch.zeros(()))
        self.empty = parameter(torch.zeros(0, 4))
        self.every_second = parameter(torch.zeros(4, 6).t()[::2])
        self.channels_last = parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.wide = parameter(torch.zeros(5, dtype=torch.float64))
        self.half_wide = parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.whole = parameter(torch.arange(3), requires_grad=False)
        self.unused = parameter(torch.zeros(2, dtype=torch.complex64))
        self.one, self.other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.other.weight = self.one.weight
        nn.init.zeros_(self.one.weight)

    def training_step(self, batch: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and name != "unused":
                loss = loss + (parameter - target(parameter)).abs().square().sum().double() / 2
        return loss + 0.0 * self.other.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.25)


def target(parameter: Tensor) -> complex:
    return 1 + 1j if parameter.is_complex() else 1.0


@pytest.mark.usefixtures("kept_forks")
@pytest.mark.parametrize("method", EVERY_WAY, ids=str)
def test_every_kind_of_parameter_is_trained(method: Any, tmp_path: Path) -> None:
    model = EveryKind()
    fit(tmp_path, method, model)
    for name, parameter in model.named_parameters():
        if name == "whole":
            assert parameter.tolist() == [0, 1, 2]
        elif name == "unused":
            assert not (parameter.abs() > 1e-6).any()  # DCD-PSGD's models take the noise of rounding
        else:
            assert bool(((parameter - target(parameter)).abs() < 0.02).all()), name
    assert model.one.weight is model.other.weight


class Lookup(LightningModule):
    """Two tables that see the same; one has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sparse = nn.Embedding(9, 3, sparse=True)
        self.dense = nn.Embedding(9, 3)
        self.dense.weight.data = self.sparse.weight.data.clone()

    def training_step(self, batch: Tensor) -> Tensor:
        rows = batch % 8
        return (self.sparse(rows) - 1).square().sum() + (self.dense(rows) - 1).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.usefixtures("kept_forks")
@pytest.mark.parametrize("method", EXACT, ids=str)
def test_sparse_gradients_are_as_good_as_dense_ones(method: Any, tmp_path: Path) -> None:
    model = Lookup()
    untouched = model.dense.weight.detach()[8].clone()
    fit(tmp_path, method, model)
    torch.testing.assert_close(model.sparse.weight, model.dense.weight)
    assert bool(((model.sparse.weight[:8] - 1).abs() < 0.5).all())  # whatever order workers take turns in
    assert torch.equal(model.sparse.weight[8], untouched)


class OnlySparse(Lookup):
    """An optimizer that takes no other gradients, and leaves rows alone that no worker has looked up."""

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.sparse(batch % 8) - 1).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.sparse.parameters(), lr=0.2)


@pytest.mark.usefixtures("kept_forks")
@pytest.mark.parametrize("method", EXACT, ids=str)
def test_an_optimizer_for_sparse_gradients_gets_them(method: Any, tmp_path: Path) -> None:
    model = OnlySparse()
    before = model.sparse.weight.detach().clone()
    fit(tmp_path, method, model)
    now = model.sparse.weight.detach()
    assert float((now[:8] - 1).abs().mean()) < 0.5 * float((before[:8] - 1).abs().mean())


def lazy() -> nn.Module:
    return nn.LazyLinear(1)


def on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1, device="meta"))


def sharing_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    return model


class Holds(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def on_fit_start(self) -> None:
        raise AssertionError("it was not refused before")

    def training_step(self, batch: Tensor) -> Tensor:
        return self.network(torch.ones(4)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("method", ["dpsgd_fork", DPSGD()], ids=str)
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lazy, r"network\.\w+ is a lazy module's.*Run a forward pass"),
        (on_meta, r"network\.0\.\w+ is on the meta device|no data"),
        (sharing_memory, r"network\.0\.weight and network\.1\.weight share memory.*make them one"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(network: Any, words: str, method: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=words):
        fit(tmp_path, method, Holds(network()))
