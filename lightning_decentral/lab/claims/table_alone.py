"""The claims on optimizers and layers, each on one device. `claim` says by which protocol they are tested."""

from __future__ import annotations

from functools import partial

from lightning_decentral.lab.claims import papers
from lightning_decentral.lab.claims.alone import (
    Alone,
    FewQueries,
    clars,
    decaying,
    falling,
    larger,
    lars,
    momentum,
    rsgd,
    warmed_up,
)
from lightning_decentral.lab.claims.claim import Claim, Measure, Statement
from lightning_decentral.lab.claims.digits import reached
from lightning_decentral.lab.claims.statements import ACCURACY, as_accurate, more_accurate

_HIDDEN = partial(Alone, batches=800)
_RESIDUAL = partial(Alone, momentum, 1200, 16, schedule=decaying)
_LARGE = partial(Alone, batches=48, batch=256, network="residual", parts=8)
_FOUR_TIMES = partial(larger, decaying, 4.0)
_QUERIES = Measure("thousand queries to a gap of 0.005", partial(reached, "queries", "digits", 2.301), True)


def _fewer(method: str) -> Statement:
    return Statement(f"{method} needs fewer queries than ZO-ProxSGD", "queries", method, "ZO-ProxSGD", "factor", 1.0)


ALONE = (
    Claim(
        "full-norm",
        "Where each batch has one class only, Full Normalization trains and BatchNorm does not",
        "Lian, Liu, AISTATS 2019, arXiv:1810.06177",
        papers.FULL_NORM,
        "A residual network of 8 layers, 1,200 batches of 16 digits, momentum SGD whose rate falls by power 2.",
        {
            "Full Normalization": _RESIDUAL("residual, FN", "one class"),
            "BatchNorm": _RESIDUAL("residual", "one class"),
            "BatchNorm, shuffled batches": _RESIDUAL("residual"),
        },
        (0.003, 0.01, 0.03),
        {"accuracy": ACCURACY},
        "accuracy",
        (
            more_accurate("Full Normalization", "BatchNorm", 10.0),
            as_accurate("Full Normalization", "BatchNorm, shuffled batches", 5.0),
        ),
    ),
    Claim(
        "rsgd",
        "What follows the optimizer by residuals (RSGD) is more accurate than SGD for the same gradients",
        "Xu, Huo, Huang, 2020, arXiv:2004.05298v2",
        papers.RSGD,
        "A network of one hidden layer, 800 batches of 16 digits, momentum 0.9, a residual of the kind of an "
        "exponential moving average. RSGD here is a reconstruction: the paper's pseudocode was not at hand.",
        {
            "RSGD": _HIDDEN(rsgd("ema")),
            "SGD": _HIDDEN(momentum),
            "RSGD, falling rate": _HIDDEN(rsgd("ema"), schedule=falling),
            "SGD, falling rate": _HIDDEN(momentum, schedule=falling),
        },
        (0.003, 0.01, 0.03),
        {"accuracy": ACCURACY},
        "accuracy",
        (more_accurate("RSGD", "SGD"), more_accurate("RSGD, falling rate", "SGD, falling rate")),
    ),
    Claim(
        "clars",
        "With large batches CLARS trains without a warm-up as well as LARS with one",
        "Huo, Gu, Huang, AAAI 2021, arXiv:2002.01576",
        papers.CLARS,
        "A residual network of 8 layers, 48 batches of 256 digits in parts of 32; the rate falls by power 2. Trust is "
        "0.32: a layer's rate is the product of both.",
        {
            "CLARS": _LARGE(clars(rate_in_buffer=False), schedule=decaying),
            "CLARS, rate in the buffer": _LARGE(clars(rate_in_buffer=True), schedule=decaying),
            "LARS, warm-up": _LARGE(lars, schedule=warmed_up),
            "LARS": _LARGE(lars, schedule=decaying),
        },
        (0.1, 0.2, 0.4),
        {"accuracy": ACCURACY},
        "accuracy",
        (as_accurate("CLARS", "LARS, warm-up"), more_accurate("CLARS", "LARS")),
    ),
    Claim(
        "clars-larger-rates",
        "At a rate 4 times as large as is best for LARS, LARS loses accuracy, with a warm-up more, and CLARS with the "
        "rate in its buffer loses none",
        "Huo, Gu, Huang, AAAI 2021, arXiv:2002.01576",
        papers.CLARS,
        "As in `clars`. All rates are those at which LARS does best, or 4 times as large. The paper has no such "
        "experiment that was seen: it tests why CLARS gains nothing there.",
        {
            "LARS": _LARGE(lars, schedule=decaying),
            "LARS, 4 times": _LARGE(lars, schedule=_FOUR_TIMES),
            "LARS, warm-up, 4 times": _LARGE(lars, schedule=partial(larger, warmed_up, 4.0)),
            "CLARS, 4 times": _LARGE(clars(rate_in_buffer=False), schedule=_FOUR_TIMES),
            "CLARS, rate in the buffer, 4 times": _LARGE(clars(rate_in_buffer=True), schedule=_FOUR_TIMES),
        },
        (0.1, 0.2, 0.4),
        {"accuracy": ACCURACY},
        "accuracy",
        (
            more_accurate("LARS", "LARS, 4 times"),
            more_accurate("LARS, 4 times", "LARS, warm-up, 4 times"),
            as_accurate("CLARS, rate in the buffer, 4 times", "LARS"),
            more_accurate("CLARS, rate in the buffer, 4 times", "LARS, 4 times"),
        ),
        tuned_on="LARS",
    ),
    Claim(
        "zeroth-order",
        "With variance reduced, ZO-ProxSVRG and ZO-ProxSAGA need fewer values of the loss than ZO-ProxSGD",
        "Huang, Gu, Huo, Chen, Huang, AAAI 2019, arXiv:1902.06158",
        papers.ZEROTH_ORDER,
        "Sparse logistic regression of 101 numbers on passages of plays, batches of 24, differences along all "
        "coordinates. A query is the loss of one passage at one point; the gap is the objective less its minimum.",
        {name: FewQueries(name) for name in ("ZO-ProxSVRG", "ZO-ProxSAGA", "ZO-ProxSGD")},
        (0.05, 0.1, 0.2),
        {"queries": _QUERIES},
        "queries",
        (_fewer("ZO-ProxSVRG"), _fewer("ZO-ProxSAGA")),
    ),
)
"""These claims, in the order of the page."""
