"""The requests an algorithm can make, and the shape of an algorithm.

An algorithm is a coroutine that *asks*: it awaits requests, and an interpreter (a process group, the simulator or the
planner) answers them. It never touches a socket, a process, a clock or a ``Trainer``. The vocabulary is closed: adding
a word means teaching it to every interpreter. It is one file, so that the vocabulary is read from top to bottom.

====================  ========================================================  =====================================
request               answered with                                             cost per worker
====================  ========================================================  =====================================
`Gradient`            ``None``, once ``worker.gradient`` is there                one forward and backward
`LocalStep`           ``True``, or ``False`` if mixed precision skipped it      one optimizer update
`NeighborExchange`    a dict: rank -> the vector it sent                        one message per out-neighbour
`NeighborAverage`     ``None``: the value is the weighted average from then on  one message per out-neighbour
`AllReduce`           the weighted mean over some or all workers, in place      ``2 (m - 1) / m`` messages, of m workers
`Call`                what the called worker's ``on_call`` returns              one message each way
`Until`               ``True`` once a condition holds; ``False``: never more    nothing but time
`Send`                ``None``, once the value may change again                 one message
`Receive`             the vector that was sent                                  nothing: the sender pays
`Start`               a `Ticket`; awaiting it gives what the request would      nothing: this is how overlap is said
====================  ========================================================  =====================================

**The one concurrency rule (a monitor).** The code of an algorithm owns its worker and gives it up only at ``await``;
`AbstractAsynchronousAlgorithm.on_call`, and the coroutines begun by `Start`, run between awaits. `Until` is the
condition variable of this monitor. Nothing changes ``worker.x`` except code of the algorithm and `LocalStep`. The
gradient is taken at ``worker.snapshot``, which stays what it was until `LocalStep`, even if a call averages
``worker.x`` meanwhile. An algorithm whose gradient is taken away from ``x`` puts a vector of its own there, in its
``init``; evaluation and checkpoints take ``x``.

**Every step** of a worker that trains makes exactly one `Gradient` and at most one `LocalStep`, after the gradient
unless it brings another one; without it nothing is updated. A worker that does not train (`AbstractAlgorithm.trains`)
makes no `Gradient`; each of its steps waits for something.

**What is sent stays what it is** until the request has been awaited: nobody changes it, `LocalStep` and other averages
included. Any number of exchanges may be under way; between each two workers they are matched in the order in which they
were begun. What was received stays what it was as long as the algorithm refers to it.

**At a failure** whoever waits for the worker that was lost gets `PeerLost`, on every worker that can tell. **At the end
of a run** (or epoch) whoever waits in `Until` for what cannot come any more is told so; messages, calls and all-reduces
come to their end, because every worker makes the same ones. What a worker keeps under way over its steps, `rest` brings
to an end.

All this is refused by each interpreter, in the same words (`conduct`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from lightning_decentral.errors import ConfigurationError, ProtocolError

if TYPE_CHECKING:
    from lightning_decentral.flat import AbstractVector
    from lightning_decentral.worker import Worker

Answer = TypeVar("Answer")
Steps = Coroutine[Any, Any, Answer]
"""A coroutine of an algorithm that awaits requests and returns an ``Answer``."""


class AbstractRequest(ABC, Generic[Answer]):
    """Something an algorithm awaits; the interpreter sends the answer back."""

    __slots__ = ()

    def __await__(self) -> Generator[AbstractRequest[Any], Answer, Answer]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class Gradient(AbstractRequest[None]):
    """Compute this step's stochastic gradient at ``worker.snapshot`` (all micro-batches of an accumulation).

    Args:
        begins_anew: runs between micro-batches, on this worker: a coroutine that may communicate, and tells whether
            what has been computed so far is given up. ``worker.snapshot`` becomes ``worker.x`` then, and the gradient
            begins with the next micro-batch. Nobody runs it where a gradient has one micro-batch, or user code changes
            weights while it is computed.
    """

    begins_anew: Callable[[Worker], Steps[bool]] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LocalStep(AbstractRequest[bool]):
    """Clip a gradient and apply the user's optimizer with it, to ``worker.x`` or to another vector.

    Args:
        at: what the optimizer changes in the place of ``x``; of the form of ``x``.
        gradient: what it applies in the place of ``worker.gradient``: the direction of a tracker, a gradient that came
            from another worker, an outer difference. No `Gradient` has to come before it. Clipping may change it.
        shard: ``(j, k)``: ``gradient`` is of the j-th of k shards of the model alone, pieces of nearly equal size that
            are cut between parameters: ``x.slices(k, x.parameter_borders)[j]``. For the optimizer all other parameters
            have no gradient: neither they nor its state for them change.

    The answer is ``False`` if mixed precision skipped the update because of an infinite gradient; the algorithm goes on
    with its exchanges all the same, or its peers would wait for it.

    In `AbstractAsynchronousAlgorithm.on_call` it needs a ``gradient``. Of a worker that does not train the optimizer
    belongs to its step: the update is made while that waits in `Until`; a step has one, and who comes later has that
    of the next step. Of a worker that trains it is made at once, beside its gradient, by the same optimizer; the
    algorithm says so with `AbstractAsynchronousAlgorithm.updates_in_answers`.
    """

    at: AbstractVector | None = None
    gradient: AbstractVector | None = None
    shard: tuple[int, int] | None = None

    def target(self, worker: Worker) -> AbstractVector:
        """Return what the optimizer changes: of ``x``, or of another vector, all or one shard."""
        whole = worker.x if self.at is None else self.at
        if self.shard is None:
            return whole
        number, count = self.shard
        return whole.slices(count, worker.x.parameter_borders)[number]


@dataclass(frozen=True, slots=True, eq=False)
class NeighborExchange(AbstractRequest["dict[int, AbstractVector]"]):
    """Send ``value`` to some workers and receive from some.

    Every worker must make the matching request: whoever is in ``send_to`` must have this worker in its
    ``receive_from``. ``value`` must not change until the answer is there. The received vectors belong to the
    interpreter, or to the worker that sent them: they must not be changed. They stay what they are as long as anybody
    refers to them; whoever lets go of them before the next exchange needs no memory for both.
    """

    value: AbstractVector
    send_to: tuple[int, ...]
    receive_from: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class NeighborAverage(AbstractRequest[None]):
    """Exchange a value with neighbours, and replace it by the weighted average with theirs.

    The value is replaced when the answer is there; if the request was begun by `Start`, when its `Ticket` is awaited,
    although the average may be computed before. Until then it must not change, and no other average of it may begin.
    Without neighbours it stays what it is.

    Args:
        value: of this worker.
        send_to: who receives it.
        own_weight: of the value itself.
        weights: of what others send, by rank: these are received from, and the average is computed in this order.
    """

    value: AbstractVector
    send_to: tuple[int, ...]
    own_weight: float
    weights: Mapping[int, float]

    @property
    def exchange(self) -> NeighborExchange:
        """The messages that it is made of."""
        return NeighborExchange(self.value, self.send_to, tuple(self.weights))

    def apply(self, received: Mapping[int, AbstractVector], into: AbstractVector | None = None) -> None:
        """Replace the value by the average with ``received``, or write that average somewhere else.

        Args:
            received: the answer to `exchange`.
            into: where to; it may be the first of what was received.
        """
        others = [(theirs, self.weights[source]) for source, theirs in received.items()]
        if others:
            (self.value if into is None else into).mix_(self.value, self.own_weight, others)
        elif into is not None:
            into.copy_(self.value)


@dataclass(frozen=True, slots=True, eq=False)
class AllReduce(AbstractRequest["AbstractVector"]):
    """Replace ``value`` by its weighted mean over some workers, in place, and answer with it.

    ``sum_i weight_i value_i / sum_i weight_i``. All of these workers ask for it, with the same ``among``; those of the
    same workers are matched in the order in which they were begun. Several may be under way at once.

    Args:
        value: of this worker; of the same form on all.
        among: the ranks that take part, this worker's among them; ``None``: all.
        weight: of this worker's value; 0 or more, and more than 0 on one of them at least. Of a worker with weight 0
            the value does not count, and is replaced too.
    """

    value: AbstractVector
    among: tuple[int, ...] | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Call(AbstractRequest["AbstractVector"]):
    """Send ``value`` to ``peer`` and wait for what its `AbstractAsynchronousAlgorithm.on_call` returns.

    The peer answers at once, whatever it is computing, or when its ``on_call``, if that waits, has come to its end.
    ``value`` must not change until the answer is there, unless it ``may_change``. The answer belongs to the
    interpreter, and stays what it is as long as anybody refers to it.

    Args:
        peer: who is called.
        value: what is sent: of the form of ``x``, or of one that `AbstractAsynchronousAlgorithm.messages` declares.
        then: what becomes of the answer: called with this worker and the answer, in the place of answering with it.
            Under `AbstractAsynchronousAlgorithm.answers_in_parts` it may be called for each part, and what holds for
            ``on_call`` then holds for it: between workers of one host, both ends change in one pass over memory.
        may_change: whether ``value`` may change as soon as this is asked for, as ``worker.x`` does. A copy of it is
            sent then; between workers of one host under `AbstractAsynchronousAlgorithm.answers_in_parts` none is
            needed, and each part is sent as it is when its turn comes.
        used_up: whether ``value`` is not needed any more once it is sent. An answer of the same form may come to its
            memory, and stays what it is for as long as nobody writes there.
    """

    peer: int
    value: AbstractVector
    then: Callable[[Worker, AbstractVector], None] | None = None
    may_change: bool = False
    used_up: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Until(AbstractRequest[bool]):
    """Give the worker up until a condition holds. For a step and for an ``on_call``.

    The answer is ``True`` once the condition holds; it does hold then. It is ``False`` when it cannot come any more:
    nobody can go on, every other worker having come to its end (of the run or the epoch) or waiting too. Who is told so
    makes what can be made without, and returns; it waits for nothing more in this step, or in this ``on_call``. If
    nobody has come to an end, all wait for each other: that is a `DeadlockError`, which names the condition.

    A lost worker ends the wait with `PeerLost`, unless the algorithm `AbstractAlgorithm.tolerates_loss`. Where workers
    come and go, the answer is ``False`` as soon as one of them has no more batches of an epoch.

    Args:
        condition: reads ``worker.state``, ``worker.step`` and ``worker.version``, and has no effect; it is looked at
            again after whatever runs on this worker. It must not depend on values of vectors, which the planner does
            not have.
    """

    condition: Callable[[], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Send(AbstractRequest[None]):
    """Send a vector one way: into a mailbox of ``to``, which it takes from with `Receive`, first in, first out.

    The answer comes when ``value`` may change again. It does not wait for the `Receive`: so all workers may send first,
    and receive then. What nobody has received by the next rest (a checkpoint, say) is refused there.

    Args:
        to: another rank.
        value: of any form.
        tag: of the mailbox: there is one for each sender and tag.
    """

    to: int
    value: AbstractVector
    tag: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Receive(AbstractRequest["AbstractVector"]):
    """Wait for the next vector that ``source`` sends here with ``tag``.

    The answer belongs to the interpreter, must not be changed, and stays what it is as long as anybody refers to it.

    Args:
        source: another rank.
        like: a vector of the form of what will come; its values do not matter.
        tag: of the mailbox.
        before: what this worker receives next, of other mailboxes, with nothing to wait for in between. It changes no
            value: real workers ask for these at once, and so do not wait for a way there and back for each.
    """

    source: int
    like: AbstractVector
    tag: int = 0
    before: tuple[Receive, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Start(AbstractRequest["Ticket[Answer]"], Generic[Answer]):
    """Begin a request, or a coroutine of requests, now; await the `Ticket` for its answer later.

    A started coroutine may communicate, and nothing else: no `Gradient`, `LocalStep`, `Until` or `Start` in it, and no
    await of a ticket. What a worker starts runs in the order in which it was started, and what the step itself asks for
    comes after it: a started `Receive` holds up all that follows it. But a started `Call` (not one in a coroutine) runs
    beside all else, so that several may be under way.

    A coroutine that is begun before the gradient may not average the parameters: a `NeighborAverage` may, since it
    replaces them when its ticket is awaited.
    """

    work: AbstractRequest[Answer] | Steps[Answer]


class Ticket(AbstractRequest[Answer]):
    """A promise of the answer to a started request; made by interpreters only.

    It may be awaited more than once, in any order with others, and in a later step if it is kept in ``worker.state``;
    what was received lives as long. It must be awaited: a step that lets go of one is refused at its end. A checkpoint
    cannot hold one: who keeps one over its steps says in `AbstractAlgorithm.rest` how to bring it to an end.
    """

    __slots__ = ("__weakref__",)


VOCABULARY: tuple[type[AbstractRequest[Any]], ...] = (
    *(Gradient, LocalStep, NeighborExchange, NeighborAverage, AllReduce, Call, Until, Send, Receive, Start, Ticket),
)
"""All words, of which each interpreter answers each one."""


@runtime_checkable
class _Periodic(Protocol):
    """A hyper-parameter that repeats itself, as a topology; or never does, with the period 0."""

    @property
    def period(self) -> int: ...


@dataclass(frozen=True)
class Mixing:
    """How fast the averaging of a method brings its workers' models together, apart from what they learn meanwhile.

    Args:
        spectral_gap: 1 minus the factor by which one step's averaging shrinks the distance from consensus; 1 is exact,
            0 promises nothing.
        rounds_to_consensus: averaging steps until 0.1 % of a disagreement is left.
    """

    spectral_gap: float
    rounds_to_consensus: float


@runtime_checkable
class _Mixes(Protocol):
    """A hyper-parameter that says how it mixes, as a topology."""

    @property
    def spectral_gap(self) -> float: ...

    def rounds_to_consensus(self) -> float: ...


class AbstractAlgorithm(ABC):
    """One method of training, as hyper-parameters and a coroutine per step.

    Subclasses are frozen dataclasses: their ``repr`` is what is logged and what a configuration file says. Whatever
    changes while training lives in ``worker.state`` (tensors, `Vector`\\ s and plain Python values), which is
    checkpointed per worker, so that one algorithm object can serve hundreds of virtual workers.

    Attributes:
        exchanges_gradients: whether ``step`` reads ``worker.gradient``. A worker that skips an update has a zero
            gradient then, and applies what comes of it and of what the others have sent. Otherwise the exchange does
            not depend on how, and how often in a batch, user code changes its model.
        same_updates: whether all workers apply the same updates, so that their models stay equal. The mean of some of
            them is the mean of all then.
        remembers_gradients: whether something in ``worker.state`` has the unit of the gradient. A gradient scaler,
            which changes that unit and lets infinite gradients pass, cannot be used then.
        brings_momentum: whether the method has a momentum of its own, which would be one of a momentum if the user's
            optimizer had one, too: that is refused.
        tolerates_loss: whether the others go on when a worker is lost: who waits for it in `Until` is told ``False``,
            what is sent to it is lost too. Who calls it or waits for its messages gets `PeerLost` all the same.
        alike_at_rest: whether the models of all workers are the same bits once they have come to `rest`, unless user
            code has changed some.
        shares_model: whether all workers have one ``x``, in memory that they share, and change it without a lock.
        shards: into how many pieces the model is cut, of which the first of `keepers` keeps the first, and so on. 1:
            each of them keeps a whole model.
    """

    __slots__ = ()

    # Without annotations, which a command line would look up in the module of each subclass.
    exchanges_gradients = False
    same_updates = False
    brings_momentum = False
    remembers_gradients = False
    tolerates_loss = False
    alike_at_rest = False
    shares_model = False
    shards = 1

    @property
    def has_outer_gradient(self) -> bool:
        """Whether an optimizer of the method's own steps along what workers have moved, as DiLoCo's: no gradient scaler
        then."""
        return False

    def on_hosts(self, workers_per_host: int) -> AbstractAlgorithm:
        """Return this algorithm, told how many workers each host has, before `resolved`. By default it does not matter.

        Args:
            workers_per_host: equally many on all; ranks are numbered host by host.
        """
        return self

    @abstractmethod
    def resolved(self, world_size: int) -> AbstractAlgorithm:
        """Return this algorithm for ``world_size`` workers: defaults that depend on it filled in, everything checked.

        Raises:
            ConfigurationError: if the algorithm cannot run with so many workers.
        """

    @abstractmethod
    def init(self, worker: Worker) -> None:
        """Put what the algorithm remembers into ``worker.state``; also called to begin anew after a re-start."""

    @abstractmethod
    async def step(self, worker: Worker) -> None:
        """Make one step of one worker."""

    async def rest(self, worker: Worker) -> None:
        """Bring what is under way to an end: before an evaluation, a checkpoint, a change of who takes part, the end.

        For methods that keep tickets or expect messages over several steps: await them, and let ``x`` be what it is
        without them. All workers rest together, between two steps; training may go on afterwards. Only communication
        and tickets may be awaited. By default nothing is under way.
        """
        return

    def opened(self) -> AbstractAsynchronousAlgorithm:
        """Return what a run is of whose workers come and go: one that has ``among``, which tells it who is there.

        Raises:
            ConfigurationError: if the workers cannot go on without one of them; so by default.
        """
        raise ConfigurationError(
            f"OpenStrategy got {self!r}, whose workers cannot go on without one of them; it needs a method that "
            "averages in pairs and tolerates a loss, or one of local updates. Use ADPSGD, ACiD, Swarm, DPSGD, "
            "LocalSGD, DiLoCo, FedBuff, APSGD or another one with a server; or AsyncStrategy."
        )

    def trains(self, rank: int) -> bool:
        """Tell whether a worker computes gradients. One that does not only serves: it has no data.

        It makes no `Gradient`. Each of its steps waits for something, and makes one update at most. It has no number of
        steps to make: it goes on until those that train have come to their end.
        """
        return True

    def keepers(self, world_size: int) -> tuple[int, ...]:
        """Return the workers whose ``x`` is the model: the mean of theirs is evaluated and saved. By default all.

        With several `shards`, as many workers as these: the model is made of one shard of each one's ``x``.
        """
        return tuple(range(world_size))

    def for_buffers(self) -> AbstractAlgorithm | None:
        """Return what averages the workers' buffers as this averages their models; by default ``None``: nothing.

        Buffers (BatchNorm's running statistics) are changed by forward passes, and by no optimizer. Under
        ``buffers="gossip"`` of the strategies what is returned here makes its steps on a vector of them, without
        gradients and updates: a method that averages and does nothing else, on the same graph or in the same rounds.
        """
        return None

    def questions(self, worker: Worker) -> int:
        """Return how many calls that a worker has answered brought no gradient, and no model; 0 by default."""
        return 0

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Return what a worker can tell of the run so far, by name, for callbacks and loggers; by default nothing."""
        return {}

    def period(self, world_size: int) -> int:
        """Return after how many steps what a worker sends repeats itself; the planner measures whole periods.

        By default what the hyper-parameters say that have a ``period``, as a topology does; 1 if none has. A method
        that does something in every so many steps only says so here::

            return math.lcm(self.every, super().period(world_size))

        Args:
            world_size: how many workers take part; the algorithm is resolved for as many.
        """
        periods = [value.period for value in self._hyper_parameters() if isinstance(value, _Periodic)]
        return math.lcm(*filter(None, periods))  # 0: never

    def mixing(self, world_size: int) -> Mixing:
        """Tell how fast the models come together; for the planner.

        By default what the hyper-parameters say that mix, as a topology does; exact if none does, as where gradients
        are averaged over all. A method that averages in another way, in every so many steps or of random pairs, says
        how.

        Args:
            world_size: how many workers take part; the algorithm is resolved for as many.
        """
        graph = next((value for value in self._hyper_parameters() if isinstance(value, _Mixes)), None)
        if graph is None or world_size == 1:
            return Mixing(1.0, 1)
        return Mixing(graph.spectral_gap, graph.rounds_to_consensus())

    def _hyper_parameters(self) -> list[Any]:
        fields: Any = self
        return [getattr(self, field.name) for field in dataclasses.fields(fields)]


class AbstractErrorFeedbackAlgorithm(AbstractAlgorithm):
    """An algorithm whose workers remember what their messages left out, so that nothing is lost in the sum of them all.

    That sum has to outlive a change of the number of workers.
    """

    __slots__ = ()

    @abstractmethod
    def regrouped(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what each worker remembers if another number of workers goes on.

        Args:
            states: ``worker.state`` of the workers so far, by rank.
        """


class AbstractAsynchronousAlgorithm(AbstractAlgorithm):
    """An algorithm whose workers call each other and answer while they compute, so that nobody waits for the slowest.

    Its gradient is taken at a snapshot, because a call may change ``worker.x`` meanwhile.

    Attributes:
        answers_in_parts: whether `on_call` treats each element by itself, has an answer of the form of the call, which
            is that of ``x``, waits for nothing, and uses and changes nothing of the worker but ``x``. Then a call may
            be answered part by part as it arrives: ``on_call`` is called for each part, with a worker whose ``x`` is
            that part of the parameters. The whole call takes one message's time instead of two, and its responder needs
            no copy of the model.
        updates_in_answers: whether `on_call` makes updates (`LocalStep`) of workers that train. They are made at once,
            by the optimizer of that worker, while it computes its gradient.
        needs: the workers without whom the others cannot go on where workers come and go, as a server.
        is_called: whether workers call each other at all. Where nobody does, ``x`` stays what it is while a gradient is
            computed, and there is no snapshot apart from it.
    """

    __slots__ = ()

    answers_in_parts = False  # as above
    updates_in_answers = False
    needs: tuple[int, ...] = ()
    is_called = True

    def changes_beside(self, rank: int) -> bool:
        """Tell whether a worker's ``x`` may change while its gradient is computed, so that it needs a snapshot.

        By calls of others, or by what its step has started; by default it may.
        """
        return True

    @abstractmethod
    def peers(self, rank: int) -> tuple[int, ...]:
        """Return the workers that ``rank`` may `Call`."""

    @abstractmethod
    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        """Answer a `Call` of ``source``.

        It may await `Until`, so that the answer is given later, and `LocalStep` with a gradient, for which see there;
        other calls are answered meanwhile. What does not wait is answered at once.

        Args:
            worker: that is called.
            source: who calls.
            theirs: what was sent: it may be changed and returned, and is this call's until it returns. Who needs it
                longer keeps a copy.

        Returns:
            The answer, as it is at that moment; of the form of ``x`` or of one of `messages`.
        """

    def mixing(self, world_size: int) -> Mixing:
        """Tell how fast the models come together; for the planner. Nothing is promised of calls that it does not know.

        A method whose calls average two models says so with `topology.pairwise_gap`, as AD-PSGD does.
        """
        return Mixing(1.0, 1) if world_size == 1 else Mixing(0.0, math.inf)

    def messages(self, worker: Worker) -> Mapping[str, AbstractVector]:
        """Forms other than that of ``x`` that calls and their answers have: a vector of each, by a name for messages.

        The same on all workers, from the beginning: receivers have their memory ready before a call comes. A number
        that travels beside a vector is a form of its own::

            return {"gradient and version": worker.x.beside(worker.x.new_numbers(0.0))}
        """
        return {}

    def notice(self, worker: Worker) -> None:
        """Learn who is there, where workers come and go: this is the algorithm that ``among`` has given for these.

        Called before each step; of one that others need, before each answer too, and again and again while its step or
        an answer waits in `Until`. Coroutines that wait are of the algorithm for those that were there before: they
        learn of it from ``worker.state``.
        """
        return

    async def depart(self, worker: Worker, neighbors: Sequence[int]) -> None:
        """Hand over what others have not of this worker, before it leaves where workers come and go, between two steps.

        Only communication may be awaited. By default nothing is under way, and nothing is left to hand over.

        Args:
            worker: that leaves.
            neighbors: those to which there is a connection now; it may call each of them.
        """
        return

    def handed_over(self, worker: Worker) -> dict[str, Any]:
        """Return what one that joins needs of a worker's state, beside its model; it stays the worker's."""
        return {}

    def join(self, worker: Worker, given: Mapping[str, Any]) -> None:
        """Begin where another worker is: its model is in ``x``, and this is what it has handed over."""
        return


class AbstractOpenRounds(AbstractAsynchronousAlgorithm):
    """An algorithm of workers that come and go, which average all together now and then, between two of their steps.

    The interpreter lets them meet: where one `is_due` it waits for all that are there, and each makes `end_round`, as
    the algorithm that `among` gives for these. An exchange with neighbours is made by all of them or by none: where one
    is lost in it, the others make `end_round` again.

    Attributes:
        ends_with_epoch: whether a round ends with an epoch, too.
        may_end_early: whether a worker may end its round before it `is_due`, because the others wait for it.
    """

    __slots__ = ()

    is_called = False
    tolerates_loss = True
    ends_with_epoch = True
    may_end_early = True

    @abstractmethod
    def is_due(self, worker: Worker) -> bool:
        """Tell whether a worker, between two steps, has made those of its round."""

    @abstractmethod
    async def end_round(self, worker: Worker) -> None:
        """Average with all that are there. Only communication may be awaited."""

    def mass(self, worker: Worker) -> AbstractVector:
        """Return of what a round among neighbours keeps the sum over the workers, as a copy: of the model."""
        return worker.x.clone()

    def peers(self, rank: int) -> tuple[int, ...]:
        return ()

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        """Refuse to answer: nobody calls."""
        raise ProtocolError(
            f"{type(self).__name__} got a call of worker {source}, but its workers average all together; it needs "
            "none. Remove the `Call`."
        )


def answered_at_once(
    algorithm: AbstractAsynchronousAlgorithm, worker: Worker, source: int, theirs: AbstractVector
) -> AbstractVector:
    """Return what `AbstractAsynchronousAlgorithm.on_call` does, of a method that waits for nothing in it.

    Raises:
        ProtocolError: if it waits.
    """
    coroutine = algorithm.on_call(worker, source, theirs)
    try:
        request = coroutine.send(None)
    except StopIteration as finished:
        answer: AbstractVector = finished.value
        return answer
    coroutine.close()
    raise ProtocolError(
        f"{type(algorithm).__name__} got, in step {worker.step} of worker {worker.rank}, `{type(request).__name__}` in "
        f"its `on_call`, which answers worker {source} at once; it needs an answer without waiting. Set "
        "`answers_in_parts` to False if it is True; otherwise this interpreter cannot give answers later."
    )
