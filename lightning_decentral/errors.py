"""Errors of the package. Every message has three parts: what was *got*, what is *needed*, what to *do*."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigurationError(ValueError):
    """A setting, or a combination of settings, that cannot work; raised before any training starts."""


class TopologyError(ConfigurationError):
    """A communication graph or mixing matrix that does not have the property a method needs."""


class EmulationError(ConfigurationError):
    """Hosts cannot be emulated on this machine, or not under this name."""


class CompressionError(ValueError):
    """A vector that cannot be compressed (NaN, infinity, no floating-point type), or a message that does not fit."""


class DecodingError(CompressionError):
    """A message that is only correct near a reference arrived too far from it; what it decodes to would be wrong."""


class ProtocolError(RuntimeError):
    """An algorithm asks for what the protocol forbids; the message names the method, the word and the step."""


class PoisonedMessage(ValueError):
    """A model with NaN or infinity came from another worker; the message names it, the step and the parameter."""


class DeadlockError(RuntimeError):
    """Every virtual worker waits for another one; the message says who waits for what."""


class WorkerFailed(RuntimeError):
    """Another worker raised an exception; the message carries its rank, host and traceback."""


class PeerLost(RuntimeError):
    """A worker stopped answering (killed, unplugged or stopped) without reporting an exception.

    Attributes:
        ranks: the ranks that were lost, as far as this worker can tell.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Say which of the known names was meant, for the end of an error that got another one.

    Args:
        name: what was given.
        known: what could have been.
    """
    close = get_close_matches(str(name).lower().replace("-", "_"), list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else "Use one of these."


def to_install(extra: str) -> str:
    """Say how the packages of an extra are installed, for the end of an error that misses one.

    Args:
        extra: its name in ``pyproject.toml``.
    """
    return f'pip install "lightning-decentral[{extra}]", or in a clone pip install ".[{extra}]"'
