"""Loops over numbers, compiled with numba."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

from lightning_decentral.errors import ConfigurationError, to_install

Function = TypeVar("Function", bound=Callable[..., Any])

HAS_COMPILER = find_spec("numba") is not None


def compiled(function: Function) -> Function:
    """Compile a function of numbers and arrays when it is first called; the machine code is kept beside the module.

    Without numba the function stays what it is, thousands of times slower: `require_compiler` refuses that.
    """
    if not HAS_COMPILER:
        return function
    from numba import njit

    made: Any = njit(cache=True, nogil=True, error_model="numpy")(function)
    return made  # type: ignore[no-any-return]


def require_compiler(what: str) -> None:
    """Refuse to go on without numba.

    Args:
        what: needs it.

    Raises:
        ConfigurationError: if it is not installed.
    """
    if not HAS_COMPILER:
        raise ConfigurationError(
            f"{what} takes its steps in compiled loops and needs the package numba, which is not installed. "
            f"Install it: {to_install('linear')}."
        )
