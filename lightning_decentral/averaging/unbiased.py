"""What DCD and ECD have in common: compressed messages that are right on average, and replicas that follow them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_decentral.averaging.base import AbstractAverager
from lightning_decentral.averaging.messages import (
    refuse_sums,
    require_compressor,
    require_fixed_size,
    require_replicas,
    require_unbiased,
)
from lightning_decentral.compression import AbstractCompressor, Int8
from lightning_decentral.flat import AbstractVector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class AbstractUnbiased(AbstractAverager):
    """An averager whose messages are right on average, so that a value may take what was sent as it is.

    All workers have to begin with equal values, as they do in training.

    Args:
        compressor: unbiased, with messages of fixed size. ``None``: `Int8` with stochastic rounding.
    """

    compressor: AbstractCompressor | None = None

    def __post_init__(self) -> None:
        for require in (require_compressor, require_fixed_size, require_unbiased):
            require(type(self).__name__, self._compressor)

    @cached_property
    def _compressor(self) -> AbstractCompressor:
        return Int8(stochastic=True) if self.compressor is None else self.compressor

    @property
    def share(self) -> float:
        """The share of the way that one average goes: 1, the whole."""
        return 1.0

    @property
    def lag(self) -> float:
        """The lag: 0, as neighbours know the value without a bias."""
        return 0.0

    def check(self, graph: AbstractTopology) -> None:
        require_replicas(type(self).__name__, graph)

    def init(self, worker: Worker, value: AbstractVector, adds_up: bool = False) -> None:
        """Begin with the value as it is, which has to be the same on all workers."""
        refuse_sums(type(self).__name__, adds_up)
        self.remember(worker, value)

    @abstractmethod
    def remember(self, worker: Worker, value: AbstractVector) -> None:
        """Put what is remembered into ``worker.state``."""

    def pull_(
        self, worker: Worker, value: AbstractVector, heard: Any, total: AbstractVector, rest: AbstractVector
    ) -> None:
        move = total.zeros_like().add_(value, alpha=-1.0)
        self.combine_(worker, value, heard)
        total.add_(move.add_(value))
