"""FedMom: federated averaging with Nesterov's momentum on the server (Huo, Yang, Gu, Carin, Huang, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.federated import AbstractFederated
from lightning_decentral.algorithms.local_updates import OuterOptimizer
from lightning_decentral.errors import ConfigurationError


@dataclass(frozen=True)
class AbstractServerMomentum(AbstractFederated):
    """A server with momentum.

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: above 0.
        momentum: of the server, in [0, 1).
        clients: a population of which a few take part in each round; see `Clients`.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigurationError(
                f"{type(self).__name__}(momentum={self.momentum}): needs a number in [0, 1). Use 0.9, or 0 for FedAvg."
            )


@dataclass(frozen=True)
class FedMom(AbstractServerMomentum):
    r"""FedMom: what the clients have moved, taken as a biased gradient, with Nesterov's momentum on the server.

    Update rule, for round t of the clients S, with :math:`p_k = n_k / n_S` and :math:`v_0 = w_0`::

        g       = sum_{k in S} p_k (w - w_k)               # a biased gradient
        v(t+1)  = w(t) - server_learning_rate g
        w(t+1)  = v(t+1) + momentum (v(t+1) - v(t))

    This is `torch.optim.SGD` with ``nesterov=True`` on g, and DiLoCo's outer optimizer.

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: 1 is FedAvg's. The paper's K / M, with weights by the samples of all K clients, is 1 with
            ``Clients(weights="all")``.
        momentum: in [0, 1); 0.9 in the paper's code. 0 is FedAvg.
        clients: a population of which a few take part in each round; see `Clients`.

    Cost:
        As `FedAvg`, and one more copy of the model for the momentum. Clients keep nothing.

    Differences with the paper:
        The published code begins at v = 0, which multiplies the initial model by ``1 + momentum`` in the first round;
        here v begins at the model, as the paper says.

    References:
        Zhouyuan Huo, Qian Yang, Bin Gu, Lawrence Carin, Heng Huang. Faster On-Device Training Using New Federated
        Momentum Algorithm. 2020, arXiv:2002.02090.

    Example:
        >>> from lightning_decentral.federated import Clients
        >>> FedMom(clients=Clients(1000, per_round=20, local_steps=5)).round(0, workers=1).asked
        20
    """

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """The outer optimizer: Nesterov's."""
        return partial(SGD, lr=self.server_learning_rate, momentum=self.momentum, nesterov=self.momentum > 0.0)
