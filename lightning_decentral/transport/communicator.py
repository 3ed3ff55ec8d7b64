"""The communicator: everything that moves a worker's vectors, in one object.

Its exchanges end in the order in which they were begun: on one background thread (the *lane*), so that a worker can
compute meanwhile; or where they are waited for, if there is no core for another thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.traffic import Traffic
from lightning_decentral.transport.answers import AbstractCallee
from lightning_decentral.transport.board import Board
from lightning_decentral.transport.calls import Calls
from lightning_decentral.transport.collectives import Collectives
from lightning_decentral.transport.connections import AbstractConnections, ConnectionSettings
from lightning_decentral.transport.exchanges import Exchanges
from lightning_decentral.transport.living import LivingCollectives, LivingExchanges
from lightning_decentral.transport.mail import Mail
from lightning_decentral.transport.membership import Membership
from lightning_decentral.transport.shared_memory import num_bytes_of, views_of
from lightning_decentral.transport.standstill import Standstill


def _fill(memory: Tensor, values: Vector) -> None:
    Vector(views_of(memory, 0, values)).copy_(values)


class Communicator(AbstractConnections):
    """Moves vectors between the workers of a run.

    Args:
        settings: how they reach each other.
        membership: who takes part, in a run whose workers come and go.
        most_workers: of such a run, at its start.

    Attributes:
        exchanges: with neighbours.
        collectives: of all workers.
        calls: of other workers, and by them.
        mail: one-way messages.
        board: values that are left for others to read.
        standstill: notices that nobody can go on.

    Must be made by all workers together, after `torch.distributed` has been initialized.
    """

    def __init__(
        self, settings: ConnectionSettings, membership: Membership | None = None, most_workers: int = 1
    ) -> None:
        place = None if membership is None else (membership.rank, most_workers)
        super().__init__(settings, place)
        self.collectives = Collectives(self)
        self.exchanges = Exchanges(self)
        if membership is not None:
            self.collectives = living = LivingCollectives(self, membership)
            self.exchanges = LivingExchanges(self, living)
        self.standstill = Standstill(self)
        self.calls = Calls(self, self.standstill)
        self.mail = Mail(self)
        self.board = Board(self)

    @property
    def traffic(self) -> Traffic:
        """What this worker sent and waited for."""
        self.calls.count_answers()
        return self.sent

    def open_edges(self, algorithm: AbstractAsynchronousAlgorithm, callees: Sequence[AbstractCallee]) -> None:
        """Connect to those that this worker may call and that may call it. All workers together."""
        self.calls.open(algorithm, callees)

    def common_memory(self, method: str, index: int, x: Vector) -> Vector:
        """Map one vector in memory that all workers map, with worker 0's values. All workers together.

        Args:
            method: that needs it; for messages.
            index: of the model.
            x: it.

        Raises:
            ConfigurationError: if the workers are not on one host, or the model is not in its memory.
        """
        if self.device.type != "cpu" or len(self.shared.peers) < self.world_size - 1:
            raise ConfigurationError(
                f"{method} got {self.world_size} workers of which worker {self.rank} shares memory with "
                f"{sorted(self.shared.peers)}, on {self.device}; it needs all on one machine (Linux), on its "
                "processor, and shared_memory=True. Use APSGD over a network, or on accelerators."
            )
        with self.failures(self.others):
            if self.rank:
                memory = self.shared.borrow(0, index)
                common = Vector(views_of(memory, 0, x))
            else:
                memory = self.shared.lend(index, num_bytes_of(x), lambda new: _fill(new, x))
                common = Vector(views_of(memory, 0, x))
        self.barrier("the model in shared memory")
        return common

    def meet_for_exchanges(self, again: bool) -> tuple[int, ...]:
        """Agree on who makes the exchanges that follow, of workers that come and go; return their ranks.

        Args:
            again: whether those that met first, when all began to average, have made none.
        """
        assert isinstance(self.collectives, LivingCollectives)
        return self.collectives.meet_for_exchanges(again)

    def lend(self, callee: AbstractCallee) -> None:
        """Let the parameters lie where calls need them. Between two steps, all workers together."""
        self.calls.lend(callee)

    def agree(self, value: float, operation: str = "mean", what: str = "a meeting of all workers") -> float:
        """Reduce one number of every worker; see `Collectives.agree`."""
        return self.collectives.agree(value, operation, what)

    def reduce(self, values: Tensor, operation: str) -> Tensor:
        """Reduce a few numbers of every worker; see `Collectives.reduce_numbers`."""
        return self.collectives.reduce_numbers(values, operation)

    def meet(self, what: str, *numbers: int) -> list[list[int]]:
        """Wait for everybody; a few integers of every worker, by rank; see `Collectives.meet`."""
        return self.collectives.meet(what, *numbers)

    def barrier(self, what: str = "a meeting of all workers") -> None:
        """Wait for everybody; raises when another worker fails meanwhile, or is at another kind of meeting."""
        self.collectives.meet(what)

    def gather(self, value: bytes) -> list[bytes]:
        """Gather what every worker passed, by rank. All workers together; not counted as traffic."""
        return self.collectives.gather(value)

    def average_floating(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over all workers; see `Collectives.average_floating`."""
        self.collectives.average_floating(tensors)

    def take_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous tensors by those of one worker. All workers together; not counted as traffic."""
        self.collectives.take_from(source, tensors)

    def consensus(self, value: Vector, keepers: Sequence[int] | None = None) -> Vector:
        """Replace a vector by its mean over all workers, or some. All together; not counted as traffic."""
        answer: Vector = self.wait(self.submit(lambda: self.collectives.consensus_(value, keepers)))
        return answer

    def close(self, failed: bool = False) -> None:
        self.calls.close(failed)
        if failed and self.mail.has_unsent:  # a thread waits for receivers that have stopped
            self._break_groups()
        self._disconnect(failed)
        self.mail.close(failed)
        self.calls.forget()
