"""Checkpoints of runs in which every worker has a model of its own.

The main file is an ordinary Lightning checkpoint of the consensus, with a *manifest* that names the worker files of the
same save: ``<file>.workers/<id>-<rank>.ckpt``, each a complete Lightning checkpoint of one worker plus what its
algorithm remembers and its random numbers. The worker files are written first, so a main file always has all of its
own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import pack, unpack
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm
from lightning_decentral.transport.process_group import Stepper

MANIFEST = "lightning_decentral"
"""Key of the manifest in the main file."""

WORKER = "lightning_decentral_worker"
"""Key of what only a worker file has."""


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
