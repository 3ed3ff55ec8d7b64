"""When each stage does what, on a virtual clock: what a schedule costs before anything is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_decentral.pipeline.schedules import Schedule, Work


class Span(NamedTuple):
    """A time in which a stage works.

    Attributes:
        stage: its number.
        work: what it does.
        begin, end: in seconds from the beginning.
    """

    stage: int
    work: Work
    begin: float
    end: float


def timeline(
    schedule: Schedule,
    batches: int,
    forward_seconds: Sequence[float] | float = 1.0,
    backward_seconds: Sequence[float] | float = 2.0,
    send_seconds: Sequence[float] | float = 0.0,
    slowdown: Callable[[int, int], float] = lambda stage, batch: 1.0,
) -> list[Span]:
    """Tell when each stage does what, drain included.

    A worker does the work of its stages in the order of the schedule, and begins as soon as what it needs has come; of
    several stages, with what can begin first. Sending goes on beside computing, one message after the other on a link.

    Args:
        schedule: of the pipeline.
        batches: how many.
        forward_seconds: of a whole batch, of each stage or of all. What is replayed takes it again.
        backward_seconds: likewise.
        send_seconds: for the activations of a whole batch, and for their errors, at each cut or at all.
        slowdown: of a stage and a batch: how many times as long the stage computes on it.

    Returns:
        All spans, in the order in which they end.

    Example:
        >>> from lightning_decentral.pipeline.schedules import gpipe
        >>> used(timeline(gpipe(2, 4), 1), gpipe(2, 4))
        0.8
    """
    stages, parts = schedule.stages, schedule.parts
    forward = [forward_seconds] * stages if isinstance(forward_seconds, float | int) else list(forward_seconds)
    backward = [backward_seconds] * stages if isinstance(backward_seconds, float | int) else list(backward_seconds)
    sending = [send_seconds] * (stages - 1) if isinstance(send_seconds, float | int) else list(send_seconds)
    ticks = batches + schedule.drain_ticks
    queues = [
        deque((tick, work) for tick in range(ticks) for work in schedule.program(stage, tick, batches))
        for stage in range(stages)
    ]
    # A worker makes the update at the end of a tick: none of its stages goes on before all have made theirs.
    beside = [
        [other for other in schedule.stages_of(schedule.worker_of(stage)) if other != stage] for stage in range(stages)
    ]
    arrived: dict[tuple[int, bool, int, int], float] = {}  # stage, backward, batch, part
    free = [0.0] * schedule.workers
    links: dict[tuple[int, bool], float] = {}
    spans: list[Span] = []
    while any(queues):
        best: tuple[float, int] | None = None
        for stage in range(stages):
            if not queues[stage]:
                continue
            tick, work = queues[stage][0]
            if any(queues[other] and queues[other][0][0] < tick for other in beside[stage]):
                continue
            source = stage + 1 if work.backward else stage - 1
            ready = 0.0
            if 0 <= source < stages:
                if (stage, *work) not in arrived:
                    continue
                ready = arrived[stage, *work]
            begin = max(free[schedule.worker_of(stage)], ready)
            if best is None or begin < best[0]:
                best = begin, stage
        assert best is not None
        begin, stage = best
        work = queues[stage].popleft()[1]
        replay = forward[stage] if work.backward and schedule.replays(stage) else 0.0
        computing = ((backward[stage] if work.backward else forward[stage]) + replay) / parts
        end = begin + computing * slowdown(stage, work.batch)
        free[schedule.worker_of(stage)] = end
        spans.append(Span(stage, work, begin, end))
        target = stage - 1 if work.backward else stage + 1
        if 0 <= target < stages:
            link = (stage, work.backward)
            links[link] = max(end, links.get(link, 0.0)) + sending[min(stage, target)] / parts
            arrived[target, *work] = links[link]
    return sorted(spans, key=lambda span: span.end)


def used(spans: Sequence[Span], schedule: Schedule) -> float:
    """Tell which share of the workers' time is work."""
    busy = sum(span.end - span.begin for span in spans)
    return busy / (schedule.workers * max(span.end for span in spans))


def seconds_per_batch(
    schedule: Schedule,
    batches: int = 60,
    forward_seconds: Sequence[float] | float = 1.0,
    backward_seconds: Sequence[float] | float = 2.0,
    send_seconds: Sequence[float] | float = 0.0,
    slowdown: Callable[[int, int], float] = lambda stage, batch: 1.0,
) -> float:
    """Tell how long a batch takes once the pipeline is full.

    Args:
        schedule: of the pipeline.
        batches: that are looked at; the first and the last third of them are left out.
        forward_seconds, backward_seconds, send_seconds, slowdown: as in `timeline`.
    """
    spans = timeline(schedule, batches, forward_seconds, backward_seconds, send_seconds, slowdown)
    ends = [0.0] * batches
    for span in spans:
        if span.work.backward:
            ends[span.work.batch] = max(ends[span.work.batch], span.end)
    third = batches // 3
    return (ends[2 * third] - ends[third]) / third
