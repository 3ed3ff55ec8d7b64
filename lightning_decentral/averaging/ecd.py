"""ECD: gossip of extrapolated values, whose errors shrink with time (Tang et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_decentral.averaging.gossip import neighbor_exchange
from lightning_decentral.averaging.messages import Message, compressed_in_pieces
from lightning_decentral.averaging.unbiased import AbstractUnbiased
from lightning_decentral.flat import AbstractVector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker

Heard = tuple[AbstractVector, Message, dict[int, AbstractVector], Mapping[int, float]]
"""The value after the round, its own message, those of the neighbours, and the weights."""


@dataclass(frozen=True)
class ECD(AbstractUnbiased):
    r"""Average through compressed extrapolations, of which neighbours keep a running estimate.

    In round t = 1, 2, ..., with ``x_i`` the value after the last round and ``estimate_i`` what is known of it::

        h_i        <- sum_j W[i, j] estimate_j + value_i - x_i
        z_i        <- (1 - t / 2) x_i + (t / 2) h_i                               # C(z_i) is sent
        estimate_i <- (1 - 2 / t) estimate_i + (2 / t) C(z_i)
        value_i    <- h_i

    Without compression the estimate is the value. Of unbiased errors it keeps a mean whose variance falls with t as
    long as ``z`` keeps its size; but ``z`` grows with t times the last move. All workers have to begin with equal
    values, as they do in training. Only the average of the estimates is kept.

    Args:
        compressor: unbiased, with messages of fixed size. ``None``: `Int8` with stochastic rounding.

    Raises:
        TopologyError: by `check`, if the graph changes with the step, or is not symmetric.
        ConfigurationError: for a compressor that is biased, and by `init` for a method that adds up pulls.

    Cost:
        One compressed message to each neighbour. Two copies of the value in ``worker.state``, in float32 for half
        precision, and one more from the exchange to `combine_`.

    References:
        Tang, Gan, Zhang, Zhang, Liu, *Communication Compression for Decentralized Training*, NeurIPS 2018,
        arXiv:1803.06443.

    Example:
        >>> ECD().share
        1.0
    """

    def remember(self, worker: Worker, value: AbstractVector) -> None:
        worker.state["estimate"] = value.zeros_like().copy_(value)
        worker.state["last"] = value.zeros_like().copy_(value)
        worker.state["round"] = 1

    async def exchange(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> Heard | None:
        weights = graph.weights(worker.rank, worker.step)
        if weights.keys() == {worker.rank}:
            return None
        last, half = worker.state["last"], worker.state["round"] / 2
        after = worker.state["estimate"].clone().add_difference_(value, last, 1.0)
        message = compressed_in_pieces(self._compressor, worker, last, (last, after), partial(_extrapolate, half=half))
        return after, message, await neighbor_exchange(worker, graph, message.vector), weights

    def combine_(self, worker: Worker, value: AbstractVector, heard: Heard | None) -> None:
        if heard is not None:
            after, message, received, weights = heard
            share, mine = 2 / worker.state["round"], weights.get(worker.rank, 0.0)
            worker.state["round"] += 1
            vectors = (worker.state["estimate"],)
            for (estimate,), own, theirs in message.in_pieces(vectors, list(received.values())):
                mean = own.mul_(mine)
                for source, each in zip(received, theirs, strict=True):
                    mean.add_(each, alpha=weights[source])
                estimate.mul_(1 - share).add_(mean, alpha=share)
            worker.state["last"] = after
            value.copy_(after)


def _extrapolate(out: Tensor, last: Tensor, after: Tensor, half: float) -> None:
    torch.sub(after, last, out=out).mul_(half).add_(last)
