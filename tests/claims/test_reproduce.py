"""Proved here: verdicts on claims follow the paired differences and their spread; rates are tuned alike and beyond an
edge of the grid; no run is made twice; a report says what was seen; and a claim of the table runs from its command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from lightning_decentral.commands.main import main
from lightning_decentral.lab.benchmarks import zeroth_order
from lightning_decentral.lab.claims import alone
from lightning_decentral.lab.claims.alone import _drawn, falling, warmed_up
from lightning_decentral.lab.claims.claim import Claim, Curve, Measure, Statement
from lightning_decentral.lab.claims.command import Runs, keep, run
from lightning_decentral.lab.claims.digits import NUM_BYTES, last, reached
from lightning_decentral.lab.claims.judging import judge, together
from lightning_decentral.lab.claims.table import CLAIMS
from lightning_decentral.lab.results import Measurement

SECONDS = Measure("seconds", lambda curve: curve[-1]["seconds"], smaller_is_better=True)
ACCURACY = Measure("accuracy", lambda curve: curve[-1]["accuracy"], smaller_is_better=False)
TWICE = Statement("twice as fast", "seconds", "a", "b", "factor", 2.0)
NO_WORSE = Statement("loses at most a point", "accuracy", "a", "b", "difference", -1.0)


@pytest.mark.parametrize(
    ("statement", "measure", "better", "than", "verdict"),
    [
        (TWICE, SECONDS, [1.0, 1.1, 0.9], [3.0, 3.2, 2.8], "seen"),
        (TWICE, SECONDS, [1.0, 1.1, 0.9], [1.2, 1.3, 1.1], "not seen"),
        (TWICE, SECONDS, [1.0, 1.1, 0.9], [2.0, 2.6, 1.7], "not separable here"),
        (TWICE, SECONDS, [1.0, 1.0, 1.0], [math.inf, math.inf, math.inf], "seen"),  # the other one never arrived
        (TWICE, SECONDS, [math.inf, math.inf], [1.0, 1.0], "not seen"),
        (TWICE, SECONDS, [1.0, math.inf], [3.0, math.inf], "not separable here"),
        (NO_WORSE, ACCURACY, [90.0, 91.0, 90.4], [90.2, 91.1, 90.5], "seen"),
        (NO_WORSE, ACCURACY, [80.0, 81.0, 80.4], [90.2, 91.1, 90.5], "not seen"),
        (NO_WORSE, ACCURACY, [90.0, 88.0, 92.0], [91.0, 91.0, 91.0], "not separable here"),
    ],
)
def test_a_verdict_is_that_of_the_whole_interval(
    statement: Statement, measure: Measure, better: list[float], than: list[float], verdict: str
) -> None:
    assert judge(statement, measure, better, than).verdict == verdict


def test_the_interval_is_that_of_student_and_the_mean_of_factors_is_geometric() -> None:
    difference = judge(NO_WORSE, ACCURACY, [1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    half = 4.303 * 1.0 / math.sqrt(3)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert judge(TWICE, SECONDS, [1.0, 1.0], [2.0, 8.0]).mean == pytest.approx(4.0)
    seen = judge(TWICE, SECONDS, [1.0, 1.0], [3.0, 3.0])
    unseen = judge(TWICE, SECONDS, [1.0, 1.0], [1.0, 1.0])
    assert together([seen, unseen, seen]) == "not seen"


def test_fewer_than_two_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="needs as many of both, and two at least"):
        judge(TWICE, SECONDS, [1.0], [2.0])


def _curve(best: float) -> object:
    """A contender that does best at one rate; `made` counts its runs."""

    def contender(rate: float, seed: int) -> Curve:
        made.append((best, rate, seed))
        return [
            {"gradients": 10.0 * n, "accuracy": 90 - 10 * abs(math.log10(rate / best)) + 0.01 * seed * n}
            for n in (1, 2)
        ]

    return contender


made: list[tuple[float, float, int]] = []
CLAIM = Claim(
    "toy",
    "The one is better",
    "Nobody, nowhere",
    "Nothing at all",
    "Nothing is trained.",
    {"one": _curve(10.0), "other": _curve(0.1)},  # type: ignore[dict-item]
    (0.01, 0.1, 1.0),
    {"accuracy": ACCURACY},
    "accuracy",
    (Statement("as good", "accuracy", "one", "other", "difference", -1.0),),
)


def test_rates_are_tuned_beyond_the_edge_and_no_run_is_made_twice(tmp_path: Path) -> None:
    made.clear()
    with Runs(CLAIM, tmp_path / "runs", jobs=1) as runs:
        ran = run(runs, 3)
    assert ran.rates == {"one": 10.0, "other": 0.1}
    assert sorted(rate for best, rate, seed in made if best == 10.0 and seed == 0) == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert sorted(rate for best, rate, seed in made if best == 0.1 and seed == 0) == [0.01, 0.1, 1.0]
    assert {seed for _, _, seed in made} == {0, 1, 2, 3}  # what is judged was not tuned on
    count = len(made)
    with Runs(CLAIM, tmp_path / "runs", jobs=1) as runs:
        assert run(runs, 3) == ran
    assert len(made) == count
    assert ran.processor_seconds > 0
    report = keep(CLAIM, ran, tmp_path / "data", "reproduce toy")
    assert "Verdict: **seen**" in report
    assert "more than 20 minutes" not in report
    folder = next((tmp_path / "data" / "claim-toy").iterdir())
    assert {"about.json", "curves.csv", "plot.png", "report.md", "tables.json"} == {
        file.name for file in folder.iterdir()
    }
    assert [len(table["rows"]) for table in json.loads((folder / "tables.json").read_text())] == [2, 1]
    assert "In the paper: Nothing at all." in (folder / "report.md").read_text()
    assert Measurement.read(folder).processor_seconds == round(ran.processor_seconds, 1)
    longer = dataclasses.replace(ran, processor_seconds=2401.0)
    assert "more than 20 minutes on 2 cores" in keep(CLAIM, longer, tmp_path / "data", "reproduce toy")


def test_every_statement_names_what_there_is() -> None:
    for claim in CLAIMS.values():
        assert claim.tuned_by in claim.measures, claim.name
        assert claim.tuned_on is None or claim.tuned_on in claim.contenders, claim.name
        assert len(claim.rates) >= 2, claim.name
        assert sorted(claim.rates) == list(claim.rates), claim.name
        for one in claim.statements:
            assert {one.better, one.than} <= set(claim.contenders), claim.name
            assert one.measure in claim.measures, claim.name


def test_compressors_are_compared_at_equal_bits() -> None:
    contenders = CLAIMS["bingrad"].contenders
    for equal in (("BinGrad", "scaled sign"), ("BinGrad, buckets of 104", "TernGrad", "QSGD")):
        bits = [contenders[name].compressor().num_bits(NUM_BYTES // 4) for name in equal]  # type: ignore[attr-defined]
        assert max(bits) <= 1.02 * min(bits)


def test_a_contender_of_the_table_learns() -> None:
    digits = CLAIMS["adpsgd-straggler"].contenders["AD-PSGD"]
    curve = dataclasses.replace(digits, gradients=400, measured=4)(0.1, 1)  # type: ignore[type-var]
    assert [point["gradients"] for point in curve] == [100, 200, 300, 400]
    assert curve[-1]["accuracy"] > curve[0]["accuracy"]
    assert last("accuracy", curve) > 30
    assert 0 < reached("seconds", "accuracy", curve[1]["accuracy"], curve) <= curve[1]["seconds"]
    assert reached("seconds", "accuracy", 101.0, curve) == math.inf


@pytest.mark.parametrize(
    ("claim", "contender", "speeds"),
    [
        ("dsp", "DSP, K = 4", {"speed": 3.0, "slow": 1.5, "kept_slow": 0.5}),  # replays are a third of the work more
        ("dsp", "DSP, K = 4, graphs kept", {"speed": 4.0, "slow": 2.0}),
        ("dsp", "GPipe, K = 4", {"speed": 4 * 4 / 7}),
        ("ouroboros", "Ouroboros", {"speed": 2.25}),  # once around, and back through half a device's share
        ("ouroboros", "data parallelism", {"speed": 3.0, "large": 0.6}),  # it sends 2 (3 - 1) / 3 models
    ],
)
def test_a_contender_in_stages_learns_and_has_the_speed_of_its_schedule(
    claim: str, contender: str, speeds: dict[str, float]
) -> None:
    staged = CLAIMS[claim].contenders[contender]
    curve = dataclasses.replace(staged, batches=20, measured=2)(0.03, 1)  # type: ignore[type-var]
    assert [point["gradients"] for point in curve] == [10, 20]
    assert math.isfinite(curve[-1]["loss"])
    for name, value in speeds.items():
        assert CLAIMS[claim].measures[name].of(curve) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("claim", "contender", "batches", "rate"),
    [
        ("rsgd", "RSGD, falling rate", 40, 0.01),
        ("clars", "CLARS", 2, 0.2),
        ("full-norm", "Full Normalization", 4, 0.01),
    ],
)
def test_a_contender_on_one_device_is_measured_and_repeats(
    claim: str, contender: str, batches: int, rate: float
) -> None:
    device = dataclasses.replace(CLAIMS[claim].contenders[contender], batches=batches, measured=2)  # type: ignore[type-var]
    curve = device(rate, 1)
    assert [point["gradients"] for point in curve] == [batches // 2, batches]
    assert curve[-1]["loss"] < curve[0]["loss"] or batches < 40
    assert device(rate, 1) == curve
    assert device(rate, 2) != curve


def test_a_batch_of_one_class_has_one_and_a_warm_up_begins_low_and_ends_at_nothing() -> None:
    labels, draw = torch.arange(200) % 10, torch.Generator().manual_seed(0)
    batches = [labels[_drawn(labels, 16, "one class", draw)] for _ in range(20)]
    assert all(len(set(batch.tolist())) == 1 for batch in batches)
    assert len({int(batch[0]) for batch in batches}) > 3
    assert [warmed_up(share) for share in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0.25, 0.625, 1.0, 0.0])
    assert [falling(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_queries_are_counted_and_the_gap_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroth_order, "PASSES", 1)
    monkeypatch.setattr(alone, "_least", lambda: 0.0)
    curve = CLAIMS["zeroth-order"].contenders["ZO-ProxSGD"](0.05, 1)
    assert 0 == curve[0]["queries"] < curve[-1]["queries"]
    assert 0 < curve[-1]["gap"] < curve[0]["gap"]
    assert curve[-1]["digits"] == pytest.approx(-math.log10(curve[-1]["gap"]))


def test_an_unknown_claim_is_refused_and_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "adpsgd-stragler"]) == 2
    assert "Did you mean: adpsgd-straggler" in capsys.readouterr().err
    assert main(["reproduce"]) == 0
    assert set(CLAIMS) == {line.split()[0] for line in capsys.readouterr().out.splitlines()}
