"""Schedules as data: which batch each stage forwards and backwards in which tick, and with which weights.

A stage takes micro-batches in order: it forwards number ``i``, then backwards number ``i - lag``, and so on. The lag of
each stage, how many micro-batches a batch has, whether a batch is brought to its end before the next one begins, and
with which weights a gradient is taken: that is all in which the methods differ, so a schedule is these four.

A *tick* of a stage is one batch of its own count. Stages need not be in the same tick at the same time: what a stage
does follows from the order of its own work alone, so that whoever runs a schedule may let each go on as soon as what it
needs has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lightning_decentral.errors import ConfigurationError

Weights = Literal["current", "forward", "previous"]


class Work(NamedTuple):
    """One thing that a stage does.

    Attributes:
        backward: whether it is the backward pass; otherwise it is the forward pass.
        batch: the number of the batch, from 0.
        part: the number of the micro-batch in it, from 0.
    """

    backward: bool
    batch: int
    part: int = 0


@dataclass(frozen=True)
class Schedule:
    """When each of K stages takes which batch, and with which weights.

    Args:
        name: of the method.
        lags: of each stage: how many micro-batches it has forwarded beyond the one that it backwards.
        weights: where the gradient of a batch is taken. ``"current"``: at the weights of now, with the forward pass
            made again (DSP, Features Replay). ``"forward"``: at the weights that forwarded it, which are kept (DDG,
            PipeDream). ``"previous"``: forwarded and backwarded with the weights one update ago (PipeDream-2BW).
        parts: micro-batches that a batch is divided into.
        flush: whether all of a batch is backwarded before the next one is forwarded, as synchronous schedules do.
        ring: whether the first and the last stage share a worker, so that what they have in common is one storage.
        warm_up: batches after which each lag may be one more, from 0 on; 0: the lags are what they are at once. Waiting
            for each other is what the first batches cost then. Only for schedules without micro-batches.
        prediction: how much of the smoothed step is kept at each update, from 0 to below 1, where forward passes are
            made at predicted weights; ``None``: they are made at the weights of now. See `predicted`.
        slow_start: batches in which the learning rate grows to the optimizer's, from that divided by the staleness; 0:
            it is the optimizer's at once. See `slowed`.

    Raises:
        ConfigurationError: if the lags cannot be of a pipeline, or a warm-up, a prediction or a slow start is of a
            schedule whose delays are 0 or 1.

    Example:
        >>> dsp(3).staleness
        (4, 2, 0)
        >>> [(work.backward, work.batch) for work in dsp(3).program(1, tick=5)]
        [(False, 5), (True, 3)]
    """

    name: str
    lags: tuple[int, ...]
    weights: Weights = "current"
    parts: int = 1
    flush: bool = False
    ring: bool = False
    warm_up: int = 0
    prediction: float | None = None
    slow_start: int = 0

    def __post_init__(self) -> None:
        decreasing = all(before >= after for before, after in zip(self.lags, self.lags[1:], strict=False))
        if not self.lags or not decreasing or min(self.lags) < 0 or self.parts < 1:
            raise ConfigurationError(
                f"{self.name} got the lags {self.lags} and {self.parts} micro-batches; it needs one lag for each "
                "stage, "
                "none below 0, that do not grow from the first stage to the last, and at least one micro-batch. An "
                "error can only reach a stage after the stage behind it."
            )
        if not self.flush and self.lags[-1]:
            raise ConfigurationError(
                f"{self.name} got the lag {self.lags[-1]} of the last stage, and needs 0: it has the loss as soon as "
                "it has forwarded a batch. Let the last staleness be 0."
            )
        no_delays = self.flush or self.parts > 1 or self.weights == "previous"
        for option, value in (("warm_up", self.warm_up), ("slow_start", self.slow_start)):
            if value < 0 or (value and no_delays):
                raise ConfigurationError(
                    f"{self.name} got {option}={value}, and needs none: its delays are 0 or 1. Leave it out; or use "
                    "dsp, ddg, features_replay, ouroboros or pipedream, with a number of batches."
                )
        if self.prediction is not None and (no_delays or not 0 <= self.prediction < 1):
            raise ConfigurationError(
                f"{self.name} got prediction={self.prediction}, and needs a number from 0 to below 1, with a schedule "
                "whose delays differ: dsp, ddg, features_replay, ouroboros or pipedream. Leave it out with others."
            )

    def warmed_up(self, batches: int) -> Schedule:
        """Return the same schedule with delays that grow: by one after each so many batches, as far as its lags.

        The first batches are those of backpropagation, when parameters and learning rate change fastest. Batches are
        counted from the beginning of training, over drains and resumed runs.

        Args:
            batches: for each step of delay; the longest lag is reached after ``batches`` times as many.
        """
        return replace(self, warm_up=batches)

    def predicted(self, decay: float = 0.0) -> Schedule:
        """Return the same schedule with forward passes at weights that are predicted for the update of their batch.

        A stage that will have made ``s`` updates when it makes that of a batch forwards it at ``w + s d``, with ``d``
        its smoothed step: ``d <- decay d + (1 - decay) (w_new - w_old)``. A schedule that keeps graphs takes the
        gradient there, too; one that replays takes it at the weights of then, which the prediction was for.

        With SGD with momentum and ``decay=0`` it is SpecTrain's rule (Chen, Yang and Cheng 2018, arXiv:1809.02839): a
        step of the optimizer is the rate times the smoothed gradient. PipeMare (Yang et al., MLSys 2021,
        arXiv:1910.05124) smoothes steps, as here, and goes back by them from the weights of now to those that
        forwarded the batch; this package keeps these, or replays.

        Args:
            decay: how much of the smoothed step is kept at each update; 0: the last update alone.

        Raises:
            ConfigurationError: of a schedule whose delays are 0 or 1.
        """
        return replace(self, prediction=decay)

    def slowed(self, batches: int) -> Schedule:
        """Return the same schedule with learning rates that begin lower, the more, the older a stage's gradients are.

        In batch ``t`` a stage with gradients that are ``tau`` updates old has ``1 / tau ** (1 - t / batches)`` times
        the optimizer's rate, and from batch ``batches`` on that rate: PipeMare's first rule.

        Args:
            batches: until when; counted from the beginning of training, over drains and resumed runs.

        Raises:
            ConfigurationError: of a schedule whose delays are 0 or 1.
        """
        return replace(self, slow_start=batches)

    def rate(self, stage: int, count: int) -> float:
        """Tell how many times the optimizer's rate a stage's update has.

        Args:
            stage: its number.
            count: of batches before this one since training began.
        """
        if not self.slow_start or count >= self.slow_start:
            return 1.0
        return float(max(1, self.lags[stage]) ** (count / self.slow_start - 1.0))

    def lag(self, stage: int, count: int) -> int:
        """Tell how far a stage's backward pass is behind its forward pass.

        Args:
            stage: its number.
            count: of batches that it has forwarded since training began.
        """
        return min(self.lags[stage], count // self.warm_up) if self.warm_up else self.lags[stage]

    @property
    def stages(self) -> int:
        """The number of stages, K."""
        return len(self.lags)

    @property
    def workers(self) -> int:
        """The number of workers: one for each stage, or one fewer in a ring."""
        return max(1, self.stages - 1) if self.ring else self.stages

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the model that each stage has where workers have equal ones: half of it at a ring's ends."""
        if not self.ring:
            return (1 / self.stages,) * self.stages
        return (1 / (2 * self.workers), *((1 / self.workers,) * (self.stages - 2)), 1 / (2 * self.workers))

    def worker_of(self, stage: int) -> int:
        """Tell which worker has a stage. Worker 0 has the last one, so that the loss is where Lightning logs it."""
        return (self.stages - 1 - stage) % self.workers

    def stages_of(self, worker: int) -> tuple[int, ...]:
        """Tell which stages a worker has, in their order."""
        return tuple(stage for stage in range(self.stages) if self.worker_of(stage) == worker)

    @property
    def staleness(self) -> tuple[int, ...]:
        """The updates that each stage makes between a batch's forward pass and the update with its gradient."""
        if self.flush:
            return (0,) * self.stages
        return (1,) * self.stages if self.weights == "previous" else self.lags

    @property
    def is_stale(self) -> bool:
        """Whether any gradient is of other weights than those that it changes."""
        return self.weights == "previous" or any(self.staleness)

    def replays(self, stage: int) -> bool:
        """Tell whether a stage keeps inputs, and makes the forward pass again when it needs its graph."""
        return self.weights == "current" and not self.flush and self.lags[stage] > 0

    def stashes(self, stage: int) -> bool:
        """Tell whether a stage keeps weights that have been updated since."""
        return self.weights == "previous" or (self.weights == "forward" and not self.flush and self.lags[stage] > 0)

    def program(self, stage: int, tick: int, batches: int | None = None, before: int = 0) -> Iterator[Work]:
        """List what a stage does in one tick, in order; then it makes the update of the batch that is complete, if any.

        Args:
            stage: its number, from 0.
            tick: its number, from 0.
            batches: how many batches there are, if it is known; in ticks beyond them nothing is forwarded.
            before: batches that were brought to their end before the first of these; they count for a warm-up.
        """
        if self.warm_up:
            yield from self._growing(stage, tick, batches, before)
            return
        parts, lag = self.parts, self.lags[stage]
        if self.flush and batches is not None and tick >= batches:
            return
        for number in range(tick * parts, (tick + 1) * parts + (lag if self.flush else 0)):
            if number < (tick + 1) * parts and (batches is None or tick < batches):
                yield Work(False, *divmod(number, parts))
            ready = number - lag
            if ready >= (tick * parts if self.flush else 0) and (batches is None or ready < batches * parts):
                yield Work(True, *divmod(ready, parts))

    def _growing(self, stage: int, tick: int, batches: int | None, before: int) -> Iterator[Work]:
        """List what a stage does in one tick while its lag grows: in a tick in which it does, nothing is backwarded."""
        last = tick if batches is None else min(tick, batches - 1)  # a drain keeps the lag that there was
        ready = tick - self.lag(stage, before + last)
        if last == tick:
            yield Work(False, tick)
            grown = tick > 0 and ready == tick - 1 - self.lag(stage, before + tick - 1)
        else:
            grown = False
        if ready >= 0 and not grown and (batches is None or ready < batches):
            yield Work(True, ready)

    @property
    def drain_ticks(self) -> int:
        """How many ticks without a new batch bring everything under way to its end."""
        return 0 if self.flush else -(-max(self.lags) // self.parts)

    def version(self, batch: int, updates: int) -> int:
        """Tell with which weights a batch is forwarded: those after so many updates of the stage.

        Args:
            batch: its number.
            updates: that the stage has made.
        """
        return max(0, batch - 1) if self.weights == "previous" else updates


def _check_stages(name: str, stages: int) -> None:
    if stages < 1:
        raise ConfigurationError(f"{name} got {stages} stages, needs at least 1. Pass stages=2 or more.")


def dsp(
    stages: int,
    parts: int = 1,
    forward_delays: Sequence[int] | None = None,
    staleness: Sequence[int] | None = None,
    recompute: bool = True,
) -> Schedule:
    """Make DSP, diversely stale parameters: inputs are kept, and the forward pass is made again at the weights of now.

    Args:
        stages: K.
        parts: 1; a batch is not divided.
        forward_delays: lengths of the queues of activations behind each stage, the paper's first numbers; 1 of each but
            the last by default.
        staleness: of each stage, the paper's second numbers. By default ``2 (K - 1 - k)``: queues of length 1 in both
            directions. The paper's DSP(1,1,0;4,2,0) is ``dsp(3, forward_delays=(1, 1, 0), staleness=(4, 2, 0))``.
        recompute: whether the forward pass is made again, as in the paper. Otherwise a stage keeps the graphs of the
            batches under way, and the weights that they are of: its gradient is that of the weights that forwarded the
            batch. That saves a forward pass in three, and costs ``S_k + 1`` graphs and copies of the stage's weights.

    Raises:
        ConfigurationError: if there are no such queues.
    """
    _check_stages("dsp", stages)
    _refuse_parts("dsp", parts)
    delays = (1,) * (stages - 1) + (0,) if forward_delays is None else tuple(forward_delays)
    if staleness is None:
        lags = tuple(sum(2 * delay for delay in delays[stage:]) for stage in range(stages))
    else:
        lags = tuple(staleness)
    backward = [before - after - delay for before, after, delay in zip(lags, (*lags[1:], 0), delays, strict=False)]
    if len(delays) != stages or len(lags) != stages or min(*delays, *backward, 0) < 0 or delays[-1]:
        raise ConfigurationError(
            f"dsp got the forward delays {delays} and the staleness {lags} for {stages} stages, which leaves queues of "
            f"{backward} errors; it needs one of each for every stage, the last 0, and no queue shorter than 0. The "
            "staleness of a stage is that of the next one, plus its forward delay, plus the length of its queue of "
            "errors."
        )
    return Schedule("dsp", lags, "current" if recompute else "forward")


def ddg(stages: int, parts: int = 1) -> Schedule:
    """Make DDG, delayed gradients: graphs and weights are kept until the error comes."""
    _check_stages("ddg", stages)
    _refuse_parts("ddg", parts)
    return Schedule("ddg", tuple(range(stages - 1, -1, -1)), "forward")


def features_replay(stages: int, parts: int = 1) -> Schedule:
    """Make Features Replay: the delays of DDG, but inputs are kept, and replayed at the weights of now."""
    _check_stages("features_replay", stages)
    _refuse_parts("features_replay", parts)
    return Schedule("features_replay", tuple(range(stages - 1, -1, -1)), "current")


def ouroboros(stages: int, parts: int = 1) -> Schedule:
    """Make Ouroboros: DDG in a ring, in which the first and the last stage share a worker, and so a tied embedding."""
    if stages < 2:
        raise ConfigurationError(
            f"ouroboros got {stages} stages, needs at least 2: the first and the last are on one worker. Pass stages=3 "
            "or more, or train on one device without a strategy."
        )
    _refuse_parts("ouroboros", parts)
    return Schedule("ouroboros", tuple(range(stages - 1, -1, -1)), "forward", ring=True)


def pipedream(stages: int, parts: int = 1) -> Schedule:
    """Make PipeDream: one forward, one backward, and stashed weights. Its updates are those of DDG."""
    _check_stages("pipedream", stages)
    _refuse_parts("pipedream", parts)
    return Schedule("pipedream", tuple(range(stages - 1, -1, -1)), "forward")


def pipe_2bw(stages: int, parts: int | None = None) -> Schedule:
    """Make PipeDream-2BW: micro-batches, no flush, two versions of the weights, a delay of one update everywhere.

    Args:
        stages: K.
        parts: micro-batches, at least K; K by default.
    """
    _check_stages("pipe_2bw", stages)
    parts = stages if parts is None else parts
    if parts < stages:
        raise ConfigurationError(
            f"pipe_2bw got {parts} micro-batches for {stages} stages, and needs at least as many as stages: with "
            f"fewer, a third version of the weights would be needed. Pass parts={stages} or more."
        )
    lags = tuple(range(stages - 1, -1, -1))
    return Schedule("pipe_2bw", lags, "current" if stages == 1 else "previous", parts)


def gpipe(stages: int, parts: int | None = None) -> Schedule:
    """Make GPipe: all micro-batches forward, then all backward; exact, and the baseline.

    Args:
        stages: K.
        parts: micro-batches m; ``4 K`` by default, of which ``m / (m + K - 1)`` of the time is used.
    """
    _check_stages("gpipe", stages)
    parts = (4 * stages if stages > 1 else 1) if parts is None else parts
    return Schedule("gpipe", (parts - 1,) * stages, "current", parts, flush=True)


def one_f_one_b(stages: int, parts: int | None = None) -> Schedule:
    """Make 1F1B: one forward, one backward, and a flush after each batch: GPipe's time and gradients, with less memory.

    Args:
        stages: K.
        parts: micro-batches m; ``4 K`` by default.
    """
    _check_stages("one_f_one_b", stages)
    parts = (4 * stages if stages > 1 else 1) if parts is None else parts
    return Schedule(
        "one_f_one_b", tuple(min(stages - 1 - stage, parts - 1) for stage in range(stages)), "current", parts, True
    )


def _refuse_parts(name: str, parts: int) -> None:
    if parts != 1:
        raise ConfigurationError(
            f"{name} got {parts} micro-batches, and takes whole batches. Leave parts out, or use pipe_2bw, gpipe or "
            "one_f_one_b, which divide them."
        )


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    maker.__name__: maker for maker in (dsp, ddg, features_replay, ouroboros, pipe_2bw, pipedream, gpipe, one_f_one_b)
}
"""What makes a schedule for so many stages, by its name in ``Trainer(strategy=...)``."""
