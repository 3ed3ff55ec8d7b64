"""CHOCO-SGD: decentralized SGD with compressed differences (Koloskova et al., 2019 and 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_decentral.algorithms.dpsgd import AbstractDPSGD
from lightning_decentral.averaging import Choco
from lightning_decentral.compression import AbstractCompressor, Int8
from lightning_decentral.topology import TopologyLike, ring_or_complete


@dataclass(frozen=True, repr=False)
class ChocoSGD(AbstractDPSGD):
    r"""CHOCO-SGD: D-PSGD whose messages are compressed differences, sent *while* the gradient is computed.

    Update rule, with the gradient taken before the averaging, and ``public_i`` what the neighbours know of ``x_i``::

        public_i <- public_i + C(x_i - public_i)            # C(...) is sent
        x_i      <- x_i + consensus_step_size * sum_j W[i, j] (public_j - public_i) - learning_rate * gradient_i(x_i)

    Any optimizer may apply the gradient; its state (momentum) stays local. The mean of all workers moves by the mean
    gradient, whatever is lost in compression. With `Identity` and step size 1 it is `DPSGD` (adapt while combine) on
    the same graph, step by step.

    Args:
        topology: a graph that stays the same, or a function of the number of workers. By default the paper's `Ring`
            for 3 and more workers; `Complete` below.
        compressor: a contraction with messages of fixed size, biased or not. ``None``: `Int8`, a quarter of the bytes.
        consensus_step_size: the paper's gamma, in (0, 1]: smaller for coarser compression. ``None``: 1 for compressors
            with a squared error of at most 1 %, such as `Int8`; must be given for others. The papers have 0.45 for
            `ScaledSign` on a ring of 8, and 0.04 to 0.1 for 1 % of the elements.

    Raises:
        TopologyError: if the graph changes with the step.
        ConfigurationError: for a compressor that is no contraction or has messages of changing size, and for a coarse
            one without a step size.

    Cost:
        One compressed model sent to each out-neighbour per step. Compressing and sending are hidden behind forward and
        backward where cores or links are free; messages are decoded in the update, piece by piece. Extra memory: two
        copies of the model (float32 for half precision), and the messages; of `TopK` one more for each message. A lost
        peer raises `PeerLost`.

    Not to be confused with:
        Sending compressed models (DeepSqueeze, or a cast in D-PSGD), where the error of compression stays in the
        models: here it vanishes as the workers agree.

    References:
        Anastasia Koloskova, Sebastian U. Stich, Martin Jaggi. Decentralized Stochastic Optimization and Gossip
        Algorithms with Compressed Communication. ICML 2019, arXiv:1902.00340. Anastasia Koloskova, Tao Lin, Sebastian
        U. Stich, Martin Jaggi. Decentralized Deep Learning with Arbitrary Communication Compression. ICLR 2020,
        arXiv:1907.09356.

    Example:
        >>> from lightning_decentral.compression import ScaledSign
        >>> ChocoSGD(compressor=ScaledSign(), consensus_step_size=0.45).resolved(8).topology
        Ring(size=8, lazy=False)
    """

    topology: TopologyLike = ring_or_complete
    compressor: AbstractCompressor | None = None
    consensus_step_size: float | None = None

    @cached_property
    def averager(self) -> Choco:
        """The averager: CHOCO's."""
        return Choco(self.compressor or Int8(), self.consensus_step_size)

    def chosen(self) -> dict[str, Any]:
        return {"compressor": self.averager.compressor, "consensus_step_size": self.averager.share}
