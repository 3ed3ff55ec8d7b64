"""Proved here: what one worker sends is what the others of its host read, whatever becomes of the value afterwards; a
sender is two messages ahead of its readers at most; who is gone or silent is noticed; strangers and other hosts are
kept out; and nothing is left behind. What workers reduce there is the weighted mean, added up in the order of the
ranks, for all and for some of them, piece by piece. Workers are objects of one process here, processes in
tests/distributed."""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import sys
import threading

import pytest
import torch

from lightning_decentral.errors import ProtocolError
from lightning_decentral.flat import Vector
from lightning_decentral.transport import shared_reduces
from lightning_decentral.transport.shared_memory import Address, SharedMemory
from lightning_decentral.transport.shared_reduces import SharedReduces

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

TIMEOUT_SECONDS = 0.3
PATIENT_SECONDS = 60.0  # where something will happen, however late a busy machine lets it


def met(*hosts: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[SharedMemory]:
    """One worker for each name of a host, as they are after their start."""
    workers = [SharedMemory(rank, timeout_seconds) for rank in range(len(hosts))]
    addresses = []
    for worker, host in zip(workers, hosts, strict=True):
        worker._address = dataclasses.replace(worker.listen(), host=host)
        addresses.append(worker._address)
    connected = [worker.connect(addresses) for worker in workers]
    for worker in workers:
        worker.accept(connected)
    return workers


def vector(seed: int, size: int = 1001) -> Vector:
    """Three types, and sizes that end in the middle of a cache line."""
    generator = torch.Generator().manual_seed(seed)
    single, double = torch.randn(size, generator=generator), torch.randn(7, generator=generator, dtype=torch.float64)
    return Vector([single, double, single.bfloat16()])


def equal(one: Vector, other: Vector) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.buffers, other.buffers, strict=True))


def test_everybody_reads_what_was_sent_even_if_it_changes_afterwards() -> None:
    a, b, c = met("here", "here", "here")
    sent = vector(0)
    before = sent.clone()
    a.send(sent, 0, [1, 2])
    sent.mul_(0.0)
    assert equal(b.receive(0, 0, sent), before)
    assert equal(c.receive(0, 0, sent), before)
    for worker in (a, b, c):
        worker.close()


def test_what_stays_is_read_where_it_lies_and_its_room_is_free_once_all_have_read() -> None:
    a, b = met("here", "here")
    value = vector(0)
    for step in range(4):
        a.send(value, 0, [1], stays=True)
        read = b.receive(0, 0, value)
        assert equal(read, value)
        if step:  # it is there already: what the sender writes is what the receiver sees
            value.buffers[0][0] = 100.0 + step
            assert float(read.buffers[0][0]) == 100.0 + step
            with pytest.raises(TimeoutError):
                a.send(value, 0, [1], stays=True)  # the same place again, and the reader is still there
        room = a.room(0)  # what was sent before has been read
        b.done(0)
        value.buffers, room.buffers = room.copy_(value).mul_(2.0).buffers, value.buffers
    a.send(value, 0, [1], stays=True)
    value.buffers = a.room(0).copy_(value).buffers
    a.send(value, 0, [1], stays=True)
    with pytest.raises(TimeoutError):
        a.room(0)  # nobody has read what was sent from there
    for worker in (a, b):
        worker.close()


def test_workers_that_send_to_each_other_keep_the_order_and_the_models_apart() -> None:
    workers = met("here", "here")
    for step in range(5):
        for model in (0, 3):
            for rank, worker in enumerate(workers):
                worker.done(model)
                worker.send(vector(100 * step + 10 * model + rank), model, [1 - rank])
        for model in (3, 0):  # asked for in another order
            for rank, worker in enumerate(workers):
                expected = vector(100 * step + 10 * model + 1 - rank)
                assert equal(worker.receive(1 - rank, model, expected), expected)
    for worker in workers:
        worker.close()


def test_a_sender_is_two_messages_ahead_and_then_waits_for_its_readers() -> None:
    a, b = met("here", "here")
    a.send(vector(0), 0, [1])
    a.send(vector(1), 0, [1])
    with pytest.raises(TimeoutError):
        a.send(vector(2), 0, [1])
    first = b.receive(0, 0, vector(0))
    assert equal(first, vector(0))  # what was refused has written nothing
    b.done(0)
    a.send(vector(2), 0, [1])
    assert equal(first, vector(2))  # the same memory again, once the reader was done with it
    for expected in (vector(1), vector(2)):
        assert equal(b.receive(0, 0, expected), expected)
    a.close()
    b.close()


def test_a_waiting_sender_goes_on_once_its_reader_is_done() -> None:
    a, b = met("here", "here", timeout_seconds=PATIENT_SECONDS)
    a.send(vector(0), 0, [1])
    a.send(vector(1), 0, [1])
    b.receive(0, 0, vector(0))
    reader = threading.Timer(0.1, b.done, [0])
    reader.start()
    a.send(vector(2), 0, [1])
    for expected in (vector(1), vector(2)):
        assert equal(b.receive(0, 0, expected), expected)
    reader.join()
    a.close()
    b.close()


def test_a_model_may_grow_and_may_be_empty() -> None:
    a, b = met("here", "here")
    for size in (10, 100_000, 0, 3):
        value = vector(size, size)
        a.send(value, 0, [1])
        assert equal(b.receive(0, 0, value), value)
        b.done(0)
    nothing = Vector([])
    a.send(nothing, 1, [1])
    assert b.receive(0, 1, nothing).num_bytes == 0
    a.close()
    b.close()


def test_a_model_may_grow_before_what_was_sent_has_been_read() -> None:
    a, b = met("here", "here")
    small, large = vector(0, 10), vector(1, 5000)
    b.send(vector(5), 0, [0])
    b.send(vector(6), 0, [0])
    a.send(small, 0, [1])
    a.send(large, 0, [1])
    with pytest.raises(TimeoutError):
        b.send(vector(7), 0, [0])  # waits for a, and takes note of both of its messages meanwhile
    assert equal(b.receive(0, 0, small), small)
    b.done(0)  # of the small one, whose memory is gone: must not count for the large one
    a.send(large, 0, [1])
    with pytest.raises(TimeoutError):
        a.send(vector(2, 5000), 0, [1])
    for _ in range(2):
        assert equal(b.receive(0, 0, large), large)
    a.close()
    b.close()


def test_who_is_silent_or_gone_is_noticed() -> None:
    a, b = met("here", "here")
    with pytest.raises(TimeoutError):
        b.receive(0, 0, vector(0))
    a.close()
    b.close()
    a, b = met("here", "here", timeout_seconds=PATIENT_SECONDS)
    closing = threading.Timer(0.05, a.interrupt)
    closing.start()
    with pytest.raises(ConnectionError, match="Worker 0 closed"):  # and no TimeoutError
        b.receive(0, 0, vector(0))
    with pytest.raises(OSError):
        b.send(vector(0), 0, [0])
    closing.join()
    a.close()
    b.close()


def test_having_read_is_no_error_when_the_sender_is_gone() -> None:
    a, b = met("here", "here")
    a.send(vector(0), 0, [1])
    b.receive(0, 0, vector(0))
    a.close()
    b.done(0)
    with pytest.raises(ConnectionError, match="Worker 0 closed"):
        b.receive(0, 0, vector(0))
    b.close()


def test_a_thread_that_waits_is_released_when_its_own_worker_closes() -> None:
    a, b = met("here", "here", timeout_seconds=PATIENT_SECONDS)
    interrupting = threading.Timer(0.05, b.interrupt)
    interrupting.start()
    with pytest.raises(ConnectionError):  # and no TimeoutError
        b.receive(0, 0, vector(0))
    interrupting.join()
    a.close()
    b.close()


def test_only_workers_of_one_host_share_memory() -> None:
    workers = met("here", "there", "here", "")
    assert [worker.peers for worker in workers] == [{2}, set(), {0}, set()]
    for worker in workers:
        worker.close()


def test_a_stranger_is_turned_away() -> None:
    worker, other = SharedMemory(0, TIMEOUT_SECONDS), SharedMemory(1, TIMEOUT_SECONDS)
    address = worker.listen()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0{address.name}")
        stranger.send(bytes(16) + (1).to_bytes(4, "big"))  # claims to be worker 1
        other.listen()
        connected = other.connect([address, Address("", "", b"")])
        worker.accept([set(), connected])
        stranger.settimeout(PATIENT_SECONDS)
        assert stranger.recv(1) == b""
    assert worker.peers == {1}
    worker.send(vector(0), 0, [1])
    assert equal(other.receive(0, 0, vector(0)), vector(0))
    worker.close()
    other.close()


def test_nothing_is_left_behind() -> None:
    gc.collect()  # or what earlier tests have left might be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    a, b = met("here", "here")
    for size in (10, 1000):
        a.send(vector(0, size), 0, [1])
        b.receive(0, 0, vector(0, size))
        b.done(0)
    a.close()
    b.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_workers_know_who_of_them_share_memory() -> None:
    workers = met("here", "there", "here", "here")
    for worker in workers[:1] + workers[2:]:
        assert worker.connects((0, 2, 3))
        assert worker.connects((3, 0))
    for worker in workers:
        assert not worker.connects(range(4))
        assert not worker.connects((worker.rank,))
        worker.close()
    # Something has kept two of three from each other.
    workers = [SharedMemory(rank, TIMEOUT_SECONDS) for rank in range(3)]
    addresses = [worker.listen() for worker in workers]
    connected = [worker.connect(addresses[:1]) for worker in workers]
    for worker in workers:
        worker.accept(connected)
    assert [worker.connects((0, 1, 2)) for worker in workers] == [False] * 3
    assert workers[0].connects((0, 1))
    for worker in workers:
        worker.close()


# -- all-reduces -------------------------------------------------------------------------------------------------------


def reduce_together(
    reduces: list[SharedReduces], values: list[Vector], members: tuple[int, ...], weights: list[float]
) -> list[BaseException]:
    """Let these workers reduce, each in a thread of its own; returns what they raise."""
    errors: list[BaseException] = []

    def reduce(rank: int) -> None:
        try:
            reduces[rank].reduce(values[rank], members, weights[rank])
        except (OSError, ProtocolError) as error:
            errors.append(error)

    threads = [threading.Thread(target=reduce, args=(rank,), daemon=True) for rank in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT_SECONDS)
        assert not thread.is_alive()
    return errors


def test_a_reduction_is_the_mean_in_the_order_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reduces, "_PIECE_BYTES", 1 << 10)  # several pieces of these vectors, and a rest
    workers = met("here", "here", "here", timeout_seconds=PATIENT_SECONDS)
    reduces = [SharedReduces(worker) for worker in workers]
    cases: list[tuple[tuple[int, ...], list[float]]] = [
        ((0, 1, 2), [1.0, 1.0, 1.0]),
        ((0, 2), [1.0, 0.0, 3.0]),  # whoever read the last slice of worker 0 is not among them
        ((1, 2), [0.0, 0.25, 0.0]),
        ((0, 1, 2), [0.5, 0.0, 7.0]),
    ]
    for size in (1001, 3, 0):
        for members, weights in cases:
            values = [vector(rank, size) for rank in range(3)]
            for rank in members:
                if weights[rank] == 0:
                    values[rank].mul_(float("nan"))  # does not count
            before, total = [value.clone() for value in values], sum(weights[rank] for rank in members)
            mean = before[0].zeros_like()
            for rank in members:
                if weights[rank]:
                    mean.add_(before[rank], alpha=weights[rank] / total)
            mean = Vector(m.to(b.dtype) for m, b in zip(mean.buffers, before[0].buffers, strict=True))
            assert not reduce_together(reduces, values, members, weights)
            for rank, value in enumerate(values):
                assert equal(value, mean if rank in members else before[rank])
    for worker in workers:
        worker.close()


def test_different_vectors_no_weight_and_whoever_is_gone_are_errors_of_a_reduction() -> None:
    workers = met("here", "here", timeout_seconds=PATIENT_SECONDS)
    reduces = [SharedReduces(worker) for worker in workers]
    errors = reduce_together(reduces, [vector(0), vector(0, 999)], (0, 1), [1.0, 1.0])
    assert len(errors) == 2
    assert all("another form" in str(error) for error in errors)
    errors = reduce_together([SharedReduces(worker) for worker in workers], [vector(0)] * 2, (0, 1), [0.0, 0.0])
    assert len(errors) == 2
    assert all("weight 0 on all workers that take part, [0, 1]" in str(error) for error in errors)
    workers[1].close()
    with pytest.raises(OSError, match="Broken pipe"):
        SharedReduces(workers[0]).reduce(vector(0), (0, 1), 1.0)
    workers[0].close()
