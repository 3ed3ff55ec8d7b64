"""The claims, each an experiment of minutes. `claim` says by which protocol they are tested."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning_decentral.algorithms import (
    ACPD,
    ADPSGD,
    APSGD,
    D2,
    DPSGD,
    SAEF,
    BackupWorkers,
    CoCoAPlus,
    Extra,
    FedAvg,
    FedMom,
    GradientTracking,
    Hogwild,
    MoniquaSGD,
    StalenessAware,
    Swarm,
    SyncSGD,
)
from lightning_decentral.compression import ORQ, QSGD, BinGrad, ScaledSign, TernGrad, TopK
from lightning_decentral.lab.claims import papers
from lightning_decentral.lab.claims.claim import Claim, Curve, Measure, Statement
from lightning_decentral.lab.claims.digits import NUM_BYTES, Digits, fallen, last, reached
from lightning_decentral.lab.claims.linear import Linear
from lightning_decentral.lab.claims.stages import Staged, digits_in_stages, kept, plays_in_stages, speed
from lightning_decentral.lab.claims.statements import ACCURACY, as_accurate, faster, more_accurate
from lightning_decentral.lab.claims.table_alone import ALONE
from lightning_decentral.methods import METHODS, PIPELINES
from lightning_decentral.pipeline.schedules import dsp, gpipe, ouroboros
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import Ring

_RATES = (0.03, 0.1, 0.3)
_MEGABYTES = Measure(
    "MB that a worker has sent, at the end", partial(last, "megabytes", over=1), smaller_is_better=True
)


_DIGITS_IN_STAGES = partial(Staged, task=digits_in_stages, batches=1800, warm_up=200, falls=True)
_PLAYS_IN_STAGES = partial(Staged, task=plays_in_stages, batches=2400, warm_up=200, falls=True)

_LENGTH = Measure("virtual seconds for all gradients", partial(last, "seconds", over=1), smaller_is_better=True)


def _seconds_to(percent: float) -> Measure:
    return Measure(f"virtual seconds to {percent:g} % accuracy", partial(reached, "seconds", "accuracy", percent), True)


def _federated(algorithm: type[FedAvg | FedMom]) -> Digits:
    """Measure after each round of 10 clients' 20 local steps."""
    return Digits(partial(algorithm, every=20), 10, 12000, _link(0.01), data="classes", measured=60, after=1)


def _rounds_to_85(curve: Curve) -> float:
    gradients = reached("gradients", "accuracy", 85.0, curve)
    return float(gradients // 200) if math.isfinite(gradients) else math.inf


def _link(seconds: float, latency: float = 0.0, **options: object) -> Cluster:
    """Make a cluster whose links need so many seconds for the model, where a gradient takes 0.1."""
    return Cluster(0.1, bandwidth_bytes_per_second=NUM_BYTES / seconds, latency_seconds=latency, **options)  # type: ignore[arg-type]


def _keeps_pace(better: str, than: str, share: float = 0.95) -> Statement:
    sentence = f"{better}: at least {share:g} of the steps per second of {than}"
    return Statement(sentence, "seconds", better, than, "factor", share)


def _quicker(better: str, than: str, times: float) -> Statement:
    return Statement(
        f"{better} is at the loss {times:g} times as soon as {than}", "seconds", better, than, "factor", times
    )


def _final_loss(curve: Curve) -> float:
    """Return the mean of the last two measurements; infinite, where the training has diverged."""
    values = [point["loss"] for point in curve]
    return sum(values[-2:]) / 2 if all(map(math.isfinite, values)) else math.inf


def _speed(name: str, where: str) -> Measure:
    return Measure(f"speed{where}; one device with the whole model is 1", partial(speed, name), False)


def _kept(name: str, where: str) -> Measure:
    return Measure(f"share of its speed that is left {where}", partial(kept, name), False)


def _keeps_more(measure: str, where: str) -> Statement:
    sentence = f"Of its speed DSP of 4 stages keeps more than GPipe of 4 {where}"
    return Statement(sentence, measure, "DSP, K = 4", "GPipe, K = 4", "factor", 1.0)


_GOOD = 88.0
_EIGHT = 4800  # gradients of 8 workers together: 600 steps of each
_MEASURES = {"seconds": _seconds_to(_GOOD), "accuracy": ACCURACY}
_SLOW = _link(0.2)
_FAR = _link(0.01, latency=0.1)
_NEARLY: dict[str, Any] = {"jitter": "lognormal", "jitter_scale": 0.1}
_STRAGGLER = _link(0.01, slowdown={7: 10.0})
_HEAVY = _link(0.01, jitter="pareto", jitter_scale=1.2)

_ONE_SAMPLE = partial(Digits, batch=1, measured=100)

_ACPD = partial(ACPD, 1, 20, 0.1)
_SHARES, _SHARE = (0.03, 0.1, 0.3, 1.0), "steps between exchanges / rows"
_LINEAR = (
    "Logistic loss on long speeches of Shakespeare in TF-IDF, lambda = 1 / speeches; 4 workers, links of 20 Mbit/s; a "
    "pass over a worker's rows takes 0.5 s, as if there were some hundred times as many. ACPD answers each worker at "
    "once, and sends 10 % of the values."
)
_TO_THE_GAP = {
    "seconds": Measure("virtual seconds to a gap of 1e-4", partial(reached, "seconds", "digits", 4.0), True),
    "megabytes": Measure("MB sent by a worker to a gap of 1e-4", partial(reached, "megabytes", "digits", 4.0), True),
}


def _sooner(sentence: str, better: str, than: str, margin: float) -> Statement:
    return Statement(sentence, "seconds", better, than, "factor", margin)


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            "dpsgd-slow-network",
            "On a network of little bandwidth D-PSGD is faster than an all-reduce, and loses no accuracy",
            METHODS["dpsgd"].paper,
            papers.DPSGD,
            "8 workers, whose links need 0.2 s for the model; a gradient takes 0.1 s.",
            {
                "D-PSGD": Digits(DPSGD, 8, _EIGHT, _SLOW),
                "all-reduce": Digits(SyncSGD, 8, _EIGHT, _SLOW),
            },
            _RATES,
            _MEASURES,
            "accuracy",
            (faster("D-PSGD", "all-reduce"), as_accurate("D-PSGD", "all-reduce")),
        ),
        Claim(
            "dpsgd-far-network",
            "On a network of high latency D-PSGD is faster than an all-reduce, and loses no accuracy",
            METHODS["dpsgd"].paper,
            papers.DPSGD,
            "8 workers, 0.1 s apart; a gradient takes 0.1 s.",
            {
                "D-PSGD": Digits(DPSGD, 8, _EIGHT, _FAR),
                "all-reduce": Digits(SyncSGD, 8, _EIGHT, _FAR),
            },
            _RATES,
            _MEASURES,
            "accuracy",
            (faster("D-PSGD", "all-reduce"), as_accurate("D-PSGD", "all-reduce")),
        ),
        Claim(
            "adpsgd-slow-network",
            "AD-PSGD's computing does not wait for its averaging, and it is as accurate as D-PSGD",
            METHODS["adpsgd"].paper,
            papers.ADPSGD,
            "8 workers; a gradient takes about 0.1 s, the model 0.2 s or 2 s on a link (5 MB at 200 or 20 Mbit/s), or "
            "no time.",
            {
                "AD-PSGD": Digits(ADPSGD, 8, _EIGHT, _link(0.2, **_NEARLY)),
                "AD-PSGD, 2 s": Digits(ADPSGD, 8, _EIGHT, _link(2.0, **_NEARLY)),
                "AD-PSGD, no time": Digits(ADPSGD, 8, _EIGHT, Cluster(0.1, **_NEARLY)),
                "D-PSGD": Digits(DPSGD, 8, _EIGHT, _link(0.2, **_NEARLY)),
            },
            _RATES,
            {"accuracy": ACCURACY, "seconds": _LENGTH},
            "accuracy",
            (
                _keeps_pace("AD-PSGD", "AD-PSGD, no time"),
                _keeps_pace("AD-PSGD, 2 s", "AD-PSGD, no time"),
                as_accurate("AD-PSGD", "D-PSGD"),
                as_accurate("AD-PSGD, 2 s", "D-PSGD"),
            ),
        ),
        Claim(
            "adpsgd-straggler",
            "With one worker 10 times slower AD-PSGD is faster than synchronous methods, at the same accuracy",
            METHODS["adpsgd"].paper,
            papers.ADPSGD,
            "8 workers, one of them 10 times slower; the network is fast.",
            {
                "AD-PSGD": Digits(ADPSGD, 8, _EIGHT, _STRAGGLER),
                "D-PSGD": Digits(DPSGD, 8, _EIGHT, _STRAGGLER),
                "all-reduce": Digits(SyncSGD, 8, _EIGHT, _STRAGGLER),
            },
            _RATES,
            _MEASURES,
            "accuracy",
            (
                faster("AD-PSGD", "all-reduce", 3.0),
                faster("AD-PSGD", "D-PSGD"),
                as_accurate("AD-PSGD", "all-reduce"),
            ),
        ),
        Claim(
            "adpsgd-server",
            "Where a server's link is the bottleneck, AD-PSGD is faster than A-PSGD",
            METHODS["adpsgd"].paper,
            papers.ADPSGD,
            "8 workers, whose links, the server's among them, need 0.05 s for the model; a gradient takes 0.1 s.",
            {
                "AD-PSGD": Digits(ADPSGD, 8, _EIGHT, _link(0.05)),
                "A-PSGD": Digits(APSGD, 8, _EIGHT, _link(0.05)),
            },
            _RATES,
            _MEASURES,
            "accuracy",
            (faster("AD-PSGD", "A-PSGD"), as_accurate("AD-PSGD", "A-PSGD")),
        ),
        Claim(
            "swarm",
            "With 4 local steps and messages of 8 bits SwarmSGD is as accurate as an all-reduce after 1.5 times the "
            "gradients, and faster",
            METHODS["swarm"].paper,
            papers.SWARM,
            "8 workers, whose links need 0.2 s for the model in full precision; a gradient takes about 0.1 s.",
            {
                "SwarmSGD, 1.5 times": Digits(Swarm, 8, _EIGHT * 3 // 2, _link(0.2, **_NEARLY)),
                "SwarmSGD": Digits(Swarm, 8, _EIGHT, _link(0.2, **_NEARLY)),
                "all-reduce": Digits(SyncSGD, 8, _EIGHT, _link(0.2, **_NEARLY)),
            },
            _RATES,
            {**_MEASURES, "megabytes": _MEGABYTES},
            "accuracy",
            (
                Statement(
                    "After 1.5 times the gradients SwarmSGD loses at most 1 point of accuracy against all-reduce",
                    "accuracy",
                    "SwarmSGD, 1.5 times",
                    "all-reduce",
                    "difference",
                    -1.0,
                ),
                faster("SwarmSGD, 1.5 times", "all-reduce"),
            ),
        ),
        Claim(
            "d2-one-class",
            "Where each worker has data of other classes, D2 trains as if it were shared, and D-PSGD does not",
            METHODS["d2"].paper,
            papers.D2,
            "10 workers of one digit each, on a ring; both take the rate at which D2 does best.",
            {
                "D2": Digits(partial(D2, partial(Ring, lazy=True)), 10, 6000, _link(0.01), data="classes"),
                "D-PSGD": Digits(partial(DPSGD, Ring), 10, 6000, _link(0.01), data="classes"),
                "D2, shared data": Digits(partial(D2, partial(Ring, lazy=True)), 10, 6000, _link(0.01)),
            },
            _RATES,
            {"accuracy": ACCURACY},
            "accuracy",
            (more_accurate("D2", "D-PSGD"), as_accurate("D2", "D2, shared data")),
            tuned_on="D2",
        ),
        Claim(
            "tracking-one-class",
            "Where each worker has data of other classes, tracking the gradient trains better than D-PSGD",
            METHODS["gradient_tracking"].paper,
            papers.TRACKING,
            "10 workers of one digit each, on a ring.",
            {
                "gradient tracking": Digits(partial(GradientTracking, Ring), 10, 6000, _link(0.01), data="classes"),
                "EXTRA": Digits(partial(Extra, Ring), 10, 6000, _link(0.01), data="classes"),
                "D-PSGD": Digits(partial(DPSGD, Ring), 10, 6000, _link(0.01), data="classes"),
            },
            _RATES,
            {"accuracy": ACCURACY},
            "accuracy",
            (more_accurate("gradient tracking", "D-PSGD"), more_accurate("EXTRA", "D-PSGD")),
        ),
        Claim(
            "fedmom",
            "Where clients have data of other classes, FedMom reaches an accuracy in fewer rounds than FedAvg",
            METHODS["fedmom"].paper,
            papers.FEDMOM,
            "10 clients of one digit each, all in every round of 20 local steps of each. Both drift: on unequal "
            "quadratics they rest beside the optimum, by what the closed form on the page of FedAvg says.",
            {
                "FedMom": _federated(FedMom),
                "FedAvg": _federated(FedAvg),
            },
            (0.01, 0.03, 0.1),
            {
                "rounds": Measure("rounds to 85 % accuracy", _rounds_to_85, True),
                "accuracy": ACCURACY,
            },
            "rounds",
            (Statement("FedMom needs fewer rounds", "rounds", "FedMom", "FedAvg", "factor", 1.0),),
        ),
        Claim(
            "apsgd-speedup",
            "A-PSGD is nearly as many times faster as there are workers, until the server's link is full",
            METHODS["apsgd"].paper,
            papers.APSGD,
            "Gradients of one sample, whose noise is what more workers average. A gradient takes 0.1 s. The links need "
            "0.01 s for the model, so that 5 to 10 workers fill the server's. The other form, without a lock, has the "
            "model in memory that all share.",
            {
                "1 worker": _ONE_SAMPLE(APSGD, 1, 4000, _link(0.01)),
                "4 workers": _ONE_SAMPLE(APSGD, 4, 4000, _link(0.01)),
                "16 workers": _ONE_SAMPLE(APSGD, 16, 4000, _link(0.01)),
                "32 workers": _ONE_SAMPLE(APSGD, 32, 4000, _link(0.01)),
                "4 workers, shared memory": _ONE_SAMPLE(Hogwild, 4, 4000, Cluster(0.1)),
                "16 workers, shared memory": _ONE_SAMPLE(Hogwild, 16, 4000, Cluster(0.1)),
            },
            (0.003, 0.01, 0.03),
            {
                "seconds": Measure("virtual seconds to a loss of 0.2", partial(fallen, "seconds", "loss", 0.2), True),
                "accuracy": ACCURACY,
            },
            "seconds",
            (
                _quicker("4 workers", "1 worker", 3.0),
                _quicker("4 workers, shared memory", "1 worker", 3.0),
                _quicker("16 workers, shared memory", "1 worker", 10.0),
                Statement(
                    "32 workers are at most 1.2 times as fast as 16",
                    "seconds",
                    "16 workers",
                    "32 workers",
                    "factor",
                    1 / 1.2,
                ),
            ),
        ),
        Claim(
            "staleness-aware",
            "At a rate at which one worker trains well, plain asynchronous SGD of many workers fails, and dividing the "
            "rate by the staleness learns",
            METHODS["staleness_aware"].paper,
            papers.STALENESS_AWARE,
            "16 and 32 workers, no delay but that of computing; all take the rate at which one worker does best.",
            {
                "staleness-aware, 16": Digits(StalenessAware, 16, 8000, _link(0.0001)),
                "plain, 16": Digits(APSGD, 16, 8000, _link(0.0001)),
                "staleness-aware, 32": Digits(StalenessAware, 32, 8000, _link(0.0001)),
                "plain, 32": Digits(APSGD, 32, 8000, _link(0.0001)),
                "one worker": Digits(APSGD, 1, 8000, _link(0.0001)),
            },
            (0.1, 0.3, 1.0),
            {"accuracy": ACCURACY},
            "accuracy",
            (
                more_accurate("staleness-aware, 16", "plain, 16", 10.0),
                more_accurate("staleness-aware, 32", "plain, 32", 10.0),
            ),
            tuned_on="one worker",
        ),
        Claim(
            "backup-workers",
            "With heavy-tailed computing times backup workers are faster than synchronous SGD, and as accurate",
            METHODS["backup_workers"].paper,
            papers.BACKUP_WORKERS,
            "10 workers, computing times of Pareto's distribution (shape 1.2); the first 8 gradients of a step count.",
            {
                "backup workers": Digits(partial(BackupWorkers, 8), 10, 6000, _HEAVY),
                "synchronous": Digits(SyncSGD, 10, 6000, _HEAVY),
                "asynchronous": Digits(APSGD, 10, 6000, _HEAVY),
            },
            _RATES,
            _MEASURES,
            "accuracy",
            (faster("backup workers", "synchronous"), as_accurate("backup workers", "synchronous")),
        ),
        Claim(
            "moniqua-8-bits",
            "Messages of 8 bits without further memory train as well as full precision, with a quarter of the bytes",
            METHODS["moniqua_sgd"].paper,
            papers.MONIQUA,
            "8 workers, fast links.",
            {
                "Moniqua": Digits(MoniquaSGD, 8, _EIGHT, _link(0.01)),
                "D-PSGD": Digits(DPSGD, 8, _EIGHT, _link(0.01)),
            },
            _RATES,
            {"accuracy": ACCURACY, "megabytes": _MEGABYTES},
            "accuracy",
            (
                as_accurate("Moniqua", "D-PSGD"),
                Statement("Moniqua sends at most a third", "megabytes", "Moniqua", "D-PSGD", "factor", 3.0),
            ),
        ),
        Claim(
            "saef",
            "A step ahead, error feedback trains in as many epochs as full precision; without it, compression slows it",
            METHODS["saef"].paper,
            papers.SAEF,
            "8 workers, each with a momentum of 0.9, as in the paper's code; the largest 1 % of each message. "
            "Evaluated is the model that all workers have, without what is still to be sent.",
            {
                "SAEF": Digits(partial(SAEF, TopK(0.01)), 8, _EIGHT, _link(0.01), momentum=0.9),
                "EF": Digits(partial(SAEF, TopK(0.01), None, 0.0), 8, _EIGHT, _link(0.01), momentum=0.9),
                "full precision": Digits(SyncSGD, 8, _EIGHT, _link(0.01), momentum=0.9),
            },
            (0.01, 0.03, 0.1),
            {
                "gradients": Measure(
                    f"gradients to {_GOOD:g} % accuracy", partial(reached, "gradients", "accuracy", _GOOD), True
                ),
                "accuracy": ACCURACY,
            },
            "accuracy",
            (
                Statement("SAEF needs fewer gradients than EF", "gradients", "SAEF", "EF", "factor", 1.0),
                as_accurate("SAEF", "full precision"),
            ),
        ),
        Claim(
            "orq",
            "Levels chosen by the distribution (ORQ) lose less than QSGD's or TernGrad's at as many bits",
            "Xu, Huo, Huang, 2020, arXiv:2002.11082",
            papers.QUANTIZATION,
            "4 workers, each gradient compressed to 3 levels.",
            {
                "ORQ": Digits(SyncSGD, 4, 3000, _link(0.01), compressor=partial(ORQ, 3, bucket=2048)),
                "TernGrad": Digits(SyncSGD, 4, 3000, _link(0.01), compressor=partial(TernGrad, bucket=2048)),
                "QSGD": Digits(SyncSGD, 4, 3000, _link(0.01), compressor=partial(QSGD, 1, bucket=2048)),
                "full precision": Digits(SyncSGD, 4, 3000, _link(0.01)),
            },
            _RATES,
            {"accuracy": ACCURACY},
            "accuracy",
            (more_accurate("ORQ", "TernGrad"), more_accurate("ORQ", "QSGD")),
        ),
        Claim(
            "bingrad",
            "Two levels chosen by the distribution (BinGrad) lose less than signs of one size, TernGrad or QSGD at as "
            "many bits",
            "Xu, Huo, Huang, 2020, arXiv:2002.11082",
            papers.QUANTIZATION,
            "4 workers, no error feedback. Each gradient is compressed to one bit for each value, in buckets of 2,048; "
            "or, in buckets of 104 values with levels of their own, to as many bits as the 3 levels of TernGrad and "
            "QSGD need.",
            {
                "BinGrad": Digits(SyncSGD, 4, 3000, _link(0.01), compressor=partial(BinGrad, "b", bucket=2048)),
                "scaled sign": Digits(SyncSGD, 4, 3000, _link(0.01), compressor=partial(ScaledSign, bucket=2048)),
                "BinGrad, buckets of 104": Digits(
                    SyncSGD, 4, 3000, _link(0.01), compressor=partial(BinGrad, "b", bucket=104)
                ),
                "TernGrad": Digits(SyncSGD, 4, 3000, _link(0.01), compressor=partial(TernGrad, bucket=2048)),
                "QSGD": Digits(SyncSGD, 4, 3000, _link(0.01), compressor=partial(QSGD, 1, bucket=2048)),
                "full precision": Digits(SyncSGD, 4, 3000, _link(0.01)),
            },
            _RATES,
            {"accuracy": ACCURACY},
            "accuracy",
            (
                more_accurate("BinGrad", "scaled sign"),
                more_accurate("BinGrad, buckets of 104", "TernGrad"),
                more_accurate("BinGrad, buckets of 104", "QSGD"),
            ),
        ),
        Claim(
            "acpd-straggler",
            "With one worker 10 times slower ACPD is sooner at a small duality gap than CoCoA+, and hardly later than "
            "with equal workers",
            METHODS["acpd"].paper,
            papers.ACPD,
            f"{_LINEAR} All workers have equally many rows.",
            {
                "ACPD": Linear(_ACPD, 10.0),
                "ACPD, equal workers": Linear(_ACPD),
                "CoCoA+": Linear(CoCoAPlus, 10.0),
                "CoCoA+, equal workers": Linear(CoCoAPlus),
            },
            _SHARES,
            _TO_THE_GAP,
            "seconds",
            (
                _sooner("ACPD is sooner at the gap than CoCoA+", "ACPD", "CoCoA+", 1.0),
                _sooner("A slow worker costs ACPD at most 1.4 times the time", "ACPD", "ACPD, equal workers", 1 / 1.4),
            ),
            rate=_SHARE,
        ),
        Claim(
            "acpd-straggler-shares",
            "Where a worker 10 times slower has a tenth of the others' rows, it costs ACPD at most 1.4 times the time",
            METHODS["acpd"].paper,
            papers.ACPD,
            f"{_LINEAR} This is not in the paper, where all have equally many rows.",
            {
                "ACPD": Linear(_ACPD, 10.0, by_speed=True),
                "ACPD, equal workers": Linear(_ACPD),
                "CoCoA+": Linear(CoCoAPlus, 10.0, by_speed=True),
            },
            _SHARES,
            _TO_THE_GAP,
            "seconds",
            (
                _sooner("A slow worker costs ACPD at most 1.4 times the time", "ACPD", "ACPD, equal workers", 1 / 1.4),
                _sooner("ACPD is sooner at the gap than CoCoA+", "ACPD", "CoCoA+", 1.0),
            ),
            rate=_SHARE,
        ),
        Claim(
            "dsp",
            "Stages that do not wait for each other (DSP) train as accurately as backpropagation, faster than a "
            "pipeline that waits, and are less hurt by a slow stage",
            PIPELINES["dsp"].paper,
            papers.DSP,
            "A residual network of 8 layers, 1,800 batches of 32 digits; rates rise and then fall. The clock takes K "
            "equal stages, a backward pass of two forward passes, and links that take no time; GPipe has 4 "
            "micro-batches. The slow stage takes 2 times as long; or each stage "
            "takes 4 times as long on one batch in 8, at random.",
            {
                "backpropagation": _DIGITS_IN_STAGES(gpipe(1, 1)),
                "DSP, K = 2": _DIGITS_IN_STAGES(dsp(2)),
                "DSP, K = 3": _DIGITS_IN_STAGES(dsp(3)),
                "DSP, K = 4": _DIGITS_IN_STAGES(dsp(4)),
                "DSP, K = 4, graphs kept": _DIGITS_IN_STAGES(dsp(4, recompute=False)),
                "GPipe, K = 4": _DIGITS_IN_STAGES(gpipe(4, 4)),
            },
            (0.03, 0.1, 0.3),
            {
                "accuracy": ACCURACY,
                "speed": _speed("seconds", ""),
                "slow": _speed("seconds_slow", " with a slow stage"),
                "random": _speed("seconds_random", " with stages that are slow at random"),
                "kept_slow": _kept("seconds_slow", "with a slow stage"),
                "kept_random": _kept("seconds_random", "with stages that are slow at random"),
            },
            "accuracy",
            (
                *(as_accurate(f"DSP, K = {stages}", "backpropagation") for stages in (2, 3, 4)),
                Statement(
                    "DSP of 4 stages is faster than GPipe of 4", "speed", "DSP, K = 4", "GPipe, K = 4", "factor", 1
                ),
                _keeps_more("kept_slow", "with a slow stage"),
                _keeps_more("kept_random", "with stages that are slow at random"),
            ),
        ),
        Claim(
            "ouroboros",
            "Delayed gradients in a ring (Ouroboros) train a Transformer with a tied embedding as well as "
            "backpropagation, and faster than data parallelism where the model is large",
            PIPELINES["ouroboros"].paper,
            papers.OUROBOROS,
            "A Transformer of 4 blocks, 2,400 batches of 16 windows of Shakespeare; 4 stages on 3 devices. Rates rise "
            "and then fall. Growing delays: by one after each twelfth of the training. The clock takes equal stages. "
            "Large model: sending its gradients takes as long as computing them on one device, sending activations "
            "a thirtieth of that. Small model: the other way around. Speeds are of the first 240 batches, in which "
            "growing delays have hardly begun.",
            {
                "backpropagation": _PLAYS_IN_STAGES(gpipe(1, 1)),
                "Ouroboros": _PLAYS_IN_STAGES(ouroboros(4)),
                "Ouroboros, growing delays": _PLAYS_IN_STAGES(ouroboros(4).warmed_up(200)),
                "data parallelism": _PLAYS_IN_STAGES(gpipe(1, 1), devices=3),
            },
            (0.001, 0.003, 0.01),
            {
                "loss": Measure("loss on other plays, at the end", _final_loss, smaller_is_better=True),
                "speed": _speed("seconds", ", links that take no time"),
                "large": _speed("seconds_large", ", large model"),
                "small": _speed("seconds_small", ", small model"),
            },
            "loss",
            (
                *(
                    Statement(
                        f"{name} loses at most 0.05 nats against backpropagation",
                        "loss",
                        name,
                        "backpropagation",
                        "difference",
                        -0.05,
                    )
                    for name in ("Ouroboros", "Ouroboros, growing delays")
                ),
                Statement(
                    "With a large model Ouroboros is faster than data parallelism on as many devices",
                    "large",
                    "Ouroboros",
                    "data parallelism",
                    "factor",
                    1.0,
                ),
            ),
        ),
        *ALONE,
    )
}
"""All claims, by name."""
