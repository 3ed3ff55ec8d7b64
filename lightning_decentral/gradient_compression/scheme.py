"""How a parameter's gradient is exchanged, and which ways of aggregation are possible for a compressor's messages.

================ ============================================================ =======================================
way              what happens                                                 bytes each of `n` workers sends, for
                                                                              messages of `c` bytes
================ ============================================================ =======================================
``all_reduce``   messages are added on their way: those of linear             `2 (n-1)/n c`; on a grid `c` is that of
                 compressors, or whole numbers on a grid with a shared scale  numbers with head room for the sum
``all_gather``   all workers get all messages and decode them                 `(n-1) c`
``two_phase``    every worker owns a part: it gets all messages of that part, `2 (n-1)/n c`
                 averages them and sends the mean, compressed once more
================ ============================================================ =======================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_decentral.compression import AbstractCompressor, Identity, PowerSGD
from lightning_decentral.compression import compressor as by_name
from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.errors import ConfigurationError

Way = Literal["all_gather", "two_phase", "all_reduce"]
WAYS: tuple[Way, ...] = ("all_gather", "two_phase", "all_reduce")
_TYPICAL = 1 << 20  # elements for which a compressor's constant is looked at


@dataclass(frozen=True)
class Scheme:
    """How a parameter's gradient is exchanged.

    Args:
        compressor: the operator.
        feedback: whether what it leaves out is remembered.
        aggregation: how messages become their mean; ``"auto"`` leaves it to `sizes.chosen`.

    Raises:
        ConfigurationError: for a way that this compressor's messages cannot take.
    """

    compressor: AbstractCompressor
    feedback: bool
    aggregation: Literal["auto"] | Way = "auto"

    def __post_init__(self) -> None:
        if self.aggregation not in ("auto", *WAYS):
            raise ConfigurationError(
                f"Got aggregation={self.aggregation!r}, need 'auto' or one of {', '.join(map(repr, WAYS))}. Use 'auto'."
            )
        if self.aggregation != "auto" and self.aggregation not in ways(self):
            raise ConfigurationError(
                f"Got aggregation={self.aggregation!r} with {self.compressor}, need "
                f"{' or '.join(map(repr, ways(self)))}{_why_not(self)}. Use 'auto'."
            )


def helps_feedback(compressor: AbstractCompressor) -> bool:
    """Say whether error feedback is on unless somebody says otherwise: for what is biased and a contraction."""
    return not compressor.traits.unbiased and compressor.error_bound(_TYPICAL) <= 1


def scheme_of(name: str) -> Scheme:
    """Make the scheme of a compressor with its defaults.

    Raises:
        ConfigurationError: if there is none of that name, or it needs options.
    """
    made = by_name(name)
    return Scheme(made, helps_feedback(made))


def ways(scheme: Scheme) -> tuple[Way, ...]:
    """List the ways that are possible for a compressor's messages."""
    compressor = scheme.compressor
    if isinstance(compressor, PowerSGD):
        return ("all_reduce",)
    if compressor.traits.linear:
        return ("all_reduce", "all_gather")
    if not compressor.traits.fixed_size:
        return ("all_gather",)
    # A memory would need what a worker's own numbers on a shared grid stand for; grids are unbiased and need none.
    if isinstance(compressor, AbstractGrid) and not scheme.feedback:
        return WAYS
    return ("all_gather", "two_phase")


def _why_not(scheme: Scheme) -> str:
    if scheme.compressor.traits.linear:
        return ": its messages are added on their way, which is never more"
    if scheme.aggregation == "two_phase":
        return ": the size of its messages is not known beforehand"
    if isinstance(scheme.compressor, AbstractGrid):
        return ": error feedback cannot be had with a shared scale"
    return ": its messages cannot be added"


UNCOMPRESSED = Scheme(Identity(), False)
"""What is sent as it is."""
