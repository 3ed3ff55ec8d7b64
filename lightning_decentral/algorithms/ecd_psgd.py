"""ECD-PSGD: extrapolation compression (Tang et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.unbiased import AbstractUnbiasedDPSGD
from lightning_decentral.averaging import ECD


@dataclass(frozen=True, repr=False)
class ECDPSGD(AbstractUnbiasedDPSGD):
    r"""ECD-PSGD: D-PSGD in which neighbours estimate a model from compressed extrapolations of it.

    Update rule, for the steps t = 1, 2, ..., with ``estimate_i`` what is known of worker i::

        x_i        <- sum_j W[i, j] estimate_j - learning_rate * gradient_i(x_i)
        z_i        <- (1 - t / 2) x_i of before + (t / 2) x_i                             # C(z_i) is sent
        estimate_i <- (1 - 2 / t) estimate_i + (2 / t) C(z_i)

    Without compression the estimate is the model, and it is D-PSGD. The error of an estimate falls as long as models
    move by less and less: the learning rate has to fall as well.

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
        (float32 for half precision), one more during the exchange, and the messages. A lost peer raises `PeerLost`.

    References:
        Hanlin Tang, Shaoduo Gan, Ce Zhang, Tong Zhang, Ji Liu. Communication Compression for Decentralized Training.
        NeurIPS 2018, arXiv:1803.06443.

    Example:
        >>> ECDPSGD().resolved(4).topology
        Ring(size=4, lazy=False)
    """

    averages_by = ECD
