"""Elementwise work in one kernel, by `torch.compile`, where that is asked for.

An operation of torch reads its inputs from memory and writes its result there. On an accelerator that is what
compressing costs: operation by operation int8 passes over a vector eleven times, in one kernel three times. The eager
path of a scheme remains, and is what its kernels are tested against.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, ParamSpec

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError

VARIABLE = "LIGHTNING_DECENTRAL_COMPILE"
"""The environment variable: ``1`` for kernels; all workers need the same, or their results differ in the last bit."""

_Arguments = ParamSpec("_Arguments")


def is_fused() -> bool:
    """Tell whether schemes use their kernels.

    Raises:
        ConfigurationError: for another value of the environment variable than ``0`` and ``1``.
    """
    mode = os.environ.get(VARIABLE, "0")
    if mode not in ("0", "1"):
        raise ConfigurationError(
            f"Got {VARIABLE}={mode!r} in the environment, needs '0' or '1'. Remove it to compress without kernels."
        )
    return mode == "1"


class Kernel(Generic[_Arguments]):
    """A function of tensors that writes its results into some of them, compiled when it is first called.

    Sizes may change between calls; for those of 1 there are kernels of their own. Where compiling fails, a warning says
    so and the function runs as it is.

    Args:
        function: of torch's operations alone.
    """

    def __init__(self, function: Callable[_Arguments, None]) -> None:
        self._function = function
        self._compiled: Callable[_Arguments, None] | None = torch.compile(function, dynamic=True, fullgraph=True)
        self._known: set[object] = set()

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        if self._compiled is None:
            return self._function(*args, **kwargs)
        kind = tuple(
            (one.device, one.dtype, *(n == 1 for n in one.shape)) if isinstance(one, Tensor) else one for one in args
        )
        known = kind in self._known
        try:
            with _gate.running() if known else _gate.compiling():
                self._compiled(*args, **kwargs)
        except Exception as error:  # whatever a compiler may say
            if not known:
                self._compiled = None
                said = (str(error).splitlines() or [""])[0]
                warnings.warn(
                    f"torch.compile failed for compression ({type(error).__name__}: {said}); it goes on without, more "
                    f"slowly. Kernels for a CPU need a C++ compiler, those for a GPU Triton; or unset {VARIABLE}.",
                    stacklevel=2,
                )
            self._function(*args, **kwargs)  # also while something else in this process is being compiled
        self._known.add(kind)
        return None


class _Gate:
    """torch.compile refuses calls of what is compiled while another thread compiles; so they wait for each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._compiling = 0, False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let any number of threads run at once."""
        with self._changed:
            self._changed.wait_for(lambda: not self._compiling)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Let one thread compile, and none run meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._compiling and not self._running)
            self._compiling = True
        try:
            yield
        finally:
            with self._changed:
                self._compiling = False
                self._changed.notify_all()


_gate = _Gate()
