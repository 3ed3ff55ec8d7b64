"""DCD: gossip in which a value moves by what was sent of it, and by nothing else (Tang et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_decentral.averaging.gossip import neighbor_exchange
from lightning_decentral.averaging.messages import Message, compressed_in_pieces, require_contraction
from lightning_decentral.averaging.unbiased import AbstractUnbiased
from lightning_decentral.flat import AbstractVector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker

Heard = tuple[Message, dict[int, AbstractVector], Mapping[int, float]]
"""Its own message, those of the neighbours, and their weights."""


@dataclass(frozen=True)
class DCD(AbstractUnbiased):
    r"""Average through compressed differences that the value itself takes: its replicas are exact.

    With ``replica_i`` what all neighbours know of worker i, and what its value was after the last round::

        q_i       <- C(value_i + sum_j W[i, j] (replica_j - replica_i) - replica_i)         # sent
        replica_i <- replica_i + q_i
        value_i   <- replica_i

    Neighbours need no replica each: the sum of their differences is kept. All workers have to begin with equal values,
    as they do in training. What compression loses is lost to the value, so that the compressor has to be unbiased, and
    fine enough for the graph: a coarse one makes the models diverge, where `Choco` only slows them down.

    Args:
        compressor: unbiased, with messages of fixed size. ``None``: `Int8` with stochastic rounding.

    Raises:
        TopologyError: by `check`, if the graph changes with the step, or is not symmetric.
        ConfigurationError: for a compressor that is biased, and by `init` for a method that adds up pulls.

    Cost:
        One compressed message to each neighbour. Two copies of the value in ``worker.state``, in float32 for half
        precision. A compressor whose messages cannot be made and decoded piece by piece takes one more, and one for
        each message while it is decoded.

    References:
        Tang, Gan, Zhang, Zhang, Liu, *Communication Compression for Decentralized Training*, NeurIPS 2018,
        arXiv:1803.06443.

    Example:
        >>> DCD().share
        1.0
    """

    def remember(self, worker: Worker, value: AbstractVector) -> None:
        require_contraction("DCD", self._compressor, value)
        worker.state["replica"] = value.zeros_like().copy_(value)
        worker.state["pull"] = value.zeros_like()

    async def exchange(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> Heard | None:
        weights = graph.weights(worker.rank, worker.step)
        if weights.keys() == {worker.rank}:
            return None
        replica, pull = worker.state["replica"], worker.state["pull"]
        message = compressed_in_pieces(self._compressor, worker, pull, (value, replica, pull), _difference)
        return message, await neighbor_exchange(worker, graph, message.vector), weights

    def combine_(self, worker: Worker, value: AbstractVector, heard: Heard | None) -> None:
        if heard is not None:
            message, received, weights = heard
            vectors = worker.state["replica"], worker.state["pull"], value
            for (replica, pull, mine), own, theirs in message.in_pieces(vectors, list(received.values())):
                mine.copy_(replica.add_(own))
                for source, each in zip(received, theirs, strict=True):
                    pull.add_(each.sub_(own), alpha=weights[source])


def _difference(out: Tensor, value: Tensor, replica: Tensor, pull: Tensor) -> None:
    torch.sub(value, replica, out=out).add_(pull)
