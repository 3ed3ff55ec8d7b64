"""What strategies know of a federated method: its clients, and whose turn it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from lightning_decentral.federated.clients import Clients, Round, Turn
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.worker import Worker


class AbstractFederatedAlgorithm(AbstractAlgorithm):
    """An algorithm of rounds in which workers are clients, one after the other.

    A strategy gives each turn the data of its client, and an optimizer that remembers nothing.

    Attributes:
        remembers_clients: whether it keeps something of each client from one round to the next.
        vectors_sent: what travels from the server to a client, and back, in models.
    """

    remembers_clients = False
    vectors_sent = 1

    @property
    @abstractmethod
    def population(self) -> Clients | None:
        """The clients; none: each worker is one, and takes part in each round."""

    @abstractmethod
    def of_population(self, population: Clients) -> Self:
        """Return this algorithm with other clients."""

    @abstractmethod
    def round(self, number: int, workers: int) -> Round:
        """Tell what happens in a round, with the weights that the method gives to its clients."""

    @abstractmethod
    def shares(self, number: int, workers: int) -> list[list[Turn]]:
        """Return the turns of each worker in a round."""

    @abstractmethod
    def turn(self, worker: Worker) -> Turn | None:
        """Tell whose turn it is in a worker's next step; nobody's: it waits for the others."""

    @abstractmethod
    def enter_round(self, worker: Worker, number: int) -> None:
        """Let a worker that is at the beginning of a round go on with another one."""

    @abstractmethod
    def abandon_round(self, worker: Worker) -> None:
        """Let a worker be at the beginning of the round again, with the common model, as if it had made no step."""

    @abstractmethod
    def drift(self, worker: Worker) -> float:
        """Tell how far the clients of the last round were from their mean, as a root of the weighted mean square."""
