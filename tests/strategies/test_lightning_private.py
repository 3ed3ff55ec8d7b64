"""Each private name of Lightning that we use does what we take it for, and nobody but one module uses any.

There is a test for each function of `lightning_private`, on a real `Trainer`. Run them with the lowest and the newest
Lightning that is supported: ``python3 tasks.py lowest`` and ``python3 tasks.py test``.
"""

from __future__ import annotations

import ast
import inspect
import signal
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import lightning_decentral.callbacks as callbacks
import lightning_decentral.strategies as strategies
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies import fabric_private
from lightning_decentral.strategies import lightning_private as private
from strategies.fits import QUIET, Regression, Samples, loader, make_trainer

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lightning_decentral"
ONE_MODULE = PACKAGE / "strategies" / "lightning_private.py"
FABRICS_MODULE = (
    PACKAGE / "strategies" / "fabric_private.py"
)  # the same for Fabric, that programs without it do not read


class Probe(Callback):
    """Looks at something in each batch of a fit, or when a hook is called."""

    def __init__(self, look: Callable[[Trainer], Any], hook: str = "on_train_batch_start") -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda trainer, *_: self.seen.append(look(trainer)))


def fit(folder: Path, *callbacks: Callback, module: Regression | None = None, **options: Any) -> Trainer:
    """Two epochs of four batches, each followed by a validation of one batch."""
    options = {"max_epochs": 2, "limit_val_batches": 1, **options}
    trainer = make_trainer(folder, "auto", devices=1, callbacks=list(callbacks), **options)
    trainer.fit(module or Regression(size=16), val_dataloaders=loader(4))
    return trainer


def probed(folder: Path, look: Callable[[Trainer], Any], hook: str = "on_train_batch_start", **options: Any) -> Any:
    probe = Probe(look, hook)
    fit(folder, probe, **options)
    return probe.seen


# -- one test for each function ---------------------------------------------------------------------------------------


def test_replace(tmp_path: Path) -> None:
    """Every method of Lightning's loops that is replaced is called through the object, and is itself again after it."""
    trainer = make_trainer(tmp_path, "auto", devices=1, max_epochs=2)
    epochs = trainer.fit_loop
    batches = epochs.epoch_loop
    places: list[tuple[Any, str, int]] = [
        (epochs, "on_advance_end", 2),
        (epochs, "setup_data", 3),  # once before the loop
        (batches, "advance", 8),
        (batches, "on_advance_end", 8),
        (batches, "update_lr_schedulers", 20),  # for each kind of schedule, after each batch and each epoch
        (batches.automatic_optimization, "run", 8),
    ]
    counts = dict.fromkeys(range(len(places)), 0)

    def counted(index: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            counts[index] += 1
            return function(*arguments, **options)

        return count

    before = [getattr(owner, name) for owner, name, _ in places]
    undo = [
        private.replace(owner, name, counted(index, getattr(owner, name)))
        for index, (owner, name, _) in enumerate(places)
    ]
    trainer.fit(Regression(size=16))
    assert list(counts.values()) == [number for _, _, number in places]
    for each in (*undo, *undo):
        each()
    assert [getattr(owner, name) for owner, name, _ in places] == before
    assert private.replace(batches.manual_optimization, "run", print)


def test_replace_puts_back_what_somebody_else_had_replaced() -> None:
    owner = SimpleNamespace(method=min)
    undo = private.replace(owner, "method", max)
    assert owner.method is max
    undo()
    assert owner.method is min


def test_trainer_of(tmp_path: Path) -> None:
    module = Regression()
    assert private.trainer_of(None) is None
    assert private.trainer_of(module) is None
    trainer = fit(tmp_path, module=module)
    assert private.trainer_of(module) is trainer


def test_logs_hyperparameters() -> None:
    class Module(Regression):
        def __init__(self, logs: bool) -> None:
            super().__init__()
            self.save_hyperparameters(logger=logs)

    class Data(LightningDataModule):
        def __init__(self, size: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert [private.logs_hyperparameters(each) for each in (Module(True), Module(False), Data())] == [True, False, True]


def test_timeout_of() -> None:
    assert private.timeout_of(DDPStrategy(timeout=timedelta(seconds=7))) == timedelta(seconds=7)
    assert private.timeout_of(strategies.GossipStrategy(timeout=timedelta(seconds=8))) == timedelta(seconds=8)


def test_backend_of() -> None:
    assert private.backend_of(DDPStrategy(process_group_backend="gloo")) == "gloo"
    trainer = Trainer(**QUIET, strategy="ddp", devices=2)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert private.backend_of(trainer.strategy) == "gloo"  # what fits a CPU


def test_synchronizes_batch_norm() -> None:
    for wanted in (True, False):
        strategy = Trainer(**QUIET, strategy="ddp", devices=2, sync_batchnorm=wanted).strategy
        assert isinstance(strategy, DDPStrategy)
        assert private.synchronizes_batch_norm(strategy) == wanted


def test_combined_loader(tmp_path: Path) -> None:
    assert private.combined_loader(Trainer(**QUIET)) is None
    (flattened, *_) = probed(tmp_path, lambda trainer: private.combined_loader(trainer).flattened)
    assert [len(each) for each in flattened] == [4]


def test_deal_validation(tmp_path: Path) -> None:
    """From the second validation on it has the last third of 12 samples, in batches of one."""
    seen: list[int] = []

    class Deals(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(trainer.current_epoch)

        def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                private.deal_validation(trainer, 2, 3)

    data = Samples(12)
    trainer = make_trainer(tmp_path, "auto", devices=1, callbacks=[Deals()], max_epochs=2, limit_val_batches=1.0)
    loaders = DataLoader(data, sampler=DistributedSampler(data, 1, 0, shuffle=False))
    trainer.fit(Regression(size=16), val_dataloaders=loaders)
    assert seen == [0] * 12 + [1] * 4


def test_reloads_loader(tmp_path: Path) -> None:
    for every, expected in ((1, [True, False, True]), (0, [False, False, False])):
        trainer = make_trainer(tmp_path, "auto", devices=1, max_epochs=2, reload_dataloaders_every_n_epochs=every)
        seen, set_up = list[bool](), trainer.fit_loop.setup_data

        def look(trainer: Trainer = trainer, seen: list[bool] = seen, set_up: Callable[[], None] = set_up) -> None:
            seen.append(private.reloads_loader(trainer))
            set_up()

        private.replace(trainer.fit_loop, "setup_data", look)
        trainer.fit(Regression(size=16))
        assert seen == expected


def test_data_fetcher(tmp_path: Path) -> None:
    assert private.data_fetcher(Trainer(**QUIET)) is None
    fetched = probed(tmp_path, lambda trainer: private.data_fetcher(trainer).fetched, max_epochs=1)
    assert len(fetched) == 4
    assert fetched == sorted(fetched)


def test_set_data_fetcher(tmp_path: Path) -> None:
    """What is put there at the beginning of an epoch is what its batches come from."""

    class Counts(private.PrefetchDataFetcher):
        number = 0

        def __next__(self) -> Any:
            self.number += 1
            return super().__next__()

    mine = Counts()

    class Sets(Callback):
        def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
            if private.data_fetcher(trainer) is not mine:
                private.set_data_fetcher(trainer, mine)
                mine.setup(private.combined_loader(trainer))
                iter(mine)

    fit(tmp_path, Sets(), max_epochs=1)
    assert mine.number == 4


def test_takes_iterator(tmp_path: Path) -> None:
    class Iterates(Regression):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

    def look(trainer: Trainer) -> bool:
        return private.takes_iterator(private.data_fetcher(trainer))

    assert probed(tmp_path, look, "on_train_epoch_start") == [False, False]
    assert probed(tmp_path, look, "on_train_epoch_start", module=Iterates(size=16)) == [True, True]


def test_can_stop_early(tmp_path: Path) -> None:
    assert probed(tmp_path, private.can_stop_early, "on_train_epoch_end", min_epochs=2) == [False, True]


def test_only_forward(tmp_path: Path) -> None:
    """As stochastic weight averaging sets it for its last epoch."""
    assert not any(probed(tmp_path, private.only_forward))

    class Skips(Callback):
        def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
            trainer.fit_loop._skip_backward = True

    probe = Probe(private.only_forward)
    fit(tmp_path, Skips(), probe)
    assert all(probe.seen)


def test_accumulates(tmp_path: Path) -> None:
    seen = probed(tmp_path, private.accumulates, "on_train_batch_end", accumulate_grad_batches=3, max_epochs=1)
    assert seen == [True, True, False, False]  # the last one of an epoch, too


def test_replace_is_accumulated(tmp_path: Path) -> None:
    """Lightning asks it whether an update is due; the last batch of an epoch has one in any case."""

    class Halves(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            ready = trainer.fit_loop.epoch_loop.batch_progress.current
            self.undo = private.replace_is_accumulated(trainer, lambda: ready.ready == 1)

        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            self.updates = trainer.global_step

    halves = Halves()
    fit(tmp_path, halves, accumulate_grad_batches=3, max_epochs=1)
    assert halves.updates == 2


def test_is_last_ready(tmp_path: Path) -> None:
    seen = probed(tmp_path, private.is_last_ready, "on_train_batch_end")
    assert seen == [False, False, False, True] * 2


def test_replace_is_last_ready(tmp_path: Path) -> None:
    """Lightning asks it when an epoch is over."""

    class Ends(Callback):
        batches = 0

        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            self.undo = private.replace_is_last_ready(trainer, lambda: self.batches >= 2)

        def on_train_batch_end(self, *_: Any) -> None:
            self.batches += 1

    ends = Ends()
    fit(tmp_path, ends, max_epochs=1)
    assert ends.batches == 2


def test_loops_state(tmp_path: Path) -> None:
    states = probed(tmp_path, private.loops_state, "on_train_epoch_start")
    assert [state["epoch_progress"]["current"]["processed"] for state in states] == [0, 1]


def test_restore_loops(tmp_path: Path) -> None:
    """A trainer that is given the state of another one's second epoch trains in that one alone."""
    states = probed(tmp_path, private.loops_state, "on_train_epoch_end")
    state = states[0]
    for of in ("current", "total"):
        state["epoch_progress"][of]["completed"] = 1
    probe = Probe(lambda trainer: trainer.current_epoch, "on_train_epoch_start")
    give = Probe(lambda trainer: private.restore_loops(trainer, state), "on_train_start")
    trainer = fit(tmp_path, give, probe)
    assert (probe.seen, trainer.current_epoch, trainer.global_step) == ([1], 2, 8)


def saved(folder: Path) -> tuple[ModelCheckpoint, dict[str, Any]]:
    """A callback that has saved something, and what the trainer says of its callbacks."""
    saver = ModelCheckpoint(dirpath=folder)
    return saver, private.callbacks_state(fit(folder, saver, enable_checkpointing=True))


def test_callbacks_state(tmp_path: Path) -> None:
    saver, states = saved(tmp_path)
    assert states == {saver.state_key: saver.state_dict()}


def test_restore_callbacks(tmp_path: Path) -> None:
    saver, states = saved(tmp_path)
    other = ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(tmp_path, "auto", devices=1, callbacks=[other], enable_checkpointing=True)
    private.restore_callbacks(trainer, states)
    assert other.best_model_path == saver.best_model_path != ""


def test_validates_in_epoch(tmp_path: Path) -> None:
    seen = probed(tmp_path, private.validates_in_epoch, "on_train_epoch_end", check_val_every_n_epoch=2)
    assert seen == [False, True]


def test_validates_now(tmp_path: Path) -> None:
    def look(trainer: Trainer) -> bool:
        return private.validates_now(trainer, private.data_fetcher(trainer))

    assert probed(tmp_path, look, "on_train_batch_end", val_check_interval=2) == [False, True] * 4


def test_validates_by_the_clock() -> None:
    assert private.validates_by_the_clock(Trainer(**QUIET, val_check_interval="00:00:10:00"))
    assert not private.validates_by_the_clock(Trainer(**QUIET, val_check_interval=0.5))


def test_replace_sigterm_broadcast(tmp_path: Path) -> None:
    """It is called before each batch is loaded, and nothing is sent."""
    module, seen = Regression(size=16), Calls(tmp_path)
    trainer = make_trainer(tmp_path, DDPStrategy(start_method="fork"), max_epochs=1, callbacks=[seen])
    trainer.fit(module)
    written = [(tmp_path / f"calls-{rank}").read_text() for rank in range(2)]
    assert written == ["before loaded before loaded"] * 2


class Calls(Callback):
    """Notes when a batch is there, and what is called before it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[str]()

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.undo = private.replace_sigterm_broadcast(trainer, lambda: self.calls.append("before"))

    def on_train_batch_start(self, *_: Any) -> None:
        self.calls.append("loaded")

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.undo()
        (self.folder / f"calls-{trainer.global_rank}").write_text(" ".join(self.calls))


def test_results_of(tmp_path: Path) -> None:
    assert private.results_of(Trainer(**QUIET)) is None
    (names, *_) = probed(tmp_path, lambda trainer: list(private.results_of(trainer) or ()), "on_train_batch_end")
    assert names == ["training_step.loss"]


def test_replace_epoch_end(tmp_path: Path) -> None:
    """It is called before the hooks of an epoch's end; the metrics of the epoch are there once Lightning's was."""
    order: list[str] = []

    class Puts(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            self.undo = private.replace_epoch_end(trainer, self.around)

        def around(self, reached: Callable[[], None]) -> None:
            reached()
            order.append("reached")

        def on_train_epoch_end(self, *_: Any) -> None:
            order.append("hook")

        def on_train_end(self, *_: Any) -> None:
            self.undo()

    fit(tmp_path, Puts(), limit_val_batches=0)
    assert order == ["reached", "hook"] * 2


def test_replace_hooks_of_update(tmp_path: Path) -> None:
    """It is called in the place of the hooks before an update, which are called only if it calls them."""
    order: list[str] = []

    class Puts(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            self.undo = private.replace_hooks_of_update(trainer, self.around)

        def around(self, hooks: Callable[..., None], *arguments: Any) -> None:
            order.append("around")
            if len(order) > 1:
                hooks(*arguments)

        def on_before_optimizer_step(self, *_: Any) -> None:
            order.append("hook")

        def on_train_end(self, *_: Any) -> None:
            self.undo()

    trainer = fit(tmp_path, Puts(), limit_train_batches=2, max_epochs=1)
    assert order == ["around", "around", "hook"]
    assert "_after_closure" not in vars(trainer.precision_plugin)


def test_replace_ends_of_validation(tmp_path: Path) -> None:
    """They are called before the first hook of a validation's beginning, and of its end, until that is undone."""
    order: list[str] = []

    class Puts(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            order.clear()  # of the sanity check
            functions = [partial(order.append, name) for name in ("begins", "ends")]
            self.undo = private.replace_ends_of_validation(trainer, *functions)

        def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
            order.append("start")

        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            order.append("end")
            if trainer.current_epoch == 0 and not trainer.sanity_checking:
                for undo in self.undo:
                    undo()

    fit(tmp_path, Puts())
    assert order == ["begins", "start", "ends", "end", "start", "end"]


def test_replace_evaluation_metrics(tmp_path: Path) -> None:
    """It is asked after a loader's batches, and again behind the hooks at the end of the evaluation."""
    order: list[str] = []

    class Puts(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            self.undo = private.replace_evaluation_metrics(trainer, self.around)

        def around(self, update: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            order.append("asked")
            return update()

        def on_validation_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                order.append("hook")

        def on_train_end(self, *_: Any) -> None:
            self.undo()

    fit(tmp_path, Puts())
    assert order == ["asked", "hook", "asked"] * 2


def test_count_logged_steps(tmp_path: Path) -> None:
    logged: list[int] = []

    class Logs(Regression):
        def on_train_epoch_end(self) -> None:
            private.count_logged_steps(self.trainer, 100)
            logged.append(self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    fit(tmp_path, module=Logs(size=16))
    assert logged == [104, 208]  # four batches in an epoch


def test_is_first_iteration(tmp_path: Path) -> None:
    seen = probed(tmp_path, private.is_first_iteration, max_epochs=1)
    assert seen == [True, False, False, False]


def test_set_first_iteration(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    before = private.is_first_iteration(trainer)
    private.set_first_iteration(trainer, not before)
    assert private.is_first_iteration(trainer) is not before


def test_call_callbacks(tmp_path: Path) -> None:
    probe = Probe(lambda trainer: trainer.global_step, "on_train_batch_end")
    trainer = fit(tmp_path, probe)
    private.call_callbacks(trainer, "on_train_batch_end", None, None, 5)
    assert probe.seen == [1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_call_module(tmp_path: Path) -> None:
    class Names(Regression):
        def on_train_epoch_start(self) -> str:  # type: ignore[override]
            return "called"

    trainer = fit(tmp_path, module=Names(size=16))
    assert private.call_module(trainer, "on_train_epoch_start") == "called"


def test_saves_every_steps() -> None:
    assert private.saves_every_steps(ModelCheckpoint(every_n_train_steps=3)) == 3
    assert private.saves_every_steps(ModelCheckpoint()) == 0


def test_saves_by_the_clock() -> None:
    assert private.saves_by_the_clock(ModelCheckpoint(train_time_interval=timedelta(seconds=5)))
    assert not private.saves_by_the_clock(ModelCheckpoint())


def test_saves_after_epochs() -> None:
    trainer: Any = SimpleNamespace(check_val_every_n_epoch=1, num_val_batches=[0])
    assert private.saves_after_epochs(ModelCheckpoint(), trainer)
    assert not private.saves_after_epochs(ModelCheckpoint(save_on_train_epoch_end=False), trainer)


def test_seconds_until_saved() -> None:
    callback = ModelCheckpoint(train_time_interval=timedelta(seconds=5))
    assert private.seconds_until_saved(callback) == 5.0  # training has not begun
    callback.on_train_start(NOTHING, NOTHING)  # type: ignore[arg-type]
    assert 0.0 < private.seconds_until_saved(callback) < 5.0


def test_looks_after_batches() -> None:
    assert private.looks_after_batches(Timer(timedelta(hours=1)))
    assert not private.looks_after_batches(Timer(timedelta(hours=1), interval="epoch"))


def test_replace_look(tmp_path: Path) -> None:
    timer, looks = Timer(timedelta(hours=1)), list[int]()
    undo = private.replace_look(timer, lambda trainer: looks.append(trainer.global_step))
    fit(tmp_path, timer, max_epochs=1)
    assert looks[-4:] == [1, 2, 3, 4]
    undo()


def test_look_of() -> None:
    """It asks worker 0 whether to stop."""
    asked: list[Any] = []
    trainer: Any = SimpleNamespace(should_stop=False, strategy=SimpleNamespace(broadcast=asked.append))
    private.look_of(Timer(timedelta(hours=1)))(trainer)
    assert asked == [False]


def test_count_as_updated() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    private.count_as_updated(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_take_over_sigterm(tmp_path: Path) -> None:
    """A signal that arrives in a batch is noted, and the loop stops after it; nothing is broadcast."""
    taken: list[bool] = []

    class Takes(Callback):
        def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            private.take_over_sigterm(trainer)

        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            composed: Any = signal.getsignal(signal.SIGTERM)
            taken.extend(getattr(each, "func", None) is private.note_sigterm for each in composed.signal_handlers)

        def on_train_batch_start(self, *_: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    probe = Probe(lambda trainer: trainer.received_sigterm, "on_train_batch_end")
    with pytest.raises(SystemExit):
        fit(tmp_path, Takes(), probe)
    assert any(taken)
    assert probe.seen == [True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_note_sigterm(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    assert not trainer.received_sigterm
    private.note_sigterm(trainer, signal.SIGTERM, None)
    assert trainer.received_sigterm


def test_unnoticed_sigterm(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "auto", devices=1)
    private.note_sigterm(trainer, signal.SIGTERM, None)
    with private.unnoticed_sigterm(trainer):
        assert not trainer.received_sigterm
    assert trainer.received_sigterm


class Queued(SLURMEnvironment):
    """A job of SLURM with one worker, which starts itself."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=True)

    creates_processes_externally = False

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass

    def world_size(self) -> int:
        return 1

    def global_rank(self) -> int:
        return 0

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0


def test_take_over_requeue(tmp_path: Path) -> None:
    """Of a job of SLURM the notice is heeded by the function; elsewhere there is nothing to take over."""
    noted: list[int] = []
    handlers: list[Any] = []

    class Takes(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            for _ in range(2):
                handlers.append(private.take_over_requeue(trainer, lambda signum, frame: noted.append(signum)))

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if handlers[0] is not None and not noted:
                signal.raise_signal(signal.SIGUSR1)

    fit(tmp_path, Takes(), plugins=[Queued()])
    assert noted == [signal.SIGUSR1]
    assert handlers[0].__name__ == "_slurm_sigusr_handler_fn"
    assert handlers[1] is None
    handlers.clear()
    fit(tmp_path, Takes())
    assert handlers == [None, None]


def test_replace_requeue_path(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    undo = private.replace_requeue_path(trainer, lambda path: f"{path} of worker 0")
    connector: Any = trainer._checkpoint_connector
    assert connector.hpc_save_path(tmp_path) == f"{tmp_path / 'hpc_ckpt_1.ckpt'} of worker 0"
    undo()
    assert connector.hpc_save_path(tmp_path) == str(tmp_path / "hpc_ckpt_1.ckpt")


def test_version_of() -> None:
    tensor = torch.zeros(2)
    before = private.version_of(tensor)
    tensor.add_(1.0)
    assert private.version_of(tensor) == before + 1


def test_buffers_of() -> None:
    module = nn.BatchNorm1d(2)
    private.buffers_of(module)["running_mean"] = torch.ones(2)
    assert module.running_mean is not None
    assert module.running_mean.tolist() == [1.0, 1.0]
    assert list(private.buffers_of(module)) == ["running_mean", "running_var", "num_batches_tracked"]


def test_unsaved_buffers_of() -> None:
    module = nn.Module()
    module.register_buffer("saved", torch.zeros(1))
    module.register_buffer("unsaved", torch.zeros(1), persistent=False)
    assert private.unsaved_buffers_of(module) == {"unsaved"}


def test_parameters_of() -> None:
    module = nn.Sequential(nn.Linear(1, 1))
    assert list(private.parameters_of(module[0])) == ["weight", "bias"]
    assert list(private.parameters_of(module)) == []


def functions() -> Iterator[str]:
    for name, value in vars(private).items():
        if inspect.isfunction(value) and value.__module__ == private.__name__ and not name.startswith("_"):
            yield name


def test_every_function_has_a_test() -> None:
    assert [name for name in functions() if f"test_{name}" not in globals()] == []


def test_one_optimizer_is_had_by_its_public_name(tmp_path: Path) -> None:
    """`LightningModule.optimizers`, which we use where the private list was read before."""
    (kind, *_) = probed(tmp_path, lambda trainer: type(trainer.lightning_module.optimizers()))
    assert issubclass(kind, LightningOptimizer)


# -- a name that is gone ----------------------------------------------------------------------------------------------

LOOPS: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=SimpleNamespace())))
NOTHING: Any = SimpleNamespace()


@pytest.mark.parametrize(
    ("call_it", "name"),
    [
        (lambda: private.replace(NOTHING, "advance", print), "advance"),
        (lambda: private.trainer_of(NOTHING), "_trainer"),
        (lambda: private.logs_hyperparameters(NOTHING), "_log_hyperparams"),
        (lambda: private.timeout_of(NOTHING), "_timeout"),
        (lambda: private.backend_of(NOTHING), "_get_process_group_backend"),
        (lambda: private.synchronizes_batch_norm(NOTHING), "_layer_sync"),
        (lambda: private.combined_loader(LOOPS), "_combined_loader"),
        (lambda: private.deal_validation(LOOPS, 0, 1), "_combined_loader"),
        (lambda: private.reloads_loader(LOOPS), "_should_reload_train_dl"),
        (lambda: private.data_fetcher(LOOPS), "_data_fetcher"),
        (lambda: private.set_data_fetcher(LOOPS, None), "_data_fetcher"),
        (lambda: private.can_stop_early(LOOPS), "_can_stop_early"),
        (lambda: private.only_forward(LOOPS), "_skip_backward"),
        (lambda: private.accumulates(LOOPS), "_should_accumulate"),
        (lambda: private.is_last_ready(LOOPS), "_num_ready_batches_reached"),
        (lambda: private.replace_is_last_ready(LOOPS, lambda: True), "_num_ready_batches_reached"),
        (lambda: private.replace_is_accumulated(LOOPS, lambda: True), "_accumulated_batches_reached"),
        (lambda: private.validates_in_epoch(LOOPS), "_should_check_val_epoch"),
        (lambda: private.validates_now(LOOPS, None), "_should_check_val_fx"),
        (lambda: private.validates_by_the_clock(NOTHING), "_val_check_time_interval"),
        (lambda: private.replace_sigterm_broadcast(LOOPS, print), "_broadcast_sigterm_tensor"),
        (lambda: private.count_logged_steps(LOOPS, 1), "_batches_that_stepped"),
        (lambda: private.results_of(NOTHING), "_results"),
        (lambda: private.replace_epoch_end(NOTHING, print), "_logger_connector"),
        (lambda: private.replace_hooks_of_update(SimpleNamespace(precision_plugin=NOTHING), print), "_after_closure"),
        (lambda: private.replace_ends_of_validation(LOOPS, print, print), "_on_evaluation_start"),
        (lambda: private.is_first_iteration(NOTHING), "_logger_connector"),
        (lambda: private.set_first_iteration(SimpleNamespace(_logger_connector=NOTHING), True), "_first_loop_iter"),
        (lambda: private.saves_every_steps(NOTHING), "_every_n_train_steps"),
        (lambda: private.saves_by_the_clock(NOTHING), "_train_time_interval"),
        (lambda: private.saves_after_epochs(NOTHING, NOTHING), "_should_save_on_train_epoch_end"),
        (lambda: private.seconds_until_saved(NOTHING), "_last_time_checked"),
        (lambda: private.looks_after_batches(NOTHING), "_interval"),
        (lambda: private.look_of(NOTHING), "_check_time_remaining"),
        (lambda: private.replace_look(NOTHING, print), "_check_time_remaining"),
        (lambda: private.take_over_sigterm(NOTHING), "_signal_connector"),
        (lambda: private.unnoticed_sigterm(NOTHING).__enter__(), "_signal_connector"),
        (lambda: private.take_over_sigterm(SimpleNamespace(_signal_connector=NOTHING)), "_sigterm_notifier_fn"),
        (lambda: private.take_over_requeue(NOTHING, print), "_accelerator_connector"),
        (lambda: private.replace_requeue_path(NOTHING, str), "_checkpoint_connector"),
    ],
)
def test_a_name_that_is_gone_is_named(call_it: Callable[[], Any], name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        call_it()
    message = str(caught.value)
    assert f"got Lightning {lightning.__version__}" in message
    assert f"has no {name!r}" in message
    assert f"pip install lightning=={private.NEWEST}" in message


@pytest.mark.parametrize("name", ["_call_callback_hooks", "_call_lightning_module_hook"])
def test_a_function_that_is_gone_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(call, name)
    function: Any = {"_call_callback_hooks": private.call_callbacks, "_call_lightning_module_hook": private.call_module}
    with pytest.raises(ConfigurationError, match=f"has no '{name}'"):
        function[name](NOTHING, "on_train_start")


def test_a_class_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("lightning.pytorch.loops.fetchers._PrefetchDataFetcher")
    with pytest.raises(ConfigurationError, match=r"fetchers has no '_PrefetchDataFetcher'.*release that has it"):
        exec(compile(ONE_MODULE.read_text(), "again", "exec"), {"__name__": "again"})


def test_the_releases_are_those_of_the_requirements() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"lightning>={private.LOWEST}" in requirements
    assert f"lightning=={private.NEWEST}\n" in (ROOT / "constraints.txt").read_text()
    assert lightning.__version__ in (private.LOWEST, private.NEWEST)


# -- nobody else uses private names -----------------------------------------------------------------------------------


def uses_of_private_names(source: str, owned: set[str]) -> list[str]:
    """Uses of private names that are not the writer's own.

    A private name is somebody's own on ``self``, ``cls`` and ``super()``, if a class of ours has it; and on a parameter
    that is annotated with the very class that the method belongs to.

    Args:
        source: of a module.
        owned: the private names that classes of ours have.
    """
    tree = ast.parse(source)
    relatives: set[int] = set()
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for function in (node for node in ast.walk(kind) if isinstance(node, ast.FunctionDef)):
            same = {a.arg for a in function.args.args if a.annotation and ast.unparse(a.annotation) == kind.name}
            names = (node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in same)
            relatives.update(id(name) for name in names)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value)
            if (base in ("self", "cls", "super()") or id(node.value) in relatives) and node.attr in owned:
                continue
            found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_decentral"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"import {name}" for name in names if is_private(name)]
        elif isinstance(node, ast.Import):
            found += [f"import {part}" for alias in node.names for part in alias.name.split(".") if is_private(part)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "delattr", "vars"):
            strings = (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
            found += [ast.unparse(node) for value in strings if is_private(value)]
        elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
            found.append(ast.unparse(node))
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> set[str]:
    """The private names that classes give themselves."""
    found = set()
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) == "self" else set()
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if is_private(name)}


def modules() -> list[Path]:
    """Whatever has to do with Lightning: our strategies and callbacks, and what imports it."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        near = path.relative_to(PACKAGE).parts[0] in ("strategies", "callbacks")
        if near or "from lightning." in text or "import lightning\n" in text:
            found.append(path)
    return [path for path in found if path not in (ONE_MODULE, FABRICS_MODULE)]


def test_only_one_module_uses_private_names() -> None:
    paths = modules()
    assert len(paths) > 30
    owned: set[str] = set()
    for path in paths:
        owned |= private_names(ast.parse(path.read_text(encoding="utf-8")))
    found = {
        str(path.relative_to(PACKAGE)): uses
        for path in paths
        if (uses := uses_of_private_names(path.read_text(encoding="utf-8"), owned))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "trainer._results",
        "trainer.fit_loop._data_fetcher = 1",
        "class A:\n    def f(self):\n        return self._timeout",
        "class A:\n    def f(self, other):\n        return other._own",
        "from lightning.pytorch.loops.fetchers import _DataFetcher",
        "import lightning.pytorch._graveyard",
        "getattr(trainer, '_results', None)",
        "delattr(loop, '_x')",
        "loop.__dict__.pop('advance')",
    ],
)
def test_each_kind_of_use_is_found(source: str) -> None:
    assert len(uses_of_private_names(source, {"_own"})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def f(self):\n        return self._own",
        "class A(B):\n    def _own(self):\n        return super()._own()",
        "class A:\n    def take(self, other: A):\n        return other._own",
        "from lightning_decentral.registry import install as _install",
        "trainer.__class__",
    ],
)
def test_what_is_ones_own_passes(source: str) -> None:
    assert uses_of_private_names(source, {"_own"}) == []


@pytest.mark.parametrize(
    "kind",
    [
        each
        for room in (strategies, callbacks)
        for each in vars(room).values()
        if inspect.isclass(each) and any(base.__module__.startswith("lightning.") for base in each.__mro__)
    ],
)
def test_no_private_name_is_one_of_lightning_too(kind: type) -> None:
    """A name that we give an object of ours is not one by which its base class keeps something else."""
    ours, theirs = set[str](), set[str]()
    for base in kind.__mro__[:-1]:
        if base.__module__.startswith(("lightning_decentral", "lightning.", "torch.")):
            names = private_names(ast.parse(textwrap.dedent(inspect.getsource(base))))
            beside = base.__module__ == fabric_private.__name__  # its purpose is to stand in for theirs
            ours |= names if base.__module__.startswith("lightning_decentral") and not beside else set()
            theirs |= names if not base.__module__.startswith("lightning_decentral") else set()
    assert ours & theirs == set()
