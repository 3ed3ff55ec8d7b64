"""FedAvgM: federated averaging with heavy-ball momentum on the server (Hsu, Qi, Brown, 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.fedmom import AbstractServerMomentum
from lightning_decentral.algorithms.local_updates import OuterOptimizer


@dataclass(frozen=True)
class FedAvgM(AbstractServerMomentum):
    r"""FedAvgM: what the clients have moved, with heavy-ball momentum on the server.

    Update rule, for a round of the clients S, with :math:`p_k = n_k / n_S`::

        g <- sum_{k in S} p_k (w - w_k)
        m <- momentum m + g
        w <- w - server_learning_rate m

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: the paper's 1.
        momentum: in [0, 1); the paper tries 0 to 0.997, and 0.9 is usual.
        clients: a population of which a few take part in each round; see `Clients`.

    Cost:
        As `FedMom`.

    References:
        Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown. Measuring the Effects of Non-Identical Data Distribution for
        Federated Visual Classification. 2019, arXiv:1909.06335.

    Example:
        >>> FedAvgM(momentum=0.7).momentum
        0.7
    """

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """The outer optimizer: heavy ball."""
        return partial(SGD, lr=self.server_learning_rate, momentum=self.momentum)
