"""DCD-PSGD: difference compression (Tang et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.unbiased import AbstractUnbiasedDPSGD
from lightning_decentral.averaging import DCD


@dataclass(frozen=True, repr=False)
class DCDPSGD(AbstractUnbiasedDPSGD):
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
        (float32 for half precision), and the messages. A lost peer raises `PeerLost`.

    References:
        Hanlin Tang, Shaoduo Gan, Ce Zhang, Tong Zhang, Ji Liu. Communication Compression for Decentralized Training.
        NeurIPS 2018, arXiv:1803.06443.

    Example:
        >>> DCDPSGD().resolved(4).topology
        Ring(size=4, lazy=False)
    """

    averages_by = DCD
