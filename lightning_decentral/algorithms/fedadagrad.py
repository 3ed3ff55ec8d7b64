"""FedAdagrad: Adagrad as the server's optimizer (Reddi et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.fedopt import AbstractFedOpt


@dataclass(frozen=True)
class FedAdagrad(AbstractFedOpt):
    r"""FedAdagrad: Adagrad on the server, whose steps become smaller where much has been moved.

    Update rule, for a round of the clients S, with :math:`p_k = n_k / n_S`; v begins at ``tau ** 2``, m at 0::

        d <- sum_{k in S} p_k (w_k - w)
        m <- beta_1 m + (1 - beta_1) d
        v <- v + d^2
        w <- w + server_learning_rate m / (sqrt(v) + tau)

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: above 0; the paper tunes it, from 0.001 to 10.
        beta_1: of the momentum, in [0, 1); the paper's 0.
        tau: how adaptive it is, above 0; the paper's 0.001.
        clients: a population of which a few take part in each round; see `Clients`.

    Cost:
        As `FedAvg`, and two more copies of the model. Clients keep nothing.

    References:
        Sashank Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, Jakub Konečný, Sanjiv Kumar,
        H. Brendan McMahan. Adaptive Federated Optimization. ICLR 2021, arXiv:2003.00295.

    Example:
        >>> FedAdagrad().beta_1
        0.0
    """

    adapts = "adagrad"

    beta_1: float = 0.0
