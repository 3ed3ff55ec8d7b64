"""One-way messages: a worker sends what another one takes when it asks for it, in the order of sending.

A message is a header and its bytes, on the connections that exchanges have. gloo moves it when its receiver asks for
it; until then it lies with its sender, in a copy, so that whoever sends does not wait. A lane of its own waits for it
to leave.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
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


class Mail:
    """Answers `Send` and `Receive`. What is here runs on the communicator's lane, but for `unread` and `close`.

    Args:
        connections: to the other workers.
    """

    def __init__(self, connections: AbstractConnections) -> None:
        self._links = connections
        self._leaving: Lane | None = None
        self._sent: dict[Future[Any], tuple[int, int]] = {}  # to whom, with which tag, what has not left yet

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

    def receive(self, request: Receive, check: Callable[[Vector], None]) -> Vector:
        """Wait for a message.

        Args:
            request: whose, and what it is like.
            check: refuses what is not like that; called before any bytes are taken.
        """
        links, like, source, tag = self._links, request.like, request.source, request.tag
        assert isinstance(like, Vector)
        self._require_gloo()
        group, (heads, bodies) = links.groups[source < links.rank], _tags(tag)
        header = empty_header()
        with links.failures((source,)):
            group.recv([header], source, heads).wait(links.timeout)
        if not is_of(header, like, tag):
            check(described(header, 1))
            raise ConfigurationError(
                f"A message of worker {source} got the tag {int(header[0])} and {int(header[1])} tensors in the "
                f"mailbox of tag {tag}; it needs the form and the tag that are received. Use smaller tags."
            )
        received = links.leases.new(like)
        on_cpu = received
        if links.device.type != "cpu":
            on_cpu = Vector(torch.empty_like(buffer, device="cpu") for buffer in like.buffers)
        with links.failures((source,)):
            works = [group.recv([buffer.view(torch.uint8)], source, bodies) for buffer in on_cpu.buffers]
            for work in works:
                work.wait(links.timeout)
        return received if on_cpu is received else received.copy_(on_cpu)

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
