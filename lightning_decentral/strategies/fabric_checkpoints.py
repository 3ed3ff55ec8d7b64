"""Checkpoints of Fabric's runs, in the files of the Trainer's: the consensus, and one file of each worker beside it."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import Module

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm
from lightning_decentral.strategies import fabric_private as private
from lightning_decentral.strategies.consensus import Consensus
from lightning_decentral.strategies.files import MANIFEST, WORKER, Files, Meeting, Save, copied, read_workers
from lightning_decentral.strategies.remembered import (
    parameter_names,
    random_state,
    regroup_stepper,
    require_same_names,
    restore_random_state,
    restore_stepper,
    saved_names,
    stepper_states,
)
from lightning_decentral.transport.communicator import Communicator

if TYPE_CHECKING:
    from lightning_decentral.strategies.fabric import FabricStrategy


class FabricCheckpoints:
    """Writes what every worker has of its own beside what ``fabric.save`` writes, and gives it back.

    Its methods are called by all workers together, between two steps.

    Args:
        strategy: whose workers these are.
    """

    def __init__(self, strategy: FabricStrategy) -> None:
        self._strategy = strategy
        self._module: Module | None = None
        self._steppers: Sequence[Stepper] = ()
        self._consensus: Consensus | None = None
        self._communicator: Communicator | None = None
        self._files: Files | None = None
        self._left: threading.Event | None = None

    def attach(
        self, module: Module, steppers: Sequence[Stepper], consensus: Consensus, communicator: Communicator
    ) -> None:
        """Begin a run with these."""
        self._module, self._steppers, self._consensus = module, steppers, consensus
        self._communicator, self._left = communicator, threading.Event()

    @property
    def files(self) -> Files:
        """What writes and removes files, through the strategy's plugin."""
        if self._files is None:
            self._files = Files(self._strategy.checkpoint_io)
        return self._files

    def save(self, path: str | Path, convert: Callable[[], dict[str, Any]], storage_options: Any) -> None:
        """Write the files of all workers, then the main file, then remove the worker files that it replaces.

        Args:
            path: of the main file.
            convert: gathers what the user saves of this worker, as it is when it is called.
            storage_options: for the plugin that writes.
        """
        strategy, files, consensus = self._strategy, self.files, self._consensus
        identifier, path = strategy.broadcast((uuid.uuid4().hex[:12], os.fspath(path)))
        save = Save(path, identifier, strategy.global_rank, strategy.world_size, storage_options)
        own = meet = None
        if consensus is None:
            main = files.kept(convert())
        else:
            assert self._module is not None
            assert self._communicator is not None
            assert self._left is not None
            consensus.enter()
            try:
                main = convert()
                main = copied(main) if strategy.is_global_zero else {}
            finally:
                consensus.leave()
            if strategy.worker_checkpoints:
                worker = {
                    "id": identifier,
                    "rank": strategy.global_rank,
                    "steppers": stepper_states(self._steppers, self._module),
                    "random": random_state(),
                }
                own = files.kept({**convert(), WORKER: worker})
                main[MANIFEST] = {
                    "id": identifier,
                    "world_size": strategy.world_size,
                    "algorithm": repr(strategy.algorithm),
                }
                timeout = private.timeout_of(strategy)
                seconds = timeout.total_seconds() if timeout else 1800.0
                meet = Meeting(self._communicator, identifier, seconds, self._left)
        files.run(lambda: save.write(files, own, main if strategy.is_global_zero else None, meet))

    def load(self, path: str | Path, load: Callable[..., dict[str, Any]], weights_only: bool | None) -> dict[str, Any]:
        """Let every worker go on from its own file, or from the main one, at a step's beginning.

        Args:
            path: of the main file.
            load: gives what a file has to what the user wants to have it, and returns the rest.
            weights_only: as in ``fabric.load``.

        Raises:
            ConfigurationError: on all workers, if one of them lacks a file; if the file is of another method.
        """
        strategy = self._strategy
        if self._communicator is not None:
            self._communicator.drain()
        for stepper in self._steppers:
            stepper.abandon()
        self.files.finish()  # what is read may still be on its way to the disk
        manifest = self._read(path, weights_only).get(MANIFEST)
        states: list[list[dict[str, Any]]] = []
        own = None
        if manifest is not None and strategy.resume == "exact":
            states, own = self._read_states(path, manifest, weights_only)
        remainder = load(path if own is None else own, weights_only=weights_only)
        remainder.pop(MANIFEST, None)
        worker = remainder.pop(WORKER, None)
        for stepper in self._steppers:
            stepper.begin_anew()
        if states:
            self._restore(states, regroup=own is None)
        if worker is not None:
            restore_random_state(worker["random"])
        return remainder

    def _read_states(
        self, path: str | Path, manifest: dict[str, Any], weights_only: bool | None
    ) -> tuple[list[list[dict[str, Any]]], str | None]:
        """Read what the algorithms of some workers remembered, and the file from which this one goes on, if any."""
        strategy, before = self._strategy, manifest["world_size"]
        same = before == strategy.world_size
        if same:
            ranks: Sequence[int] = [strategy.global_rank]
            rank_zero_info(f"Every one of the {strategy.world_size} workers goes on from its own state.")
        else:
            regroups = isinstance(strategy.algorithm, AbstractErrorFeedbackAlgorithm)
            ranks = range(before) if regroups else []
            rank_zero_warn(
                f"The checkpoint is of {before} workers and {strategy.world_size} go on: all of them start from the "
                "averaged model, with the optimizer state of worker 0, and "
                + (
                    "with what the algorithms of all workers remember together."
                    if regroups
                    else "the algorithm begins anew."
                )
            )
        identifier = manifest["id"]
        found = read_workers(lambda each: self._read(each, weights_only), path, identifier, ranks, strategy.global_rank)
        states = [worker[WORKER]["steppers"] for worker in found]
        own = Save(path, identifier, strategy.global_rank, before).worker_path
        return states, own if same else None

    def _restore(self, states: list[list[dict[str, Any]]], regroup: bool) -> None:
        assert self._module is not None
        device = self._strategy.root_device
        if len(states[0]) != len(self._steppers):
            raise ConfigurationError(
                f"The checkpoint has {len(states[0])} optimizers, this run {len(self._steppers)}. Set up the same "
                "ones, or pass resume='consensus' to the strategy."
            )
        for index, stepper in enumerate(self._steppers):
            require_same_names(saved_names(states[0][index]), parameter_names(stepper, self._module))
            if regroup:
                regroup_stepper(stepper, [worker[index] for worker in states], device)
            else:
                restore_stepper(stepper, states[0][index], device)

    def _read(self, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
        options = {} if weights_only is None else {"weights_only": weights_only}
        checkpoint: dict[str, Any] = self.files.plugin.load_checkpoint(path, **options)
        return checkpoint

    def close(self, failed: bool) -> None:
        """Wait until all is on the disk; for no other worker any more if the run has failed."""
        if self._files is None:
            return
        if not failed:
            self._files.finish()
            return
        if self._left is not None:
            self._left.set()
        with suppress(Exception):
            self._files.finish()
