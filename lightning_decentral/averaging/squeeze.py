"""DeepSqueeze's average: gossip of compressed values with error compensation (Tang et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lightning_decentral.averaging.base import AbstractAverager
from lightning_decentral.averaging.choco import Choco
from lightning_decentral.averaging.gossip import neighbor_exchange
from lightning_decentral.averaging.messages import Message, compressed, refuse_sums, require_contraction
from lightning_decentral.compression import AbstractCompressor, Int8
from lightning_decentral.flat import AbstractVector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker

Heard = tuple[AbstractVector, Message, dict[int, AbstractVector], Mapping[int, float]]
"""What was compressed, the message, those of the neighbours, and their weights."""


@dataclass(frozen=True)
class Squeeze(AbstractAverager):
    r"""Average through compressed values; what compression leaves out of one is added to the next.

    ::

        q_i     <- C(value_i + error_i)                                # sent
        error_i <- value_i + error_i - q_i
        value_i <- value_i + consensus_step_size * sum_j W[i, j] (q_j - q_i)

    Nothing is remembered of the neighbours, so that any graph will do, and the sum of the values stays. Values are
    compressed themselves and not differences: workers come no nearer to each other than what compression leaves out of
    a value, where `Choco`'s errors vanish.

    Args:
        compressor: a contraction with messages of fixed size, biased or not. ``None``: `Int8`.
        consensus_step_size: the paper's eta, in (0, 1]. ``None``: 1 for compressors with a squared error of at most 1
            %; must be given for others.

    Raises:
        ConfigurationError: for a compressor or step size that cannot work, and by `init` for a method that adds up
            pulls.

    Cost:
        One compressed message to each out-neighbour. One copy of the value in ``worker.state``, in float32 for half
        precision, and one more from the exchange to `combine_`.

    References:
        Tang, Lian, Qiu, Yuan, Zhang, Zhang, Liu, *DeepSqueeze: Decentralization Meets Error-Compensated Compression*,
        2019, arXiv:1907.07346.

    Example:
        >>> Squeeze().share
        1.0
    """

    compressor: AbstractCompressor | None = None
    consensus_step_size: float | None = None

    def __post_init__(self) -> None:
        _ = self._rules

    @cached_property
    def _compressor(self) -> AbstractCompressor:
        return Int8() if self.compressor is None else self.compressor

    @cached_property
    def _rules(self) -> Choco:
        """What holds for CHOCO's compressor and step size holds here."""
        return Choco(self._compressor, self.consensus_step_size)

    @property
    def share(self) -> float:
        """The step size, or the one that is right for a fine compressor."""
        return self._rules.share

    @property
    def lag(self) -> float:
        """The lag: that of the compressor."""
        return self._rules.lag

    def check(self, graph: AbstractTopology) -> None:
        pass  # any graph, also one that changes with the step

    def init(self, worker: Worker, value: AbstractVector, adds_up: bool = False) -> None:
        """Begin without an error."""
        require_contraction("Squeeze", self._compressor, value)
        refuse_sums("Squeeze", adds_up)
        worker.state["error"] = value.zeros_like()

    async def exchange(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> Heard | None:
        weights = graph.weights(worker.rank, worker.step)
        if weights.keys() == {worker.rank}:
            return None
        work = worker.state["error"].clone().add_(value)
        message = compressed(self._compressor, work, worker)
        return work, message, await neighbor_exchange(worker, graph, message.vector), weights

    def combine_(self, worker: Worker, value: AbstractVector, heard: Heard | None) -> None:
        if heard is not None:
            work, message, received, weights = heard
            for (error, mine), own, theirs in message.in_pieces((work, value), list(received.values())):
                error.sub_(own)
                for source, each in zip(received, theirs, strict=True):
                    mine.add_(each.sub_(own), alpha=self.share * weights[source])
            worker.state["error"] = work

    def pull_(
        self, worker: Worker, value: AbstractVector, heard: Heard | None, total: AbstractVector, rest: AbstractVector
    ) -> None:
        move = total.zeros_like()
        self.combine_(worker, move, heard)
        total.add_(move)
        value.add_rest_(move, rest)
