"""What the protocol forbids, refused in the same words by every interpreter.

An interpreter tells the `Conduct` of a worker what its algorithm asks for, and what was answered. So a method that is
wrong on real workers is refused by the simulator and the planner too, and the other way round.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
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
    Start,
    Steps,
    Ticket,
)
from lightning_decentral.worker import Worker

COMMUNICATION = (NeighborExchange, NeighborAverage, AllReduce, Call)
"""What may be started, and asked for by a started coroutine."""


@dataclass(eq=False, slots=True)
class UnderWay:
    """A request that was begun, whose answer was not taken yet.

    Attributes:
        word: what it is, for messages.
        value: what must stay as it is until then; none of a coroutine.
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
        self._asked_for_gradient = self._asked_for_update = False

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A step begins."""
        self._asked_for_gradient = self._asked_for_update = False
        self._worker.forget_gradient()
        # What was begun by a step that an interpreter has given up is nobody's any more.
        self._under_way = [each for each in self._under_way if each.ticket is None or each.ticket() is not None]

    def gradient_is_there(self) -> None:
        """`Gradient` is answered."""
        self._worker.gradient_is_there = True

    def end(self) -> None:
        """A step ends.

        Raises:
            ProtocolError: if it made no `Gradient`, or let go of a ticket that it has not awaited.
        """
        if not self._asked_for_gradient:
            self._refuse(
                "no `Gradient`", "exactly one in each step", "Write `await Gradient()`, also where it is unused."
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

    def ask(self, request: object) -> None:
        """A step asks for something.

        Raises:
            ProtocolError: if it may not.
        """
        word = self._known(request)
        if word is Gradient:
            if self._asked_for_gradient:
                self._refuse("a second `Gradient`", "exactly one in each step", "Use `worker.gradient` again.")
            self._asked_for_gradient = True
        elif word is LocalStep:
            assert isinstance(request, LocalStep)
            self._check_update(request)
        elif word is Start:
            assert isinstance(request, Start)
            self._check_start(request.work)
        elif isinstance(request, COMMUNICATION):
            self._check(request)
            self._check_free(request, started=False, beside_gradient=False)

    def begun(self, ticket: Ticket[Any], work: AbstractRequest[Any] | Steps[Any]) -> UnderWay:
        """A request, or a coroutine, was begun by `Start`, and ``ticket`` was given for it."""
        beside = not self._worker.gradient_is_there
        if isinstance(work, COMMUNICATION):
            value = value_of(work)
            entry = UnderWay(type(work).__name__, value, value.revision(), weakref.ref(ticket), beside)
        else:
            entry = UnderWay(work.__name__, None, None, weakref.ref(ticket), beside)  # type: ignore[union-attr]
        self._under_way.append(entry)
        return entry

    def take(self, ticket: Ticket[Any]) -> None:
        """The answer behind a ticket is there, and is given to whoever awaits it; an average replaces its value now.

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
        """A started coroutine asks for something, and waits for the answer; to be given to `answered_inside`.

        Raises:
            ProtocolError: if it may not.
        """
        if not isinstance(request, COMMUNICATION):
            self._known(request)
            self._refuse(
                f"`{type(request).__name__.lstrip('_')}` in the started coroutine `{started.word}`",
                f"nothing in it but {_listed(word.__name__ for word in COMMUNICATION)}",
                "Ask for it in the step itself, before or after the coroutine.",
            )
        self._check(request)
        self._check_free(request, started=False, beside_gradient=started.beside_gradient)
        value = value_of(request)
        entry = UnderWay(type(request).__name__, value, value.revision())
        self._under_way.append(entry)
        return entry

    def answered_inside(self, entry: UnderWay) -> None:
        """What `ask_inside` gave is answered; an average replaces its value now.

        Raises:
            ProtocolError: if the value has changed meanwhile.
        """
        self._under_way.remove(entry)
        self._check_unchanged(entry)

    # -- the rules ----------------------------------------------------------------------------------------------------

    def _known(self, request: object) -> type:
        kind = Ticket if isinstance(request, Ticket) else type(request)
        if kind not in VOCABULARY:
            words = _listed(word.__name__ for word in VOCABULARY)
            self._refuse(
                f"the unknown word `{kind.__name__}`",
                f"one of {words}",
                "Await requests of lightning_decentral.protocol, and coroutines that await these, and nothing else.",
            )
        return kind

    def _check_update(self, request: LocalStep) -> None:
        worker = self._worker
        if not self._asked_for_gradient:
            self._refuse("`LocalStep` before `Gradient`", "the gradient first", "Write `await Gradient()` before it.")
        if self._asked_for_update:
            self._refuse("a second `LocalStep`", "at most one in each step", "Make one update of one gradient.")
        self._asked_for_update = True
        if request.at is not None and request.at is not worker.snapshot:
            self._refuse(
                "`LocalStep` with `at=` another vector", "`worker.snapshot`, or nothing for `worker.x`", "Correct it."
            )
        self._check_unsent(worker.x if request.at is None else request.at, "`LocalStep`, which changes its vector,")

    def _check_start(self, work: object) -> None:
        if isinstance(work, COMMUNICATION):
            self._check(work)
            self._check_free(work, started=True, beside_gradient=not self._worker.gradient_is_there)
        elif not inspect.iscoroutine(work):
            name = f"`{type(work).__name__.lstrip('_')}`" if isinstance(work, AbstractRequest) else repr(work)
            self._refuse(
                f"`Start` of {name}",
                f"{_listed(word.__name__ for word in COMMUNICATION)}, or a coroutine that asks for these",
                "Await everything else at once, and call a function that is a coroutine, as Start(exchange(worker)).",
            )

    def _check(self, request: object) -> None:
        """That a request is about workers that there are and vectors, and that an average knows all its weights."""
        worker, word = self._worker, type(request).__name__
        value = value_of(request)
        if not isinstance(value, AbstractVector):
            self._refuse(f"`{word}` of a {type(value).__name__}", "a vector", "Use worker.x, or Vector([tensor]).")
        if isinstance(request, Call):
            if not isinstance(self._algorithm, AbstractAsynchronousAlgorithm):
                self._refuse("`Call`", "an asynchronous algorithm", "Derive it from AbstractAsynchronousAlgorithm.")
            if request.peer not in self._algorithm.peers(worker.rank):
                self._refuse(
                    f"`Call` of worker {request.peer}",
                    f"one of those that `peers({worker.rank})` names: {self._algorithm.peers(worker.rank)}",
                    "Name it there, or call another one.",
                )
            if value.num_bytes != worker.x.num_bytes:
                self._refuse(
                    f"`Call` with {value.num_bytes} bytes",
                    f"a vector like `worker.x`, of {worker.x.num_bytes} bytes, which is what its receiver expects",
                    "Send a vector of that size, or exchange another one with NeighborExchange.",
                )
        exchange = request.exchange if isinstance(request, NeighborAverage) else request
        if isinstance(exchange, NeighborExchange):
            for name, ranks in (("send_to", exchange.send_to), ("receive_from", exchange.receive_from)):
                allowed = set(range(worker.world_size)) - {worker.rank}
                if not allowed.issuperset(ranks) or len(set(ranks)) != len(ranks):
                    self._refuse(
                        f"`{word}` with {name}={tuple(ranks)}",
                        f"each of the other ranks from 0 to {worker.world_size - 1} at most once",
                        "Take them from a topology's out_neighbors and in_neighbors.",
                    )
        if isinstance(request, NeighborAverage):
            unknown = [rank for rank in request.exchange.receive_from if rank not in request.weights]
            if unknown:
                self._refuse(
                    f"`{word}` with no weights for workers {unknown}",
                    "a weight for each one in receive_from",
                    "Use a topology's weights, as averaging.neighbor_average does.",
                )

    def _check_free(self, request: object, started: bool, beside_gradient: bool) -> None:
        """That nothing that is under way changes this value, and that this changes none that is sent or used."""
        value, word = value_of(request), type(request).__name__
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
        """That a value that changes now is not being sent."""
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
    """When a request changes the vector that it sends; later: when its ticket is awaited."""
    if word == NeighborAverage.__name__:
        return "later" if started else "now"
    return "now" if word == AllReduce.__name__ else "never"


def value_of(request: Any) -> AbstractVector:
    """What a request of communication sends."""
    return (request.exchange if isinstance(request, NeighborAverage) else request).value


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
            "cannot be saved. Await and remove it in the step before a checkpoint is due, or save between two such "
            "exchanges; for checkpoints of the averaged model alone, pass worker_checkpoints=False to the strategy."
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
