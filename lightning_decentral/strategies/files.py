"""Checkpoint files on disk: where worker files lie, and writing and removing them whole and in order."""

from __future__ import annotations

import contextlib
import os
import posixpath
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.gathering import gather_objects

MANIFEST = "lightning_decentral"
"""Key of the manifest in the main file."""

WORKER = "lightning_decentral_worker"
"""Key of what only a worker file has."""

_UNFINISHED = ".part"  # the end of the name of a file that is being written
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 2.0  # after which a thread that waits for others asks whether they are alive


def worker_folder(path: str | Path) -> str:
    """Return the folder of the worker files beside a main file; a link (``save_last="link"``) is followed."""
    file_system, place = url_to_fs(os.fspath(path))
    return (os.path.realpath(place) if isinstance(file_system, LocalFileSystem) else os.fspath(path)) + ".workers"


def worker_file(path: str | Path, checkpoint_id: str, rank: int) -> str:
    """Tell where the worker file of one save lies."""
    return posixpath.join(worker_folder(path), f"{checkpoint_id}-{rank}.ckpt")


class WholeFiles(TorchCheckpointIO):
    """Lightning's own plugin, but a file on a local disk is there as a whole or not at all, whenever a kill comes.

    Lightning writes to the folder for temporary files and moves the file from there, which is a copy if that is another
    disk. Here it is written beside its place, flushed to the disk, and renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        file_system, place = url_to_fs(os.fspath(path))
        if storage_options is not None or not isinstance(file_system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        os.makedirs(os.path.dirname(place), exist_ok=True)
        unfinished = place + _UNFINISHED
        try:
            with open(unfinished, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, place)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(unfinished)
            raise


def whole(plugin: CheckpointIO) -> CheckpointIO:
    """Return a plugin that never leaves a cut file behind, in the place of Lightning's own; any other as it is."""
    return WholeFiles() if type(plugin) is TorchCheckpointIO else plugin


class Files:
    """Writes, removes and reads checkpoint files through Lightning's plugin, in the order in which it is asked to.

    With `AsyncCheckpointIO` this happens on a thread of its own, in the same order, so that no removal overtakes what
    is still being written. Any other plugin is used as it is; Lightning's default one becomes `WholeFiles`.

    Args:
        plugin: the strategy's ``checkpoint_io``.
    """

    def __init__(self, plugin: CheckpointIO) -> None:
        self.in_background = (
            isinstance(plugin, AsyncCheckpointIO)
            and type(plugin).save_checkpoint is AsyncCheckpointIO.save_checkpoint
            and plugin.checkpoint_io is not None
        )
        inner = plugin.checkpoint_io if self.in_background else plugin  # type: ignore[attr-defined]
        self.plugin = whole(inner)
        self._executor: ThreadPoolExecutor | None = None
        self._error: BaseException | None = None

    def kept(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint that stays what it is while it is being written."""
        if not self.in_background:
            return checkpoint
        kept: dict[str, Any] = copied(checkpoint)
        return kept

    def run(self, work: Callable[[], None]) -> None:
        """Do something with files, after all that was asked for before.

        Raises:
            BaseException: what went wrong meanwhile in the background.
        """
        self._raise()
        if not self.in_background:
            work()
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="decentral-files")
        self._executor.submit(self._try, work)

    def finish(self) -> None:
        """Wait until everything is written and removed.

        Raises:
            BaseException: what went wrong meanwhile in the background.
        """
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        self._raise()

    def saves(self, path: str | Path) -> set[str]:
        """Return the identifiers of the saves of which worker files lie beside a main file now."""
        return {checkpoint_id for _, checkpoint_id, _ in self._worker_files(path)}

    def remove_workers(self, path: str | Path, mine: Callable[[str, int], bool]) -> None:
        """Remove worker files beside a main file.

        Args:
            path: of the main file.
            mine: whether this worker removes the file of a save and a rank.
        """
        for file, checkpoint_id, owner in self._worker_files(path):
            if mine(checkpoint_id, owner):
                with contextlib.suppress(FileNotFoundError):  # its own worker was quicker
                    self.plugin.remove_checkpoint(file)
        file_system, place = url_to_fs(worker_folder(path))
        with contextlib.suppress(OSError, NotImplementedError):
            # Others' files may still be there, and the last worker removes the folder; some stores have none.
            file_system.rmdir(place)

    def _worker_files(self, path: str | Path) -> list[tuple[str, str, int]]:
        """Return the worker files beside a main file, unfinished ones included, each with its save and its rank."""
        folder = worker_folder(path)
        file_system, place = url_to_fs(folder)
        file_system.invalidate_cache()
        try:
            found = file_system.ls(place, detail=False)
        except FileNotFoundError:  # there are none, or another worker has just removed the last of them
            return []
        files = []
        for name in (posixpath.basename(each) for each in found):
            checkpoint_id, _, end = name.removesuffix(_UNFINISHED).rpartition("-")
            rank = end.removesuffix(".ckpt")
            if rank.isdigit():
                files.append((posixpath.join(folder, name), checkpoint_id, int(rank)))
        return files

    def _try(self, work: Callable[[], None]) -> None:
        if self._error is not None:
            return  # the others wait for what has failed, and come to nothing that was asked for later
        try:
            work()
        except BaseException as error:
            self._error = error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def copied(value: Any) -> Any:
    """Return a value with all its tensors copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value


@dataclass(frozen=True)
class Save:
    """One save: a main file, and a file of each worker beside it.

    Attributes:
        path: of the main file.
        identifier: the same on all workers, and of no other save.
        rank: of this worker.
        world_size: how many there are.
        options: for the plugin that writes.
    """

    path: str | Path
    identifier: str
    rank: int
    world_size: int
    options: Any = None

    @property
    def worker_path(self) -> str:
        """Where this worker's file lies."""
        return worker_file(self.path, self.identifier, self.rank)

    def write(
        self,
        files: Files,
        own: dict[str, Any] | None,
        main: dict[str, Any] | None,
        meet: Callable[[str], None] | None,
    ) -> None:
        """Write this worker's file, then the main one once all are there, then remove those that it replaces.

        Args:
            files: writes and removes.
            own: what this worker's file has; none if it is written already, or there is to be none.
            main: what the main file has; none on others than worker 0.
            meet: waits for all workers; none if there are no worker files.
        """
        if own is not None:
            files.plugin.save_checkpoint(own, self.worker_path, storage_options=self.options)
        if meet is not None:
            meet("worker files are written")
        if main is not None:
            files.plugin.save_checkpoint(main, self.path, storage_options=self.options)
        if meet is not None:
            meet("the main file is written")
            files.remove_workers(self.path, lambda each, owner: each != self.identifier and self._mine(owner))

    def _mine(self, owner: int) -> bool:
        """Tell whether a file is this worker's to remove: its own, or nobody's for worker 0. Others may write."""
        return owner == self.rank or (self.rank == 0 and owner >= self.world_size)


def read_workers(
    read: Callable[[str], dict[str, Any]], path: str | Path, identifier: str, ranks: Iterable[int], rank: int
) -> list[dict[str, Any]]:
    """Return the files of some workers of a save. All workers together.

    Args:
        read: reads one.
        path: of the main file.
        identifier: of the save.
        ranks: whose.
        rank: of this worker.

    Raises:
        ConfigurationError: on all workers, if one of them lacks a file.
    """
    problem = ""
    found: list[dict[str, Any]] = []
    for owner in ranks:
        file = worker_file(path, identifier, owner)
        try:
            own = read(file)
            if own[WORKER]["id"] != identifier or own[WORKER]["rank"] != owner:
                problem = f"worker {rank}: {file} belongs to another checkpoint"
            found.append(own)
        except FileNotFoundError:
            problem = f"worker {rank}: {file} is missing"
        except Exception as error:
            problem = f"worker {rank}: {file} is damaged ({type(error).__name__}: {error})"
    problems = gather_objects(problem)
    if any(problems):
        raise ConfigurationError(
            "Cannot resume every worker exactly:\n  "
            + "\n  ".join(text.splitlines()[0] for text in problems if text)
            + "\nPut the files back, or pass resume='consensus' to the strategy to start all workers from the "
            "averaged model of the main file."
        )
    return found


class Meeting:
    """Where the threads that write the files of one save wait for each other.

    Args:
        communicator: reaches the other workers.
        name: of the save, the same on all workers.
        timeout_seconds: after which a meeting has failed.
        left: set when this worker's run is over, so that nobody is waited for.
    """

    def __init__(self, communicator: Communicator, name: str, timeout_seconds: float, left: threading.Event) -> None:
        self._communicator = communicator
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._left = left

    def __call__(self, what: str) -> None:
        """Wait until all workers are here.

        Raises:
            ConfigurationError: if they do not come in time, or this worker's run ends before.
            PeerLost: if one of them was lost.
            WorkerFailed: if one of them raised.
        """
        if self._communicator.world_size == 1:
            return
        store, key = self._communicator.store, f"save/{self._name}/{what}"
        began = time.monotonic()
        here = store.add(key, 1)
        while here < self._communicator.world_size:
            self._communicator.check()
            if self._left.wait(_POLL_SECONDS):
                raise ConfigurationError(f"A checkpoint is not complete: the run was over before {what}.")
            waited = time.monotonic() - began
            if waited > _PATIENCE_SECONDS and (watch := self._communicator.watch) is not None:
                failure = watch.diagnose(TimeoutError(f"no answer before {what}"))
                if not isinstance(failure, PeerLost) or failure.ranks:  # a slow disk is no failure
                    raise failure
            if waited > self._timeout_seconds:
                raise ConfigurationError(
                    f"A checkpoint is not complete: {here} of {self._communicator.world_size} workers came within "
                    f"{self._timeout_seconds:g} s, until {what}. Raise the strategy's timeout if disks are slow."
                )
            here = store.add(key, 0)
