"""Calls among virtual workers: the way there, the answer, and the way back."""

from __future__ import annotations

from typing import Any

from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Call, answered_at_once
from lightning_decentral.simulation.links import Links
from lightning_decentral.simulation.scheduler import Scheduler
from lightning_decentral.simulation.tasks import WAIT, CallUnderWay, Fleet, Task


class Calls:
    """Answers `Call`, and carries the answers that come later."""

    def __init__(self, fleet: Fleet, links: Links, scheduler: Scheduler) -> None:
        self._fleet = fleet
        self._clock = fleet.clock
        self._cluster = fleet.cluster
        self._links = links
        self._scheduler = scheduler
        scheduler.on_answer = self._reply

    def call(self, task: Task, request: Call) -> Any:
        """Answer a `Call`."""
        rank, peer = task.worker.rank, request.peer
        self._fleet.check_alive(peer, rank)
        algorithm = self._fleet.algorithm
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        call = CallUnderWay(task, request, algorithm.answers_in_parts)
        leaves = self._clock.seconds + self._cluster.call_wait_seconds(rank, peer)
        self._clock.at(leaves, self._send, call, request.value.clone())
        return WAIT

    def _send(self, call: CallUnderWay, value: AbstractVector) -> None:
        source, peer = call.task.worker.rank, call.peer
        if source in self._fleet.dead:
            return
        self._fleet.check_alive(peer, source)
        transmit, num_bytes = self._links.transmit, value.num_bytes
        if call.in_parts:  # its answer sets out when the first part is there
            paced = self._cluster.call_paced_seconds(num_bytes, source, peer)
            transmit(source, peer, num_bytes, self._answer, call, value, paced, self._begin_reply)
        else:
            transmit(source, peer, num_bytes, self._answer, call, value)

    def _answer(self, call: CallUnderWay, theirs: AbstractVector) -> None:
        """Learn that all of a call is there."""
        source, peer = call.task.worker.rank, call.peer
        self._fleet.check_alive(peer, source)
        algorithm, worker = self._fleet.algorithm, self._fleet.workers[peer]
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        call.theirs = theirs
        if call.in_parts:
            self._reply(call, answered_at_once(algorithm, worker, source, theirs))
            self._scheduler.look_again(peer)
        else:
            self._scheduler.advance(Task(worker, algorithm.on_call(worker, source, theirs), "answer", call), None)

    def _reply(self, call: CallUnderWay, answer: AbstractVector) -> None:
        """Learn that an ``on_call`` has returned."""
        source, peer = call.task.worker.rank, call.peer
        if answer is not call.theirs:
            self._fleet.conduct[peer].check_answer(source, answer)
            answer = answer.clone()  # as it is now
        call.reply = answer
        self._fleet.workers[peer].version += 1
        self._fleet.traffic[peer].calls_answered += 1
        if not call.in_parts:
            self._links.transmit(peer, source, answer.num_bytes, self._called, call, None)
        else:  # the answer to the last part is on its way back, if not held up by a slower link
            latency = self._cluster.message_latency_seconds(peer, source)
            self._clock.at(self._clock.seconds + latency, self._called, call, None)

    def _begin_reply(self, call: CallUnderWay, num_bytes: int) -> None:
        source, peer = call.task.worker.rank, call.peer
        self._fleet.check_alive(peer, source)
        paced = self._cluster.call_paced_seconds(num_bytes, peer, source)
        self._links.transmit(peer, source, num_bytes, self._called, call, None, paced)

    def _called(self, call: CallUnderWay, _: None) -> None:
        """Learn that the answer has come back; in parts: when the last byte has, and when the last part could have."""
        call.missing -= 1
        if call.missing:
            return
        self._fleet.traffic[call.task.worker.rank].exchanges += 1
        if call.then is not None and call.reply is not None:
            call.then(call.task.worker, call.reply)
            call.reply = None
        self._fleet.resume(call.task, call.reply)
