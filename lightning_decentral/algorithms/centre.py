"""Workers that make local steps, and a server that keeps a model of its own, apart from the one that it trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lightning_decentral.algorithms.compressed_calls import SERVER, AbstractCompressedCalls, news, with_rest
from lightning_decentral.algorithms.open_centre import OpenCentre
from lightning_decentral.algorithms.server import require_count, trainers_at
from lightning_decentral.averaging.messages import add_decoded_, decoded, message_like, same_types
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    AbstractAsynchronousAlgorithm,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    Mixing,
    Until,
)
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class AbstractCentre(AbstractCompressedCalls):
    """A model that worker 0 keeps for all, the *centre*, beside the one that it trains as everybody does.

    The centre is changed by what workers send and not by an optimizer step, so that no training loop has to stop for
    it, and user code that changes weights in the middle of a step does not meet it. When all workers rest, worker 0
    shows it: it is what is evaluated and saved. What user code changes there counts for the centre, and for whatever
    all workers measure differences from.

    What the server knows is in its ``worker.state``, by the names of `AbstractServer`: ``version``, ``given``,
    ``accepted``, ``dropped``, ``staleness``; and ``centre``, in float32 at least.

    A subclass names a hyper-parameter ``every``: local steps from one exchange to the next.
    """

    needs_anchor: ClassVar[bool] = False  # whether workers measure how far they have gone from where they began

    @property
    @abstractmethod
    def steps_between(self) -> int:
        """The local steps from one exchange to the next, of a worker as fast as any."""

    def check(self, workers: int | None) -> None:
        """Refuse hyper-parameters that cannot work.

        Args:
            workers: the number of those that train; ``None`` if that is not known yet.

        Raises:
            ConfigurationError: if they cannot.
        """

    def __post_init__(self) -> None:
        self.check_calls()
        require_count(type(self).__name__, "every", self.steps_between)
        self.check(None)

    def resolved(self, world_size: int) -> Self:
        trainers = self.trainers(world_size)
        resolved = self.for_trainers(trainers)
        resolved.check(trainers)
        return resolved

    def for_trainers(self, trainers: int) -> Self:
        """Fill in what depends on how many workers train; nothing by default."""
        return self

    def trainers(self, world_size: int) -> int:
        """Tell how many workers make local steps."""
        return trainers_at(type(self).__name__, self.server, world_size)

    def trains(self, rank: int) -> bool:
        return rank != SERVER or self.server == "beside"

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (SERVER,)

    def peers(self, rank: int) -> tuple[int, ...]:
        return () if rank == SERVER else (SERVER,)

    def period(self, world_size: int) -> int:
        return self.steps_between

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, self.steps_between)  # each takes the one model

    def init(self, worker: Worker) -> None:
        state = worker.state
        state.update(steps=0, due=self.steps_between, shown=worker.x.clone())
        if self.needs_anchor:
            state["anchor"] = worker.x.clone()
        self.init_calls(worker, [worker.x])
        if worker.rank == SERVER:
            nothing = {rank: 0 for rank in range(worker.world_size) if self.trains(rank)}
            state.update(version=0, given=dict(nothing), staleness={})
            state.update(accepted=dict(nothing), dropped=dict(nothing))
            self.init_centre(worker)

    def init_centre(self, worker: Worker) -> None:
        """Let the server have a model of its own, besides the one that it trains."""
        worker.state["centre"] = worker.x.zeros_like().copy_(worker.x)
        if self.trains(SERVER):
            worker.state["aside"] = worker.x.clone()

    def check_opened(self) -> None:
        """Refuse what a loss makes wrong where workers come and go."""
        if self.compressors or self.server != "beside":
            raise ConfigurationError(
                f"OpenStrategy got {self!r}, whose server remembers something of each worker, or does not train; it "
                "needs one without. Leave out compressors and server='dedicated', or use AsyncStrategy."
            )

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell how many messages of whom were used, how stale they were, and the server's version."""
        names = ("version", "accepted", "dropped", "staleness")
        return {name: worker.state[name] for name in names} if worker.rank == SERVER else {}

    async def serve(self, worker: Worker) -> None:
        """Make a step of a server that does not train: wait for what comes."""
        state, version = worker.state, worker.state["version"]
        self.go_on(worker)
        await Until(lambda: state["version"] > version)

    # -- between steps ------------------------------------------------------------------------------------------------

    async def rest(self, worker: Worker) -> None:
        """Let the server show the centre."""
        state = worker.state
        if "shown" in state:
            return
        self.show_centre(worker)
        state["shown"] = worker.x.clone()

    def show_centre(self, worker: Worker) -> None:
        """Let the server's ``x`` be the centre, and keep the model that it trains."""
        if worker.rank != SERVER:
            return
        if self.trains(SERVER):
            worker.state["aside"] = worker.x.clone()
        worker.x.copy_(worker.state["centre"])

    def go_on(self, worker: Worker) -> None:
        """Begin a step. After a rest the server goes on with the model that it trains, and what was changed counts."""
        if self.leave_rest(worker) and worker.snapshot is not worker.x:
            worker.snapshot.copy_(worker.x)

    def leave_rest(self, worker: Worker) -> bool:
        """Let the server's model be the one that it trains; tell whether it had rested."""
        state = worker.state
        if "shown" not in state:
            return False
        shown: AbstractVector = state.pop("shown")
        for name in ("anchor", "centre", "aside"):
            if name in state:
                state[name].add_difference_(worker.x, shown, 1.0)
        if "aside" in state:
            worker.x.copy_(state.pop("aside"))
        return True

    def note(self, worker: Worker, source: int) -> int:
        """Count what a worker has sent; tell how stale it is."""
        state = worker.state
        staleness: int = state["version"] - state["given"][source]
        state["accepted"][source] += 1
        state["staleness"][staleness] = state["staleness"].get(staleness, 0) + 1
        return staleness


@dataclass(frozen=True, repr=False)
class AbstractBufferedUpdates(AbstractCentre):
    """Workers send how far their local steps have taken them, and go on from the centre.

    Of worker ``i``, with its own optimizer; ``H_i`` is ``every``, or by its speed::

        b_i, x_i <- centre                               # the answer to its last message
        x_i      <- H_i local steps
        send d_i = x_i - b_i

    What is evaluated and saved in the middle of rounds is the centre with, besides, the mean of what workers have made
    since their last messages and what waits in a buffer: ``centre + (1/n) sum_i (x_i - b_i)``.

    **Compression.** With a ``compressor`` worker ``i`` sends ``c_i = C(e_i + d_i)``, and remembers what that leaves
    out: ``e_i <- e_i + d_i - c_i``. With a ``model_compressor`` the server answers ``C(centre - w_i)``: the largest
    part of what worker ``i`` has not been told yet. Both add it to ``w_i``, from which the worker goes on. What is
    evaluated has the mean of all ``e_i``, too. Worker 0's own messages do not travel, and are whole.

    **By speed** (DyLU): ``H_i`` is ``every`` times the local steps that worker ``i`` has made so far over those of the
    fastest, at least 1. So all come about equally often, and a slow worker's message is not staler than another's.
    """

    needs_anchor: ClassVar[bool] = True

    @property
    @abstractmethod
    def adapts(self) -> bool:
        """Whether slow workers make fewer local steps."""

    @property
    def has_outer_gradient(self) -> bool:
        return True

    @abstractmethod
    def weight(self, staleness: int) -> float:
        """Tell what a difference of this staleness counts, without what a momentum makes of it later."""

    @abstractmethod
    def receive(self, worker: Worker, difference: AbstractVector, staleness: int) -> None:
        """Let the centre have what a worker has sent; count its versions.

        Args:
            worker: the server.
            difference: it; may be changed.
            staleness: of it, in versions.
        """

    def init(self, worker: Worker) -> None:
        super().init(worker)
        if self.compressor is not None and self.peers(worker.rank):
            worker.state["left out"] = worker.x.zeros_like()
        if self.model_compressor is not None and self.peers(worker.rank):
            worker.state["known"] = worker.x.clone()
        if self.model_compressor is not None:
            worker.state.update({f"known: {rank}": worker.x.clone() for rank in self.callers(worker)})
        if worker.rank == SERVER:
            worker.state["made"] = dict.fromkeys(worker.state["given"], 0)
            worker.state["dues"] = dict.fromkeys(worker.state["given"], self.steps_between)

    def messages(self, worker: Worker) -> dict[str, AbstractVector]:
        forms = {} if self.compressor is None else {"a difference": message_like(self.compressor, worker.x)}
        if self.adapts or self.model_compressor is not None:
            forms["a model, and perhaps how many local steps"] = self._answer_like(worker)
        return forms

    def _answer_like(self, worker: Worker) -> AbstractVector:
        """Return a vector of the form of an answer."""
        compressor = self.model_compressor
        model = worker.x if compressor is None else message_like(compressor, worker.x)
        return model.beside(worker.x.new_numbers(0.0)) if self.adapts else model

    async def step(self, worker: Worker) -> None:
        if not self.trains(worker.rank):
            await self.serve(worker)
            return
        state = worker.state
        self.go_on(worker)
        await Gradient()
        await LocalStep()
        state["steps"] += 1
        if state["steps"] < state["due"]:
            return
        # Where user code changes weights in the middle of steps, the last of them is in `x` when the next one begins:
        # it is made from the new model then, and sent with the next round.
        anchor: AbstractVector = state["anchor"]
        anchor.mul_(-1.0).add_(worker.x)
        if worker.rank == SERVER:
            state["due"] = self._received(worker, SERVER, anchor)
            model = state["centre"]
        else:
            model = await self._exchanged(worker, anchor)
        state["steps"] = 0
        worker.x.copy_(model)
        anchor.copy_(worker.x)

    async def _exchanged(self, worker: Worker, difference: AbstractVector) -> AbstractVector:
        """Send the server a difference; give the model with which the next round begins."""
        state, number, sent = worker.state, self.next_call(worker), difference
        if self.compressor is not None:
            sent = with_rest(self.compressor, state["left out"], difference, worker, number)
        model, state["due"] = self.told(worker, await Call(SERVER, sent))
        if self.model_compressor is None:
            return model
        known: AbstractVector = state["known"]  # not `x`, which user code may change
        add_decoded_(known, self.model_compressor, model, 1.0, number)
        return known

    def told(self, worker: Worker, answer: AbstractVector) -> tuple[AbstractVector, int]:
        """Return the model, or its message, of an answer, and how many local steps the next round has."""
        if not self.adapts:
            return answer, self.steps_between
        like = worker.x if self.model_compressor is None else message_like(self.model_compressor, worker.x)
        model, due = answer.apart(like, worker.x.new_numbers(0.0))
        return model, int(due.numbers()[0])

    def answer_of(self, worker: Worker, due: int) -> AbstractVector:
        """Return the centre, with how many local steps follow where that is told."""
        return self._with_due(worker, self._centre(worker), due)

    def _centre(self, worker: Worker) -> AbstractVector:
        """Return the centre in the types of workers' models."""
        centre: AbstractVector = worker.state["centre"]
        return centre if same_types(centre, worker.x) else worker.x.clone().copy_(centre)

    def _with_due(self, worker: Worker, model: AbstractVector, due: int) -> AbstractVector:
        return model.beside(worker.x.new_numbers(float(due))) if self.adapts else model

    def show_centre(self, worker: Worker) -> None:
        super().show_centre(worker)
        if "buffered" in worker.state:
            worker.x.add_(worker.state["buffered"])

    def opened(self) -> AbstractAsynchronousAlgorithm:
        self.check_opened()
        return OpenCentre(self)

    async def rest(self, worker: Worker) -> None:
        """Let the server show the centre with what all workers have made since their last messages, on average.

        Training goes on from the centre alone.
        """
        state = worker.state
        self.leave_rest(worker)  # the snapshot is what user code sees, and stays
        progress = worker.x.clone().add_(state["anchor"], alpha=-1.0)
        if "left out" in state:
            progress.add_(state["left out"])
        await AllReduce(progress, weight=float(self.trains(worker.rank)))
        self.show_centre(worker)
        if worker.rank == SERVER:
            worker.x.add_(progress)
        state["shown"] = worker.x.clone()

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        number = self.next_answer(worker, source)
        if self.compressor is not None:
            theirs = decoded(worker.x, self.compressor, theirs, number)
        due = self._received(worker, source, theirs)
        if self.model_compressor is None:
            return self.answer_of(worker, due)
        known = worker.state[f"known: {source}"]
        return self._with_due(worker, news(self.model_compressor, known, self._centre(worker), worker, number), due)

    def _received(self, worker: Worker, source: int, difference: AbstractVector) -> int:
        """Take what a worker has sent; tell how many local steps it makes next."""
        state = worker.state
        self.receive(worker, difference, self.note(worker, source))
        state["given"][source] = state["version"]
        made: dict[int, int] = state["made"]
        made[source] += state["dues"][source]
        if self.adapts:
            state["dues"][source] = max(1, self.steps_between * made[source] // max(made.values()))
        due: int = state["dues"][source]
        return due
