"""What a claim is: who runs what, what is measured of it, and what has to hold of the measurements.

A claim is tested by a protocol that is the same for all:

1. Every contender has the same grid of learning rates and the same budget. The rate that does best with the seed 0 is
   taken; where it lies at an edge of the grid, the grid is continued there, `Claim.extensions` times at most.
2. Each of the seeds 1, 2, ... is run by every contender. They start from the same parameters with the same seed, so
   their measurements are compared seed by seed.
3. Each statement is judged by the mean of these paired differences and its 95 % interval (Student's t): *seen* if what
   is stated holds in the whole interval, *not seen* if it holds nowhere in it, *not separable here* otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Curve = Sequence[Mapping[str, float]]
"""What was measured in one run, in order: numbers by name."""

Run = Callable[[float, int], Curve]
"""Runs a contender with a learning rate and a seed."""


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Args:
        title: with its unit.
        of: computes it from the run's curve. Infinite, where something was not reached; NaN nowhere.
        smaller_is_better: which direction is good.
    """

    title: str
    of: Callable[[Curve], float]
    smaller_is_better: bool


@dataclass(frozen=True)
class Statement:
    """Something that one contender is stated to do better than another, or no worse.

    Args:
        sentence: in words.
        measure: by which it is judged; the name of one of the claim's.
        better: a contender.
        than: the other one.
        by: ``"factor"``: the measure of ``than`` divided by that of ``better`` (of ``better`` by ``than``, where larger
            is better) is at least ``margin``. ``"difference"``: the measure of ``better`` is better by at least
            ``margin``, in its own unit; a negative margin is by how much it may be worse.
        margin: see ``by``; 1 and 0 state that it is better at all.
    """

    sentence: str
    measure: str
    better: str
    than: str
    by: Literal["factor", "difference"]
    margin: float


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and the experiment in miniature.

    Args:
        name: on the command line.
        sentence: what the paper claims.
        paper: which one.
        measured_there: what the paper measured, and on what, in one or two sentences without the last full stop: as far
            as it was seen.
        setting: what is run here, in one or two sentences.
        contenders: how each of them runs, by name.
        rates: the grid of learning rates, ascending.
        measures: by name.
        tuned_by: the measure for which a rate is chosen.
        statements: what has to hold.
        tuned_on: the contender whose rate all take, where the claim is about equal rates; none: each its own.
        extensions: how often the grid may be continued at each end.
        rate: what ``rates`` are, where they are no learning rates.
    """

    name: str
    sentence: str
    paper: str
    measured_there: str
    setting: str
    contenders: Mapping[str, Run]
    rates: tuple[float, ...]
    measures: Mapping[str, Measure]
    tuned_by: str
    statements: tuple[Statement, ...]
    tuned_on: str | None = None
    extensions: int = 2
    rate: str = "learning rate"
