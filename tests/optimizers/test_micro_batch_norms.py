"""Proved here: with the callback, CLARS under gradient accumulation and under DDP takes the steps of CLARS by hand on
all micro-batches; loss scaling changes nothing; where the callback cannot work it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from strategies.fits import Recorder, Regression, Samples, flat, gossip, make_trainer, saved
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_decentral.callbacks import MicroBatchNorms
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import CLARS

STEPS, PARTS, SIZE = 4, 4, 6  # steps, micro-batches of each, samples of each


class Parts(Regression):
    """Its loader deals whole micro-batches, so that one worker and two can be given the same ones."""

    def configure_optimizers(self) -> Any:
        return CLARS(self.parameters(), lr=0.5, weight_decay=0.01)

    def training_step(self, batch: Any) -> Tensor:
        return self.loss([part[0] for part in batch])

    def train_dataloader(self) -> DataLoader[Any]:
        samples = Samples(STEPS * PARTS * SIZE)
        inputs, targets = (x.view(STEPS * PARTS, SIZE, -1) for x in (samples.inputs, samples.targets))
        return DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=1, shuffle=False)


def by_hand() -> Tensor:
    """The weights after every step, [steps, parameters]."""
    module = Parts()
    optimizer = module.configure_optimizers()
    optimizer.observe()
    kept = []
    for number, batch in enumerate(module.train_dataloader()):
        (module.training_step(batch) / PARTS).backward()
        if (number + 1) % PARTS == 0:
            optimizer.step()
            optimizer.zero_grad()
            kept.append(flat(module))
    return torch.stack(kept)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_and_workers_are_micro_batches(devices: int, accumulate: int, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        "auto" if devices == 1 else "ddp_fork",
        devices,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=True,
        max_epochs=1,
        callbacks=[MicroBatchNorms(), Recorder(tmp_path)],
    )
    module = Parts()
    if devices > 1:  # the sampler that Lightning would put in shuffles a training loader; deal in order instead
        module.train_dataloader = lambda: _dealt(module)  # type: ignore[method-assign]
    trainer.fit(module)
    weights = torch.stack([torch.stack(each["weights"]) for each in saved(tmp_path, devices)])
    weights = weights[:, accumulate - 1 :: accumulate]  # [workers, steps, parameters]
    for worker in weights[1:]:
        assert torch.equal(worker, weights[0]), "workers took different steps"
    torch.testing.assert_close(weights[0], by_hand(), rtol=1e-11, atol=1e-11)  # gradients are summed in another order


def _dealt(module: Parts) -> DataLoader[Any]:
    """Worker r of n gets the micro-batches r, r + n, r + 2n, ..."""
    whole = Parts.train_dataloader(module)
    trainer = module.trainer
    own = torch.utils.data.Subset(whole.dataset, range(trainer.global_rank, STEPS * PARTS, trainer.world_size))
    sampler = torch.utils.data.DistributedSampler(own, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(own, batch_size=1, sampler=sampler)


def test_loss_scaling_changes_nothing(tmp_path: Path) -> None:
    """The parameters are float64, which autocast leaves alone; the scale is a power of two: so it has to be exact."""
    weights = []
    for plugin in (None, MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))):
        trainer = make_trainer(
            tmp_path,
            "auto",
            1,
            accumulate_grad_batches=PARTS,
            max_epochs=1,
            callbacks=[MicroBatchNorms(), Recorder(tmp_path)],
            plugins=None if plugin is None else [plugin],
        )
        trainer.fit(Parts())
        weights.append(torch.stack(saved(tmp_path, 1)[0]["weights"]))
    assert torch.equal(*weights)
    assert not torch.equal(weights[0][0], weights[0][-1])


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "auto", 1, max_epochs=1, callbacks=[MicroBatchNorms()])
    with pytest.raises(ConfigurationError, match=r"needs an optimizer of the type CLARS, got SGD"):
        trainer.fit(Regression())


def test_without_the_callback_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"MicroBatchNorms\(\)"):
        make_trainer(tmp_path, "auto", 1, max_epochs=1).fit(Parts())


def test_gossip_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gossip(), 1, max_epochs=1, callbacks=[MicroBatchNorms()])
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r'got GossipStrategy; .* strategy="ddp"'):
        trainer.fit(Parts())
