"""What the protocol forbids, refused in the same words by every interpreter.

An interpreter tells the `Conduct` of a worker what its algorithm asks for, and what was answered. So a method that is
wrong on real workers is refused by the simulator and the planner too, and the other way round. It is one file, because
the rules of one word are about what others have under way.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from lightning_decentral.errors import ProtocolError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    VOCABULARY,
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AbstractRequest,
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
from lightning_decentral.worker import Worker

COMMUNICATION = (NeighborExchange, NeighborAverage, AllReduce, Call, Send, Receive)
"""What may be started, and asked for by a started coroutine."""


@dataclass(eq=False, slots=True)
class UnderWay:
    """A request that was begun, whose answer was not taken yet.

    Attributes:
        word: what it is, for messages.
        value: what must stay as it is until then; none of a coroutine, and of a `Receive`.
        revision: of that value, when it was begun.
        ticket: that has to be awaited; none if whoever asked waits.
        beside_gradient: whether it was begun before the step's gradient was there.
    """

    word: str
    value: AbstractVector | None
    revision: object
    ticket: weakref.ref[Ticket[Any]] | None = None
    beside_gradient: bool = False


class Conduct:
    """Watches over what one worker's algorithm asks for.

    Args:
        algorithm: for messages, and for whom it may call.
        worker: that it runs on.
    """

    def __init__(self, algorithm: AbstractAlgorithm, worker: Worker) -> None:
        self._algorithm = algorithm
        self._worker = worker
        self._under_way: list[UnderWay] = []
        self._trains = algorithm.trains(worker.rank)
        self._form = worker.x.form
        self._callable_before: tuple[int, ...] = ()  # before the members of the run changed
        self._asked_for_gradient = self._asked_for_update = self._waited = self._told = False

    def follow(self, algorithm: AbstractAlgorithm) -> None:
        """Watch over an algorithm that differs in who takes part; what was begun before may call whom it could call."""
        self._callable_before = self._peers()
        self._algorithm = algorithm

    def _peers(self) -> tuple[int, ...]:
        algorithm = self._algorithm
        return algorithm.peers(self._worker.rank) if isinstance(algorithm, AbstractAsynchronousAlgorithm) else ()

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note that a step begins."""
        self._asked_for_gradient = self._asked_for_update = self._waited = self._told = False
        self._worker.forget_gradient()
        # What was begun by a step that an interpreter has given up is nobody's any more.
        self._under_way = [each for each in self._under_way if each.ticket is None or each.ticket() is not None]

    def gradient_is_there(self) -> None:
        """Note that `Gradient` is answered."""
        self._worker.gradient_is_there = True

    def told(self) -> None:
        """Note that the step was told that what it waits for in `Until` cannot come any more."""
        self._told = True

    def lend_update(self) -> bool:
        """Tell whether an answer may make the update of the step that waits now; the step has none then."""
        free = not self._asked_for_update
        self._asked_for_update = True
        return free

    @property
    def waits_in_vain(self) -> bool:
        """Whether the step was told that what it waits for cannot come any more."""
        return self._told

    def is_averaged(self, value: AbstractVector) -> bool:
        """Tell whether an average that is under way will replace a vector, or a part of it."""
        return any(
            each.value is not None
            and each.value.overlaps(value)
            and _changes(each.word, each.ticket is not None) == "later"
            for each in self._under_way
        )

    def is_under_way(self, value: AbstractVector) -> bool:
        """Tell whether a request that is not answered yet sends a vector, or a part of it."""
        return any(each.value is not None and each.value.overlaps(value) for each in self._under_way)

    @property
    def counts(self) -> bool:
        """Whether the step that ended was one: not if it was told that it waits in vain, and made nothing after that.

        The worker has come to its end then.
        """
        return not self._told or self._asked_for_gradient or self._asked_for_update

    def end(self) -> None:
        """Note that a step ends.

        Raises:
            ProtocolError: if it made no `Gradient` and should have, or waited for nothing and should have, or let go of
                a ticket that it has not awaited.
        """
        if self._trains and not self._asked_for_gradient and not self._told:
            self._refuse(
                "no `Gradient`", "exactly one in each step", "Write `await Gradient()`, also where it is unused."
            )
        if not self._trains and not self._waited:
            self._refuse(
                "a step that waits for nothing, of a worker that does not train",
                "a wait in each step, or it makes steps without end",
                "Write `await Until(...)` for what others bring.",
            )
        for each in tuple(self._under_way):
            if each.ticket is not None and each.ticket() is None:
                self._under_way.remove(each)
                self._refuse(
                    f"`{each.word}`, begun by `Start`, and no `await` of its ticket",
                    "every ticket awaited, by the end of the step or, if it is kept in `worker.state`, of a later one",
                    "Await the ticket.",
                )

    # -- what is asked for --------------------------------------------------------------------------------------------

    def ask(self, request: Any) -> None:
        """Admit what a step asks for.

        Raises:
            ProtocolError: if it may not.
        """
        word = self._known(request)
        if word not in (LocalStep, Start, Send):
            self._waited = True
        if word is Gradient:
            if not self._trains:
                self._refuse(
                    "`Gradient`",
                    f"none of a worker for which `trains({self._worker.rank})` is False",
                    "Let it train, or wait for what others send, and use LocalStep(gradient=...).",
                )
            if self._asked_for_gradient:
                self._refuse("a second `Gradient`", "exactly one in each step", "Use `worker.gradient` again.")
            self._asked_for_gradient = True
        elif word is LocalStep:
            self._check_update(request)
        elif word is Start:
            self._check_start(request.work)
        elif word is Until:
            self._check_condition(request, self._told)
        elif word in COMMUNICATION:
            self._check(request)
            self._check_free(request, started=False, beside_gradient=False)

    def begun(self, ticket: Ticket[Any], work: Any) -> UnderWay:
        """Note that `Start` began a request or a coroutine, and gave ``ticket`` for it."""
        beside = not self._worker.gradient_is_there
        if type(work) in COMMUNICATION:
            entry = _under_way(work, weakref.ref(ticket), beside)
        else:
            entry = UnderWay(work.__name__, None, None, weakref.ref(ticket), beside)
        self._under_way.append(entry)
        return entry

    def take(self, ticket: Ticket[Any]) -> None:
        """Note that the answer behind a ticket is there and is given to whoever awaits it.

        An average replaces its value now.

        Raises:
            ProtocolError: if the value has changed meanwhile.
        """
        for entry in tuple(self._under_way):
            if entry.ticket is not None and entry.ticket() is ticket:
                self._under_way.remove(entry)
                self._check_unchanged(entry)
                if entry.word == NeighborAverage.__name__ and entry.value is not None:
                    self._check_unsent(entry.value, f"`{entry.word}`, which replaces its value when it is awaited,")
                return

    def ask_inside(self, started: UnderWay, request: object) -> UnderWay:
        """Admit what a started coroutine asks for and waits for; give what this returns to `answered_inside`.

        Raises:
            ProtocolError: if it may not.
        """
        if type(request) not in COMMUNICATION:
            self._known(request)
            self._refuse(
                f"`{type(request).__name__.lstrip('_')}` in the started coroutine `{started.word}`",
                f"nothing in it but {_listed(word.__name__ for word in COMMUNICATION)}",
                "Ask for it in the step itself, before or after the coroutine.",
            )
        self._check(request)
        self._check_free(request, started=False, beside_gradient=started.beside_gradient)
        entry = _under_way(request)
        self._under_way.append(entry)
        return entry

    def answered_inside(self, entry: UnderWay) -> None:
        """Note that what `ask_inside` gave is answered; an average replaces its value now.

        Raises:
            ProtocolError: if the value has changed meanwhile.
        """
        self._under_way.remove(entry)
        self._check_unchanged(entry)

    def ask_answering(self, source: int, request: object, told: bool) -> None:
        """Admit what an ``on_call`` asks for.

        Args:
            source: who has called.
            request: what it asks for.
            told: whether it was told before that what it waits for cannot come any more.

        Raises:
            ProtocolError: if it may not.
        """
        where = f"in its `on_call` of worker {source}"
        word = self._known(request)
        if isinstance(request, Until):
            self._check_condition(request, told)
        elif isinstance(request, LocalStep):
            beside = isinstance(self._algorithm, AbstractAsynchronousAlgorithm) and self._algorithm.updates_in_answers
            if (self._trains and not beside) or request.gradient is None:
                self._refuse(
                    f"`LocalStep` {where}",
                    "a worker that does not train, or an algorithm that says `updates_in_answers`, and a `gradient`",
                    "Say so and pass gradient=, or keep what came and make the update in `step`.",
                )
            if self._trains and request.at is not None:
                self._refuse(f"`LocalStep` with `at=` {where}", "an update of `worker.x` there", "Leave `at=` out.")
            self._check_vectors(request)
        else:
            self._refuse(
                f"`{word.__name__}` {where}",
                "nothing there but `Until` and `LocalStep`",
                "Answer with what the worker has, and communicate in its own steps.",
            )

    def let_call(self, ranks: Iterable[int]) -> None:
        """Let the worker call some more, before it leaves."""
        self._callable_before = (*self._callable_before, *ranks)

    def ask_resting(self, request: object, where: str = "rest") -> None:
        """Admit what a ``rest`` asks for, or what a `Gradient` runs between micro-batches.

        Args:
            request: what it asks for.
            where: it does, for messages.

        Raises:
            ProtocolError: if it may not.
        """
        word = self._known(request)
        if word in COMMUNICATION:
            self._check(request)
            self._check_free(request, started=False, beside_gradient=False)
        elif word is not Ticket:
            self._refuse(
                f"`{word.__name__}` in its `{where}`",
                f"nothing there but a ticket and {_listed(word.__name__ for word in COMMUNICATION)}",
                "Bring to an end what is under way, and leave the rest to the next step.",
            )

    def check_answer(self, source: int, answer: object) -> None:
        """Check what an ``on_call`` has returned.

        Raises:
            ProtocolError: if its receiver has no memory for it.
        """
        if not isinstance(answer, AbstractVector):
            self._refuse(
                f"a {type(answer).__name__} as the answer to a `Call` of worker {source}",
                "a vector",
                "Return one from `on_call`, as worker.x.",
            )
        self._check_form(answer, f"an answer to the `Call` of worker {source}")

    def check_received(self, request: Receive, message: AbstractVector) -> None:
        """Check what has come for a `Receive`.

        Raises:
            ProtocolError: if it is not what was expected.
        """
        if message.form != request.like.form:
            self._refuse(
                f"`Receive` of {_described(message)} from worker {request.source}, tag {request.tag}",
                f"one like {request.like.form} (elements and type, buffer by buffer)",
                "Send and receive vectors of one form, or use another tag for the other ones.",
            )

    # -- the rules ----------------------------------------------------------------------------------------------------

    def _known(self, request: object) -> type:
        kind = type(request)
        if kind not in VOCABULARY:
            if isinstance(request, Ticket):
                return Ticket
            words = _listed(word.__name__ for word in VOCABULARY)
            self._refuse(
                f"the unknown word `{kind.__name__}`",
                f"one of {words}",
                "Await requests of lightning_decentral.protocol, and coroutines that await these, and nothing else.",
            )
        return kind

    def _check_update(self, request: LocalStep) -> None:
        if not self._asked_for_gradient and request.gradient is None:
            self._refuse("`LocalStep` before `Gradient`", "the gradient first", "Write `await Gradient()` before it.")
        if self._asked_for_update:
            self._refuse("a second `LocalStep`", "at most one in each step", "Make one update of one gradient.")
        self._asked_for_update = True
        self._check_vectors(request)
        at = self._worker.x if request.at is None else request.at
        self._check_unsent(at, "`LocalStep`, which changes its vector,")
        if request.gradient is not None:
            self._check_unsent(request.gradient, "`LocalStep`, which may clip its gradient,")

    def _check_vectors(self, request: LocalStep) -> None:
        """Check that the vectors of an update are like the parameters; of a gradient the precision may be another."""
        own = self._form
        at, gradient, shard = request.at, request.gradient, request.shard
        if at is not None and (not isinstance(at, AbstractVector) or at.form != own):
            self._refuse(
                f"`LocalStep` with `at=` {_described(at)}",
                f"a vector like `worker.x`: {own}, or nothing for `worker.x`",
                "Use worker.x, worker.snapshot or a clone of them.",
            )
        if shard is not None:
            if gradient is None or at is not None or not 0 <= shard[0] < shard[1] == self._algorithm.shards:
                self._refuse(
                    f"`LocalStep` with `shard={shard}`",
                    f"a `gradient`, no `at`, and (j, {self._algorithm.shards}), as `shards` says, with a smaller j",
                    "Say in `shards` how often the model is cut.",
                )
            own = request.target(self._worker).form
        sizes = [size for size, _ in own]
        if gradient is not None and (
            not isinstance(gradient, AbstractVector) or [size for size, _ in gradient.form] != sizes
        ):
            like = "`worker.x`" if shard is None else f"shard {shard[0]} of `worker.x`"
            self._refuse(
                f"`LocalStep` with `gradient=` {_described(gradient)}",
                f"a vector of as many elements as {like}: {own}",
                "Use worker.gradient, or a vector made by worker.x.zeros_like().",
            )

    def _check_condition(self, request: Until, told: bool) -> None:
        if not callable(request.condition):
            self._refuse(
                f"`Until` of {request.condition!r}",
                "a function without arguments that tells whether to go on",
                "Write Until(lambda: ...).",
            )
        if told:
            self._refuse(
                "`Until` again, after it was answered with False",
                "no further wait: nobody is left who could end it",
                "Make what can be made without, and return, where `await Until(...)` is False.",
            )

    def _check_start(self, work: object) -> None:
        if type(work) in COMMUNICATION:
            self._check(work)
            self._check_free(work, started=True, beside_gradient=not self._worker.gradient_is_there)
        elif not inspect.iscoroutine(work):
            name = f"`{type(work).__name__.lstrip('_')}`" if isinstance(work, AbstractRequest) else repr(work)
            self._refuse(
                f"`Start` of {name}",
                f"{_listed(word.__name__ for word in COMMUNICATION)}, or a coroutine that asks for these",
                "Await everything else at once, and call a function that is a coroutine, as Start(exchange(worker)).",
            )

    def _check(self, request: Any) -> None:
        """Check that a request is about workers that there are, and vectors."""
        worker, kind = self._worker, type(request)
        word = kind.__name__
        value: object = request.like if kind is Receive else request.value
        if not isinstance(value, AbstractVector):
            self._refuse(f"`{word}` of a {type(value).__name__}", "a vector", "Use worker.x, or Vector([tensor]).")
        if kind is Call:
            if not isinstance(self._algorithm, AbstractAsynchronousAlgorithm):
                self._refuse("`Call`", "an asynchronous algorithm", "Derive it from AbstractAsynchronousAlgorithm.")
            if request.peer not in (*self._peers(), *self._callable_before):
                self._refuse(
                    f"`Call` of worker {request.peer}",
                    f"one of those that `peers({worker.rank})` names: {self._peers()}",
                    "Name it there, or call another one.",
                )
            self._check_form(value, f"`Call` with {value.num_bytes} bytes")
        elif kind is NeighborExchange:
            self._check_others(word, "send_to", request.send_to)
            self._check_others(word, "receive_from", request.receive_from)
        elif kind is NeighborAverage:
            self._check_others(word, "send_to", request.send_to)
            self._check_others(word, "weights of", tuple(request.weights))
        elif kind is Send:
            self._check_others(word, "to", (request.to,))
        elif kind is Receive:
            self._check_others(word, "source", (request.source,))
        elif kind is AllReduce:
            self._check_group(request)

    def _check_others(self, word: str, name: str, ranks: Sequence[int]) -> None:
        worker = self._worker
        there = {rank for rank in ranks if 0 <= rank < worker.world_size and rank != worker.rank}
        if len(there) != len(ranks):
            self._refuse(
                f"`{word}` with {name}={tuple(ranks)}",
                f"each of the other ranks from 0 to {worker.world_size - 1} at most once",
                "Take them from a topology's out_neighbors and in_neighbors.",
            )

    def _check_group(self, request: AllReduce) -> None:
        worker, among = self._worker, request.among
        if among is not None:
            there = set(among)
            if not there.issubset(range(worker.world_size)) or len(there) != len(among) or worker.rank not in there:
                self._refuse(
                    f"`AllReduce` with among={tuple(among)}",
                    f"ranks from 0 to {worker.world_size - 1}, each once, and {worker.rank} among them",
                    "Ask for it on the workers that take part, and only there.",
                )
        if not 0 <= request.weight < math.inf:
            self._refuse(
                f"`AllReduce` with weight={request.weight}", "a finite number of at least 0", "Use a count, or a share."
            )

    def _check_form(self, value: AbstractVector, what: str) -> None:
        """Check that the receiver of a call, or of its answer, has memory ready for it."""
        worker, algorithm = self._worker, self._algorithm
        if value is worker.x or value is worker.snapshot or value.form == self._form:
            return
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        declared = algorithm.messages(worker)
        if algorithm.answers_in_parts or value.form not in [message.form for message in declared.values()]:
            self._refuse(
                what,
                f"a vector like `worker.x`, of {worker.x.num_bytes} bytes, or one that `messages` declares "
                f"({_listed(declared) or 'none'}): that is what its receiver expects",
                "Declare its form in `messages`, send a vector of that size, or use another word.",
            )

    def _check_free(self, request: object, started: bool, beside_gradient: bool) -> None:
        """Check that nothing that is under way changes this value, and that this changes none that is sent or used."""
        value, word = value_of(request), type(request).__name__
        if value is None:
            return
        changes = _changes(word, started)
        if beside_gradient and changes == "now" and value.overlaps(self._worker.snapshot):
            self._refuse(
                f"`{word}` of the parameters, begun before `Gradient`",
                "the parameters to stay what they are while the gradient is computed",
                "Start a NeighborAverage and await its ticket after the gradient, or send a copy.",
            )
        for other in tuple(self._under_way):
            if other.value is None or not value.overlaps(other.value):
                continue
            others = _changes(other.word, other.ticket is not None)
            if "now" in (changes, others) or changes == others == "later":
                self._refuse(
                    f"`{word}` of a vector of which a `{other.word}` is under way",
                    "a vector to stay what it is until the request that sends it has been awaited",
                    "Await the first one before, or send a copy.",
                )

    def _check_unsent(self, value: AbstractVector, what: str) -> None:
        """Check that a value that changes now is not being sent."""
        for other in tuple(self._under_way):
            if other.value is not None and value.overlaps(other.value):
                self._refuse(
                    f"{what} while a `{other.word}` sends that vector",
                    "a vector to stay what it is until the request that sends it has been awaited",
                    f"Await the ticket of the `{other.word}` before, or send a copy.",
                )

    def _check_unchanged(self, entry: UnderWay) -> None:
        if entry.value is not None and entry.word != AllReduce.__name__ and entry.value.revision() != entry.revision:
            self._refuse(
                f"`{entry.word}` of a vector that has changed while it was under way",
                "a vector to stay what it is until the request that sends it has been awaited",
                "Change it afterwards, or send a copy.",
            )

    def _refuse(self, got: str, need: str, do: str) -> NoReturn:
        worker = self._worker
        raise ProtocolError(
            f"{type(self._algorithm).__name__} got, in step {worker.step} of worker {worker.rank}, {got}; "
            f"it needs {need}. {do}"
        )


def _changes(word: str, started: bool) -> Literal["now", "later", "never"]:
    """Tell when a request changes the vector that it sends; later: when its ticket is awaited."""
    if word == NeighborAverage.__name__:
        return "later" if started else "now"
    return "now" if word == AllReduce.__name__ else "never"


def value_of(request: Any) -> AbstractVector | None:
    """Return what a request of communication sends and must stay as it is, if there is something."""
    sends_nothing_of_it = type(request) is Receive or (type(request) is Call and request.may_change)
    value: AbstractVector | None = None if sends_nothing_of_it else request.value
    return value


def _under_way(request: Any, ticket: weakref.ref[Ticket[Any]] | None = None, beside: bool = False) -> UnderWay:
    value = value_of(request)
    return UnderWay(type(request).__name__, value, None if value is None else value.revision(), ticket, beside)


def described(condition: Callable[[], bool]) -> str:
    """Say where a condition stands, for messages."""
    if not inspect.isfunction(condition):
        return f"{condition!r}"
    code = condition.__code__
    return f"`{condition.__qualname__}`, line {code.co_firstlineno} of {code.co_filename.rsplit('/', 1)[-1]}"


def _described(value: object) -> str:
    return f"a vector of {value.form}" if isinstance(value, AbstractVector) else f"a {type(value).__name__}"


def require_no_ticket(algorithm: AbstractAlgorithm, worker: Worker) -> None:
    """Refuse a checkpoint of a worker that keeps a ticket: what is under way cannot be saved.

    Raises:
        ProtocolError: if one is anywhere in ``worker.state``.
    """
    found = _ticket_in(worker.state, "worker.state")
    if found:
        raise ProtocolError(
            f"A checkpoint of {type(algorithm).__name__} got a ticket in `{found}`, after step {worker.step} of worker "
            f"{worker.rank}; it needs everything that was begun by `Start` to be awaited, because what is under way "
            "cannot be saved. Await and remove it in the method's `rest`, which is called before each checkpoint; for "
            "checkpoints of the averaged model alone, pass worker_checkpoints=False to the strategy."
        )


def _ticket_in(value: object, name: str) -> str:
    if isinstance(value, Ticket):
        return name
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return next((found for key, item in items if (found := _ticket_in(item, f"{name}[{key!r}]"))), "")


def _listed(words: Any) -> str:
    return ", ".join(words)
