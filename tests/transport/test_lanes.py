"""Proved here: a lane keeps the order and says when it has nothing to do; a relay begins every request on the lane
where it was made and in the order in which the coroutines were started, whatever takes how long; the first failure
stops all that share it, and whoever waits for the end is told once; paused work goes on where it was, on any thread,
and ends with the error that ended its wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_decentral.transport.lanes import Lane, Paused, Pausing, Relay

PATIENCE = 30.0  # seconds until a test that hangs has failed


class Ask:
    """A request; its answer is the number times ten. From 1000 on the lane waits itself."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __await__(self) -> Any:
        return (yield self)


class Begun:
    """Begins requests, and keeps which ones on which lane, and in which thread they were waited for."""

    def __init__(self) -> None:
        self.lanes: list[list[int]] = [[], [], []]
        self.waited: list[str] = []

    def __call__(self, request: Ask, lane: int) -> tuple[Callable[[], int], bool]:
        self.lanes[lane].append(request.number)

        def wait() -> int:
            self.waited.append(threading.current_thread().name)
            return 10 * request.number

        return wait, request.number >= 1000


@pytest.fixture
def lanes() -> Iterator[list[Lane]]:
    made = [Lane(f"lane-{number}") for number in range(3)]
    yield made
    assert all(lane.close(PATIENCE) for lane in made)


def test_a_lane_does_one_thing_after_the_other() -> None:
    lane, order, gate = Lane("lane"), list[int](), threading.Event()
    first = lane.submit(lambda: gate.wait(PATIENCE))
    futures = [lane.submit(lambda number=number: order.append(number)) for number in range(20)]  # type: ignore[misc]
    assert not lane.idle
    gate.set()
    assert first.result(PATIENCE)
    for future in futures:
        future.result(PATIENCE)
    assert order == list(range(20))
    assert lane.idle
    with pytest.raises(ZeroDivisionError):
        lane.submit(lambda: 1 // 0).result(PATIENCE)
    assert lane.submit(lambda: "still there").result(PATIENCE) == "still there"
    assert lane.close(PATIENCE)


def test_a_lane_that_is_busy_is_not_waited_for_longer_than_asked() -> None:
    lane, gate = Lane("lane"), threading.Event()
    lane.submit(lambda: gate.wait(PATIENCE))
    assert not lane.close(0.01)
    gate.set()
    assert lane.close(PATIENCE)


def test_paused_work_goes_on_when_it_may_and_ends_with_what_ends_its_wait() -> None:
    may: dict[str, bool] = {"first": False, "second": True}
    done: list[tuple[str, str]] = []

    def work() -> Pausing[str]:
        for name in may:
            try:
                yield lambda seconds, name=name: may[name] and seconds == 0.5  # type: ignore[misc]
            except ConnectionError as error:
                raise ValueError(name) from error
            done.append((name, threading.current_thread().name))
        yield None
        done.append(("last", threading.current_thread().name))
        return "answer"

    paused = Paused(work())
    assert not paused.go_on(0.5)
    assert done == []
    may["first"] = True
    assert not paused.go_on(0.5)  # only a lane can wait for the rest
    assert paused.pause is None
    lane = Lane("lane")
    lane.submit(paused.finish)
    assert paused.result(PATIENCE) == "answer"
    assert done == [("first", "MainThread"), ("second", "MainThread"), ("last", "lane")]
    assert lane.close(PATIENCE)

    lost = Paused(work())
    lost.fail(ConnectionError())
    assert lost.go_on(0.5)
    with pytest.raises(ValueError, match="first"):
        lost.result()


def test_coroutines_pass_the_lanes_in_the_order_in_which_they_were_started(lanes: list[Lane]) -> None:
    begun, over, answers = Begun(), threading.Event(), dict[int, list[int]]()

    async def way(number: int) -> None:
        assert not torch.is_grad_enabled()
        answers[number] = [await Ask(number)]
        if number % 2:
            answers[number].append(await Ask(100 + number))

    Relay(lanes, begun).start(lambda: map(way, range(8)), [], over.set)
    assert over.wait(PATIENCE)
    assert begun.lanes == [list(range(8)), [101, 103, 105, 107], []]
    assert answers == {n: [10 * n] + [1000 + 10 * n] * (n % 2) for n in range(8)}
    assert begun.waited.count("lane-1") == 8
    assert begun.waited.count("lane-2") == 4


def test_a_lane_that_waits_itself_begins_nothing_else_meanwhile(lanes: list[Lane]) -> None:
    begun, over, answers = Begun(), threading.Event(), list[int]()

    async def way(number: int) -> None:
        answers.append(await Ask(1000 + number))
        answers.append(await Ask(1100 + number))
        answers.append(await Ask(number))
        answers.append(await Ask(1200 + number))

    Relay(lanes, begun).start(lambda: map(way, range(3)), [], over.set)
    assert over.wait(PATIENCE)
    assert begun.lanes == [[1000, 1100, 0, 1001, 1101, 1, 1002, 1102, 2], [1200, 1201, 1202], []]
    assert sorted(answers) == sorted(10 * n + each for n in range(3) for each in (10_000, 11_000, 0, 12_000))
    assert begun.waited.count("lane-0") == 6


def test_a_request_is_under_way_while_the_first_lane_goes_on(lanes: list[Lane]) -> None:
    """The answer to the first comes only after the second was begun."""
    second, over, order = threading.Event(), threading.Event(), list[str]()

    def begin(request: Ask, lane: int) -> tuple[Callable[[], bool], bool]:
        order.append(f"begin {request.number}")
        if request.number == 2:
            second.set()
        return lambda: second.wait(PATIENCE), False

    async def way(number: int) -> None:
        assert await Ask(number)  # type: ignore[misc]
        order.append(f"end {number}")

    Relay(lanes, begin).start(lambda: map(way, (1, 2)), [], over.set)
    assert over.wait(PATIENCE)
    assert order == ["begin 1", "begin 2", "end 1", "end 2"]


@pytest.mark.parametrize("where", ["making", "first", "begin", "wait", "second"])
def test_a_failure_stops_all_that_share_it(where: str, lanes: list[Lane]) -> None:
    failures, over, ran, closed = list[BaseException](), threading.Event(), list[int](), list[int]()

    def begin(request: Ask, lane: int) -> tuple[Callable[[], None], bool]:
        if where == "begin":
            raise OSError("broken")

        def wait() -> None:
            if where == "wait":
                raise OSError("broken")

        return wait, False

    async def way(number: int) -> None:
        try:
            if where == "first":
                raise OSError("broken")
            await Ask(number)
            if where == "second":
                raise OSError("broken")
            ran.append(number)
        finally:
            closed.append(number)

    def coroutines() -> Iterator[Any]:
        if where == "making":
            raise OSError("broken")
        yield from map(way, range(3))

    relay = Relay(lanes, begin)
    relay.start(coroutines, failures, over.set)
    assert over.wait(PATIENCE)
    assert str(failures[0]) == "broken"
    assert ran == []
    again = threading.Event()
    relay.start(lambda: [way(7)], failures, again.set)  # of the same step
    assert again.wait(PATIENCE)
    assert 7 not in closed
    fine = threading.Event()
    if where == "making":
        relay.start(lambda: [way(8)], new := list[BaseException](), fine.set)  # of another one
        assert fine.wait(PATIENCE)
        assert (ran, new) == ([8], [])


def test_more_requests_than_lanes_are_refused(lanes: list[Lane]) -> None:
    failures, over = list[BaseException](), threading.Event()

    async def way() -> None:
        for number in range(3):
            await Ask(number)

    Relay(lanes, Begun()).start(lambda: [way()], failures, over.set)
    assert over.wait(PATIENCE)
    with pytest.raises(RuntimeError, match=r"on lane 2 .* it is the last. Make at most 2"):
        raise failures[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_lane_of_a_gpu_waits_for_what_its_giver_has_submitted() -> None:
    stream = torch.cuda.Stream()
    lane = Lane("lane", stream)
    x = torch.zeros(1 << 20, device="cuda")
    torch.cuda._sleep(20_000_000)
    x.add_(1.0)
    doubled = lane.submit(lambda: x * 2.0)
    stream_of_lane = lane.submit(torch.cuda.current_stream).result(PATIENCE)
    assert stream_of_lane == stream
    result = doubled.result(PATIENCE)
    torch.cuda.current_stream().wait_stream(stream)
    assert bool((result == 2.0).all())
    assert lane.close(PATIENCE)
