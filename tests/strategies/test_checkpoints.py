"""Proved here: the main file is an ordinary Lightning checkpoint of the consensus; resuming gives every worker the
very bits of an uninterrupted run; another number of workers starts from the consensus; whatever cannot be resumed
exactly is named; worker files appear and disappear with their main file, and an interrupted save leaves nothing that
cannot be loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_decentral.algorithms import (
    APSGD,
    D2,
    DPSGD,
    EF21,
    SAEF,
    ChocoSGD,
    DiLoCo,
    FedMom,
    Hogwild,
    LocalSGD,
    SyncSGD,
)
from lightning_decentral.compression import Int8, TopK
from lightning_decentral.strategies import AsyncStrategy, GossipStrategy
from lightning_decentral.strategies.files import MANIFEST, worker_folder
from lightning_decentral.topology import RandomMatching, Ring
from strategies.fits import (
    Recorder,
    Regression,
    Samples,
    asynchronous,
    fit_kept,
    flat,
    gossip,
    loader,
    make_trainer,
    saved,
)

pytestmark = pytest.mark.usefixtures("kept_forks")


class Dropped(Regression):
    """Dropout makes the random numbers matter, momentum the optimizer's state, StepLR the schedule."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)).double())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    def train_dataloader(self) -> Any:
        return loader(48)

    def val_dataloader(self) -> Any:
        return loader(12)


class Seeded(Recorder):
    """Every worker has random numbers of its own, as after ``seed_everything(workers=True)``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["restored"] = flat(pl_module)
        if trainer.current_epoch == 0:
            torch.manual_seed(50 + trainer.global_rank)

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["momentum"] = [
            state["momentum_buffer"].clone()
            for state in trainer.optimizers[0].state.values()
            if "momentum_buffer" in state
        ]
        self.kept["rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.kept["steps"] = trainer.strategy.steps
        self.kept["epoch"] = trainer.current_epoch


def fit(
    folder: Path,
    strategy: Any,
    name: str = "worker",
    workers: int = 3,
    epochs: int = 2,
    resume: Path | None = None,
    module: LightningModule | None = None,
    checkpoint: ModelCheckpoint | None = None,
    **options: Any,
) -> LightningModule:
    """Train, keep a checkpoint of every epoch in ``folder/epoch=...``, and write what each worker ends with."""
    module = Dropped() if module is None else module
    callbacks = [Seeded(folder, name), checkpoint or every_epoch(folder)]
    options = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": callbacks, **options}
    make_trainer(folder, strategy, workers, **options).fit(module, ckpt_path=resume)
    return module


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


def worker_files(path: Path) -> list[str]:
    """The worker files beside a main file, as ranks, once it is sure that all belong to it."""
    folder = Path(worker_folder(path))
    if not folder.exists():
        return []
    wanted = torch.load(path, weights_only=True)[MANIFEST]["id"]
    names = sorted(os.listdir(folder))
    assert all(name.startswith(wanted + "-") for name in names), (wanted, names)
    return [name.removeprefix(wanted + "-").removesuffix(".ckpt") for name in names]


def test_the_main_file_is_an_ordinary_checkpoint_of_the_consensus(tmp_path: Path) -> None:
    module = fit(tmp_path, "dpsgd_fork", module=Regression(size=48), epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=True)  # tensors and plain values only
    consensus = torch.stack([worker["weights"][-1] for worker in saved(tmp_path, 3)]).mean(0)

    plain = Regression()
    plain.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(flat(plain), consensus, rtol=0.0, atol=1e-15)
    loaded = Regression.load_from_checkpoint(path, network=Regression().network)
    assert torch.equal(flat(loaded), flat(plain))
    assert torch.equal(flat(module), flat(plain))
    assert worker_files(path) == ["0", "1", "2"]

    # Lightning alone can go on from it, with its own strategies.
    make_trainer(tmp_path, "auto", 1, max_epochs=2).fit(Regression(), ckpt_path=path)
    # ... and ours can evaluate it with any number of workers.
    for strategy, workers in (("dpsgd_fork", 2), ("adpsgd", 1)):
        other = Regression(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double())
        make_trainer(tmp_path, strategy, workers).validate(other, loader(12), ckpt_path=path, verbose=False)
        if workers == 1:
            assert torch.equal(flat(other), flat(plain))


@pytest.mark.parametrize(
    ("algorithm", "weights_only"),
    [
        (DPSGD(RandomMatching(3)), None),
        (D2(), True),
        (ChocoSGD(compressor=Int8(stochastic=True)), None),
        (EF21(TopK(0.2)), None),
        (SyncSGD(), None),
        (LocalSGD(every=7, delay=4, local_share=0.5), None),  # a mean is under way at the checkpoint, after step 8
        (DiLoCo(every=3), None),
    ],
    ids=repr,
)
def test_resuming_gives_the_bits_of_an_uninterrupted_run(
    algorithm: Any, weights_only: bool | None, tmp_path: Path
) -> None:
    resume = {"ckpt_path": tmp_path / "epoch=1.ckpt", "weights_only": weights_only}
    # Whatever the random numbers are that the second ones begin with, the file has them.
    for name, given in (("whole", {}), ("resumed", resume)):
        callbacks = [Seeded(tmp_path, name), every_epoch(tmp_path)]
        options: dict[str, Any] = {"max_epochs": 3, "callbacks": callbacks, "enable_checkpointing": True, **given}
        fit_kept(tmp_path, GossipStrategy(algorithm, exchange_timeout_seconds=60.0), 3, Dropped(), **options)
    for whole, part in zip(saved(tmp_path, 3, "whole"), saved(tmp_path, 3, "resumed"), strict=True):
        assert len(whole["weights"]) == 12
        assert len(part["weights"]) == 4
        assert torch.equal(part["restored"], whole["weights"][7])
        for ours, theirs in zip(part["weights"], whole["weights"][8:], strict=True):
            assert torch.equal(ours, theirs)
        assert all(map(torch.equal, part["momentum"], whole["momentum"]))
        assert all(torch.equal(value, whole["state"][key]) for key, value in part["state"].items())
        assert (part["rate"], part["steps"], part["epoch"], part["global_step"]) == (
            whole["rate"],
            whole["steps"],
            whole["epoch"],
            whole["global_step"],
        )
        assert part["metrics"] == whole["metrics"]


def test_an_asynchronous_run_resumes_every_worker(tmp_path: Path) -> None:
    """Not bit for bit, as no two asynchronous runs are equal; but each goes on from its own state."""
    fit(tmp_path, asynchronous(), "first", epochs=1)
    fit(tmp_path, asynchronous(), "second", epochs=2, resume=tmp_path / "epoch=0.ckpt")
    folder = Path(worker_folder(tmp_path / "epoch=0.ckpt"))
    files = [torch.load(path, weights_only=True) for path in sorted(folder.iterdir())]
    for worker, own in zip(saved(tmp_path, 3, "second"), files, strict=True):
        weights = torch.cat([own["state_dict"][name].reshape(-1) for name, _ in Dropped().named_parameters()])
        assert torch.equal(worker["restored"], weights)
        assert worker["steps"] > own["lightning_decentral_worker"]["steppers"][0]["step"] > 0
        assert worker["epoch"] == 2


@pytest.mark.parametrize("workers", [1, 4])
def test_another_number_of_workers_starts_from_the_consensus(workers: int, tmp_path: Path) -> None:
    fit(tmp_path, "d2_fork", epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    consensus = Dropped()
    consensus.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    folder = tmp_path / "resumed"
    folder.mkdir()
    strategy = "d2_fork" if workers > 1 else "d2"
    fit(folder, strategy, workers=workers, epochs=2, resume=path)
    for worker in saved(folder, workers):
        assert torch.equal(worker["restored"], flat(consensus))
        assert worker["epoch"] == 2
    assert worker_files(folder / "epoch=1.ckpt") == [str(rank) for rank in range(workers)]


class Outer(Seeded):
    """The common model and the outer momentum of DiLoCo, at the start and after each step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.kept["outer"] = []
        self.look(trainer)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        (stepper,) = trainer.strategy._steppers  # type: ignore[attr-defined]
        (states,) = stepper.worker.state["outer"]
        momentum = [state["momentum_buffer"].clone() for state in states]
        self.kept["outer"].append((stepper.worker.step, stepper.worker.state["global"].buffers[0].clone(), momentum))


@pytest.mark.parametrize(("algorithm", "rate"), [(DiLoCo(every=3), 0.7), (FedMom(every=3), 1.0)], ids=repr)
def test_another_number_of_workers_goes_on_with_the_common_model_and_the_outer_momentum(
    algorithm: Any, rate: float, tmp_path: Path
) -> None:
    """In the middle of a round, which ends when it would have ended, with the momentum of the rounds before."""
    for name, workers, epochs, path in (("first", 3, 1, None), ("second", 2, 2, tmp_path / "epoch=0.ckpt")):
        callbacks = [Outer(tmp_path, name), every_epoch(tmp_path)]
        options: dict[str, Any] = {"max_epochs": epochs, "callbacks": callbacks, "enable_checkpointing": True}
        strategy = GossipStrategy(algorithm, exchange_timeout_seconds=60.0)
        fit_kept(tmp_path, strategy, workers, Dropped(), ckpt_path=path, **options)
    (step, common, momentum), resumed = saved(tmp_path, 3, "first")[0]["outer"][-1], saved(tmp_path, 2, "second")
    assert step == 4
    for worker in resumed:
        begun, steps = worker["outer"][0], worker["outer"][1:]
        assert begun[0] == 4
        assert torch.equal(begun[1], common)
        assert torch.equal(begun[2][0], momentum[0])
        assert [torch.equal(each, common) for _, each, _ in steps] == [True, *[False] * 5]
        _, after, (moved,) = steps[1]
        difference = moved - 0.9 * momentum[0]
        assert float(difference.abs().max()) > 1e-3
        torch.testing.assert_close(after, common - rate * (difference + 0.9 * moved), rtol=0.0, atol=1e-14)
    assert torch.equal(resumed[0]["weights"][1], resumed[1]["weights"][1])  # after 6 steps
    assert not torch.equal(resumed[0]["weights"][0], resumed[1]["weights"][0])


def test_a_server_and_the_worker_that_trains_resume_with_the_same_bits(tmp_path: Path) -> None:
    """One sends gradients to one that only serves, so that their order is always the same: of a shared epoch."""
    for name, path in (("whole", None), ("resumed", tmp_path / "epoch=0.ckpt")):
        callbacks = [Seeded(tmp_path, name), every_epoch(tmp_path)]
        options: dict[str, Any] = {"max_epochs": 2, "callbacks": callbacks, "enable_checkpointing": True}
        strategy = AsyncStrategy(APSGD(server="dedicated"), exchange_timeout_seconds=60.0)
        fit_kept(tmp_path, strategy, 2, Dropped(), ckpt_path=path, **options)
    (server, worker), resumed = saved(tmp_path, 2, "whole"), saved(tmp_path, 2, "resumed")
    assert len(resumed[1]["weights"]) == 12
    assert all(map(torch.equal, resumed[1]["weights"], worker["weights"][12:]))
    assert all(map(torch.equal, resumed[0]["momentum"], server["momentum"]))
    for one, other in zip((server, worker), resumed, strict=True):
        assert (other["steps"], other["rate"], other["epoch"]) == (one["steps"], one["rate"], one["epoch"])
        assert all(torch.equal(other["state"][key], value) for key, value in one["state"].items())


class Rows(LightningModule):
    """Each worker's gradients are of a row of its own in a table: whoever is first, the updates come to the same."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(2, 3, sparse=sparse).double()

    def training_step(self, batch: Any) -> Tensor:
        row = self.table(torch.tensor([self.global_rank]))
        return ((row * batch[0].mean(0)[:3]) ** 2 - row).mean()

    def configure_optimizers(self) -> Any:
        if self.table.sparse:
            return torch.optim.SparseAdam(self.parameters(), lr=0.05)
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return Resumable()


@pytest.mark.parametrize(
    "algorithm", [APSGD(), Hogwild(), Hogwild(copy=False)], ids=["A-PSGD", "Hogwild", "Hogwild in place"]
)
def test_asynchronous_workers_resume_in_the_middle_of_an_epoch(algorithm: Any, tmp_path: Path) -> None:
    """With the same bits, where these do not depend on who was first, by a loader that goes on where it was."""
    for name, path in (("whole", None), ("resumed", tmp_path / "step=8.ckpt")):
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
        options: dict[str, Any] = {"max_epochs": 2, "callbacks": [Seeded(tmp_path, name), saving]}
        strategy = AsyncStrategy(algorithm, exchange_timeout_seconds=60.0)
        module = Rows(sparse=algorithm.shares_model)
        fit_kept(tmp_path, strategy, 2, module, ckpt_path=path, enable_checkpointing=True, **options)
    whole, resumed = saved(tmp_path, 2, "whole"), saved(tmp_path, 2, "resumed")
    for rank, (one, other) in enumerate(zip(whole, resumed, strict=True)):
        assert len(one["weights"]) == 12
        own = slice(3 * rank, 3 * rank + 3)
        for weights, expected in zip(other["weights"], one["weights"][8:], strict=True):
            assert torch.equal(weights[own], expected[own])
        assert torch.equal(other["state"]["table.weight"], one["state"]["table.weight"])
        assert not torch.equal(other["restored"][own], one["weights"][-1][own])


def test_a_missing_or_damaged_worker_file_is_named(tmp_path: Path) -> None:
    fit(tmp_path, "dpsgd_fork", epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    first, second, third = sorted(Path(worker_folder(path)).iterdir())
    second.unlink()
    third.write_bytes(third.read_bytes()[:1000])
    with pytest.raises(Exception, match="Cannot resume every worker exactly") as error:
        fit(tmp_path, "dpsgd_fork", resume=path)
    message = str(error.value)
    assert f"worker 1: {second} is missing" in message
    assert f"worker 2: {third} is damaged" in message
    assert str(first) not in message
    assert "resume='consensus'" in message
    fit(tmp_path, gossip(resume="consensus"), "anew", resume=path)
    consensus = Dropped()
    consensus.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    for worker in saved(tmp_path, 3, "anew"):
        assert torch.equal(worker["restored"], flat(consensus))


def test_a_worker_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, "dpsgd_fork", workers=2, epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    first, second = sorted(Path(worker_folder(path)).iterdir())
    second.write_bytes(first.read_bytes())
    with pytest.raises(Exception, match=r"worker 1: .* belongs to another checkpoint"):
        fit(tmp_path, "dpsgd_fork", workers=2, resume=path)


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, "dpsgd_fork", epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    for algorithm in (D2(), DPSGD(Ring(3))):
        with pytest.raises(Exception, match=r"The checkpoint is of DPSGD\(topology=OnePeerExponential") as error:
            fit(tmp_path, gossip(algorithm), resume=path)
        assert repr(algorithm.resolved(3)) in str(error.value)
    fit(tmp_path, gossip(D2(), resume="consensus"), "anew", resume=path)
    assert saved(tmp_path, 3, "anew")[0]["epoch"] == 2


def test_top_k_removes_the_worker_files_too(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="epoch_number", mode="max", save_top_k=2)
    fit(tmp_path, "dpsgd_fork", workers=2, epochs=4, module=Numbered(), checkpoint=checkpoint)
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == [
        "epoch=2.ckpt",
        "epoch=2.ckpt.workers",
        "epoch=3.ckpt",
        "epoch=3.ckpt.workers",
    ]
    for path in tmp_path.glob("epoch*.ckpt"):
        assert worker_files(path) == ["0", "1"]


class Numbered(Dropped):
    def on_train_epoch_end(self) -> None:
        self.log("epoch_number", float(self.current_epoch))


@pytest.mark.parametrize("kind", [True, "link"])
def test_the_last_checkpoint_has_exactly_one_set_of_worker_files(kind: Any, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_last=kind, save_top_k=1, save_on_train_epoch_end=True
    )
    fit(tmp_path, "d2_fork", "first", workers=2, epochs=2, checkpoint=checkpoint)
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() == (kind == "link")
    assert worker_files(last) == ["0", "1"]
    assert len(list(tmp_path.glob("*.workers"))) == (1 if kind == "link" else 2)
    fit(tmp_path, "d2_fork", "second", workers=2, epochs=3, resume=last)
    first, second = saved(tmp_path, 2, "first"), saved(tmp_path, 2, "second")
    for before, after in zip(first, second, strict=True):
        assert torch.equal(after["restored"], before["weights"][-1])


class Unsynced(Dropped):
    """Every worker has another opinion about which epoch was best."""

    def on_train_epoch_end(self) -> None:
        self.log(
            "score",
            torch.tensor([[0.1, 0.5, 0.3], [0.7, 0.2, 0.6], [0.4, 0.9, 0.8]])[self.global_rank, self.current_epoch],
        )


@pytest.mark.parametrize("top_k", [1, -1])
def test_a_metric_that_differs_between_workers_still_gives_one_file(top_k: int, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path / "files",
        filename="{epoch}-{score:.1f}",
        monitor="score",
        save_top_k=top_k,
        save_on_train_epoch_end=True,
    )
    fit(tmp_path, "dpsgd_fork", epochs=3, module=Unsynced(), checkpoint=checkpoint)
    scores_of_worker_0 = {"epoch=0-score=0.1.ckpt", "epoch=1-score=0.5.ckpt", "epoch=2-score=0.3.ckpt"}
    files = {path.name for path in (tmp_path / "files").glob("*.ckpt")}
    assert files
    assert files <= scores_of_worker_0
    if top_k == -1:
        assert files == scores_of_worker_0
    for name in files:
        assert worker_files(tmp_path / "files" / name) == ["0", "1", "2"]
    folders = {path.name.removesuffix(".workers") for path in (tmp_path / "files").glob("*.workers")}
    assert folders == files


class DuringValidation(Recorder):
    """What the local weights were when the validation began."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["local"] = {key: value.detach().clone() for key, value in pl_module.state_dict().items()}


def test_a_checkpoint_from_inside_a_validation_has_the_live_weights(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    recorder = DuringValidation(tmp_path)
    fit(tmp_path, "dpsgd_fork", epochs=1, val_check_interval=0.75, callbacks=[recorder, checkpoint])
    path = tmp_path / "step=3.ckpt"
    main = torch.load(path, weights_only=True)["state_dict"]
    workers = saved(tmp_path, 3)
    files = [torch.load(each, weights_only=True) for each in sorted(Path(worker_folder(path)).iterdir())]
    assert len(files) == 3
    for worker, own in zip(workers, files, strict=True):
        for key, value in worker["local"].items():
            assert torch.equal(own["state_dict"][key], value), key
    for key, value in main.items():
        if value.is_floating_point():
            mean = torch.stack([worker["local"][key] for worker in workers]).mean(0)
            torch.testing.assert_close(value, mean, rtol=1e-12, atol=1e-14)
            if key == "network.3.weight":
                assert not torch.equal(value, workers[0]["local"][key])


def test_resuming_from_inside_an_epoch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    fit(tmp_path, "d2_fork", "whole", epochs=2, checkpoint=checkpoint)
    fit(tmp_path, "d2_fork", "part", epochs=2, resume=tmp_path / "step=6.ckpt", checkpoint=checkpoint)
    for whole, part in zip(saved(tmp_path, 3, "whole"), saved(tmp_path, 3, "part"), strict=True):
        assert torch.equal(part["restored"], whole["weights"][5])
        assert part["global_step"] == whole["global_step"] == 8


class Resumable:
    """A loader that Lightning saves in the middle of an epoch; it adds noise, so that random numbers matter twice."""

    def __init__(self) -> None:
        self.samples, self.position = Samples(24), 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.position %= len(self)
        while self.position < len(self):
            chosen = slice(4 * self.position, 4 * self.position + 4)
            self.position += 1
            inputs = self.samples.inputs[chosen]
            yield inputs + 0.1 * torch.randn_like(inputs), self.samples.targets[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Resumed(Dropped):
    def train_dataloader(self) -> Any:
        return Resumable()


@pytest.mark.parametrize("step", [2, 5, 8])
def test_resuming_at_a_step_gives_the_same_bits_with_a_loader_that_can(step: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"workers": 2, "val_check_interval": 3}
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=step)
    fit(tmp_path, "d2_fork", "whole", module=Resumed(), checkpoint=checkpoint, **options)
    resume = tmp_path / f"step={step}.ckpt"
    fit(tmp_path, "d2_fork", "part", module=Resumed(), checkpoint=every_epoch(tmp_path), resume=resume, **options)
    for whole, part in zip(saved(tmp_path, 2, "whole"), saved(tmp_path, 2, "part"), strict=True):
        assert len(part["weights"]) == 12 - step
        for ours, theirs in zip(part["weights"], whole["weights"][step:], strict=True):
            assert torch.equal(ours, theirs)


class Unfreezing(Regression):
    """Its first layer is frozen for an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.network[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.network[0].requires_grad_(self.current_epoch >= 1)


@pytest.mark.parametrize(
    "algorithm",
    [D2(), ChocoSGD(), SAEF(TopK(0.2), 5), SyncSGD()],
    ids=["d2", "choco", "saef", "sync_sgd"],
)
def test_resuming_after_unfreezing(algorithm: Any, tmp_path: Path) -> None:
    """The run that goes on has more parameters to exchange than its optimizer trains at the beginning."""
    fit(tmp_path, gossip(algorithm), "whole", module=Unfreezing(), epochs=3, workers=2)
    for epoch, steps in ((0, 8), (1, 4)):
        fit(
            tmp_path,
            gossip(algorithm),
            f"part-{epoch}",
            module=Unfreezing(),
            epochs=3,
            workers=2,
            resume=tmp_path / f"epoch={epoch}.ckpt",
            checkpoint=ModelCheckpoint(tmp_path / "part"),
        )
        for whole, part in zip(saved(tmp_path, 2, "whole"), saved(tmp_path, 2, f"part-{epoch}"), strict=True):
            assert len(part["weights"]) == steps
            assert torch.equal(part["weights"][-1], whole["weights"][-1])


class Finetuned(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.network[0]

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("strategy", ["d2_fork", "adpsgd_fork"])
def test_resuming_with_a_callback_that_adds_parameters(strategy: str, tmp_path: Path) -> None:
    """Lightning's callback freezes them again in the run that goes on, under DDP too."""
    for name, resume in (("whole", None), ("part", tmp_path / "whole" / "epoch=1.ckpt")):
        callbacks = [Recorder(tmp_path, name), BackboneFinetuning(1, verbose=False), every_epoch(tmp_path / name)]
        options: dict[str, Any] = {"max_epochs": 3, "callbacks": callbacks, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, strategy, 2, **options)
        trainer.fit(Finetuned(), ckpt_path=resume)
    whole, part = saved(tmp_path, 2, "whole"), saved(tmp_path, 2, "part")
    assert 0 < sum(len(each["weights"]) for each in part) < sum(len(each["weights"]) for each in whole)


@pytest.mark.parametrize("how", ["save_weights_only", "worker_checkpoints=False"])
def test_worker_files_can_be_left_out(how: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_weights_only=how == "save_weights_only", save_on_train_epoch_end=True
    )
    strategy = gossip(worker_checkpoints=how == "save_weights_only")
    module = fit(tmp_path, strategy, epochs=1, checkpoint=checkpoint)
    assert not list(tmp_path.glob("*.workers"))
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert MANIFEST not in state
    for key, value in module.state_dict().items():
        assert torch.equal(state["state_dict"][key], value)


class Breaks(TorchCheckpointIO):
    """The disk of worker 1 is full at the second save."""

    def __init__(self) -> None:
        super().__init__()
        self.saves = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if str(path).endswith("-1.ckpt"):
            self.saves += 1
            if self.saves == 2:
                raise OSError("no space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


def test_an_interrupted_save_leaves_the_one_before_whole(tmp_path: Path) -> None:
    """``last.ckpt`` is written over at every epoch; the second save fails half-way on one worker."""
    checkpoint = ModelCheckpoint(tmp_path, filename="only", enable_version_counter=False, save_on_train_epoch_end=True)
    with pytest.raises(Exception, match="no space left on device"):
        fit(tmp_path, "d2_fork", epochs=3, checkpoint=checkpoint, plugins=[Breaks()])
    path = tmp_path / "only.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 0
    wanted = state[MANIFEST]["id"]
    assert {f"{wanted}-{rank}.ckpt" for rank in range(3)} <= set(os.listdir(worker_folder(path)))
    fit(tmp_path, "d2_fork", "resumed", epochs=2, resume=path)
    assert saved(tmp_path, 3, "resumed")[1]["epoch"] == 2


class Fails(Dropped):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.failing = rank

    def training_step(self, batch: Any) -> Tensor:
        if self.global_rank == self.failing and self.global_step == 5:
            raise KeyError("the original mistake")
        return super().training_step(batch)


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
@pytest.mark.parametrize(("how", "rank"), [("OnExceptionCheckpoint", 1), ("save_on_exception", 0)])
def test_a_checkpoint_on_an_exception_does_not_hide_it(how: str, rank: int, strategy: str, tmp_path: Path) -> None:
    """A worker that stops saves alone, without waiting for the others; the launcher ends these."""
    if how == "OnExceptionCheckpoint":
        callback: Any = OnExceptionCheckpoint(tmp_path, "broken")
    else:
        callback = ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True, every_n_epochs=50)
    trainer = make_trainer(tmp_path, strategy, 3, max_epochs=9, callbacks=[callback], enable_checkpointing=True)
    with pytest.raises(Exception, match="the original mistake"):
        trainer.fit(Fails(rank))


def test_a_checkpoint_by_hand_and_one_resumed_on_one_device(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "d2", 1, max_epochs=2)
    module = Dropped()
    trainer.fit(module)
    path = tmp_path / "by_hand.ckpt"
    trainer.save_checkpoint(path)
    for key, value in torch.load(path, weights_only=True)["state_dict"].items():
        assert torch.equal(value, module.state_dict()[key])


def test_the_number_of_optimizers_must_be_the_same(tmp_path: Path) -> None:
    fit(tmp_path, gossip(None), workers=2, epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    state = torch.load(path, weights_only=True)
    for file in Path(worker_folder(path)).iterdir():
        own = torch.load(file, weights_only=True)
        own["lightning_decentral_worker"]["steppers"] *= 2
        torch.save(own, file)
    assert state[MANIFEST]["world_size"] == 2
    with pytest.raises(Exception, match="The checkpoint has 2 optimizers, this run 1"):
        fit(tmp_path, gossip(None), workers=2, resume=path)
