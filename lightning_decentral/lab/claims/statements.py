"""What claims state of contenders in common: who is faster, who is as accurate, who is more so."""

from __future__ import annotations

from functools import partial

from lightning_decentral.lab.claims.claim import Measure, Statement
from lightning_decentral.lab.claims.digits import last

ACCURACY = Measure("accuracy in percent, at the end", partial(last, "accuracy"), smaller_is_better=False)
"""The mean of the last five measurements."""


def faster(better: str, than: str, times: float = 1.0) -> Statement:
    """State that an accuracy is reached so many times as soon; the claim has the measure ``seconds``."""
    said = "sooner than" if times == 1 else f"{times:g} times as soon as"
    return Statement(f"{better} is at the accuracy {said} {than}", "seconds", better, than, "factor", times)


def as_accurate(better: str, than: str, points: float = 1.0) -> Statement:
    """State that no more points of accuracy than these are lost."""
    sentence = f"{better} loses at most {points:g} points of accuracy against {than} for the same gradients"
    return Statement(sentence, "accuracy", better, than, "difference", -points)


def more_accurate(better: str, than: str, points: float = 0.0) -> Statement:
    """State that it is more accurate, by so many points."""
    by = f" by {points:g} points" if points else ""
    return Statement(f"{better} is more accurate than {than}{by}", "accuracy", better, than, "difference", points)
