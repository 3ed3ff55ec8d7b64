"""FedAvg: federated averaging (McMahan et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.federated import AbstractFederated
from lightning_decentral.algorithms.local_updates import OuterOptimizer


@dataclass(frozen=True)
class FedAvg(AbstractFederated):
    r"""FedAvg: a few clients train the common model on their own data, and their mean, by samples, is the next one.

    Update rule, for the round that begins at the common model w, with the clients S and :math:`p_k = n_k / n_S`::

        w_k <- w, then the local steps of client k
        w   <- w - server_learning_rate sum_{k in S} p_k (w - w_k)          # sum_k p_k w_k, if that rate is 1

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: 1 in the paper: the mean itself.
        clients: a population of which a few take part in each round; see `Clients`.

    Cost:
        A client gets the model and sends it back once in a round. In this package workers send ``2 (n - 1) / n``
        models in a round, however many clients they are. One copy of the model, in float32 at least, and another one
        where a worker is several clients. A lost peer raises `PeerLost` at the end of the round.

    Differences with the paper:
        Without ``clients`` a worker's optimizer keeps its state from round to round: as local SGD, which it is then.

    References:
        H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas. Communication-Efficient
        Learning of Deep Networks from Decentralized Data. AISTATS 2017, arXiv:1602.05629.

    Example:
        >>> FedAvg(every=20).period(8)
        20
    """

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """A plain step."""
        return partial(SGD, lr=self.server_learning_rate)
