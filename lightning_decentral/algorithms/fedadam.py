"""FedAdam: adam as the server's optimizer (Reddi et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.fedopt import AbstractDecayingFedOpt


@dataclass(frozen=True)
class FedAdam(AbstractDecayingFedOpt):
    r"""FedAdam: Adam on the server, with what the clients have moved as its gradient.

    Update rule, for a round of the clients S, with :math:`p_k = n_k / n_S`; v begins at ``tau ** 2``, m at 0::

        d <- sum_{k in S} p_k (w_k - w)
        m <- beta_1 m + (1 - beta_1) d
        v <- beta_2 v + (1 - beta_2) d^2
        w <- w + server_learning_rate m / (sqrt(v) + tau)

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: above 0; the paper tunes it, from 0.001 to 10.
        beta_1: of the momentum, in [0, 1); the paper's 0.9.
        tau: how adaptive it is, above 0; the paper's 0.001.
        beta_2: of the squares, in [0, 1); the paper's 0.99.
        clients: a population of which a few take part in each round; see `Clients`.

    Cost:
        As `FedAvg`, and two more copies of the model. Clients keep nothing.

    Differences with the paper:
        None. Unlike `torch.optim.Adam` it has no bias correction, in the paper as here.

    References:
        Sashank Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, Jakub Konečný, Sanjiv Kumar,
        H. Brendan McMahan. Adaptive Federated Optimization. ICLR 2021, arXiv:2003.00295.

    Example:
        >>> FedAdam(server_learning_rate=0.03).beta_2
        0.99
    """

    adapts = "adam"
