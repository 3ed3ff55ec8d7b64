"""Calls: of workers of this host in memory that both share, of the others over connections of their own."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_decentral.errors import PeerLost
from lightning_decentral.flat import Vector
from lightning_decentral.membership import Members
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Call
from lightning_decentral.transport.answers import AbstractCallee, AnswerFailed, AnswerInParts, AnswerWhole, as_bytes
from lightning_decentral.transport.connections import FAILED_SECONDS, AbstractConnections
from lightning_decentral.transport.edges import AbstractAnswer, Edges, Header
from lightning_decentral.transport.exchanges import unstage
from lightning_decentral.transport.membership import Membership
from lightning_decentral.transport.open_edges import OpenEdges
from lightning_decentral.transport.sending import Sending
from lightning_decentral.transport.shared_calls import SharedCalls
from lightning_decentral.transport.standstill import Standstill


class Calls:
    """Answers `Call`, and lets others call this worker.

    Args:
        connections: to the other workers.
        standstill: knows for whom this worker waits.
    """

    def __init__(self, connections: AbstractConnections, standstill: Standstill) -> None:
        self._links = connections
        self._standstill = standstill
        self._in_parts = False
        self._numbers = itertools.count(1)  # of this worker's calls
        self._since: dict[int, float] = {}  # by the number of a call: of waiting for its answer, that may come later
        self._stage = connections.device.type == "cuda"  # the edges are gloo's, whatever the back end
        self._edges: Edges | OpenEdges | None = None
        self._shared: SharedCalls | None = None
        self._part_buffers: dict[int, list[Tensor]] = {}
        self._callees: dict[int, AbstractCallee] = {}  # by the number of the model
        # Held while a call is received and answered at once. On an accelerator there is one buffer for that.
        self.serving: threading.Lock | threading.Semaphore = threading.Lock()
        self.sending = Sending()

    def count_answers(self) -> None:
        """Count the calls that were answered without this worker's doing anything."""
        if self._shared is not None:  # by which callers have answered themselves
            for num_bytes in self._shared.uncounted():
                self.count_answer(num_bytes)

    def lend(self, callee: AbstractCallee) -> None:
        """Answer calls with this model from now on, and let its parameters lie where calls need them.

        Between two steps, all workers together.
        """
        self._callees[callee.index] = callee
        if self._shared is not None:
            self.count_answers()  # of the model in whose place this one comes
            with self._links.failures(tuple(self._shared.peers)):
                callee.lend(self._shared)

    def reaches(self, peer: int) -> bool:
        """Tell whether this worker carries out a call itself, in memory that both share."""
        return self._shared is not None and peer in self._shared.peers

    def begin(self, request: Call) -> int:
        """Note that a call is about to be made; returns its number, for `call`."""
        number = next(self._numbers)
        self._since[number], self._standstill.calling[number] = time.monotonic(), request.peer
        return number

    def _end(self, number: int) -> None:
        """Note that a call is answered, or has come to nothing."""
        self._standstill.calling.pop(number, None)
        self._since.pop(number, None)

    def call(self, request: Call, callee: AbstractCallee, number: int | None = None) -> Vector | None:
        """Answer a `Call`; of a worker that is not there, in a run whose workers come and go, it comes to nothing.

        Args:
            request: the call.
            callee: the model that it is about, on this worker.
            number: that `begin` gave to a call beside which others are made; ``None``: this is the only one.

        Raises:
            PeerLost: if the worker is lost, and the call is one whose answer the algorithm needs.
        """
        try:
            return self._call(request, callee, number)
        except PeerLost:
            if not isinstance(self._edges, OpenEdges) or request.then is None:
                raise
            return None
        finally:
            if number is not None:
                self._end(number)

    def _call(self, request: Call, callee: AbstractCallee, number: int | None) -> Vector | None:
        value, index = request.value, callee.index
        assert isinstance(value, Vector)
        assert self._edges is not None
        calls = self._shared
        if calls is not None and request.peer in calls.peers:
            shared = self._links.leases.new(value) if request.then is None else None
            calls.call(request, index, callee.monitor, shared)
            self._links.count(value.num_bytes, 1, exchanges=1)
            return shared
        with self._links.failures((request.peer,)):
            place = None if number is None else request.peer
            outgoing = self._links.staged((index, "call", place), value, self._stage, copy=True)
            if self._in_parts:
                answer = self._links.leases.new(value)
                incoming = self._links.staged((index, "answer", "stage"), answer, self._stage)
                self._edges.call(request.peer, Header(index), as_bytes(outgoing), as_bytes(incoming))
            else:
                answer, incoming = self._ask(request, outgoing, callee, number)
            unstage({request.peer: incoming}, {request.peer: answer})
        self._links.count(value.num_bytes, 1, exchanges=1)
        model = callee.x.form  # beside which an answer may have numbers, if nobody needs it in the place of another
        own, whole = (each.form if request.then is None else each.form[: len(model)] for each in (value, answer))
        inspector = self._links.inspector if whole == own == model else None
        admitted = inspector is None or inspector.admits(answer, request.peer, index)
        if request.then is None and request.used_up and not admitted:
            with callee.monitor:  # this worker's own model, in the place of a model
                return self._links.leases.new(callee.x).copy_(callee.x)
        if request.then is None:
            return answer if admitted else answer.copy_(value)
        if not admitted:
            return None
        with callee.monitor:
            request.then(callee.worker, answer)
        return None

    def _ask(
        self, request: Call, outgoing: Vector, callee: AbstractCallee, number: int | None
    ) -> tuple[Vector, Vector]:
        """Return what the peer answers, at once or later, and where it was received."""
        assert self._edges is not None
        value = request.value
        assert isinstance(value, Vector)
        index, form = callee.index, [each.form for each in callee.forms].index(outgoing.form)
        received: list[Vector] = []

        own = self.begin(request) if number is None else number
        place = None if number is None else request.peer

        def room(form: int) -> list[Tensor]:
            self._end(own)
            in_its_place = request.used_up and callee.forms[form].form == outgoing.form
            answer = value if in_its_place else self._links.leases.new(callee.forms[form])
            received[:] = answer, self._links.staged((index, "answer", form, place), answer, self._stage)
            return as_bytes(received[1])

        try:
            self._edges.ask(request.peer, Header(index, form, own), as_bytes(outgoing), room)
        finally:
            self._end(own)
        return received[0], received[1]

    def silent(self) -> tuple[int, ...]:
        """List who shows no sign of life: of those that share memory, and of those that owe an answer."""
        silent = () if self._shared is None else self._shared.silent()
        watch, calling, latest = self._links.watch, self._standstill.calling.copy(), time.monotonic()
        latest -= self._links.timeout_seconds
        late = {peer for number, peer in calling.items() if self._since.get(number, latest) < latest}
        if watch is None or not late:
            return silent
        return (*silent, *(peer for peer in watch.standing_still() if peer in late))

    def open(self, algorithm: AbstractAsynchronousAlgorithm, callees: Sequence[AbstractCallee]) -> None:
        """Connect to those that this worker may call and that may call it. All workers together."""
        if self._links.world_size == 1:
            return
        called = algorithm.peers(self._links.rank)
        callers = [rank for rank in range(self._links.world_size) if self._links.rank in algorithm.peers(rank)]

        answer = self._answering(algorithm, callees)
        if algorithm.answers_in_parts and self._links.device.type == "cpu" and self._links.shared.peers:
            self._shared = SharedCalls(
                *(self._links.rank, self._links.world_size, self._links.shared, algorithm),
                *(self._links.timeout_seconds, self._links.failures, self._links.check),
            )
            self._shared.inspector = self._links.inspector
            for callee in callees:
                self.lend(callee)
            assert self._links.watch is not None
            self._links.watch.on_beat = self._shared.beat
        links = self._links
        links.silent = self.silent
        edges = (links.rank, called, callers, links.store, links.timeout_seconds, answer, self._edge_failed)
        self._edges = self._links.connecting(lambda: Edges(*edges))

    def open_to_members(
        self,
        algorithm: AbstractAsynchronousAlgorithm,
        callees: Sequence[AbstractCallee],
        membership: Membership,
        neighbors: Callable[[Members], Sequence[int]],
    ) -> OpenEdges:
        """Let this worker and those that take part call each other, from when its heartbeat has told the edges so.

        Args:
            algorithm: of all of them.
            callees: of this worker.
            membership: knows who takes part.
            neighbors: of this worker, among the members.
        """
        answer = self._answering(algorithm, callees)
        self._edges = OpenEdges(membership, self._links.timeout_seconds, answer, neighbors)
        return self._edges

    def _answering(
        self, algorithm: AbstractAsynchronousAlgorithm, callees: Sequence[AbstractCallee]
    ) -> Callable[[int, Header], AbstractAnswer]:
        self._in_parts = algorithm.answers_in_parts
        if not self._stage:  # the next one is received while one is answered; shards have less memory each
            self.serving = threading.Semaphore(algorithm.shards + 1)
        self._callees = {callee.index: callee for callee in callees}

        def answer(source: int, header: Header) -> AbstractAnswer:
            callee = self._callees[header.model]
            if self._links.stream is not None:
                torch.cuda.set_device(self._links.device)
                torch.cuda.set_stream(self._links.stream)
            if algorithm.answers_in_parts:
                return AnswerInParts(self, callee, source)
            return AnswerWhole(self, callee, source, header)

        return answer

    def _edge_failed(self, peer: int, error: Exception) -> None:
        assert self._links.watch is not None
        if self._links.watch.failure is None:
            own = isinstance(error, AnswerFailed)
            self._links.watch.publish(error.reason if own else self._links.watch.diagnose(error, (peer,)))

    def close(self, failed: bool) -> None:
        """Take leave of everybody who may call or be called; or break all connections, if the run has failed."""
        if self._edges is not None:
            self._edges.close(FAILED_SECONDS if failed else self._links.timeout_seconds, failed)
            self._edges = None

    def forget(self) -> None:
        """Let go of all memory, once nobody is connected any more."""
        self._shared = None
        self._links.silent = tuple
        self._part_buffers.clear()

    # -- what answers need --------------------------------------------------------------------------------------------

    @property
    def stages(self) -> bool:
        """Whether answers are copied to where the transport can read them, in a buffer that all share."""
        return self._stage

    def serving_buffers(self, callee: AbstractCallee, form: int) -> tuple[Vector, Vector]:
        """Return where a call of this form is received: on the device, and where the transport writes it."""
        own = self._links.leases.new(callee.forms[form])
        return own, self._links.staged((callee.index, "serve", form), own, self._stage)

    def staged_answer(self, callee: AbstractCallee, reply: Vector) -> Vector:
        """Put an answer where the transport can read it."""  # a copy to the CPU waits for the stream
        return self._links.staged((callee.index, "reply", reply.form), reply, self._stage, copy=True)

    def part_buffers(self, source: int, count: int, num_bytes: int) -> list[Tensor]:
        """Return some buffers for the parts of a caller's calls, of at least so many bytes each."""
        kept = self._part_buffers.setdefault(source, [])
        if len(kept) < count or kept[0].numel() < num_bytes:
            pin = self._stage
            kept[:] = [torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin) for _ in range(count)]
        return kept[:count]

    def count_answer(self, num_bytes: int) -> None:
        """Count a call that was answered with so many bytes."""
        self._links.count(num_bytes, 1, calls_answered=1)
