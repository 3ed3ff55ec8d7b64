"""FedProx: federated averaging whose clients are held near the common model (Li et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.federated import AbstractFederated
from lightning_decentral.algorithms.local_updates import OuterOptimizer
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.clients import Turn
from lightning_decentral.protocol import LocalStep
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class FedProx(AbstractFederated):
    r"""FedProx: FedAvg whose clients pay for the distance from the common model.

    Update rule: as FedAvg, but a client's local steps are of its loss and ``mu / 2 ||x - w||^2``::

        x <- the user's optimizer with the gradient g(x) + mu (x - w)

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: 1 in the paper.
        mu: at least 0; the paper tries 0.001 to 1. 0 is FedAvg.
        clients: a population of which a few take part in each round; see `Clients`.

    Cost:
        As `FedAvg`, and a copy of the gradient. Clients keep nothing.

    Differences with the paper:
        Its clients may solve their problem to any accuracy; here they make the steps that they are told to make.

    References:
        Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith. Federated
        Optimization in Heterogeneous Networks. MLSys 2020, arXiv:1812.06127.

    Example:
        >>> FedProx(mu=0.1)
        FedProx(every=10, server_learning_rate=1.0, clients=None, mu=0.1)
    """

    remembers_gradients = True  # what is added has the unit of a gradient that is not scaled

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu >= 0.0:
            raise ConfigurationError(f"FedProx(mu={self.mu}): needs a number of at least 0. Use 0.01, or 0 for FedAvg.")

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """A plain step."""
        return partial(SGD, lr=self.server_learning_rate)

    async def local_step(self, worker: Worker, turn: Turn) -> None:
        worker.gradient.add_difference_(worker.x, worker.state["global"], self.mu)
        await LocalStep()

    def wait(self, worker: Worker) -> None:
        worker.gradient  # noqa: B018 - all workers read theirs in the same steps
