"""One-way messages: a worker sends what another one takes when it asks for it, in the order of sending.

A message is a header and its bytes, on the connections that exchanges have. gloo moves it when its receiver asks for
it, a way there and back for each of both; until then it lies with its sender, in a copy, so that whoever sends does not
wait. A lane of its own waits for it to leave. What is received before something else is asked for together with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import Receive, Send
from lightning_decentral.transport.connections import FAILED_SECONDS, AbstractConnections
from lightning_decentral.transport.headers import described, empty_header, header_of, is_of
from lightning_decentral.transport.lanes import Lane

_FIRST_TAG, _TAGS = 1 << 29, 1 << 27  # of the connections: two for each mailbox, for headers and bytes
_FOREVER = timedelta(days=365)  # until a message is asked for; a receiver that dies closes its connection


@dataclass(frozen=True)
class _Coming:
    """A message whose header has been checked."""

    value: Vector
    on_cpu: Vector
    works: list[Any]


class Mail:
    """Answers `Send` and `Receive`. What is here runs on the communicator's lane, but for `unread` and `close`.

    Args:
        connections: to the other workers.
    """

    def __init__(self, connections: AbstractConnections) -> None:
        self._links = connections
        self._leaving: Lane | None = None
        self._sent: dict[Future[Any], tuple[int, int]] = {}  # to whom, with which tag, what has not left yet
        self._coming: dict[tuple[int, int], _Coming] = {}  # asked for already; by source and tag

    def send(self, request: Send) -> None:
        """Send a copy; returns at once."""
        links, value, to, tag = self._links, request.value, request.to, request.tag
        assert isinstance(value, Vector)
        self._require_gloo()
        if links.device.type == "cpu":
            copy = links.leases.new(value).copy_(value)
        else:
            copy = Vector(buffer.cpu() for buffer in value.buffers)
        group, (heads, bodies) = links.groups[links.rank < to], _tags(tag)
        with links.failures((to,)):
            works = [group.send([header_of(value, tag)], to, heads)]
            works += [group.send([buffer.view(torch.uint8)], to, bodies) for buffer in copy.buffers]
        if self._leaving is None:
            self._leaving = Lane(f"decentral-mail-{links.rank}")

        def leave() -> None:
            nonlocal copy
            with links.failures((to,)):
                for work in works:
                    work.wait(_FOREVER)
            del copy
            self._sent.pop(future, None)

        self._sent = {future: box for future, box in self._sent.items() if not future.done()}
        future = self._leaving.submit(leave)
        self._sent[future] = to, tag
        links.count(value.num_bytes, 1)

    def receive(self, request: Receive, check: Callable[[Receive, Vector], None]) -> Vector:
        """Wait for a message.

        Args:
            request: whose, and what it is like.
            check: refuses what is not like what a request says; called before any bytes are taken.
        """
        self._require_gloo()
        box = request.source, request.tag
        if box not in self._coming:
            self._ask_for((request, *request.before), check)
        coming, links = self._coming.pop(box), self._links
        with links.failures((request.source,)):
            for work in coming.works:
                work.wait(links.timeout)
        if coming.on_cpu is not coming.value:
            coming.value.copy_(coming.on_cpu)
        return coming.value

    def _ask_for(self, requests: Sequence[Receive], check: Callable[[Receive, Vector], None]) -> None:
        """Ask for messages of different mailboxes: for all of their headers, and then for all of their bytes."""
        links, headers = self._links, [empty_header() for _ in requests]
        sources = tuple(each.source for each in requests)
        with links.failures(sources):
            works = [
                links.groups[each.source < links.rank].recv([header], each.source, _tags(each.tag)[0])
                for each, header in zip(requests, headers, strict=True)
            ]
            for work in works:
                work.wait(links.timeout)
        for each, header in zip(requests, headers, strict=True):
            assert isinstance(each.like, Vector)
            if not is_of(header, each.like, each.tag):
                check(each, described(header, 1))
                raise ConfigurationError(
                    f"A message of worker {each.source} got the tag {int(header[0])} and {int(header[1])} tensors in "
                    f"the mailbox of tag {each.tag}; it needs the form and the tag that are received. Use smaller tags."
                )
        with links.failures(sources):
            for each in requests:
                assert isinstance(each.like, Vector)
                value = on_cpu = links.leases.new(each.like)
                if links.device.type != "cpu":
                    on_cpu = Vector(torch.empty_like(buffer, device="cpu") for buffer in value.buffers)
                group, bodies = links.groups[each.source < links.rank], _tags(each.tag)[1]
                works = [group.recv([buffer.view(torch.uint8)], each.source, bodies) for buffer in on_cpu.buffers]
                self._coming[each.source, each.tag] = _Coming(value, on_cpu, works)

    @property
    def has_unsent(self) -> bool:
        """Whether something was sent of which it is not known that it has been received."""
        return any(not future.done() for future in tuple(self._sent))

    def unread(self, seconds: float) -> tuple[int, int] | None:
        """Tell to whom, and with which tag, something was sent that has not been received; waits so long for that."""
        for future, box in tuple(self._sent.items()):
            try:
                future.result(timeout=seconds)
            except FutureTimeoutError:
                return box
        return None

    def close(self, failed: bool) -> None:
        """End the thread: once the connections are broken, or all was received."""
        if self._leaving is not None:
            self._leaving.close(FAILED_SECONDS if failed else self._links.timeout_seconds)
            self._leaving = None

    def _require_gloo(self) -> None:
        if self._links.native:
            raise ConfigurationError(
                "`Send` and `Receive` got workers that are connected by NCCL, and need gloo, which knows tags. Pass "
                'process_group_backend="gloo" to the strategy.'
            )


def _tags(tag: int) -> tuple[int, int]:
    first = _FIRST_TAG + 2 * (tag % _TAGS)
    return first, first + 1
