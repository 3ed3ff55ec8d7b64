"""Checkpoints of runs in which every worker has a model of its own.

The main file is an ordinary Lightning checkpoint of the consensus, with a *manifest* that names the worker files of the
same save: ``<file>.workers/<id>-<rank>.ckpt``, each a complete Lightning checkpoint of one worker plus what its
algorithm remembers and its random numbers. The worker files are written first, so a main file always has all of its
own.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm
from lightning_decentral.strategies.consensus import Consensus
from lightning_decentral.strategies.files import MANIFEST, WORKER, Files, Meeting, Save, read_workers
from lightning_decentral.strategies.lightning_private import timeout_of
from lightning_decentral.strategies.remembered import (
    owned_places,
    parameter_names,
    random_state,
    regroup_stepper,
    require_same_names,
    restore_random_state,
    restore_stepper,
    saved_names,
    stepper_states,
)
from lightning_decentral.strategies.weights import complete, is_of, own_copy, put_weights
from lightning_decentral.transport.communicator import Communicator

if TYPE_CHECKING:
    from lightning_decentral.strategies.base import AbstractDecentralizedStrategy


class WorkerCheckpoints:
    """Writes what every worker has of its own beside a checkpoint, and gives it back when a run goes on.

    Its methods are called by all workers together.

    Args:
        strategy: whose workers these are.

    """

    def __init__(self, strategy: AbstractDecentralizedStrategy) -> None:
        self._strategy = strategy
        self._steppers: Sequence[Stepper] = ()
        self._consensus: Consensus | None = None
        self._communicator: Communicator | None = None
        self._restored: dict[str, Any] | None = None
        self._random: dict[str, Any] | None = None
        self._regrouped: list[list[dict[str, Any]]] | None = None
        self._given: dict[str, Any] | None = None  # the random numbers with which a loader was made
        self._in_epoch = False  # whether these random numbers are of a batch, or of an epoch's beginning
        self._optimizers: list[str] | None = None  # of the checkpoint
        self._files: tuple[CheckpointIO, Files] | None = None
        self._leaving: threading.Event | None = None
        self._saves: dict[str, str] = {}  # what was saved where in this run, or will be
        self._removed: list[tuple[str, list[str]]] = []  # of which the others have not heard: files, and their saves

    def attach(self, steppers: Sequence[Stepper], consensus: Consensus, communicator: Communicator) -> None:
        """Training begins with these: from now on a checkpoint is of what they have."""
        self._steppers, self._consensus, self._communicator = steppers, consensus, communicator

    def detach(self) -> None:
        """Training is over: forget its parts, and what was loaded and not yet given back."""
        self._steppers, self._consensus, self._communicator = (), None, None
        self.forget()

    @property
    def _left(self) -> threading.Event:
        """What ends a wait for others in the background; made in the worker, since a strategy is pickled on its way."""
        if self._leaving is None:
            self._leaving = threading.Event()
        return self._leaving

    @property
    def files(self) -> Files:
        """What writes and removes files, through the strategy's plugin."""
        plugin = self._strategy.checkpoint_io
        if self._files is None or self._files[0] is not plugin:
            self._files = plugin, Files(plugin)
        return self._files[1]

    def save(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any, dumped: Mapping[str, Any]
    ) -> None:
        """Write the files of all workers, then the main file, then remove the worker files that it replaces.

        Args:
            checkpoint: what Lightning has gathered of this worker.
            filepath: of the main file.
            storage_options: for the plugin that writes.
            dumped: the weights that the strategy has put into the checkpoint.
        """
        strategy, files, rank = self._strategy, self.files, self._strategy.global_rank
        # A metric that is not synchronized, or a worker's own count of steps, gives every rank another file name:
        # that of who writes holds.
        mine = os.fspath(filepath)
        checkpoint_id, path, removed = strategy.broadcast((uuid.uuid4().hex[:12], mine, self._removed))
        self._removed = []
        if path != mine and strategy.lightning_module is not None:
            _rename(strategy.lightning_module.trainer.checkpoint_callbacks, mine, path)
        if not strategy.is_global_zero:
            for gone, saves in removed:
                files.run(partial(self._remove_workers, gone, saves))
        whole = bool(self._steppers) and strategy.worker_checkpoints and "optimizer_states" in checkpoint
        own: dict[str, Any] | None = None
        save = Save(path, checkpoint_id, rank, strategy.world_size, storage_options)
        if whole:
            assert strategy.lightning_module is not None
            assert self._consensus is not None
            own = {**checkpoint, WORKER: {**self._worker_state(), "id": checkpoint_id}}
            with self._consensus.live():  # written meanwhile: what callbacks keep is this worker's own, too
                local = {k: own_copy(value) for k, value in strategy.lightning_module.state_dict().items()}
                own[WORKER] |= put_weights(own, local, dumped)
                if not files.in_background:
                    files.plugin.save_checkpoint(own, save.worker_path, storage_options=storage_options)
                own = files.kept(own) if files.in_background else None
            checkpoint[MANIFEST] = {
                "id": checkpoint_id,
                "world_size": strategy.world_size,
                "algorithm": repr(strategy.algorithm),
                "optimizers": _names(strategy.optimizers),
                "shards": strategy.algorithm.shards,
            }
        state = checkpoint.get("state_dict")
        if self._consensus is not None and state is not None and not is_of(state, dumped):  # a callback's average
            checkpoint["state_dict"] = self._consensus.mean(state)
        main = files.kept(checkpoint) if strategy.is_global_zero else None
        meet: Callable[[str], None] = strategy.barrier
        if files.in_background and self._communicator is not None:
            timeout = timeout_of(strategy)
            seconds = timeout.total_seconds() if timeout else 1800.0
            meet = Meeting(self._communicator, checkpoint_id, seconds, self._left)

        self._saves[path] = checkpoint_id
        files.run(lambda: save.write(files, own, main, meet if whole else None))

    def save_alone(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any) -> None:
        """Write the main file without the others, who have stopped."""
        if self._strategy.is_global_zero:
            files = self.files
            main = files.kept(checkpoint)
            files.run(lambda: files.plugin.save_checkpoint(main, filepath, storage_options=storage_options))

    def finish(self) -> None:
        """Wait until all that was saved so far is on the disk."""
        if self._files is not None:
            self._files[1].finish()

    def abandon(self) -> None:
        """Wait for no other worker any more, and for what this one is writing; its errors are old news."""
        self._left.set()
        with suppress(Exception):
            self.finish()
        self._left.clear()

    def _worker_state(self) -> dict[str, Any]:
        """Return what this worker's file has beyond a Lightning checkpoint."""
        strategy = self._strategy
        assert strategy.lightning_module is not None
        progress = strategy.lightning_module.trainer.fit_loop.epoch_loop.batch_progress
        return {
            "rank": strategy.global_rank,
            "world_size": strategy.world_size,
            "steppers": stepper_states(self._steppers, strategy.lightning_module),
            "optimizers": _names(strategy.optimizers),
            "owned": [owned_places(each, own) for each, own in zip(self._steppers, strategy.optimizers, strict=True)],
            "random": random_state(),
            "in_epoch": progress.current.ready > 0 and not progress.is_last_batch,
            "rounds": None if strategy.rounds is None else strategy.rounds.state_dict(),
        }

    def load(self, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
        """Load what this worker starts from: its own file, or the main one.

        Raises:
            ConfigurationError: on all workers, if one of them lacks a file.
        """
        strategy = self._strategy
        torch.cuda.empty_cache()
        self.finish()  # what is read may still be on its way to the disk
        checkpoint = self._read(path, weights_only)
        assert strategy.lightning_module is not None
        manifest = checkpoint.get(MANIFEST)
        running = bool(self._steppers)
        pending = self._random if running else None
        self.forget()
        self._optimizers = None if manifest is None else manifest.get("optimizers")
        fits, anew = strategy.lightning_module.trainer.state.fn == TrainerFn.FITTING, strategy.resume == "consensus"
        if not fits or manifest is None or (anew and not running):
            self._random = pending
            if fits and manifest is not None:
                try:
                    self._join_servers(path, manifest, checkpoint, weights_only)
                except ConfigurationError as error:
                    rank_zero_warn(f"The optimizer of the first server alone has a state: {error}")
            return checkpoint
        if manifest["world_size"] != strategy.world_size:
            start = (
                f"The checkpoint is of {manifest['world_size']} workers and {strategy.world_size} go on: all of them "
                "start from the averaged model, with the optimizer state of worker 0, and "
            )
            if not isinstance(strategy.algorithm, AbstractErrorFeedbackAlgorithm):
                rank_zero_warn(f"{start}the algorithm begins anew.")
                self._join_servers(path, manifest, checkpoint, weights_only)
                return checkpoint
            workers = self._worker_files(path, manifest["id"], range(manifest["world_size"]), weights_only)
            _refuse_a_cut_round(workers, strategy.world_size)
            self._regrouped = [worker[WORKER]["steppers"] for worker in workers]
            rank_zero_warn(f"{start}with what the algorithms of all workers remember together.")
            return checkpoint
        (own,) = self._worker_files(path, manifest["id"], [strategy.global_rank], weights_only)
        rank_zero_info(f"Every one of the {strategy.world_size} workers goes on from its own state.")
        self._restored = own.pop(WORKER)
        assert self._restored is not None
        self._optimizers = self._restored.get("optimizers")
        for state in (own.get("state_dict", {}), self._restored.get("state_dict", {})):
            complete(state, checkpoint.get("state_dict", {}))
        # Whoever goes back in the middle of a run, as a search does, looks after the random numbers, as under DDP.
        self._random = pending if running else self._restored["random"]
        self._in_epoch = self._restored.get("in_epoch", False) if not running else self._in_epoch
        return own

    def _join_servers(
        self, path: str | Path, manifest: Mapping[str, Any], checkpoint: dict[str, Any], weights_only: bool | None
    ) -> None:
        """Give the optimizers of a main file, which are worker 0's, what those of the other servers have of theirs."""
        shards = manifest.get("shards", 1)
        servers = [] if shards == 1 else self._worker_files(path, manifest["id"], range(shards), weights_only)
        for index, whole in enumerate(checkpoint["optimizer_states"]):
            for server in servers:
                own = server["optimizer_states"][index]["state"]
                whole["state"] |= {place: own[place] for place in server[WORKER]["owned"][index] if place in own}

    def _read(self, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
        options = {} if weights_only is None else {"weights_only": weights_only}
        checkpoint: dict[str, Any] = self.files.plugin.load_checkpoint(path, **options)
        return checkpoint

    def _worker_files(
        self, checkpoint_path: str | Path, checkpoint_id: str, ranks: Iterable[int], weights_only: bool | None
    ) -> list[dict[str, Any]]:
        return read_workers(
            lambda path: self._read(path, weights_only),
            checkpoint_path,
            checkpoint_id,
            ranks,
            self._strategy.global_rank,
        )

    @property
    def saved_rounds(self) -> dict[str, Any] | None:
        """What was loaded of the rounds of a run with clients."""
        return None if self._restored is None else self._restored.get("rounds")

    @property
    def _saved_steppers(self) -> list[dict[str, Any]] | None:
        """What was loaded for the steppers, of this worker or of the first of another number of them."""
        saved = None if self._restored is None else self._restored["steppers"]
        if self._regrouped is not None:
            saved = self._regrouped[0]
        return saved

    def restore_module(self) -> None:
        """Give the module this worker's own weights, where Lightning had others to give."""
        if self._restored is not None and "state_dict" in self._restored:
            # A callback had its own in the usual place, and has it back by now.
            assert self._strategy.lightning_module is not None
            # What the user leaves out of checkpoints stays what it is.
            self._strategy.lightning_module.load_state_dict(self._restored["state_dict"], strict=False)

    def restore_steppers(self, steppers: list[Stepper]) -> None:
        """Give the algorithm back what it remembered."""
        saved = self._saved_steppers
        if saved is not None and len(saved) != len(steppers):
            raise ConfigurationError(
                f"The checkpoint has {len(saved)} optimizers, this run {len(steppers)}. Resume with the same "
                "configure_optimizers, or pass resume='consensus' to the strategy."
            )
        device = self._strategy.root_device
        if saved is not None and self._restored is not None:
            assert self._strategy.lightning_module is not None
            for stepper, state in zip(steppers, saved, strict=True):
                require_same_names(saved_names(state), parameter_names(stepper, self._strategy.lightning_module))
                restore_stepper(stepper, state, device)
            self._restored = None
        if self._regrouped is not None:
            for index, stepper in enumerate(steppers):
                regroup_stepper(stepper, [worker[index] for worker in self._regrouped], device)
            self._regrouped = None

    def leaves(self, name: str, tensor: Tensor) -> bool:
        """Tell whether all workers begin with worker 0's value of a parameter or buffer, not with their own."""
        if self._restored is None:
            return True
        # What is frozen is often left out of checkpoints, and comes from the module.
        return not tensor.requires_grad and name in self._restored.get("left_out", ())

    def load_optimizers(self, checkpoint: Mapping[str, Any], load: Callable[[Mapping[str, Any]], None]) -> None:
        """Give the optimizers their state.

        Args:
            checkpoint: has it.
            load: as Lightning does.

        Raises:
            ConfigurationError: if it is the state of other optimizers.
        """
        optimizers = self._strategy.optimizers
        problem, cause = "", None
        defaults = [set(optimizer.defaults) for optimizer in optimizers]  # torch adds some of its own as it loads
        try:
            load(checkpoint)
        except (KeyError, ValueError) as error:
            problem, cause = f"{type(error).__name__}: {error}", error
        else:
            for optimizer, known in zip(optimizers, defaults, strict=True):
                for group in optimizer.param_groups:
                    if missing := sorted(known - group.keys()):
                        problem = problem or f"{type(optimizer).__name__} would be without {', '.join(missing)}"
        if problem:
            saved = "of " + ", ".join(self._optimizers) if self._optimizers else "of others"
            raise ConfigurationError(
                f"The state of the optimizers in the checkpoint is {saved}, and does not fit "
                f"{', '.join(_names(optimizers))} of this run ({problem}). Resume with the same configure_optimizers; "
                "to go on with another optimizer, load the weights alone: call load_from_checkpoint of the module's "
                "class, and fit without ckpt_path."
            ) from cause

    def restore_random_state(self, in_epoch: bool) -> None:
        """Set the random numbers to those of the checkpoint, once, where the run that was saved had them.

        Args:
            in_epoch: whether the loader's iterator is there already. Making it draws a number, which a checkpoint from
                inside an epoch has behind it, and one from between two epochs before it.
        """
        if self._random is not None and (in_epoch or not self._in_epoch):
            restore_random_state(self._random)
            self._given, self._random = None if in_epoch else self._random, None

    def repeat_random_state(self) -> None:
        """Set the random numbers to those of the checkpoint again, where a loader's iterator is made a second time."""
        if self._given is not None:
            restore_random_state(self._given)
            self._given = None

    def parameters(self, module: Module) -> list[list[Parameter]]:
        """Return for each optimizer the parameters that were exchanged at the checkpoint; none if it has no names.

        They may be more than the optimizer has at the beginning: a callback had unfrozen some.
        """
        known = dict(module.named_parameters())
        saved = [saved_names(state) or () for state in self._saved_steppers or ()]
        return [[known[name] for name in names if name in known] for names in saved]

    def forget(self) -> None:
        """Forget what was loaded and not yet given back."""
        self._restored, self._random, self._given, self._regrouped = None, None, None, None

    def remove(self, filepath: str | Path) -> None:
        """Remove a checkpoint and its worker files.

        A metric that is not synchronized lets each rank remove another file: the word of who writes holds. Workers that
        do not see its disk hear of it at the next save.
        """
        if not self._strategy.is_global_zero:
            return
        # Which saves these are is asked now, before anybody can begin to write others there.
        files, path = self.files, os.fspath(filepath)
        old = sorted(files.saves(path) | {self._saves.pop(path, "")})
        self._removed.append((path, old))

        def remove() -> None:
            files.plugin.remove_checkpoint(path)
            self._remove_workers(path, old)

        files.run(remove)

    def _remove_workers(self, path: str, saves: Sequence[str]) -> None:
        self.files.remove_workers(path, lambda each, owner: each in saves)


def _refuse_a_cut_round(workers: Sequence[Mapping[str, Any]], now: int) -> None:
    """Refuse the files of workers in the middle of a round of clients, of which another number has other turns.

    Args:
        workers: what their files have.
        now: how many go on.

    Raises:
        ConfigurationError: if they are in the middle of one.
    """
    rounds = [worker[WORKER].get("rounds") or {} for worker in workers]
    if any(own.get("_index") is not None for own in rounds):
        raise ConfigurationError(
            f"The checkpoint is of {len(workers)} workers in the middle of a round, and {now} go on; it needs as many "
            f"as before, each of which ends the turns of its clients. Resume with {len(workers)} workers, or from a "
            "checkpoint of the end of a round."
        )


def _names(optimizers: Iterable[Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _rename(callbacks: Sequence[Callback], mine: str, agreed: str) -> None:
    """Let callbacks know a file that is being saved by the name that it gets: they find and remove it by that."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            scores = callback.best_k_models.items()
            callback.best_k_models = {agreed if path == mine else path: score for path, score in scores}
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                if getattr(callback, name) == mine:
                    setattr(callback, name, agreed)
