"""Moniqua: gossip of the last digits of models that are near each other (Lu, De Sa, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lightning_decentral.averaging.base import AbstractAverager
from lightning_decentral.averaging.gossip import neighbor_exchange
from lightning_decentral.averaging.messages import Message, compressed, require_share
from lightning_decentral.compression import Lattice, Payload
from lightning_decentral.errors import ConfigurationError, DecodingError
from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker

Heard = list[tuple[tuple[Tensor, ...], float]]
"""Of each neighbour how many steps of the lattice it is away, in every buffer, and its weight."""


@dataclass(frozen=True)
class Moniqua(AbstractAverager):
    r"""Average with the neighbours through modulo-quantized messages; nothing is remembered between steps.

    A value is rounded to a lattice and only the last digits of the lattice point travel; the receiver takes the point
    with these digits that is nearest to its own value. That is the right one as long as the two differ by at most
    ``theta`` in every coordinate. With ``rounded_j`` what worker j's value is rounded to::

        x_i <- x_i + consensus_step_size * sum_j W[i, j] (rounded_j - rounded_i)

    A worker rounds its own value too, so that the mean of the values stays whatever rounding does: the difference of
    two rounded values is the same number on both ends. Rounding is dithered by a shift that all workers draw from the
    step's number, which makes it unbiased.

    Every message has check sums of the whole lattice points: a value that was farther away than ``theta`` is noticed
    by whoever decodes it, and ends the training instead of corrupting it.

    Args:
        theta: how far, in any coordinate, the values of two neighbours may be apart. The error of rounding is
            proportional to it: at most ``theta / (levels - 1)``.
        levels: 2, 4, 16 or 256: 1, 2, 4 or 8 bits per coordinate.
        consensus_step_size: in (0, 1]; the paper's slack matrix, needed for very few bits.

    Cost:
        One message to each out-neighbour: log2(levels) bits per parameter and 4 bytes for every 4096 parameters. No
        memory between steps; one byte per parameter and in-neighbour from the exchange to `combine_`.

    Raises:
        ConfigurationError: for numbers out of range.

    References:
        Lu, De Sa, *Moniqua: Modulo Quantized Communication in Decentralized SGD*, ICML 2020, arXiv:2002.11787.
    """

    theta: float = 1.0
    levels: int = 256
    consensus_step_size: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.theta, int | float) and 0.0 < self.theta < float("inf")):
            raise ConfigurationError(
                f"Moniqua got theta={self.theta!r}, needs a positive number, in the units of the parameters. Use "
                "the largest distance of two workers' parameters that you expect, and some reserve."
            )
        require_share("Moniqua", "consensus_step_size", self.consensus_step_size)
        _ = self.lattice  # which checks the levels

    @cached_property
    def lattice(self) -> Lattice:
        """The lattice that values are rounded to; its ``reach`` is ``theta``."""
        return Lattice.within(self.theta, self.levels, dither=True)

    @property
    def share(self) -> float:
        """The step size."""
        return self.consensus_step_size

    @property
    def lag(self) -> float:
        """The lag: 0, as rounding is unbiased."""
        return 0.0

    def check(self, graph: AbstractTopology) -> None:
        pass  # any graph, also one that changes with the step

    def init(self, worker: Worker, value: AbstractVector, adds_up: bool = False) -> None:
        pass

    async def exchange(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> Heard | None:
        """Tell the neighbours, and hear from them.

        Raises:
            DecodingError: if the value of a neighbour is farther away than ``theta``.
        """
        weights = graph.weights(worker.rank, worker.step)
        if weights.keys() == {worker.rank}:
            return None
        message = compressed(self.lattice, value, worker)
        received = await neighbor_exchange(worker, graph, message.vector)
        return [
            (self._steps_between(worker, source, message, message.read(theirs), value), weights[source])
            for source, theirs in received.items()
        ]

    def combine_(self, worker: Worker, value: AbstractVector, heard: Heard | None) -> None:
        if heard and isinstance(value, Vector):
            for number, buffer in enumerate(value.buffers):
                terms = [(steps[number], self.consensus_step_size * weight) for steps, weight in heard]
                self.lattice.add_steps_(buffer, terms)

    def pull_(
        self, worker: Worker, value: AbstractVector, heard: Heard | None, total: AbstractVector, rest: AbstractVector
    ) -> None:
        move = total.zeros_like()
        self.combine_(worker, move, heard)
        total.add_(move)
        value.add_rest_(move, rest)

    def _steps_between(
        self, worker: Worker, source: int, message: Message, payloads: tuple[Payload, ...], value: AbstractVector
    ) -> tuple[Tensor, ...]:
        if not isinstance(value, Vector):
            return ()
        try:
            return tuple(
                self.lattice.steps_between(theirs, own, near)
                for theirs, own, near in zip(payloads, message.payloads, value.buffers, strict=True)
            )
        except DecodingError as error:
            raise DecodingError(
                f"Moniqua on worker {worker.rank} got a model of worker {source} in step {worker.step} that differs "
                f"from its own by more than theta={self.lattice.reach:g} in some parameter, needs it nearer to know "
                "what was sent. Go on from the last checkpoint with a larger theta, a smaller learning rate, or a "
                "graph that mixes better."
            ) from error
