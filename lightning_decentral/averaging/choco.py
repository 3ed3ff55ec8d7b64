"""CHOCO: gossip of compressed differences to public copies (Koloskova, Stich, Jaggi, 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_decentral.averaging.base import AbstractAverager
from lightning_decentral.averaging.gossip import neighbor_exchange
from lightning_decentral.averaging.messages import (
    Message,
    compressed_in_pieces,
    in_double,
    require_compressor,
    require_contraction,
    require_fixed_size,
    require_share,
)
from lightning_decentral.compression import AbstractCompressor, Int8
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker

_FINE = 0.01  # squared relative error up to which the step size of exact gossip, 1, is right
_LARGE = 1 << 20  # parameters of a model, where a compressor's error depends on their number

Heard = tuple[Message, dict[int, AbstractVector], Mapping[int, float]]
"""Its own message, those of the neighbours, and their weights."""


@dataclass(frozen=True)
class Choco(AbstractAverager):
    r"""Average with the neighbours through compressed messages, with an error that vanishes.

    Every worker has a *public copy* of its value, which its neighbours know too. It sends the compressed difference
    between value and copy, and both ends add what was sent to the copy. The values move by the difference of the
    copies, so that nothing that compression loses is lost for good::

        q_i      <- C(x_i - public_i)                          # sent
        public_i <- public_i + q_i
        pull_i   <- pull_i + sum_j W[i, j] (q_j - q_i)         # = sum_j W[i, j] public_j - public_i
        x_i      <- x_i + consensus_step_size * pull_i

    The sum of all pulls is zero, so that the mean of the values stays; with a lossless compressor and step size 1 the
    last line is ``x_i <- sum_j W[i, j] x_j``.

    The paper keeps ``sum_j W[i, j] public_j`` and subtracts. Its rounding errors have the size of the model and add
    up; those of the pull have the size of the disagreement. A method that adds up the pulls (D2) adds up their errors
    too: for it the pull is kept in float64.

    Args:
        compressor: a contraction (its error is always smaller than the vector), with messages of fixed size. ``None``:
            `Int8`, a quarter of the bytes.
        consensus_step_size: the paper's gamma, in (0, 1]: smaller for coarser compression. ``None``: 1 for compressors
            with a squared error of at most 1 %, such as `Int8`; must be given for others.

    Raises:
        TopologyError: by `check`, if the graph changes with the step.
        ConfigurationError: for a compressor or step size that cannot work.

    Cost:
        One compressed message to each out-neighbour. Two copies of the value in ``worker.state``, in float32 for half
        precision; where the pulls are added up that of the pull is in float64, and a step size below 1 takes one more.
        A compressor whose messages cannot be made and decoded piece by piece, as that of `TopK`, takes one more for the
        difference, and one for each message while it is decoded.

    References:
        Koloskova, Stich, Jaggi, *Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
        Communication*, ICML 2019, arXiv:1902.00340.

    Example:
        >>> from lightning_decentral.compression import TopK
        >>> Choco(TopK(0.01), consensus_step_size=0.05).share
        0.05
        >>> Choco().share
        1.0
    """

    compressor: AbstractCompressor | None = None
    consensus_step_size: float | None = None

    def __post_init__(self) -> None:
        require_compressor("CHOCO", self._compressor)
        require_fixed_size("CHOCO", self._compressor)
        require_share("CHOCO", "consensus_step_size", self.share)

    @cached_property
    def _compressor(self) -> AbstractCompressor:
        return Int8() if self.compressor is None else self.compressor

    @cached_property
    def share(self) -> float:
        """The step size, or the one that is right for a fine compressor."""
        if self.consensus_step_size is None and not (bound := self._compressor.error_bound(_LARGE)) <= _FINE:
            raise ConfigurationError(
                f"CHOCO got {self._compressor} without a consensus_step_size, needs one for a compressor whose squared "
                f"error may be {bound:.2g} of the vector's. Begin with consensus_step_size=0.4 for ScaledSign, 0.05 "
                "for 1 % of the elements, and halve it if the workers drift apart."
            )
        return 1.0 if self.consensus_step_size is None else self.consensus_step_size

    @property
    def lag(self) -> float:
        """The lag `c / (1 - c)` for a relative error of c: a public copy is so far behind what moves by 1 per step.

        0 for unbiased compressors, whose errors have no direction.
        """
        if self._compressor.traits.unbiased:
            return 0.0
        error = math.sqrt(self._compressor.error_bound(_LARGE))
        return error / (1.0 - error) if error < 1.0 else math.inf

    def check(self, graph: AbstractTopology) -> None:
        if graph.period != 1:
            raise TopologyError(
                f"CHOCO needs a graph that stays the same, got {graph!r}, changing with the step: a neighbour knows "
                "the public copy only if it heard every message. Use Ring or Exponential."
            )

    def init(self, worker: Worker, value: AbstractVector, adds_up: bool = False) -> None:
        """Begin with public copies of zero, for values like this one."""
        require_contraction("CHOCO", self._compressor, value)
        worker.state["public"] = value.zeros_like()
        worker.state["pull"] = in_double(value.zeros_like()) if adds_up else value.zeros_like()

    async def exchange(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> Heard | None:
        weights = graph.weights(worker.rank, worker.step)
        if weights.keys() == {worker.rank}:
            return None
        public = worker.state["public"]
        message = compressed_in_pieces(self._compressor, worker, public, (value, public), _subtract)
        return message, await neighbor_exchange(worker, graph, message.vector), weights

    def combine_(self, worker: Worker, value: AbstractVector, heard: Heard | None) -> None:
        if heard is not None:
            state = worker.state
            for _, pull, own in _moved(heard, state["public"], state["pull"], value):
                own.add_(pull, alpha=self.share)

    def pull_(
        self, worker: Worker, value: AbstractVector, heard: Heard | None, total: AbstractVector, rest: AbstractVector
    ) -> None:
        if heard is not None:
            pull = worker.state["pull"]
            for _ in _moved(heard, worker.state["public"], pull):
                pass
            move = pull if self.share == 1.0 else pull.clone().mul_(self.share)
            total.add_(move)
            value.add_rest_(move, rest)


def _subtract(out: Tensor, value: Tensor, public: Tensor) -> None:
    torch.sub(value, public, out=out)


def _moved(heard: Heard, *vectors: AbstractVector) -> Iterator[list[Tensor]]:
    """Move the first two vectors, public copy and pull, by what was heard; yield pieces of all once theirs moved."""
    message, received, weights = heard
    for pieces, own, theirs in message.in_pieces(vectors, list(received.values())):
        pieces[0].add_(own)
        for source, each in zip(received, theirs, strict=True):
            pieces[1].add_(each.sub_(own), alpha=weights[source])
        yield pieces
