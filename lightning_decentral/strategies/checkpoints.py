"""Checkpoints of runs in which every worker has a model of its own.

The main file is an ordinary Lightning checkpoint of the consensus, with a *manifest* that names the worker files of the
same save: ``<file>.workers/<id>-<rank>.ckpt``, each a complete Lightning checkpoint of one worker plus what its
algorithm remembers and its random numbers. The worker files are written first, so a main file always has all of its
own.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import pack, unpack
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm
from lightning_decentral.transport.process_group import Stepper, gather_objects

if TYPE_CHECKING:
    from lightning_decentral.strategies.base import AbstractDecentralizedStrategy

MANIFEST = "lightning_decentral"
"""Key of the manifest in the main file."""

WORKER = "lightning_decentral_worker"
"""Key of what only a worker file has."""


class WorkerCheckpoints:
    """Writes what every worker has of its own beside a checkpoint, and gives it back when a run goes on.

    Its methods are called by all workers together.

    Args:
        strategy: whose workers these are.

    Attributes:
        exact: whether every worker goes on from its own file in this run.
    """

    def __init__(self, strategy: AbstractDecentralizedStrategy) -> None:
        self._strategy = strategy
        self._restored: dict[str, Any] | None = None
        self._random: dict[str, Any] | None = None
        self._regrouped: list[list[dict[str, Any]]] | None = None

    @property
    def exact(self) -> bool:
        return self._restored is not None

    def save(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any, dumped: dict[str, Any] | None
    ) -> None:
        """Write the files of all workers, then the main file, then remove the worker files that it replaces.

        Args:
            checkpoint: what Lightning has gathered of this worker.
            filepath: of the main file.
            storage_options: for the plugin that writes.
            dumped: the weights that the strategy has put into the checkpoint.
        """
        strategy = self._strategy
        # A metric that is not synchronized gives every rank another file name: worker 0's holds.
        checkpoint_id, filepath = strategy.broadcast((uuid.uuid4().hex[:12], os.fspath(filepath)))
        whole = bool(strategy._steppers) and strategy.worker_checkpoints and "optimizer_states" in checkpoint
        if whole:
            assert strategy.lightning_module is not None
            assert strategy._consensus is not None
            state = worker_state(strategy._steppers, strategy.global_rank, strategy.world_size)
            own = {**checkpoint, WORKER: {**state, "id": checkpoint_id}}
            # A callback that averages weights has put its own average there, and wants it back: ours goes beside it.
            mine = own if checkpoint["state_dict"] is dumped else own[WORKER]
            with strategy._consensus.live():  # written meanwhile: what callbacks keep is this worker's own, too
                mine["state_dict"] = {k: _own(value) for k, value in strategy.lightning_module.state_dict().items()}
                strategy.checkpoint_io.save_checkpoint(own, worker_file(filepath, checkpoint_id, strategy.global_rank))
            strategy.barrier("worker files are written")
            checkpoint[MANIFEST] = {
                "id": checkpoint_id,
                "world_size": strategy.world_size,
                "algorithm": repr(strategy.algorithm),
            }
        if strategy._consensus is not None and checkpoint["state_dict"] is not dumped:  # a callback's average
            checkpoint["state_dict"] = strategy._consensus.mean(checkpoint["state_dict"])
        if strategy.is_global_zero:
            strategy.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        if whole:
            strategy.barrier("the main file is written")
            remove_worker_files(filepath, strategy.global_rank, keep=checkpoint_id)

    def load(self, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
        """What this worker starts from: its own file, or the main one.

        Raises:
            ConfigurationError: on all workers, if one of them lacks a file.
        """
        strategy = self._strategy
        torch.cuda.empty_cache()
        checkpoint = self._read(path, weights_only)
        assert strategy.lightning_module is not None
        manifest = checkpoint.get(MANIFEST)
        running = bool(strategy._steppers)
        pending = self._random if running else None
        self.forget()
        if (
            strategy.lightning_module.trainer.state.fn != TrainerFn.FITTING
            or (strategy.resume == "consensus" and not running)
            or manifest is None
        ):
            self._random = pending
            return checkpoint
        if manifest["world_size"] != strategy.world_size:
            start = (
                f"The checkpoint is of {manifest['world_size']} workers and {strategy.world_size} go on: all of them "
                "start from the averaged model, with the optimizer state of worker 0, and "
            )
            if not isinstance(strategy.algorithm, AbstractErrorFeedbackAlgorithm):
                rank_zero_warn(f"{start}the algorithm begins anew.")
                return checkpoint
            workers = self._worker_files(path, manifest["id"], range(manifest["world_size"]), weights_only)
            self._regrouped = [worker[WORKER]["steppers"] for worker in workers]
            rank_zero_warn(f"{start}with what the messages of all workers left out.")
            return checkpoint
        (own,) = self._worker_files(path, manifest["id"], [strategy.global_rank], weights_only)
        rank_zero_info(f"Every one of the {strategy.world_size} workers goes on from its own state.")
        self._restored = own.pop(WORKER)
        assert self._restored is not None
        for state in (own["state_dict"], self._restored.get("state_dict", {})):
            _complete(state, checkpoint["state_dict"])
        # Whoever goes back in the middle of a run, as a search does, looks after the random numbers, as under DDP.
        self._random = pending if running else self._restored["random"]
        return own

    def _read(self, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
        options = {} if weights_only is None else {"weights_only": weights_only}
        checkpoint: dict[str, Any] = self._strategy.checkpoint_io.load_checkpoint(path, **options)
        return checkpoint

    def _worker_files(
        self, checkpoint_path: str | Path, checkpoint_id: str, ranks: Iterable[int], weights_only: bool | None
    ) -> list[dict[str, Any]]:
        """The files of some workers of a save. All workers together.

        Raises:
            ConfigurationError: on all workers, if one of them lacks a file.
        """
        here = self._strategy.global_rank
        problem = ""
        files: list[dict[str, Any]] = []
        for rank in ranks:
            path = worker_file(checkpoint_path, checkpoint_id, rank)
            try:
                own = self._read(path, weights_only)
                if own[WORKER]["id"] != checkpoint_id or own[WORKER]["rank"] != rank:
                    problem = f"worker {here}: {path} belongs to another checkpoint"
                files.append(own)
            except FileNotFoundError:
                problem = f"worker {here}: {path} is missing"
            except Exception as error:
                problem = f"worker {here}: {path} is damaged ({type(error).__name__}: {error})"
        problems = gather_objects(problem)
        if any(problems):
            raise ConfigurationError(
                "Cannot resume every worker exactly:\n  "
                + "\n  ".join(text.splitlines()[0] for text in problems if text)
                + "\nPut the files back, or pass resume='consensus' to the strategy to start all workers from the "
                "averaged model of the main file."
            )
        return files

    def restore_module(self) -> None:
        """Give the module this worker's own weights, where Lightning had others to give."""
        if self._restored is not None and "state_dict" in self._restored:
            # A callback had its own in the usual place, and has it back by now.
            assert self._strategy.lightning_module is not None
            self._strategy.lightning_module.load_state_dict(self._restored["state_dict"])

    def restore_steppers(self, steppers: list[Stepper]) -> None:
        """Give the algorithm back what it remembered."""
        saved: list[dict[str, Any]] | None = None if self._regrouped is None else self._regrouped[0]
        if self._restored is not None:
            saved = self._restored["steppers"]
        if saved is not None and len(saved) != len(steppers):
            raise ConfigurationError(
                f"The checkpoint has {len(saved)} optimizers, this run {len(steppers)}. Resume with the same "
                "configure_optimizers, or pass resume='consensus' to the strategy."
            )
        device = self._strategy.root_device
        if saved is not None and self._restored is not None:
            for stepper, state in zip(steppers, saved, strict=True):
                restore_stepper(stepper, state, device)
            self._restored = None
        if self._regrouped is not None:
            for index, stepper in enumerate(steppers):
                regroup_stepper(stepper, [worker[index] for worker in self._regrouped], device)
            self._regrouped = None

    def restore_random_state(self) -> None:
        """Set the random numbers to those of the checkpoint, once."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None

    def forget(self) -> None:
        """Forget what was loaded and not yet given back."""
        self._restored, self._random, self._regrouped = None, None, None

    def remove(self, filepath: str | Path) -> None:
        """Remove a checkpoint and its worker files."""
        remove_worker_files(filepath, self._strategy.global_rank)
        if self._strategy.is_global_zero:
            self._strategy.checkpoint_io.remove_checkpoint(filepath)


def _complete(own: dict[str, Any], main: dict[str, Any]) -> None:
    """Take from the main file the tensors that this worker alone had in another shape, or not: no model fits both."""
    for name in own.keys() - main.keys():
        del own[name]
    for name, value in main.items():
        if isinstance(value, Tensor) and (name not in own or own[name].shape != value.shape):
            own[name] = value


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def worker_file(path: str | os.PathLike[str], checkpoint_id: str, rank: int) -> str:
    """Where the worker file of one save lies."""
    return os.path.join(worker_folder(path), f"{checkpoint_id}-{rank}.ckpt")


def worker_folder(path: str | os.PathLike[str]) -> str:
    """The folder of the worker files beside a main file; a link (``save_last="link"``) is followed."""
    text = os.fspath(path)
    return (text if "://" in text else os.path.realpath(text)) + ".workers"


def remove_worker_files(path: str | os.PathLike[str], rank: int, keep: str | None = None) -> None:
    """Remove this worker's files beside a main file, but for those of the save called ``keep``.

    Worker 0 removes the files of ranks that no longer take part too.
    """
    folder = worker_folder(path)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # there are none, or another worker has just removed the last of them
        return
    for name in names:
        checkpoint_id, _, end = name.rpartition("-")
        mine = end == f"{rank}.ckpt" or rank == 0
        if mine and (keep is None or checkpoint_id != keep):
            try:
                os.remove(os.path.join(folder, name))
            except FileNotFoundError:  # its own worker was quicker
                continue
    try:
        os.rmdir(folder)
    except OSError:  # others' files are still there; the last worker removes the folder
        return


def worker_state(steppers: list[Stepper], rank: int, world_size: int) -> dict[str, Any]:
    """What a worker file has beyond a Lightning checkpoint."""
    return {
        "rank": rank,
        "world_size": world_size,
        "steppers": [
            {
                "algorithm": repr(stepper.algorithm),
                "step": stepper.worker.step,
                "version": stepper.worker.version,
                "state": pack(stepper.worker.state),
                "rng": stepper.worker.rng.getstate(),
            }
            for stepper in steppers
        ],
        "random": random_state(),
    }


def restore_stepper(stepper: Stepper, saved: dict[str, Any], device: torch.device) -> None:
    """Give a stepper what its worker file has."""
    _require_same_algorithm(stepper, saved)
    worker = stepper.worker
    worker.step, worker.version = saved["step"], saved["version"]
    state = unpack(saved["state"], device)
    assert isinstance(state, dict)
    worker.state.update(state)
    version, internal, gauss = saved["rng"]
    worker.rng.setstate((version, tuple(internal), gauss))


def regroup_stepper(stepper: Stepper, saved: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Give a stepper its part of what the worker files of another number of workers have."""
    algorithm, worker = stepper.algorithm, stepper.worker
    assert isinstance(algorithm, AbstractErrorFeedbackAlgorithm)
    for one in saved:
        _require_same_algorithm(stepper, one)
    states = [unpack(one["state"], device) for one in saved]
    assert all(isinstance(state, dict) for state in states)
    worker.state.update(algorithm.regrouped(states))  # type: ignore[arg-type]
    worker.step = saved[0]["step"]  # what is drawn alike on all workers goes on


def _require_same_algorithm(stepper: Stepper, saved: dict[str, Any]) -> None:
    if saved["algorithm"] != repr(stepper.algorithm):
        raise ConfigurationError(
            f"The checkpoint is of {saved['algorithm']}, but this run uses {stepper.algorithm!r}: what one method "
            "remembers means nothing to another. Resume with the same algorithm, or pass resume='consensus' to the "
            "strategy to start from the averaged model."
        )


def random_state() -> dict[str, Any]:
    """The state of every global random number generator, as tensors and plain values."""
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(name), torch.tensor(keys, dtype=torch.int64), int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every global random number generator to what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
