"""Methods of a few lines for the words of the protocol that no method of the package uses yet.

They are written once: the simulator runs them here, the planner prices them, real workers run them over gloo.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from lightning_decentral.averaging import neighbor_average
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    Receive,
    Send,
    Start,
    Until,
)
from lightning_decentral.topology import AbstractTopology, DirectedGraph
from lightning_decentral.topology.validation import require_stochastic
from lightning_decentral.worker import Worker

SERVER = 0


@dataclass(frozen=True)
class AbstractMethod(AbstractAlgorithm):
    """For any number of workers."""

    def resolved(self, world_size: int) -> Any:
        return self

    def init(self, worker: Worker) -> None:
        pass


@dataclass(frozen=True)
class AbstractServed(AbstractAsynchronousAlgorithm):
    """Worker 0 serves; the others train, and call it with their gradients."""

    def resolved(self, world_size: int) -> Any:
        return self

    def init(self, worker: Worker) -> None:
        worker.state["heard"] = 0

    def peers(self, rank: int) -> tuple[int, ...]:
        return () if rank == SERVER else (SERVER,)

    def trains(self, rank: int) -> bool:
        return rank != SERVER

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (SERVER,)

    async def step(self, worker: Worker) -> None:
        if worker.rank == SERVER:
            await self.serve(worker)
        else:
            await Gradient()
            worker.x.copy_(await Call(SERVER, worker.gradient))

    async def serve(self, worker: Worker) -> None:
        """One update of the server, made by `on_call`."""
        heard = worker.state["heard"]
        await Until(lambda: worker.state["heard"] > heard)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        await LocalStep(gradient=theirs)
        worker.state["heard"] += 1
        return worker.x


@dataclass(frozen=True)
class APSGD(AbstractServed):
    """Asynchronous parallel SGD: the server applies each gradient as it comes, and answers with its model."""


@dataclass(frozen=True)
class QueuedAPSGD(AbstractServed):
    """The same, with the update in the server's step: answers are given later."""

    def init(self, worker: Worker) -> None:
        worker.state.update(queue=[], arrived=0, applied=0)

    async def serve(self, worker: Worker) -> None:
        queue = worker.state["queue"]
        if await Until(lambda: bool(queue)):
            await LocalStep(gradient=queue.pop(0))
            worker.state["applied"] += 1

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        state = worker.state
        state["queue"].append(theirs)
        state["arrived"] += 1
        mine = state["arrived"]
        await Until(lambda: state["applied"] >= mine)
        return worker.x


@dataclass(frozen=True)
class BackupWorkers(AbstractServed):
    """Synchronous SGD that waits for the first few gradients of a round only; later ones are dropped."""

    quorum: int = 3

    def init(self, worker: Worker) -> None:
        worker.state.update(round=0, heard=0, dropped=0, used=[])
        if worker.rank == SERVER:
            worker.state["total"] = worker.x.zeros_like()

    def messages(self, worker: Worker) -> dict[str, AbstractVector]:
        return {"vector and round": worker.x.beside(worker.x.new_numbers(0.0))}

    async def step(self, worker: Worker) -> None:
        if worker.rank == SERVER:
            await self.serve(worker)
            return
        await Gradient()
        answer = await Call(SERVER, worker.gradient.beside(worker.x.new_numbers(worker.state["round"])))
        model, number = answer.apart(worker.x, worker.x.new_numbers(0.0))
        worker.x.copy_(model)
        worker.state["round"] = int(number.numbers()[0])

    async def serve(self, worker: Worker) -> None:
        state = worker.state
        await Until(lambda: state["heard"] == self.quorum)
        if not state["heard"]:
            return  # nobody is left to come
        heard, state["heard"] = state["heard"], self.quorum  # who comes during the update is too late
        state["used"].append(heard)
        await LocalStep(gradient=state["total"].mul_(1 / heard))
        state["total"].mul_(0.0)
        state["heard"] = 0
        state["round"] += 1

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        state = worker.state
        gradient, number = theirs.apart(worker.x, worker.x.new_numbers(0.0))
        mine = state["round"]
        if number.numbers()[0] == mine:
            if state["heard"] < self.quorum:
                state["total"].add_(gradient)
                state["heard"] += 1
            else:
                state["dropped"] += 1
            await Until(lambda: state["round"] > mine)
        else:
            state["dropped"] += 1
        return worker.x.beside(worker.x.new_numbers(state["round"]))


@dataclass(frozen=True)
class TolerantBackupWorkers(BackupWorkers):
    """The same, and goes on without workers that are lost."""

    tolerates_loss = True


@dataclass(frozen=True)
class StaleSynchronous(AbstractServed):
    """Stale-synchronous parallel SGD: nobody is more than a few steps ahead of the slowest."""

    bound: int = 2

    def init(self, worker: Worker) -> None:
        clocks = {rank: 0 for rank in range(worker.world_size) if rank != SERVER}
        worker.state.update(heard=0, clocks=clocks, lead=0)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        await LocalStep(gradient=theirs)
        state, clocks = worker.state, worker.state["clocks"]
        state["heard"] += 1
        clocks[source] += 1
        mine = clocks[source]
        await Until(lambda: mine - min(clocks.values()) <= self.bound)
        state["lead"] = max(state["lead"], mine - min(clocks.values()))
        return worker.x


@dataclass(frozen=True)
class FedAvg(AbstractServed):
    """Federated averaging: some clients, drawn anew for each round, make a few local steps; sitting out is waiting."""

    clients: int = 2
    local_steps: int = 5

    def period(self, world_size: int) -> int:
        return self.local_steps

    def init(self, worker: Worker) -> None:
        worker.state.update(chosen=[], joined=[], heard=0, used=[], anchor=worker.x.clone())
        if worker.rank == SERVER:
            worker.state["total"] = worker.x.zeros_like()

    async def step(self, worker: Worker) -> None:
        if worker.rank == SERVER:
            await self.serve(worker)
            return
        if worker.step % self.local_steps == 0:
            anchor = worker.state["anchor"]
            worker.x.copy_(await Call(SERVER, anchor.add_(worker.x, alpha=-1.0)))
            anchor.copy_(worker.x)
            worker.snapshot.copy_(worker.x)
        await Gradient()
        await LocalStep()

    async def serve(self, worker: Worker) -> None:
        state = worker.state
        state["chosen"] = random.Random(worker.step).sample(range(1, worker.world_size), self.clients)
        await Until(lambda: state["heard"] == self.clients)
        if state["heard"]:
            state["used"].append(state["heard"])
            await LocalStep(gradient=state["total"].mul_(1 / state["heard"]))
            state["total"].mul_(0.0)
            state["heard"] = 0

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        state = worker.state
        if source in state["joined"]:
            state["total"].add_(theirs)
            state["heard"] += 1
        else:
            state["joined"].append(source)
        if await Until(lambda: source in state["chosen"]):
            state["chosen"].remove(source)
        return worker.x


@dataclass(frozen=True)
class PushSum(AbstractMethod):
    """Stochastic gradient push: averages on a directed graph, with a weight that travels beside the model."""

    topology: AbstractTopology

    def init(self, worker: Worker) -> None:
        worker.snapshot = worker.x.clone()  # x over its weight, where gradients are taken
        worker.state["weight"] = worker.x.new_numbers(1.0)

    async def step(self, worker: Worker) -> None:
        weight = worker.state["weight"]
        worker.snapshot.copy_(worker.x).mul_(1 / weight.numbers()[0])
        await Gradient()
        await LocalStep()
        await neighbor_average(worker, self.topology, worker.x.beside(weight))


@dataclass(frozen=True)
class DelayedAverage(AbstractMethod):
    """Local SGD whose all-reduce ends three steps later, hidden behind them."""

    every: int = 5
    delay: int = 3

    def period(self, world_size: int) -> int:
        return self.every

    async def step(self, worker: Worker) -> None:
        state = worker.state
        await Gradient()
        await LocalStep()
        made = worker.step + 1
        if made % self.every == 0:
            state["sent"], state["mean"] = worker.x.clone(), worker.x.clone()
            state["ticket"] = await Start(AllReduce(state["mean"]))
        if made % self.every == self.delay:
            await self.rest(worker)

    async def rest(self, worker: Worker) -> None:
        if "ticket" in worker.state:
            mean = await worker.state.pop("ticket")
            del worker.state["mean"]
            worker.x.add_difference_(mean, worker.state.pop("sent"), 1.0)  # and keep the steps made meanwhile


@dataclass(frozen=True)
class Restless(DelayedAverage):
    """The same, and does not say how it comes to rest."""

    async def step(self, worker: Worker) -> None:
        await super().step(worker)
        if (worker.step + 1) % self.every == self.delay:
            await super().rest(worker)

    async def rest(self, worker: Worker) -> None:
        pass


@dataclass(frozen=True)
class OwnRing(AbstractMethod):
    """Synchronous SGD with an all-reduce of its own: gradients travel around the ring."""

    async def step(self, worker: Worker) -> None:
        await Gradient()
        n, rank = worker.world_size, worker.rank
        message = worker.gradient.clone()
        for hop in range(n - 1):
            await Send((rank + 1) % n, message, tag=hop)
            message = await Receive((rank - 1) % n, like=message, tag=hop)
            worker.gradient.add_(message)
        worker.gradient.mul_(1 / n)
        await LocalStep()


@dataclass(frozen=True)
class OneWay(AbstractMethod):
    """Averages with what the left neighbour sent a step ago: nobody waits for this step's message."""

    def init(self, worker: Worker) -> None:
        worker.state["coming"] = 0

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        await Send((worker.rank + 1) % worker.world_size, worker.x)
        worker.state["coming"] += 1
        if worker.state["coming"] > 1:
            await self._average(worker)

    async def _average(self, worker: Worker) -> None:
        theirs = await Receive((worker.rank - 1) % worker.world_size, like=worker.x)
        worker.state["coming"] -= 1
        worker.x.mix_(worker.x, 0.5, [(theirs, 0.5)])

    async def rest(self, worker: Worker) -> None:
        while worker.state["coming"]:
            await self._average(worker)


@dataclass(frozen=True)
class Tracking(AbstractMethod):
    """Gradient tracking: both the models and the trackers are averaged, and the tracker is what is applied."""

    topology: AbstractTopology

    remembers_gradients = True

    def __post_init__(self) -> None:
        require_stochastic("Tracking", self.topology, "doubly")

    def init(self, worker: Worker) -> None:
        worker.state.update(tracker=worker.x.zeros_like(), last=worker.x.zeros_like())

    async def step(self, worker: Worker) -> None:
        tracker, last = worker.state["tracker"], worker.state["last"]
        averages = [await Start(neighbor_average(worker, self.topology, value)) for value in (tracker, worker.x)]
        await Gradient()
        for average in averages:
            await average
        tracker.add_difference_(worker.gradient, last, 1.0)
        last.copy_(worker.gradient)
        await LocalStep(gradient=tracker)


@dataclass(frozen=True)
class Sites(AbstractMethod):
    """Weighted averages of the workers of a site in each step, and of one of each site in every third."""

    members: int = 2

    def period(self, world_size: int) -> int:
        return 3

    def init(self, worker: Worker) -> None:
        worker.state["other"] = worker.x.clone()

    async def step(self, worker: Worker) -> None:
        n, site = worker.world_size, worker.rank // self.members
        own = tuple(range(site * self.members, (site + 1) * self.members))
        heads = tuple(range(0, n, self.members))
        await Gradient()
        await LocalStep()
        first = await Start(AllReduce(worker.x, among=own, weight=1.0 + worker.rank))
        second = None
        if worker.step % 3 == 0 and worker.rank in heads:
            second = await Start(AllReduce(worker.state["other"], among=heads, weight=float(worker.rank > 0)))
        await first
        if second is not None:
            await second
            worker.state["other"].add_(worker.x)


@dataclass(frozen=True)
class Anchored(AbstractMethod):
    """Steps of an inner model, and in turn an outer step of ``x`` towards it, by the same optimizer."""

    def init(self, worker: Worker) -> None:
        worker.snapshot = worker.x.clone()
        worker.state["inner"] = worker.x.clone()

    async def step(self, worker: Worker) -> None:
        inner = worker.state["inner"]
        worker.snapshot.copy_(inner)
        await Gradient()
        if worker.step % 2:
            await LocalStep(gradient=worker.x.clone().add_(inner, alpha=-1.0))
        else:
            await LocalStep(at=inner)


def directed(size: int) -> DirectedGraph:
    """A directed ring with a chord from each third worker: strongly connected, and not doubly stochastic."""
    return DirectedGraph(
        tuple(
            tuple(sorted({(rank + 1) % size, *([(rank + 2) % size] if rank % 3 == 0 and size > 3 else [])}))
            for rank in range(size)
        )
    )
