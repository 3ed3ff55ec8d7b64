"""Proved here: two workers over gloo, which exchange quotients of the loss and nothing else, take the steps of one
process that is given the batches of both, bit for bit and by every method; what they send is one number for each
direction; the module leaves train mode as it was, and says what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from strategies.fits import Recorder, flat, gossip, make_trainer, saved
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import (
    L1,
    ZOSGD,
    AbstractZerothOrder,
    CooSGE,
    GauSGE,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)
from lightning_decentral.optimizers.zeroth_order_module import AbstractZerothOrderModule

SAMPLES, BATCH, EPOCHS = 24, 3, 2


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    """Inputs, targets, and the number of the sample; in float32, where every rounding shows."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.inputs = torch.randn(SAMPLES, 5, generator=generator)
        self.targets = torch.randn(SAMPLES, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.inputs[index], self.targets[index], index


OPTIMIZERS: dict[str, Any] = {
    "ZOSGD": lambda p: ZOSGD(p, 0.02, GauSGE(4)),
    "ZOProxSGD": lambda p: ZOProxSGD(p, 0.02, CooSGE(1e-2), L1(0.05)),
    "ZOProxSVRG": lambda p: ZOProxSVRG(p, 0.02, GauSGE(4, mu=1e-2), L1(0.05), snapshot_estimator=CooSGE(1e-2)),
    "ZOProxSAGA": lambda p: ZOProxSAGA(p, 0.02, SAMPLES, GauSGE(4, mu=1e-2), L1(0.05)),
}


class Network(AbstractZerothOrderModule):
    """A small network; it counts what it hands over."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 1))
        self.made = optimizer
        self.sent: list[int] = []

    def losses(self, batch: Any) -> Tensor:
        assert not self.network.training  # dropout is off
        losses: Tensor = (self.network(batch[0]).squeeze(1) - batch[1]).square()
        return losses

    def component_indices(self, batch: Any) -> Tensor:
        indices: Tensor = batch[2]
        return indices

    def configure_optimizers(self) -> AbstractZerothOrder:
        made: AbstractZerothOrder = OPTIMIZERS[self.made](self.parameters())
        return made

    def train_dataloader(self) -> DataLoader[Any]:
        data = Numbered()
        workers, rank = (self.trainer.world_size, self.trainer.global_rank) if self._trainer else (1, 0)
        return shard(data, workers, rank)

    def _gather(self, rows: Tensor) -> Tensor:
        self.sent.append(rows.numel())
        return super()._gather(rows)


def shard(data: Numbered, workers: int, rank: int) -> DataLoader[Any]:
    sampler = DistributedSampler(data, num_replicas=workers, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=BATCH, sampler=sampler)


class Kept(Recorder):
    def keep(self, trainer: Any, pl_module: Any) -> None:
        self.kept["sent"] = pl_module.sent
        self.kept["training"] = pl_module.network.training


def single(name: str) -> Tensor:
    """The weights after every step of one process that gets both workers' batches, in the order of their ranks."""
    module = Network(name).eval()
    optimizer = module.configure_optimizers()
    kept = []
    for _ in range(EPOCHS):
        shards = [list(shard(Numbered(), 2, rank)) for rank in range(2)]
        if isinstance(optimizer, ZOProxSVRG):
            optimizer.snapshot(*([loss_of(module, batch) for batch in own] for own in shards))
        for batches in zip(*shards, strict=True):
            losses = [loss_of(module, batch) for batch in batches]
            if isinstance(optimizer, ZOProxSAGA):
                optimizer.estimate(*losses, indices=[batch[2] for batch in batches])
            else:
                assert isinstance(optimizer, (ZOSGD, ZOProxSGD, ZOProxSVRG))
                optimizer.estimate(*losses)
            optimizer.step()
            kept.append(flat(module))
    return torch.stack(kept)


def loss_of(module: Network, batch: Any) -> Any:
    names = [name.removeprefix("network.") for name, _ in module.named_parameters()]

    def loss(parameters: list[Tensor]) -> Tensor:
        replaced = dict(zip(names, parameters, strict=True))
        outputs = torch.func.functional_call(module.network, replaced, (batch[0],))
        return (outputs.squeeze(1) - batch[1]).square()

    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_workers_are_one_process_bit_for_bit(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, "ddp_fork", 2, max_epochs=EPOCHS, use_distributed_sampler=False, callbacks=[Kept(tmp_path)]
    )
    trainer.fit(Network(name))
    workers = saved(tmp_path, 2)
    first, second = (torch.stack(worker["weights"]) for worker in workers)
    assert torch.equal(first, second)
    assert torch.equal(first, single(name))
    assert not torch.equal(first[0], first[-1])
    assert workers[0]["global_step"] == EPOCHS * SAMPLES // (2 * BATCH)
    assert workers[0]["training"]  # as before
    numbers, steps = len(first[0]), SAMPLES // (2 * BATCH)
    per_epoch = {
        "ZOSGD": [4] * steps,
        "ZOProxSGD": [numbers] * steps,
        "ZOProxSVRG": [numbers] + [4] * steps,
        "ZOProxSAGA": [BATCH * (4 + 1)] * steps,  # of every sample its quotients and its number
    }[name]
    assert workers[0]["sent"] == per_epoch * EPOCHS


def test_one_worker_is_the_optimizer_by_itself(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "auto", 1, max_epochs=1, callbacks=[Kept(tmp_path)])
    trainer.fit(Network("ZOProxSVRG"))
    module = Network("ZOProxSVRG").eval()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, ZOProxSVRG)
    batches = list(shard(Numbered(), 1, 0))
    optimizer.snapshot([loss_of(module, batch) for batch in batches])
    for batch in batches:
        optimizer.estimate(loss_of(module, batch))
        optimizer.step()
    worker = saved(tmp_path, 1)[0]
    assert torch.equal(worker["weights"][-1], flat(module))
    assert worker["sent"] == []


class Wrong(Network):
    """With an optimizer that wants gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unnumbered(Network):
    """Does not say which samples are in a batch."""

    def component_indices(self, batch: Any) -> Tensor:
        return AbstractZerothOrderModule.component_indices(self, batch)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Wrong("ZOSGD"), r"Wrong got SGD; it needs one zeroth-order optimizer"),
        (Unnumbered("ZOProxSAGA"), r"needs a method component_indices\(batch\)"),
    ],
    ids=["optimizer", "indices"],
)
def test_what_is_missing_is_named(module: Network, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path, "auto", 1, max_epochs=1).fit(module)


def test_gossip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="got GossipStrategy; it needs workers"):
        make_trainer(tmp_path, gossip(), 1, max_epochs=1).fit(Network("ZOSGD"))
