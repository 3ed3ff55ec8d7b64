"""Checkpoint files on disk: where worker files lie, and writing and removing them whole and in order."""

from __future__ import annotations

import contextlib
import os
import posixpath
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

_UNFINISHED = ".part"  # the end of the name of a file that is being written
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 2.0  # after which a thread that waits for others asks whether they are alive


def worker_folder(path: str | Path) -> str:
    """The folder of the worker files beside a main file; a link (``save_last="link"``) is followed."""
    file_system, place = url_to_fs(os.fspath(path))
    return (os.path.realpath(place) if isinstance(file_system, LocalFileSystem) else os.fspath(path)) + ".workers"


def worker_file(path: str | Path, checkpoint_id: str, rank: int) -> str:
    """Where the worker file of one save lies."""
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
    """A plugin that never leaves a cut file behind, in the place of Lightning's own; any other as it is."""
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
        """A checkpoint that stays what it is while it is being written."""
        if not self.in_background:
            return checkpoint
        copied: dict[str, Any] = _copied(checkpoint)
        return copied

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
        """The identifiers of the saves of which worker files lie beside a main file now."""
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
        """The worker files beside a main file, unfinished ones included, each with its save and its rank."""
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


def _copied(value: Any) -> Any:
    """A value with all its tensors copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value


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
