"""DeepSqueeze: error-compensated compression (Tang et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_decentral.algorithms.base import Order
from lightning_decentral.algorithms.dpsgd import AbstractDPSGD
from lightning_decentral.averaging import Squeeze
from lightning_decentral.compression import AbstractCompressor, Int8
from lightning_decentral.topology import TopologyLike, ring_or_complete

_ATC: Order = "atc"


@dataclass(frozen=True, repr=False)
class DeepSqueeze(AbstractDPSGD):
    r"""DeepSqueeze: D-PSGD with compressed models; what compression leaves out of one is added to the next.

    Update rule::

        x_i     <- x_i - learning_rate * gradient_i(x_i)
        q_i     <- C(x_i + error_i)                                                # sent
        error_i <- x_i + error_i - q_i
        x_i     <- x_i + consensus_step_size * sum_j W[i, j] (q_j - q_i)

    The mean of all models moves by the mean gradient, whatever is lost. Models are compressed themselves, not their
    differences, so that workers stay apart by what compression leaves out of a model. Without compression it is D-PSGD
    with ``order="atc"``. Any optimizer may make the update; its state stays local.

    Args:
        topology: doubly stochastic, also one that changes with the step, or a function of the number of workers. By
            default the paper's `Ring` for 3 and more workers; `Complete` below.
        compressor: a contraction with messages of fixed size, biased or not. ``None``: `Int8`.
        consensus_step_size: the paper's eta, in (0, 1]. ``None``: 1 for compressors with a squared error of at most 1
            %; must be given for others.

    Raises:
        ConfigurationError: for a compressor that is no contraction, and for a coarse one without a step size.

    Cost:
        One compressed model to each out-neighbour per step, after the update. Extra memory: one copy of the model
        (float32 for half precision), one more during the exchange, and the messages. A lost peer raises `PeerLost`.

    References:
        Hanlin Tang, Xiangru Lian, Shuang Qiu, Lei Yuan, Ce Zhang, Tong Zhang, Ji Liu. DeepSqueeze: Decentralization
        Meets Error-Compensated Compression. 2019, arXiv:1907.07346.

    Example:
        >>> DeepSqueeze().resolved(4).topology
        Ring(size=4, lazy=False)
    """

    order = _ATC

    topology: TopologyLike = ring_or_complete
    compressor: AbstractCompressor | None = None
    consensus_step_size: float | None = None

    @cached_property
    def averager(self) -> Squeeze:
        """The averager: that of compressed values."""
        return Squeeze(self.compressor or Int8(), self.consensus_step_size)

    def chosen(self) -> dict[str, Any]:
        return {"compressor": self.averager.compressor, "consensus_step_size": self.averager.share}
