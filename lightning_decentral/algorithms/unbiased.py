"""What DCD-PSGD and ECD-PSGD have in common: D-PSGD, adapt then combine, with unbiased messages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from lightning_decentral.algorithms.base import Order
from lightning_decentral.algorithms.dpsgd import AbstractDPSGD
from lightning_decentral.averaging.unbiased import AbstractUnbiased
from lightning_decentral.compression import AbstractCompressor, Int8
from lightning_decentral.topology import TopologyLike, ring_or_complete

_ATC: Order = "atc"


@dataclass(frozen=True, repr=False)
class AbstractUnbiasedDPSGD(AbstractDPSGD):
    """D-PSGD with an averager whose messages are right on average.

    Attributes:
        averages_by: the class of the averager.

    Args:
        topology: a symmetric graph that stays the same, or a function of the number of workers.
        compressor: unbiased, with messages of fixed size. ``None``: `Int8` with stochastic rounding.
    """

    order = _ATC
    averages_by: ClassVar[type[AbstractUnbiased]]

    topology: TopologyLike = ring_or_complete
    compressor: AbstractCompressor | None = None

    @cached_property
    def averager(self) -> AbstractUnbiased:
        """The averager, with its compressor."""
        return self.averages_by(self.compressor or Int8(stochastic=True))

    def chosen(self) -> dict[str, Any]:
        return {"compressor": self.averager.compressor}
