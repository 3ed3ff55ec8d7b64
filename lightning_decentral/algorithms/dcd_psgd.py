"""DCD-PSGD: difference compression (Tang et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_decentral.algorithms.base import Order
from lightning_decentral.algorithms.dpsgd import AbstractDPSGD
from lightning_decentral.averaging import DCD
from lightning_decentral.compression import AbstractCompressor, Int8
from lightning_decentral.topology import TopologyLike, ring_or_complete

_ATC: Order = "atc"


@dataclass(frozen=True, repr=False)
class DCDPSGD(AbstractDPSGD):
    r"""DCD-PSGD: D-PSGD in which a model moves only by the compressed difference that its neighbours get, too.

    Update rule::

        z_i <- sum_j W[i, j] x_j - learning_rate * gradient_i(x_i) - x_i
        x_i <- x_i + C(z_i)                                                        # C(z_i) is sent

    So every worker knows its neighbours' models exactly. Without compression it is D-PSGD. With a coarse compressor it
    diverges: what compression loses of the average is made anew in each step. `ChocoSGD` has no such bound.

    Any optimizer may make the update; its state stays local. Workers have to begin equal, as they do in training.

    Args:
        topology: a symmetric graph that stays the same, or a function of the number of workers. By default the paper's
            `Ring` for 3 and more workers; `Complete` below.
        compressor: unbiased, with messages of fixed size. ``None``: `Int8` with stochastic rounding.

    Raises:
        TopologyError: if the graph changes with the step, or is directed.
        ConfigurationError: for a biased compressor.

    Cost:
        One compressed model to each neighbour per step, after the update. Extra memory: two copies of the model
        (float32 for half precision), three more during the exchange, and the messages. A lost peer raises `PeerLost`.

    References:
        Hanlin Tang, Shaoduo Gan, Ce Zhang, Tong Zhang, Ji Liu. Communication Compression for Decentralized Training.
        NeurIPS 2018, arXiv:1803.06443.

    Example:
        >>> DCDPSGD().resolved(4).topology
        Ring(size=4, lazy=False)
    """

    order = _ATC

    topology: TopologyLike = ring_or_complete
    compressor: AbstractCompressor | None = None

    @cached_property
    def averager(self) -> DCD:
        """The averager: that of differences."""
        return DCD(self.compressor or Int8(stochastic=True))

    def chosen(self) -> dict[str, Any]:
        return {"compressor": self.averager.compressor}
