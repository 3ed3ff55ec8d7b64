"""The simulator: any number of virtual workers in one process, on a virtual clock.

The *driver* (a loop over `Simulator.demands`) computes gradients and applies updates: tests pass a gradient to
`Simulator.run`, the Lightning strategy answers with its own batches. The same seed gives the same bits.

`scheduler` runs the workers' coroutines, `exchanges` and `calls` say what their requests mean, `links` when bytes
arrive, and `events` keeps the time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from lightning_decentral.conduct import described, require_no_ticket
from lightning_decentral.errors import ConfigurationError, DeadlockError, ProtocolError
from lightning_decentral.flat import AbstractVector, Vector, mean_over, pack, unpack
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    NeighborAverage,
    NeighborExchange,
    Receive,
    Send,
    Start,
    Ticket,
    Until,
)
from lightning_decentral.simulation.beside import Beside
from lightning_decentral.simulation.calls import Calls
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.exchanges import Exchanges
from lightning_decentral.simulation.links import Links, SiteLink
from lightning_decentral.simulation.scheduler import Scheduler
from lightning_decentral.simulation.tasks import Fleet, Task
from lightning_decentral.traffic import Traffic
from lightning_decentral.worker import Worker

Demands = Generator[tuple["Gradient | LocalStep", Worker], "bool | None", None]

_CHECKPOINTED = ("x", "state", "step", "version", "staleness", "snapshot_version")


class Simulator:
    """Virtual workers that run one algorithm.

    Args:
        algorithm: the method.
        start: every worker's parameters at the beginning: one vector per worker.
        cluster: how long computing and sending take.
        seed: of the workers' random numbers and the cluster's jitter.
        beside: what makes its steps beside those of the method; of one that does not wait for nobody.
        micro_batches: of a gradient, of equal length, from 1: between them a method may give it up. The driver
            computes it at once, when the last one is over.

    Attributes:
        workers: the virtual workers, by rank.
        traffic: what each of them sent and waited for, by rank.

    Example:
        >>> import torch
        >>> from lightning_decentral.algorithms import DPSGD
        >>> simulator = Simulator(DPSGD(), [Vector([torch.full((3,), float(i))]) for i in range(4)])
        >>> def gradient(worker):  # of |x|^2 / 2
        ...     return worker.snapshot
        >>> simulator.run(gradient, learning_rate=0.1, steps=50)
        >>> bool(simulator.consensus().buffers[0].abs().max() < 0.01)
        True
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        start: Sequence[AbstractVector],
        cluster: Cluster | None = None,
        seed: int = 0,
        beside: Beside | None = None,
        micro_batches: int = 1,
    ) -> None:
        if micro_batches < 1:
            raise ConfigurationError(f"A simulation got micro_batches={micro_batches}, needs 1 at least. Leave it out.")
        if not start:
            raise ConfigurationError("A simulation needs at least 1 worker, got 0.")
        self.cluster = cluster or Cluster()
        self.cluster.check_ranks(len(start))
        self.algorithm = algorithm.on_hosts(self.cluster.workers_per_site).resolved(len(start))
        if not any(self.algorithm.trains(rank) for rank in range(len(start))):
            raise ConfigurationError(
                f"{type(self.algorithm).__name__} got {len(start)} workers, of which none trains; it needs one that "
                "computes gradients at least. Use more workers."
            )
        self._answers_calls = isinstance(self.algorithm, AbstractAsynchronousAlgorithm)
        self._jitter = random.Random(seed)
        self.workers: list[Worker] = []
        if self.algorithm.shares_model:
            start = [start[0]] * len(start)
        for rank, x in enumerate(start):
            worker = Worker(rank, len(start), x, x.clone() if self._answers_calls else x)
            worker.seed(seed)
            self.algorithm.init(worker)
            self.workers.append(worker)
        self._fleet = fleet = Fleet(self.algorithm, self.workers, self.cluster, beside)
        self.traffic = fleet.traffic
        self._clock = fleet.clock
        self._links = Links(self.cluster, self._clock, self.traffic)
        self._scheduler = scheduler = Scheduler(
            fleet, lambda rank: self.cluster.gradient_seconds(rank, self._jitter), micro_batches
        )
        self._exchanges = exchanges = Exchanges(fleet, self._links)
        calls = Calls(fleet, self._links, scheduler)
        self._handlers = scheduler.handlers = {
            Gradient: scheduler.gradient,
            LocalStep: scheduler.local_step,
            NeighborExchange: exchanges.exchange,
            NeighborAverage: exchanges.average,
            AllReduce: exchanges.all_reduce,
            Call: calls.call,
            Until: scheduler.until,
            Send: exchanges.send,
            Receive: exchanges.receive,
            Start: scheduler.start,
            Ticket: scheduler.ticket,
        }
        for rank, second in self.cluster.failures.items():
            self._clock.at(second, self._die, rank, None)

    @property
    def seconds(self) -> float:
        """The virtual clock."""
        return self._clock.seconds

    @property
    def site_uplinks(self) -> list[SiteLink]:
        """What leaves the sites of the cluster, in their order; one, that carries nothing, if it names none."""
        return self._links.site_uplinks

    @property
    def site_downlinks(self) -> list[SiteLink]:
        """What enters the sites, likewise."""
        return self._links.site_downlinks

    # -- driving ------------------------------------------------------------------------------------------------------

    def demands(self, steps: int | None = None) -> Demands:
        """Run; yield each gradient that is due and each update to apply, in the order of the virtual clock.

        The driver computes the gradient at ``worker.snapshot`` (leaving it where ``worker.read_gradient`` finds it), or
        applies it to ``worker.x`` (or to the request's ``at``; or applies the request's ``gradient``), and sends
        whether an update was made (``None`` counts as made).

        Args:
            steps: stop each worker that trains after this many steps of its own in total; ``None``: go on for ever.

        Raises:
            DeadlockError: if nobody can go on; names who waits for what.
            PeerLost: if a worker waits for one that died.
        """
        self._scheduler.begin(steps)
        yield from self._run()

    def _run(self) -> Demands:
        try:
            yield from self._until_nobody_can_go_on()
        except Exception:  # nobody goes on from here
            self._scheduler.close()
            raise

    def _until_nobody_can_go_on(self) -> Demands:
        scheduler, clock, ready = self._scheduler, self._clock, self._fleet.ready
        demand, may_fail = scheduler.demand, bool(self.cluster.failures)
        while True:
            while ready:
                scheduler.advance(*ready.popleft())
            if demand:
                task, request = demand.popleft()
                worker = task.worker
                if worker.rank in self._fleet.dead:
                    continue
                if type(request) is LocalStep:
                    worker.staleness = worker.version - worker.snapshot_version
                answer = yield request, worker
                clock.count += 1
                if type(request) is LocalStep:
                    worker.version += 1
                    ready.append((task, answer is not False))
                else:
                    self._fleet.conduct[worker.rank].gradient_is_there()
                    ready.append((task, None))
            elif clock.events and not (may_fail and self._only_failures_ahead()):
                clock.advance()
            elif not scheduler.tell():
                break
        if blocked := scheduler.blocked():
            raise DeadlockError(self._describe_deadlock(blocked))

    def run(
        self, gradient: Callable[[Worker], AbstractVector], learning_rate: float | Callable[[int], float], steps: int
    ) -> None:
        """Train with plain SGD.

        Args:
            gradient: the gradient at ``worker.snapshot``, for one worker.
            learning_rate: constant, or by the worker's own step.
            steps: how many steps each worker that trains makes, in addition to those already made.
        """
        rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
        gradients: dict[int, AbstractVector] = {}
        for worker in self.workers:
            worker.read_gradient = partial(gradients.__getitem__, worker.rank)
        goal = max(worker.step for worker in self.workers if self.algorithm.trains(worker.rank)) + steps
        for request, worker in self.demands(goal):
            if isinstance(request, Gradient):
                value = gradient(worker)
                gradients[worker.rank] = value.clone() if value is worker.snapshot else value
            else:
                direction = worker.gradient if request.gradient is None else request.gradient
                request.target(worker).add_(direction, alpha=-rate(worker.step))

    def rest(self) -> None:
        """Bring to an end what workers keep under way over their steps: see `AbstractAlgorithm.rest`.

        Only between two runs. `state_dict` does it.

        Raises:
            ConfigurationError: if a worker is in the middle of a step.
        """
        self._require_ends("A rest of a simulation")
        self._scheduler.begin_rest()
        for request, worker in self._run():
            raise ProtocolError(
                f"{type(self.algorithm).__name__} got `{type(request).__name__}` of worker {worker.rank} while it "
                "comes to rest; it needs communication alone there. Make updates in steps."
            )

    def close(self) -> None:
        """Give up a simulation in the middle of its steps."""
        self._scheduler.close()

    def consensus(self, leave_out: Collection[int] = ()) -> Vector:
        """Take the mean of the parameters of the living workers that keep the model, but for those left out.

        Of a model that is cut into shards, what its keepers have of it.

        Raises:
            ConfigurationError: if none is left, or a shard is lost.
        """
        values, shards = self.living(leave_out), self.algorithm.shards
        if shards == 1:
            return mean_over(values)
        if len(values) < shards:
            raise ConfigurationError(
                f"A model in {shards} shards needs the workers that keep them, got {len(values)} that live. Leave them "
                "out of `Cluster(failures=...)`."
            )
        whole, borders = values[0].clone(), values[0].parameter_borders
        pieces = [vector.slices(shards, borders) for vector in (whole, *values)]
        for number, piece in enumerate(pieces[0]):
            piece.copy_(pieces[1 + number][number])
        return whole

    def consensus_distance(self) -> float:
        """Compute ``(1/n) sum_i ||x_i - mean||^2`` over the living workers that keep the model."""
        mean = self.consensus()
        alive = self.living()
        return sum(x.squared_distance(mean) for x in alive) / len(alive)

    def living(self, leave_out: Collection[int] = ()) -> list[Vector]:
        """Return the models of the living workers that keep the model, but for those left out."""
        keepers = self.algorithm.keepers(len(self.workers))
        left_out = self._fleet.dead.union(leave_out)
        alive = [self.workers[rank].x for rank in keepers if rank not in left_out]
        values = [x for x in alive if isinstance(x, Vector)]
        if not values or len(values) < len(alive):
            raise ConfigurationError(
                "A mean over the workers needs at least 1 living worker, and vectors that have values, got "
                f"{len(values)} of {len(alive)}. Start the simulation from a `Vector` for each worker."
            )
        return values

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as plain tensors and Python values. Only between two runs.

        The workers come to `rest` first, which a method that keeps something under way over its steps will notice.

        Raises:
            ConfigurationError: if a worker is in the middle of a step, or a message on its way.
            ProtocolError: if its algorithm keeps a ticket in ``worker.state``.
        """
        self.rest()
        for worker in self.workers:
            require_no_ticket(self.algorithm, worker)
        if unread := self._exchanges.unread():
            raise ConfigurationError(
                f"A checkpoint of a simulation needs all workers at rest, got {unread}. Receive it in the step in "
                "which it is sent, or in the method's `rest`."
            )
        return {
            "seconds": self.seconds,
            "jitter": self._jitter.getstate(),
            "dead": sorted(self._fleet.dead),
            **self._links.state_dict(),
            "traffic": [asdict(traffic) for traffic in self.traffic],
            "workers": [
                {name: pack(getattr(worker, name)) for name in _CHECKPOINTED} | {"rng": worker.rng.getstate()}
                for worker in self.workers
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; of a simulation of the same algorithm with as many workers and sites.

        Raises:
            ConfigurationError: if there are not as many.
        """
        if len(state["workers"]) != len(self.workers):
            raise ConfigurationError(
                f"The checkpoint is of {len(state['workers'])} workers, this simulation has {len(self.workers)}. "
                f"Make it with {len(state['workers'])} workers."
            )
        self._links.load_state_dict(state)
        self._exchanges.forget()
        self._clock.seconds = state["seconds"]
        self._jitter.setstate(state["jitter"])
        self._fleet.dead = set(state["dead"])
        self.traffic[:] = [Traffic(**traffic) for traffic in state["traffic"]]
        self._clock.keep(lambda event: event[3] not in self._fleet.dead)  # only deaths, before the first step
        for worker, saved in zip(self.workers, state["workers"], strict=True):
            device = worker.x.buffers[0].device if isinstance(worker.x, Vector) else torch.device("cpu")
            loaded = {name: unpack(saved[name], device) for name in _CHECKPOINTED}
            x = loaded.pop("x")
            assert isinstance(x, AbstractVector)
            worker.x.copy_(x)  # in place: a module's parameters may be views of it
            for name, value in loaded.items():
                setattr(worker, name, value)
            if self._answers_calls:
                worker.snapshot.copy_(worker.x)
            worker.rng.setstate(saved["rng"])

    def _require_ends(self, what: str) -> None:
        busy = self._scheduler.busy()
        if busy or self._fleet.ready or self._scheduler.demand or not self._only_failures_ahead():
            raise ConfigurationError(
                f"{what} needs all workers at rest, got workers {busy} in the middle of a step, or a message on its "
                "way. Do it after `run` has returned, or `demands` has come to its end."
            )

    # -- failures -----------------------------------------------------------------------------------------------------

    def _only_failures_ahead(self) -> bool:
        """Tell whether nothing is left to happen but deaths: these end a wait, but are no reason to let time pass."""
        events = self._clock.events
        if not self.cluster.failures:
            return not events
        return all(event[2] == self._die for event in events)

    def _die(self, rank: int, _: None) -> None:
        self._fleet.dead.add(rank)
        self._exchanges.lose(rank)
        self._scheduler.lose(rank)

    def _describe_deadlock(self, blocked: Sequence[Task]) -> str:
        lines = [f"Nobody can go on at {self.seconds:.6g} virtual seconds:"]
        for task in blocked:
            worker, request = task.worker, task.waits_for
            what = {
                "answer": f"in its answer to worker {task.call.task.worker.rank if task.call else ''}",
                "rest": "in its rest",
            }
            if isinstance(request, Call):
                waits_for = f"worker {request.peer} to answer its call"
            elif isinstance(request, Until):
                waits_for = f"its `Until`: {described(request.condition)}"
            elif isinstance(request, LocalStep):
                waits_for = "a step of its own that waits in `Until`, to make its `LocalStep` there"
            else:
                waits_for = self._exchanges.described(task)
            where = what.get(task.kind, f"step {worker.step}")
            lines.append(f"  worker {worker.rank}, {where}, waits for {waits_for}")
        return "\n".join(lines)
