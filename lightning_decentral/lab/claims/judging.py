"""Whether a statement holds: paired differences over seeds, their mean and its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.claims.claim import Measure, Statement

Verdict = Literal["seen", "not seen", "not separable here"]

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond the last one that of the normal distribution
# is too small by less than 5 %.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.96


@dataclass(frozen=True)
class Judgement:
    """What came of a statement.

    Args:
        verdict: in words.
        values: one for each seed: by how much, or how many times, the one was better than the other.
        mean: of them; the geometric mean of factors.
        low: where the 95 % interval of the mean begins.
        high: where it ends.
    """

    verdict: Verdict
    values: tuple[float, ...]
    mean: float
    low: float
    high: float


def judge(statement: Statement, measure: Measure, better: Sequence[float], than: Sequence[float]) -> Judgement:
    """Judge a statement by the measurements of its two contenders, which belong together seed by seed.

    A factor is judged by its logarithm. Where one of a pair was not reached (infinite), the pair counts as the largest
    finite factor of the others, or as 10 if there is none: more than that is not known. Where neither was, nothing can
    be told.

    Raises:
        ConfigurationError: if there are fewer than two pairs, or as many on both sides.
    """
    if len(better) != len(than) or len(better) < 2:
        raise ConfigurationError(
            f"A judgement got {len(better)} and {len(than)} measurements, needs as many of both, and two at least. "
            "Run more seeds."
        )
    pairs = [(a, b) if measure.smaller_is_better else (b, a) for a, b in zip(better, than, strict=True)]
    if any(math.isinf(a) and math.isinf(b) for a, b in pairs):
        nothing = (math.nan,) * len(pairs)
        return Judgement("not separable here", nothing, math.nan, -math.inf, math.inf)
    if statement.by == "difference":
        values = [b - a for a, b in pairs]
        mean, low, high = _interval(values)
    else:
        logarithms = [math.log(b / a) if 0 < a < math.inf and 0 < b < math.inf else None for a, b in pairs]
        largest = max((abs(value) for value in logarithms if value is not None), default=math.log(10))
        known = [
            value if value is not None else (largest if math.isinf(b) or a == 0 else -largest)
            for value, (a, b) in zip(logarithms, pairs, strict=True)
        ]
        values = [math.exp(value) for value in known]
        mean, low, high = map(math.exp, _interval(known))
    if low >= statement.margin:
        verdict: Verdict = "seen"
    elif high < statement.margin:
        verdict = "not seen"
    else:
        verdict = "not separable here"
    return Judgement(verdict, tuple(values), mean, low, high)


def together(judgements: Sequence[Judgement]) -> Verdict:
    """Return the verdict of a claim: that of its weakest statement."""
    verdicts = {one.verdict for one in judgements}
    order: tuple[Verdict, ...] = ("not seen", "not separable here", "seen")
    return next(verdict for verdict in order if verdict in verdicts)


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and the ends of its 95 % interval."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    quantile = _QUANTILES[freedom - 1] if freedom <= len(_QUANTILES) else _NORMAL
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
