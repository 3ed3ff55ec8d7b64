"""What runs for a virtual worker: a coroutine, what it waits for, and what its workers share with those of others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from lightning_decentral.conduct import Conduct, UnderWay
from lightning_decentral.errors import PeerLost
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAlgorithm, AbstractRequest, Call, NeighborAverage, Steps, Ticket
from lightning_decentral.simulation.beside import Beside
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.events import Clock
from lightning_decentral.traffic import Traffic
from lightning_decentral.worker import Worker

WAIT = object()  # a handler's answer that comes later

Kind = Literal["step", "started", "answer", "rest", "between"]
"""A step of the worker; something that it started; its answer to a call; its `AbstractAlgorithm.rest`."""


class SimulatedTicket(Ticket[Any]):
    """Of something started; its task does not keep it, so that a ticket that nobody keeps is noticed."""

    __slots__ = ("task",)

    def __init__(self, task: Task) -> None:
        self.task = task


class CallUnderWay:
    """A call and its answer, which may come at the same time, part by part."""

    __slots__ = ("in_parts", "missing", "peer", "reply", "task", "theirs", "then")

    def __init__(self, task: Task, request: Call, in_parts: bool) -> None:
        self.task = task
        self.peer = request.peer
        self.then = request.then
        self.in_parts = in_parts
        self.theirs: AbstractVector = request.value
        self.reply: AbstractVector | None = None
        self.missing = 1 + in_parts


class Task:
    """A coroutine that runs for one worker.

    Attributes:
        kind: what it is.
        under_way: what the conduct knows of it, or of what it waits for.
        average: what was started, if it is one; it replaces its value when the ticket is awaited.
        pending: what it waits for.
        since: when it began to.
        told: whether it was told that what it waited for cannot come any more.
        call: that it answers, if it does.
    """

    __slots__ = (
        "answer",
        "average",
        "call",
        "coroutine",
        "done",
        "kind",
        "pending",
        "since",
        "told",
        "under_way",
        "waiting",
        "worker",
    )

    def __init__(
        self, worker: Worker, coroutine: Steps[Any], kind: Kind = "step", call: CallUnderWay | None = None
    ) -> None:
        self.worker = worker
        self.coroutine = coroutine
        self.kind = kind
        self.call = call
        self.average: NeighborAverage | None = None
        self.under_way: list[UnderWay] = []
        self.pending: AbstractRequest[Any] | None = None
        self.since = 0.0
        self.told = self.done = False
        self.answer: Any = None
        self.waiting: tuple[Task, SimulatedTicket] | None = None

    @property
    def waits_for(self) -> AbstractRequest[Any] | None:
        """What it waits for in the end: of a ticket, what that waits for."""
        request = self.pending
        while isinstance(request, SimulatedTicket):
            request = request.task.pending
        return request


class Fleet:
    """The virtual workers, and what the parts of a simulation share.

    Args:
        algorithm: resolved for as many workers.
        workers: by rank.
        cluster: how long computing and sending take.
        beside: what makes its steps beside those of the algorithm, if anything does.

    Attributes:
        traffic: what each worker sent and waited for.
        conduct: who watches over what each one's algorithm asks for.
        clock: the virtual time.
        ready: tasks that can go on, each with the answer to what it has waited for.
        dead: workers that died.
    """

    def __init__(
        self, algorithm: AbstractAlgorithm, workers: Sequence[Worker], cluster: Cluster, beside: Beside | None = None
    ) -> None:
        self.algorithm = algorithm
        self._beside = beside
        self.workers = list(workers)
        self.cluster = cluster
        self.traffic = [Traffic() for _ in workers]
        self.conduct = [Conduct(algorithm, worker) for worker in workers]
        self.clock = Clock()
        self.ready: deque[tuple[Task, Any]] = deque()
        self.dead: set[int] = set()

    def step(self, worker: Worker) -> Steps[None]:
        """Return the coroutine of a worker's next step."""
        own = self.algorithm.step(worker)
        return own if self._beside is None else self._beside.step(worker, own)

    def resume(self, task: Task, answer: Any) -> None:
        """Let a task go on; to be called, or to happen at a time."""
        self.ready.append((task, answer))

    def check_alive(self, peer: int, waiting: int) -> None:
        """Refuse to let a worker wait for one that died.

        Raises:
            PeerLost: if it would.
        """
        if peer in self.dead and waiting not in self.dead:
            raise PeerLost(
                f"Worker {waiting} waits for worker {peer}, which died after {self.cluster.failures[peer]} virtual "
                "seconds. Resume from a checkpoint, or leave the worker out of `Cluster(failures=...)`.",
                ranks=(peer,),
            )
