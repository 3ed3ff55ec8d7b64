"""Messages between the workers of one host, through memory that they share.

A worker writes what it sends into memory of its own, once however many receive it, and those read it there: a message
costs one copy of the model instead of the four that go through TCP on the loopback interface, and nothing is received.
Who is told what, and that memory has been read, goes through a socket between each two workers, which also tells when
the other one is gone. The memory has two halves, written in turn, so that nobody waits for a reader who is one message
behind. Parameters can lie there themselves: they are read where they are, and their average with others is written to
the other half, where they are from then on. The memory belongs to no file system and ends with the processes, however
they end.

Linux only. Workers that are in different network namespaces or containers are different hosts here.
"""

from __future__ import annotations

import itertools
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lightning_decentral.flat import Vector

# Here is my memory, as a file descriptor; a half is full; I have read a half; here is memory that I lend; two numbers.
_MEMORY, _FULL, _READ, _LENT, _TOLD = range(5)
_MESSAGE = struct.Struct("=qqq")  # what; the model; the size, or twice the number of the memory plus which half
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(4)  # bytes of a file descriptor beside a message
_ALIGNMENT = 64  # bytes: a cache line, and what vector instructions want
_MEETING_SECONDS = 10.0


@dataclass(frozen=True)
class Address:
    """Where a worker can be met.

    Attributes:
        host: workers with the same one have one kernel and one network; empty where memory cannot be shared.
        name: of the socket on which it listens, in the kernel's own name space.
        secret: that a worker of the same run knows.
    """

    host: str
    name: str
    secret: bytes


@dataclass
class _Sent:
    """The memory in which one model is sent, or lies."""

    halves: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # as vectors have them
    descriptor: int
    half: int  # bytes
    number: int  # a larger model has a new memory, while what was in the old one may not have been read yet
    next: int = 0
    told: set[int] = field(default_factory=set)
    readers: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))


@dataclass
class _Received:
    """Another worker's memory in which a model is sent."""

    memory: Tensor
    halves: dict[int, list[Tensor]] = field(default_factory=dict)  # as vectors have them, once they were asked for

    def half(self, number: int, like: Vector) -> Vector:
        """Return what is in one of the two halves."""
        if number not in self.halves:
            self.halves[number] = views_of(self.memory, number * (self.memory.numel() // 2), like)
        return Vector(self.halves[number])


class SharedMemory:
    """One worker's memory and its connections to the other workers of its host.

    Args:
        rank: this worker.
        timeout_seconds: for another worker to write, or to read.

    Attributes:
        peers: with whom messages can be exchanged: nobody before `listen`, `connect` and `accept` are done.
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self.rank = rank
        self.peers: frozenset[int] = frozenset()
        self._timeout_seconds = timeout_seconds
        self._connected: list[set[int]] = []  # of each worker: those of lower rank to which it has connected
        self._sockets: dict[int, socket.socket] = {}
        self._polls: dict[int, select.poll] = {}  # of each worker: tells whether it has told something
        self._sent: dict[int, _Sent] = {}
        self._received: dict[tuple[int, int], _Received] = {}  # of a worker, for a model
        self._borrowed: dict[tuple[int, int], Tensor] = {}
        self._full: dict[tuple[int, int], deque[tuple[_Received, int]]] = {}  # memory, and which half of which
        self._reading: dict[int, list[tuple[int, int]]] = {}  # of a model: whose half is read now
        self._told: dict[int, deque[tuple[int, int]]] = {}  # numbers of a worker that nobody has asked for yet
        self._listener: socket.socket | None = None
        self._address = Address("", "", b"")

    def listen(self) -> Address:
        """Wait for others from now on; returns where, for all workers to know."""
        if sys.platform == "linux":
            name = f"lightning-decentral-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener.bind(f"\0{name}")
            self._listener.listen(4096)
            self._address = Address(host_name(), name, secrets.token_bytes(16))
        return self._address

    def connect(self, addresses: list[Address]) -> set[int]:
        """Connect to the workers of lower rank on this host, of all these; returns to which it was possible."""
        for rank, address in enumerate(addresses[: self.rank]):
            if not address.host or address.host != self._address.host:
                continue
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(_MEETING_SECONDS)
            try:
                connection.connect(f"\0{address.name}")
                connection.send(address.secret + self.rank.to_bytes(4, "big"))
            except OSError:  # something on this host forbids it: TCP is there
                connection.close()
            else:
                self._sockets[rank] = connection
        return set(self._sockets)

    def accept(self, connected: list[set[int]]) -> None:
        """Accept the workers of higher rank; ``connected`` is what `connect` returned on each worker."""
        self._connected = connected
        expected = {rank for rank, others in enumerate(connected) if self.rank in others}
        deadline = time.monotonic() + _MEETING_SECONDS
        while expected and self._listener is not None:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            connection, _ = self._listener.accept()
            connection.settimeout(_MEETING_SECONDS)
            hello = connection.recv(64)
            rank = int.from_bytes(hello[16:], "big")
            if secrets.compare_digest(hello[:16], self._address.secret) and rank in expected:
                self._sockets[rank] = connection
                expected.discard(rank)
            else:  # the name of a socket can be read by everybody on the host
                connection.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for rank, connection in self._sockets.items():
            connection.settimeout(self._timeout_seconds)
            self._polls[rank] = select.poll()
            self._polls[rank].register(connection, select.POLLIN)
        self.peers = frozenset(self._sockets)

    def send(self, value: Vector, model: int, targets: Iterable[int], stays: bool = False) -> None:
        """Let workers read ``value``.

        Args:
            value: may change afterwards, unless it ``stays``.
            model: its number.
            targets: who reads it.
            stays: whether ``value`` does not change before it is exchanged for a `room`, and is the only one sent under
                this number. It is not copied then if it lies in this memory.

        Raises:
            OSError: if one that has to read an earlier message is gone, or does not do so in time.
        """
        sent = self._sent.get(model)
        if sent is None or _layout(sent.halves[0]) != _layout(value.buffers):
            if sent is not None:
                os.close(sent.descriptor)
            sent = self._sent[model] = _new_memory(value, 0 if sent is None else sent.number + 1)
        lies_in = [half for half in (0, 1) if stays and value.buffers is sent.halves[half]]
        half = lies_in[0] if lies_in else sent.next
        self._until_read(sent, half)
        if not lies_in:
            Vector(sent.halves[half]).copy_(value)
        for target in targets:
            if target not in sent.told:
                message = _MESSAGE.pack(_MEMORY, model, sent.half)
                socket.send_fds(self._sockets[target], [message], [sent.descriptor])
                sent.told.add(target)
            sent.readers[half].add(target)
            self._send_message(target, _FULL, model, 2 * sent.number + half)
        sent.next = 1 - half

    def room(self, model: int) -> Vector:
        """Return the half that does not have what was sent last; whoever has to read there has done so.

        Raises:
            OSError: as `send` does.
        """
        sent = self._sent[model]
        self._until_read(sent, sent.next)
        return Vector(sent.halves[sent.next])

    def receive(self, source: int, model: int, like: Vector) -> Vector:
        """Return what a worker sent, in its own memory: not to be changed, and valid until `done`.

        Raises:
            OSError: if the worker is gone, or sends nothing in time.
        """
        full = self._full.setdefault((source, model), deque())
        while not full:
            self._read_message(source)
        received, half = full.popleft()
        self._reading.setdefault(model, []).append((source, half))
        return received.half(half % 2, like)

    def is_free(self, model: int, seconds: float) -> bool:
        """Tell whether what lies where the next message or the `room` is to be has been read.

        Args:
            model: its number.
            seconds: for how long to wait for each reader.

        Raises:
            OSError: if one of them is gone.
        """
        sent = self._sent.get(model)
        readers = () if sent is None else sent.readers[sent.next]
        while readers:
            if not self._listens(next(iter(readers)), seconds):
                return False
        return True

    def has_come(self, sources: Iterable[int], model: int, seconds: float) -> bool:
        """Tell whether there is something to `receive` from each of some workers.

        Args:
            sources: these.
            model: its number.
            seconds: for how long to wait for each.

        Raises:
            OSError: if one of them is gone.
        """
        for source in sources:
            while not self._full.get((source, model)):
                if not self._listens(source, seconds):
                    return False
        return True

    def done(self, model: int) -> None:
        """Note that what was received for a model has been used; a thread may wait for another model meanwhile."""
        for source, half in self._reading.pop(model, []):
            with suppress(OSError):  # it is gone: the next exchange, or whatever comes next, says who and why
                self._send_message(source, _READ, model, half)

    def lend(self, number: int, num_bytes: int, prepare: Callable[[Tensor], None]) -> Tensor:
        """Memory of this worker's own that all others map: bytes, all zero.

        Args:
            number: for `borrow`.
            num_bytes: of them.
            prepare: is given the memory before the others are.

        Raises:
            OSError: if there is no memory left, or another worker is gone.
        """
        descriptor, memory = _new_bytes(num_bytes)
        try:
            prepare(memory)
            for connection in self._sockets.values():
                socket.send_fds(connection, [_MESSAGE.pack(_LENT, number, num_bytes)], [descriptor])
        finally:
            os.close(descriptor)
        return memory

    def borrow(self, source: int, number: int) -> Tensor:
        """Return the memory that a worker has lent under this number.

        Raises:
            OSError: if the worker is gone, or lends nothing in time.
        """
        while (source, number) not in self._borrowed:
            self._read_message(source)
        return self._borrowed.pop((source, number))

    def connects(self, members: Iterable[int]) -> bool:
        """Tell whether each two of these workers, this one and others, share memory: all of them answer alike."""
        pairs = list(itertools.combinations(sorted(members), 2))
        return bool(self.peers and pairs) and all(low in self._connected[high] for low, high in pairs)

    def tell(self, target: int, *numbers: int) -> None:
        """Send a worker two whole numbers.

        Raises:
            OSError: if it is gone.
        """
        self._send_message(target, _TOLD, *numbers)

    def hear(self, source: int) -> tuple[int, int]:
        """Return the next two numbers that a worker tells, in the order in which it does.

        Raises:
            OSError: if the worker is gone, or tells nothing in time.
        """
        told = self._told.setdefault(source, deque())
        while not told:
            self._read_message(source)
        return told.popleft()

    def interrupt(self) -> None:
        """Let a thread that waits for a message get an error, now and from now on."""
        for connection in self._sockets.values():
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other end is gone
                continue

    def close(self) -> None:
        """End the connections; no thread may be waiting. What others still read stays until they let go of it."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in self._sockets.values():
            connection.close()
        self._sockets.clear()
        self._polls.clear()
        for sent in self._sent.values():
            os.close(sent.descriptor)
        self._sent.clear()
        self._received.clear()
        self.peers = frozenset()

    def _until_read(self, sent: _Sent, half: int) -> None:
        while sent.readers[half]:
            self._read_message(next(iter(sent.readers[half])))

    def _listens(self, source: int, seconds: float) -> bool:
        """Take note of a message if one comes within so many seconds; returns whether one has."""
        come = bool(self._polls[source].poll(1000 * seconds))
        if come:
            self._read_message(source)
        return come

    def _send_message(self, target: int, what: int, model: int, value: int) -> None:
        self._sockets[target].send(_MESSAGE.pack(what, model, value))

    def _read_message(self, source: int) -> None:
        """Wait for a message, and take note of it."""
        message, ancillary, _, _ = self._sockets[source].recvmsg(_MESSAGE.size, _DESCRIPTOR_SPACE)
        if not message:
            raise ConnectionError(f"Worker {source} closed its connection for shared memory.")
        what, model, value = _MESSAGE.unpack(message)
        if ancillary:
            descriptor = int.from_bytes(ancillary[0][2], sys.byteorder)
            if what == _LENT:
                self._borrowed[source, model] = _mapped(descriptor, value)
            else:
                self._received[source, model] = _Received(_mapped(descriptor, 2 * value))
            os.close(descriptor)
        elif what == _TOLD:
            self._told.setdefault(source, deque()).append((model, value))
        elif what == _FULL:
            self._full.setdefault((source, model), deque()).append((self._received[source, model], value))
        elif value // 2 == self._sent[model].number:
            self._sent[model].readers[value % 2].discard(source)


def host_name() -> str:
    """Return the running kernel and the network namespace: what two workers must have in common to meet."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    except OSError:  # no /proc: nothing is known
        return ""


def _sizes(value: Vector) -> list[int]:
    """Bytes that each buffer of a vector takes, up to where the next one begins."""
    return [-(-b.numel() * b.element_size() // _ALIGNMENT) * _ALIGNMENT for b in value.buffers]


def _layout(buffers: Iterable[Tensor]) -> list[tuple[torch.dtype, int]]:
    return [(buffer.dtype, buffer.numel()) for buffer in buffers]


def num_bytes_of(value: Vector) -> int:
    """Bytes that a vector takes in shared memory."""
    return sum(_sizes(value))


def views_of(memory: Tensor, start: int, like: Vector) -> list[Tensor]:
    """Tensors like the buffers of a vector, one after the other in memory."""
    views = []
    for buffer, size in zip(like.buffers, _sizes(like), strict=True):
        # Of `data`, so that each view counts its own changes: what is written to one half does not change the other.
        views.append(memory[start : start + buffer.numel() * buffer.element_size()].view(buffer.dtype).data)
        start += size
    return views


def _new_memory(like: Vector, number: int) -> _Sent:
    half = num_bytes_of(like)
    descriptor, memory = _new_bytes(2 * half)
    halves = tuple(views_of(memory, 0, like)), tuple(views_of(memory, half, like))
    return _Sent(halves, descriptor, half, number)


def _new_bytes(size: int) -> tuple[int, Tensor]:
    descriptor = os.memfd_create("lightning-decentral", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, max(1, size))  # an error here, and not a signal when it is written
        return descriptor, _mapped(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise


def _mapped(descriptor: int, size: int) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # every page now, and not during a step
    return torch.frombuffer(mmap.mmap(descriptor, size, flags=flags), dtype=torch.uint8)
