"""Proved here: checkpoint files are whole or absent whenever a kill comes; they are written and removed in order in the
background, and through any file system and plugin; a worker file has what the user leaves in a checkpoint; what cannot
go on with a checkpoint is told so."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

from lightning_decentral import SimulatedStrategy
from lightning_decentral.strategies.files import MANIFEST, WORKER, WholeFiles, worker_folder
from strategies.fits import Recorder, Regression, make_trainer, saved

pytestmark = pytest.mark.usefixtures("kept_forks")


def fit(
    folder: Path,
    name: str = "worker",
    strategy: Any = "d2_fork",
    module: LightningModule | None = None,
    where: str | Path | None = None,
    resume: str | Path | None = None,
    top_k: int = -1,
    **options: Any,
) -> list[dict[str, Any]]:
    checkpoint = ModelCheckpoint(
        folder if where is None else where,
        filename="{epoch}",
        monitor="epoch",
        mode="max",
        save_top_k=top_k,
        save_on_train_epoch_end=True,
    )
    workers = options.pop("devices", 2)
    callbacks = [Recorder(folder, name), checkpoint, *options.pop("callbacks", [])]
    options = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": callbacks, **options}
    module = Regression() if module is None else module
    make_trainer(folder, strategy, workers, **options).fit(module, ckpt_path=resume)
    return saved(folder, workers, name)


def assert_goes_on(whole: list[dict[str, Any]], part: list[dict[str, Any]]) -> None:
    """The second run is the end of the first."""
    for one, other in zip(whole, part, strict=True):
        assert len(other["weights"]) == len(one["weights"]) // 2
        assert torch.equal(one["weights"][-1], other["weights"][-1])


# -- kills ------------------------------------------------------------------------------------------------------------


def _save_for_ever(path: Path) -> None:
    content = {"weights": torch.arange(200_000.0)}
    while True:
        WholeFiles().save_checkpoint(content, path)


def test_a_kill_leaves_a_file_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    found = 0
    for attempt in range(25):
        before = path.stat().st_ino if path.exists() else None
        process = get_context("fork").Process(target=_save_for_ever, args=(path,))
        process.start()
        deadline = time.monotonic() + 60.0
        while attempt >= 5 and (not path.exists() or path.stat().st_ino == before) and time.monotonic() < deadline:
            time.sleep(0.0003)  # until it saves; the first five are killed before, or in their first save
        time.sleep(0.0007 * attempt)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30.0)
        if path.exists():
            found += 1
            assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(200_000.0))
        assert {each.name for each in tmp_path.iterdir()} <= {"last.ckpt", "last.ckpt.part"}
    assert found >= 20


def test_nothing_is_written_outside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder for temporary files may be on another disk, from which a file cannot be moved at once."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    fit(tmp_path, strategy="dpsgd", devices=1, where=tmp_path / "files", max_epochs=1)
    assert len(list((tmp_path / "files").rglob("*.ckpt"))) == 2
    fit(tmp_path, strategy=SimulatedStrategy(workers=2), devices=1, where=tmp_path / "simulated", max_epochs=1)
    assert (tmp_path / "simulated" / "epoch=0.ckpt").exists()


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"a": torch.ones(3)}, path)
    with pytest.raises(Exception, match="pickle"):
        WholeFiles().save_checkpoint({"a": torch.zeros(3), "b": lambda: None}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(3))
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


# -- in the background ------------------------------------------------------------------------------------------------


class Slow(TorchCheckpointIO):
    """A disk that takes its time, one worker's most of all."""

    def __init__(self, rank: int = 1) -> None:
        super().__init__()
        self.end = f"-{rank}.ckpt"

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        time.sleep(0.1 if str(path).endswith(self.end) else 0.02)
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("strategy", ["d2_fork", "adpsgd_fork"])
def test_files_are_complete_in_the_background(strategy: str, tmp_path: Path) -> None:
    where = tmp_path / "files"
    whole = fit(tmp_path, "whole", strategy, where=where, top_k=2, max_epochs=4, plugins=[AsyncCheckpointIO(Slow())])
    assert sorted(each.name for each in where.iterdir()) == [
        "epoch=2.ckpt",
        "epoch=2.ckpt.workers",
        "epoch=3.ckpt",
        "epoch=3.ckpt.workers",
    ]
    for path in where.glob("*.ckpt"):
        wanted = torch.load(path, weights_only=True)[MANIFEST]["id"]
        assert sorted(os.listdir(worker_folder(path))) == [f"{wanted}-{rank}.ckpt" for rank in range(2)]
    if strategy == "d2_fork":
        resume = where / "epoch=2.ckpt"
        part = fit(tmp_path, "part", strategy, resume=resume, max_epochs=4, plugins=[AsyncCheckpointIO()])
        for one, other in zip(whole, part, strict=True):
            assert torch.equal(one["weights"][-1], other["weights"][-1])


class SavesOften(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/often.ckpt")


@pytest.mark.parametrize("slow", [0, 1])
def test_a_save_may_begin_while_the_one_before_is_written(slow: int, tmp_path: Path) -> None:
    plugin = AsyncCheckpointIO(Slow(slow))
    trainer = make_trainer(tmp_path, "dpsgd_fork", 2, max_epochs=2, callbacks=[SavesOften()], plugins=[plugin])
    trainer.fit(Regression())
    path = tmp_path / "often.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 8
    assert sorted(os.listdir(worker_folder(path))) == [f"{state[MANIFEST]['id']}-{rank}.ckpt" for rank in range(2)]


class Full(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if str(path).endswith("-1.ckpt"):
            time.sleep(0.3)
            raise OSError("no space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_full_disk_in_the_background_is_told(tmp_path: Path) -> None:
    """It is noticed at the end, when more saves have been asked for; and the other worker does not wait for them."""
    with pytest.raises(Exception, match="no space left on device"):
        fit(tmp_path, max_epochs=1, callbacks=[SavesOften()], plugins=[AsyncCheckpointIO(Full())])
    assert not list(tmp_path.glob("*.ckpt"))  # without its worker files a main file is none


# -- other file systems, other plugins --------------------------------------------------------------------------------


class Shared(DirFileSystem):
    """A remote file system that all workers reach: names say "shared://"."""

    protocol = "shared"
    root = ""

    def __init__(self, **_: Any) -> None:
        super().__init__(path=self.root, fs=LocalFileSystem())


def test_top_k_on_a_remote_file_system(tmp_path: Path) -> None:
    class Here(Shared):
        root = str(tmp_path / "remote")

    (tmp_path / "remote").mkdir()
    fsspec.register_implementation("shared", Here, clobber=True)
    whole = fit(tmp_path, "whole", where="shared://run/files", top_k=1, max_epochs=2)
    folder = tmp_path / "remote" / "run" / "files"
    assert sorted(each.name for each in folder.iterdir()) == ["epoch=1.ckpt", "epoch=1.ckpt.workers"]
    assert len(list((folder / "epoch=1.ckpt.workers").iterdir())) == 2
    longer = fit(tmp_path, "longer", where="shared://longer", max_epochs=4)
    part = fit(tmp_path, "part", where="shared://part", resume="shared://run/files/epoch=1.ckpt", max_epochs=4)
    assert torch.equal(whole[0]["weights"][-1], longer[0]["weights"][len(whole[0]["weights"]) - 1])
    assert_goes_on(longer, part)


def test_one_worker_in_memory(tmp_path: Path) -> None:
    fit(tmp_path, strategy="d2", devices=1, where="memory://run", top_k=1, max_epochs=3)
    files = fsspec.filesystem("memory").find("/run")
    assert len(files) == 2
    assert files[0] == "/run/epoch=2.ckpt"
    assert files[1].startswith("/run/epoch=2.ckpt.workers/")


class Told(TorchCheckpointIO):
    """A plugin of a user's own, which has its own way to use ``storage_options``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, "told": storage_options}, path)


def test_storage_options_reach_all_files(tmp_path: Path) -> None:
    class Saves(Recorder):
        def keep(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(self.folder / "end.ckpt", storage_options={"tier": "cold"})

    make_trainer(tmp_path, "dpsgd_fork", 2, max_epochs=1, callbacks=[Saves(tmp_path)], plugins=[Told()]).fit(
        Regression()
    )
    files = [tmp_path / "end.ckpt", *Path(worker_folder(tmp_path / "end.ckpt")).iterdir()]
    assert len(files) == 3
    assert all(torch.load(path, weights_only=True)["told"] == {"tier": "cold"} for path in files)


# -- what is in a file ------------------------------------------------------------------------------------------------


class Backbone(Regression):
    """A large frozen part, which is left out of checkpoints in one of the ways that users have."""

    strict_loading = False

    def __init__(self, how: str) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 1)).double())
        self.network[0].requires_grad_(False)
        self.how = how

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = {"network.0.weight", "network.0.bias"}
        state = checkpoint["state_dict"]
        if self.how == "deleted":
            for name in frozen:
                del state[name]
        if self.how == "filtered":
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in frozen}
        if self.how == "renamed":
            checkpoint["state_dict"] = {"head." + name: state[name] for name in state if name not in frozen}
        if self.how == "halved":
            checkpoint["state_dict"] = {name: value.half() for name, value in state.items() if name not in frozen}
        if self.how == "moved":
            checkpoint["mine"] = [{name: state[name] for name in state if name not in frozen}]
            del checkpoint["state_dict"]
        if self.how == "elsewhere":
            checkpoint["state_dict"] = {}
            checkpoint["head"] = {name: value for name, value in self.state_dict().items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.how == "renamed":
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.removeprefix("head."): value for name, value in state.items()}
        if self.how == "moved":
            checkpoint["state_dict"] = checkpoint["mine"][0]
        if self.how == "elsewhere":
            self.load_state_dict(checkpoint["head"], strict=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network[2].parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("how", ["deleted", "filtered", "renamed", "halved", "elsewhere", "moved"])
def test_a_worker_file_has_what_the_main_file_has(how: str, tmp_path: Path) -> None:
    whole = fit(tmp_path, "whole", "dpsgd_fork", module=Backbone(how))
    path = tmp_path / "epoch=0.ckpt"
    for file in Path(worker_folder(path)).iterdir():
        names = set(torch.load(file, weights_only=True)[WORKER]["left_out"])
        assert {"network.0.weight", "network.0.bias"} <= names
        assert file.stat().st_size < 60_000 + 2 * path.stat().st_size
        assert file.stat().st_size < 100_000
    assert_goes_on(whole, fit(tmp_path, "part", "dpsgd_fork", module=Backbone(how), resume=path))


def test_a_callback_that_averages_weights_still_gets_its_own(tmp_path: Path) -> None:
    whole = fit(tmp_path, "whole", callbacks=[WeightAveraging()])
    resume = tmp_path / "epoch=0.ckpt"
    assert_goes_on(whole, fit(tmp_path, "part", resume=resume, callbacks=[WeightAveraging()]))


# -- what does not go on ----------------------------------------------------------------------------------------------


class Optimized(Regression):
    def __init__(self, optimizer: Any, **options: Any) -> None:
        super().__init__()
        self.optimizer, self.options = optimizer, options

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.01, **self.options)


def test_another_optimizer_is_told(tmp_path: Path) -> None:
    fit(tmp_path, module=Optimized(torch.optim.SGD, momentum=0.9), max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    with pytest.raises(Exception, match=r"in the checkpoint is of SGD, and does not fit Adam of this run") as error:
        fit(tmp_path, module=Optimized(torch.optim.Adam), resume=path)
    assert "load the weights alone" in str(error.value)


def test_a_relative_of_the_optimizer_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, module=Optimized(torch.optim.Adam), max_epochs=1)
    kept = fit(tmp_path, "part", module=Optimized(torch.optim.AdamW), resume=tmp_path / "epoch=0.ckpt")
    assert len(kept[0]["weights"]) == 4


class Ordered(LightningModule):
    """Two layers of equal shapes, in another order or under another name on one worker."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.sizes = nn.Linear(2, 2)  # so that there is something before

    def configure_model(self) -> None:
        torch.manual_seed(3)
        names = ["first", "second"]
        if self.trainer.global_rank == 1:
            names = {"order": ["second", "first"], "name": ["first", "third"], "buffer": names}[self.what]
        for name in names:
            self.add_module(name, nn.Linear(4, 4))
        if self.what == "buffer":
            self.register_buffer("mean" if self.trainer.global_rank == 0 else "variance", torch.zeros(3))

    def training_step(self, batch: Any) -> Any:
        raise AssertionError("training has begun")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return Regression().train_dataloader()


@pytest.mark.parametrize(
    ("what", "theirs", "first"),
    [
        ("order", "second.weight", "first.weight"),
        ("name", "third.weight", "second.weight"),
        ("buffer", "variance", "mean"),
    ],
)
@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
def test_equal_shapes_are_not_enough(what: str, theirs: str, first: str, strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy, 2, max_epochs=1)
    with pytest.raises(Exception, match=rf"worker 1 has {theirs} of shape .* where worker 0 has {first} of shape"):
        trainer.fit(Ordered(what))
