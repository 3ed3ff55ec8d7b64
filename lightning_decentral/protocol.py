"""The requests an algorithm can make, and the shape of an algorithm.

An algorithm is a coroutine that *asks*: it awaits requests, and an interpreter (a process group, the simulator or the
planner) answers them. It never touches a socket, a process, a clock or a ``Trainer``. The vocabulary is closed: adding
a word means teaching it to every interpreter.

====================  ========================================================  =====================================
request               answered with                                             cost per worker
====================  ========================================================  =====================================
`Gradient`            ``None``, once ``worker.gradient`` is there                one forward and backward
`LocalStep`           ``True``, or ``False`` if mixed precision skipped it      one optimizer update
`NeighborExchange`    a dict: rank -> the vector it sent                        one message per out-neighbour
`NeighborAverage`     ``None``: the value is the weighted average from then on  one message per out-neighbour
`AllReduce`           the mean over all workers, in place                       ``2 (n - 1) / n`` messages
`Call`                the vector that the called worker answered with           one message each way
`Start`               a `Ticket`; awaiting it gives what the request would      nothing: this is how overlap is said
====================  ========================================================  =====================================

**The one concurrency rule (a monitor).** The code of an algorithm owns its worker and gives it up only at ``await``;
`AbstractAsynchronousAlgorithm.on_call`, and the coroutines begun by `Start`, run between awaits. Nothing changes
``worker.x`` except code of the algorithm and `LocalStep`. The gradient is taken at ``worker.snapshot``, which stays
what it was until `LocalStep`, even if a call averages ``worker.x`` meanwhile. An algorithm whose gradient is taken away
from ``x`` puts a vector of its own there, in its ``init``; evaluation and checkpoints take ``x``.

**Every step** makes exactly one `Gradient` and at most one `LocalStep`, in this order; without one nothing is updated.

**What is sent stays what it is** until the request has been awaited: nobody changes it, `LocalStep` and other averages
included. Any number of exchanges may be under way; between each two workers they are matched in the order in which they
were begun. What was received stays what it was as long as the algorithm refers to it.

All this is refused by each interpreter, in the same words (`conduct`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

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
    """Compute this step's stochastic gradient at ``worker.snapshot`` (all micro-batches of an accumulation)."""


@dataclass(frozen=True, slots=True)
class LocalStep(AbstractRequest[bool]):
    """Clip the gradient and apply the user's optimizer to ``worker.x``, or to another vector of the algorithm's.

    Args:
        at: ``worker.snapshot``, if the algorithm has put a vector of its own there that the optimizer shall change in
            the place of ``x``.

    The answer is ``False`` if mixed precision skipped the update because of an infinite gradient; the algorithm goes on
    with its exchanges all the same, or its peers would wait for it.
    """

    at: AbstractVector | None = None


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
        exchange: the value, and who takes part.
        own_weight: of the value itself.
        weights: of what others send, by rank; of everybody in ``exchange.receive_from``.
    """

    exchange: NeighborExchange
    own_weight: float
    weights: Mapping[int, float]

    def apply(self, received: Mapping[int, AbstractVector], into: AbstractVector | None = None) -> None:
        """Replace the value by the average with ``received``, or write that average somewhere else.

        Args:
            received: the answer to ``exchange``.
            into: where to; it may be the first of what was received.
        """
        value = self.exchange.value
        others = [(theirs, self.weights[source]) for source, theirs in received.items()]
        if others:
            (value if into is None else into).mix_(value, self.own_weight, others)
        elif into is not None:
            into.copy_(value)


@dataclass(frozen=True, slots=True, eq=False)
class AllReduce(AbstractRequest["AbstractVector"]):
    """Replace ``value`` by its mean over all workers, in place, and answer with it."""

    value: AbstractVector


@dataclass(frozen=True, slots=True, eq=False)
class Call(AbstractRequest["AbstractVector"]):
    """Send ``value`` to ``peer`` and wait for what its `AbstractAsynchronousAlgorithm.on_call` answers.

    The peer answers at once, whatever it is computing. ``value`` must not change until the answer is there. The answer
    belongs to the interpreter, and stays what it is as long as anybody refers to it.

    Args:
        peer: who is called.
        value: what is sent.
        then: what becomes of the answer: called with this worker and the answer, in the place of answering with it.
            Under `AbstractAsynchronousAlgorithm.answers_in_parts` it may be called for each part, and what holds for
            ``on_call`` then holds for it: between workers of one host, both ends change in one pass over memory.
    """

    peer: int
    value: AbstractVector
    then: Callable[[Worker, AbstractVector], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Start(AbstractRequest["Ticket[Answer]"], Generic[Answer]):
    """Begin a request, or a coroutine of requests, now; await the `Ticket` for its answer later.

    A started coroutine may communicate, and nothing else: no `Gradient`, `LocalStep` or `Start` in it, and no await of
    a ticket. What a worker starts runs in the order in which it was started, and what the step itself asks for comes
    after it. A coroutine that is begun before the gradient may not average the parameters: a `NeighborAverage` may,
    since it replaces them when its ticket is awaited.
    """

    work: AbstractRequest[Answer] | Steps[Answer]


class Ticket(AbstractRequest[Answer]):
    """A promise of the answer to a started request; made by interpreters only.

    It may be awaited more than once, in any order with others, and in a later step if it is kept in ``worker.state``.
    It must be awaited: a step that lets go of one is refused at its end. A checkpoint cannot hold one.
    """

    __slots__ = ("__weakref__",)


VOCABULARY: tuple[type[AbstractRequest[Any]], ...] = (
    *(Gradient, LocalStep, NeighborExchange, NeighborAverage, AllReduce, Call, Start, Ticket),
)
"""All words, of which each interpreter answers each one."""


@runtime_checkable
class _Periodic(Protocol):
    """A hyper-parameter that repeats itself, as a topology; or never does, with the period 0."""

    @property
    def period(self) -> int: ...


class AbstractAlgorithm(ABC):
    """One method of training, as hyper-parameters and a coroutine per step.

    Subclasses are frozen dataclasses: their ``repr`` is what is logged and what a configuration file says. Whatever
    changes while training lives in ``worker.state`` (tensors, `Vector`\\ s and plain Python values), which is
    checkpointed per worker, so that one algorithm object can serve hundreds of virtual workers.

    Attributes:
        exchanges_gradients: whether ``step`` reads ``worker.gradient``, so that all workers apply the same updates. A
            worker that skips an update sends a zero gradient then, and applies what the others have sent. Otherwise
            the exchange does not depend on how, and how often in a batch, user code changes its model.
    """

    __slots__ = ()

    exchanges_gradients: ClassVar[bool] = False

    @abstractmethod
    def resolved(self, world_size: int) -> AbstractAlgorithm:
        """This algorithm for ``world_size`` workers: defaults that depend on it filled in, everything checked.

        Raises:
            ConfigurationError: if the algorithm cannot run with so many workers.
        """

    @abstractmethod
    def init(self, worker: Worker) -> None:
        """Put what the algorithm remembers into ``worker.state``; also called to begin anew after a re-start."""

    @abstractmethod
    async def step(self, worker: Worker) -> None:
        """One step of one worker."""

    def period(self, world_size: int) -> int:
        """After how many steps what a worker sends repeats itself; the planner measures whole periods.

        By default what the hyper-parameters say that have a ``period``, as a topology does; 1 if none has. A method
        that does something in every so many steps only says so here::

            return math.lcm(self.every, super().period(world_size))

        Args:
            world_size: how many workers take part; the algorithm is resolved for as many.
        """
        fields: Any = self
        values = [getattr(self, field.name) for field in dataclasses.fields(fields)]
        periods = [value.period for value in values if isinstance(value, _Periodic)]
        return math.lcm(*filter(None, periods))  # 0: never


class AbstractErrorFeedbackAlgorithm(AbstractAlgorithm):
    """An algorithm whose workers remember what their messages left out, so that nothing is lost in the sum of them all.

    That sum has to outlive a change of the number of workers.

    Attributes:
        remembers_gradients: whether what is remembered has the unit of the gradient. A gradient scaler, which changes
            that unit and lets infinite gradients pass, cannot be used then.
    """

    __slots__ = ()

    remembers_gradients: ClassVar[bool] = False

    @abstractmethod
    def regrouped(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What each worker remembers if another number of workers goes on.

        Args:
            states: ``worker.state`` of the workers so far, by rank.
        """


class AbstractAsynchronousAlgorithm(AbstractAlgorithm):
    """An algorithm whose workers call each other and answer while they compute, so that nobody waits for the slowest.

    Its gradient is taken at a snapshot, because a call may change ``worker.x`` meanwhile.

    Attributes:
        answers_in_parts: whether `on_call` treats each element by itself, has an answer of the size of the call, and
            uses and changes nothing of the worker but ``x``. Then a call may be answered part by part as it arrives:
            ``on_call`` is called for each part, with a worker whose ``x`` is that part of the parameters. The whole
            call takes one message's time instead of two, and its responder needs no copy of the model.
    """

    __slots__ = ()

    answers_in_parts: ClassVar[bool] = False

    @abstractmethod
    def peers(self, rank: int) -> tuple[int, ...]:
        """The workers that ``rank`` may `Call`."""

    @abstractmethod
    def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        """Answer a `Call` of ``source``. ``theirs`` may be overwritten and returned: no copy is needed."""
