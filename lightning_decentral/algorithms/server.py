"""One loop for all methods with a server: what becomes of a gradient, when it steps, and who is answered when."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lightning_decentral.algorithms.compressed_calls import SERVER, AbstractCompressedCalls, Place, news, with_rest
from lightning_decentral.algorithms.open_server import OpenServer
from lightning_decentral.averaging.messages import add_decoded_, decoded, message_like
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    AbstractAsynchronousAlgorithm,
    Call,
    Gradient,
    LocalStep,
    Mixing,
    Start,
    Until,
)
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class AbstractServer(AbstractCompressedCalls):
    """Workers send gradients to a server, whose optimizer changes the model, and get the model back.

    The server is a role of worker 0. By default it serves *beside* its training: its answers never wait for its own
    gradient. A method is four decisions about a gradient that has come: whether it counts, and with which weight
    (`weight`), what is applied now (`direction`), and whether its sender is answered now (`answers`).

    What the server knows is in its ``worker.state``:

    * ``version``: updates made so far;
    * ``given``: of which version each worker has the model, by rank. A gradient's *staleness* is by how many versions
      the server has gone on since then;
    * ``heard``: gradients that have come for the next update;
    * ``accepted``, ``dropped``: gradients of each worker, by rank; ``staleness``: how many were how stale;
    * ``cancelled``, of a method that gives gradients up while they are computed: those of each worker. They are in
      ``staleness`` with what they were when they were given up.

    **Shards.** With ``shards=k`` the first k workers serve, each a shard: some of the parameters, with the optimizer's
    state for them. A worker sends each server its shard of the gradient, all at once, and gets that shard of the model
    back. Each server decides for itself: version, staleness, who is dropped and who waits are its own. So a worker's
    copy is not consistent: there may have been no moment at which all its shards were the model.

    **Compression.** With a ``compressor`` worker ``i`` sends ``c_i = C(e_i + g_i)`` in the place of its gradient, and
    remembers what that leaves out: ``e_i <- e_i + g_i - c_i``. With a ``model_compressor`` the server sends ``C(x -
    w_i)`` in the place of the model: the largest part of what worker ``i`` has not been told yet. Both add it to
    ``w_i``, at which the worker computes. Worker 0's own gradient and model do not travel, and are whole.

    **Workers that come and go.** With `OpenStrategy` (`OpenServer`) ``given`` has those that are there, and no others.
    A method that keeps something of each worker forgets a lost one in `regroup`, and makes room for one that has
    joined. One whose workers wait until enough gradients have come tells with `is_due` that there are enough, since
    fewer workers are left: their mean is applied then.

    Args:
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only, and has no data.
        shards: over so many servers the model is divided, from 1, the default, to the number of workers.
        compressor: of gradients: a contraction with messages of fixed size. ``None``: they are sent as they are.
        model_compressor: of what the server answers; the same. ``None``: the model is sent as it is.
    """

    updates_in_answers = True
    by_worker = False  # whether gradients are kept apart by whose they are, so that each worker counts the same

    shards: int = field(default=1, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        self.check_calls()
        require_count(type(self).__name__, "shards", self.shards)
        self.check(None)

    @property
    def asks(self) -> bool:
        """Whether workers ask, between micro-batches, if their gradient would still count: see `gives_up`."""
        return False

    def check(self, trainers: int | None) -> None:
        """Refuse hyper-parameters that cannot work; nothing is refused by default.

        Args:
            trainers: how many workers train; ``None`` if that is not known yet.

        Raises:
            ConfigurationError: if they cannot.
        """

    def chosen(self, trainers: int) -> dict[str, Any]:
        """Tell what `resolved` fills in, by the name of the hyper-parameter; nothing by default."""
        return {}

    def resolved(self, world_size: int) -> Self:
        trainers = self.trainers(world_size)
        resolved = self.for_trainers(trainers)
        resolved.check(trainers)
        return resolved

    def for_trainers(self, trainers: int) -> Self:
        """Fill in what depends on how many workers train."""
        return dataclasses.replace(self, **self.chosen(trainers))

    def trainers(self, world_size: int) -> int:
        """Tell how many workers compute gradients."""
        require_count(type(self).__name__, "shards", self.shards, world_size, ", the number of workers")
        return trainers_at(type(self).__name__, self.server, world_size, self.shards)

    def trains(self, rank: int) -> bool:
        return rank >= self.shards or self.server == "beside"

    def changes_beside(self, rank: int) -> bool:
        return rank < self.shards  # by updates

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return tuple(range(self.shards))

    def peers(self, rank: int) -> tuple[int, ...]:
        return tuple(server for server in range(self.shards) if server != rank) if self.trains(rank) else ()

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, 1)  # there is one model

    def messages(self, worker: Worker) -> dict[str, AbstractVector]:
        given = {"a gradient": self.compressor, "a change of the model": self.model_compressor}
        if self.shards == 1:
            forms = {name: message_like(each, worker.x) for name, each in given.items() if each is not None}
            return {**forms, "a question": _question(worker)} if self.asks else forms
        return {
            f"{name}, shard {number}": shard if each is None else message_like(each, shard)
            for name, each in given.items()
            for number, shard in enumerate(self._cut(worker, worker.x))
        }

    def init(self, worker: Worker) -> None:
        rank, ranks, shards = worker.rank, range(worker.world_size), self._cut(worker, worker.x)
        self.init_calls(worker, shards)
        if self.peers(rank):
            if self.compressor is not None:
                worker.state["left out"] = worker.x.zeros_like()
            if self.model_compressor is not None:
                worker.state["known"] = worker.x.clone()
        if rank >= self.shards:
            return
        if self.model_compressor is not None:
            worker.state.update({f"known: {each}": shards[rank].clone() for each in self.callers(worker)})
        nothing = {each: 0 for each in ranks if self.trains(each)}
        worker.state.update(version=0, given=dict(nothing), heard=0, busy=False)
        worker.state.update(accepted=dict(nothing), dropped=dict(nothing), staleness={})
        if self.asks:
            worker.state.update(cancelled=dict(nothing), questions=0)

    def _cut(self, worker: Worker, vector: AbstractVector) -> list[AbstractVector]:
        """Cut a vector into the shards of the servers, in the order of their ranks."""
        if self.shards == 1:
            return [vector]
        borders = worker.x.parameter_borders
        if borders is not None and len(borders) + 1 < self.shards:
            raise ConfigurationError(
                f"{type(self).__name__}(shards={self.shards}) got a model of {len(borders) + 1} parameters, needs one "
                "for each server at least: it is cut between them. Use fewer shards."
            )
        return vector.slices(self.shards, borders)

    def _own_shard(self, worker: Worker) -> AbstractVector:
        """Return what a server keeps of the model."""
        return self._cut(worker, worker.x)[worker.rank]

    def opened(self) -> AbstractAsynchronousAlgorithm:
        if self.compressors or self.shards > 1 or self.server != "beside":
            raise ConfigurationError(
                f"OpenStrategy got {self!r}, whose servers remember what each worker has been told, are several, or do "
                "not train; it needs one that trains, without such a memory. Leave out compressors, shards and "
                "server='dedicated', or use AsyncStrategy."
            )
        return OpenServer(self)

    # -- the decisions ------------------------------------------------------------------------------------------------

    @abstractmethod
    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        """Tell what a gradient counts; ``None``: it is dropped.

        Args:
            state: of the server.
            source: who has sent it.
            staleness: of it.
        """

    @abstractmethod
    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        """Take a gradient that counts.

        Args:
            worker: the server.
            source: who has sent it.
            gradient: it; may be changed.
            weight: what it counts.

        Returns:
            What the optimizer applies now; ``None``: nothing yet.
        """

    def answers(self, state: Mapping[str, Any], source: int) -> bool:
        """Tell whether a worker whose gradient was taken, or dropped, gets the model now; at once by default."""
        return True

    def gives_up(self, state: Mapping[str, Any], staleness: int) -> bool:
        """Tell whether a gradient that is being computed at a model so stale would not count; never by default."""
        return False

    def regroup(self, worker: Worker) -> None:
        """Learn that others are there: ``given`` of the server has changed. Nothing is kept of them by default."""

    def is_due(self, state: Mapping[str, Any]) -> bool:
        """Tell whether an update has to be made though no gradient has come, since fewer workers are there."""
        return False

    def due(self, worker: Worker) -> AbstractVector:
        """Return what the optimizer applies where an update `is_due`: the mean of the gradients that have come."""
        return mean_of_heard(worker)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def step(self, worker: Worker) -> None:
        state, rank = worker.state, worker.rank
        if not self.trains(rank):
            version = state["version"]
            await Until(lambda: state["version"] > version)
            return
        serves = rank < self.shards
        if serves:
            if worker.version != worker.snapshot_version:  # updated since the copy was made
                worker.snapshot.copy_(worker.x)
            state["given"][rank] = state["version"]
        await Gradient(self._begins_anew if self.asks else None)
        if serves and self.shards == 1:
            await self._take(worker, rank, worker.gradient)
            await Until(lambda: self.answers(state, rank))
            return
        number = self.next_call(worker)
        sent = self._sent(worker, number)
        if self.shards == 1:
            self._learn(worker, SERVER, await Call(SERVER, sent[SERVER], used_up=True), number)
        else:
            calls = {server: await Start(Call(server, sent[server], used_up=True)) for server in self.peers(rank)}
            if serves:
                await self._take(worker, rank, sent[rank].clone())  # what is still being sent lies in the same memory
                await Until(lambda: self.answers(state, rank))
            for server, call in calls.items():
                self._learn(worker, server, await call, number)

    async def _begins_anew(self, worker: Worker) -> bool:
        """Ask the server, between micro-batches, whether the gradient is given up; take its model then."""
        if worker.rank == SERVER:
            return self._is_given_up(worker, SERVER)
        question = _question(worker)
        answer = await Call(SERVER, question)
        if answer.form == question.form:
            return False
        self._learn(worker, SERVER, answer, self.next_call(worker))
        return True

    def _is_given_up(self, worker: Worker, source: int) -> bool:
        """Decide at the server whether a worker gives its gradient up; it is counted, and has the newest model then."""
        state = worker.state
        staleness = state["version"] - state["given"][source]
        if not self.gives_up(state, staleness):
            return False
        _count(state, "cancelled", source, staleness)
        state["given"][source] = state["version"]
        return True

    def questions(self, worker: Worker) -> int:
        asked: int = worker.state.get("questions", 0)
        return asked

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        state = worker.state
        if self.asks and theirs.form == _question(worker).form:
            state["questions"] += 1
            await Until(lambda: not state["busy"])
            if not self._is_given_up(worker, source):
                return theirs
            return self._told(worker, source, self.next_answer(worker, source))
        number = self.next_answer(worker, source)
        if self.compressor is not None:
            theirs = decoded(self._own_shard(worker), self.compressor, theirs, number)
        await self._take(worker, source, theirs)
        del theirs  # its memory is another gradient's, while this answer waits
        await Until(lambda: self.answers(state, source))  # if it cannot come any more, the model as it is
        state["given"][source] = state["version"]
        return self._told(worker, source, number)

    def _told(self, worker: Worker, source: int, number: int) -> AbstractVector:
        """Tell what answers a worker's call of a number: the model, or what that one does not know of it."""
        shard = self._own_shard(worker)
        if self.model_compressor is None:
            return shard
        return news(self.model_compressor, worker.state[f"known: {source}"], shard, worker, number)

    def _sent(self, worker: Worker, number: int) -> list[AbstractVector]:
        """Tell what a worker sends to each server in its call of a number; what is left out of it is remembered."""
        gradients = self._cut(worker, worker.gradient)
        compressor = self.compressor
        if compressor is None:
            return gradients
        pairs = zip(self._cut(worker, worker.state["left out"]), gradients, strict=True)
        return [
            gradient if server == worker.rank else with_rest(compressor, left, gradient, worker, number)
            for server, (left, gradient) in enumerate(pairs)
        ]

    def _learn(self, worker: Worker, server: int, answer: AbstractVector, number: int) -> None:
        """Take what a server has answered to the call of a number."""
        shard = self._cut(worker, worker.x)[server]
        if self.model_compressor is None:
            shard.copy_(answer)
            return
        known = self._cut(worker, worker.state["known"])[server]  # not `x`, which user code may change
        add_decoded_(known, self.model_compressor, answer, 1.0, number)
        shard.copy_(known)

    async def _take(self, worker: Worker, source: int, gradient: AbstractVector) -> None:
        """Learn that a gradient has come, and make the update that it completes."""
        state = worker.state
        await Until(lambda: not state["busy"])  # an update that the server's own step makes is not made at once
        staleness = state["version"] - state["given"][source]
        weight = self.weight(state, source, staleness)
        _count(state, "dropped" if weight is None else "accepted", source, staleness)
        direction = None if weight is None else self.direction(worker, source, gradient, weight)
        if direction is not None:
            state["busy"] = True
            await LocalStep(gradient=direction, shard=None if self.shards == 1 else (worker.rank, self.shards))
            state["busy"] = False
            state["version"] += 1

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell how many gradients of whom were used and dropped, how stale they were, and the server's version.

        Those that were cancelled, if any were.
        """
        if worker.rank >= self.shards:
            return {}
        state = worker.state
        cancelled = ("cancelled",) if any(state.get("cancelled", {}).values()) else ()
        return {name: state[name] for name in ("version", "accepted", "dropped", "staleness", *cancelled)}


@dataclass(frozen=True, repr=False)
class AbstractCollector(AbstractServer):
    """A server that collects gradients at its newest model until there are enough; it drops those at older ones.

    Args:
        gradients: how many; ``None``: the number of workers that train.
    """

    gradients: int | None = None

    def check(self, trainers: int | None) -> None:
        if self.gradients is not None:
            require_count(type(self).__name__, "gradients", self.gradients)

    def chosen(self, trainers: int) -> dict[str, Any]:
        return {"gradients": trainers} if self.gradients is None else {}

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        return 1.0 if staleness == 0 else None


def summed(worker: Worker, gradient: AbstractVector, weight: float, needed: int) -> AbstractVector | None:
    """Add a gradient to the mean of those that have come for the next update; gives the mean when it is complete.

    One buffer of the model's size, in the server's state; none if one gradient is enough. How many are needed may
    change while some have come: the mean is of as many as there are.

    Args:
        worker: the server.
        gradient: it; may be changed.
        weight: what it counts.
        needed: how many are averaged.
    """
    state = worker.state
    heard: int = state["heard"]
    if heard == 0 and needed == 1:
        return gradient if weight == 1.0 else gradient.mul_(weight)
    if "total" not in state:
        state["total"] = gradient.clone()
    if heard == 0:
        state["total"].copy_(gradient).mul_(weight)
    else:
        state["total"].add_(gradient, alpha=weight)
    state["heard"] = heard + 1
    return None if state["heard"] < needed else mean_of_heard(worker)


def mean_of_heard(worker: Worker) -> AbstractVector:
    """Return the mean of what was `summed` so far, of one gradient at least; the next sum begins anew."""
    state = worker.state
    total: AbstractVector = state["total"].mul_(1 / state["heard"])
    state["heard"] = 0
    return total


def _count(state: dict[str, Any], what: str, source: int, staleness: int) -> None:
    """Count at the server what has become of a worker's gradient, and how stale it was."""
    state[what][source] += 1
    state["staleness"][staleness] = state["staleness"].get(staleness, 0) + 1


def _question(worker: Worker) -> AbstractVector:
    """Return what a worker sends to ask, in a form that no model has: a model has one buffer of each type."""
    number = worker.x.new_numbers(0.0)
    return number.beside(number.clone())


class Table:
    """Sums of the gradients of each worker that trains, in the server's state.

    A buffer of the model's size for each of them, and one for their mean.

    Args:
        worker: the server.
        name: of the table.

    Attributes:
        counts: how many gradients each sum is of, by rank.
    """

    def __init__(self, worker: Worker, name: str) -> None:
        self._state, self._name = worker.state, name
        self.counts: dict[int, int] = worker.state.setdefault(
            f"{name}: counts", dict.fromkeys(worker.state["given"], 0)
        )

    def add(self, source: int, gradient: AbstractVector) -> None:
        """Add a gradient to the sum of its worker."""
        key = f"{self._name}: {source}"
        if key not in self._state:
            self._state[key] = gradient.clone()
        elif self.counts.get(source, 0) == 0:
            self._state[key].copy_(gradient)
        else:
            self._state[key].add_(gradient)
        self.counts[source] = self.counts.get(source, 0) + 1

    def mean(self) -> AbstractVector:
        """Return the mean over the workers of the means of each; all have at least one gradient."""
        state, workers = self._state, len(self.counts)
        for place, (source, count) in enumerate(self.counts.items()):
            own, share = state[f"{self._name}: {source}"], 1 / (workers * count)
            if place > 0:
                state["mean"].add_(own, alpha=share)
                continue
            if "mean" not in state:
                state["mean"] = own.clone()
            state["mean"].copy_(own).mul_(share)
        mean: AbstractVector = state["mean"]
        return mean

    def clear(self) -> None:
        """Forget all gradients."""
        self.counts.update(dict.fromkeys(self.counts, 0))

    def regroup(self, used: bool = False) -> None:
        """Forget the rows of those that are not there any more, and give one to each that has come.

        Args:
            used: whether what is in the rows has been applied already; if not, it was dropped.
        """
        state, there = self._state, self._state["given"]
        for rank in self.counts.keys() - there.keys():
            count = self.counts.pop(rank)
            state.pop(f"{self._name}: {rank}", None)
            if count and not used:
                state["accepted"][rank] -= count
                state["dropped"][rank] = state["dropped"].get(rank, 0) + count
        self.counts.update({rank: 0 for rank in there if rank not in self.counts})


def trainers_at(method: str, server: Place, world_size: int, servers: int = 1) -> int:
    """Tell how many workers train; refuse servers that would have nobody to serve.

    Args:
        method: for the message.
        server: where they are.
        world_size: the number of all workers.
        servers: how many there are.
    """
    trainers = world_size - servers if server == "dedicated" else world_size
    if trainers < 1:
        given = "" if servers == 1 else f", shards={servers}"
        workers = "1 worker" if world_size == 1 else f"{world_size} workers"
        raise ConfigurationError(
            f"{method}(server='dedicated'{given}) got {workers}, which would serve and have nobody to serve; it "
            "needs one more at least. Leave server out, or start more workers."
        )
    return trainers


def require_count(method: str, name: str, value: object, most: int | None = None, why: str = "") -> None:
    """Refuse what is not a whole number of at least 1, or too large.

    Args:
        method: for the message.
        name: of the hyper-parameter.
        value: of it.
        most: that is possible, if that is known.
        why: it is not more.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(
            f"{method}({name}={value!r}): needs a whole number of at least 1. Leave it out for the default."
        )
    if most is not None and value > most:
        raise ConfigurationError(
            f"{method}({name}={value}): needs at most {most}{why}. Use a smaller number, or more workers."
        )


def known_count(algorithm: object, number: int | None) -> int:
    """Return a hyper-parameter whose default depends on the number of workers, which has to be known by now.

    Args:
        algorithm: for the message.
        number: the hyper-parameter.

    Raises:
        ConfigurationError: if it is not chosen yet.
    """
    if number is None:
        raise ConfigurationError(f"{algorithm!r} needs the number of workers first. Call `resolved(workers)`.")
    return number
