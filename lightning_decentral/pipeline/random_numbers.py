"""Random numbers that belong to a batch: a replay draws what the first pass drew, a worker what the others draw."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_OF_THE_PROCESSOR = [torch.default_generator]
_NUMPY = np.random.MT19937()  # the only kind that `numpy.random.seed` takes


@contextmanager
def random_numbers_of(device: torch.device, *key: int) -> Iterator[None]:
    """Let torch, numpy and Python draw the random numbers that belong to a key, and go on with their own afterwards.

    What is drawn for a batch does not depend on where, when and after what it is drawn: on one worker as on several, in
    a replay as in the first pass, in a run that was resumed as in one that was not.

    Args:
        device: whose numbers, beside the processor's.
        key: the seed of the run, and what they are for.
    """
    with own_random_numbers(device):
        seed_random_numbers(device, *key)
        yield


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Let torch, numpy and Python go on with their own random numbers afterwards, whatever is seeded in between."""
    generators = _generators(device)
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    # To copy numpy's state would take longer than a small stage.
    np.random.set_bit_generator(_NUMPY)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        np.random.set_bit_generator(numpy)  # type: ignore[attr-defined]
        random.setstate(python)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def seed_random_numbers(device: torch.device, *key: int) -> None:
    """Let torch, numpy and Python draw the random numbers that belong to a key; see `random_numbers_of`."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # whatever the user's code draws from
    for generator in _generators(device):
        generator.manual_seed(seed)


def _generators(device: torch.device) -> list[torch.Generator]:
    # `torch.manual_seed` would queue a call for devices that nobody uses.
    if device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]
    return _OF_THE_PROCESSOR
