"""``lightning-decentral reproduce``: what papers claim, in miniature, each by one command, with seeds and a verdict.

Each run is kept in a file of its own when it has ended, with the processor time that it took, so that a command that
was stopped goes on where it was. At the end of a claim its table, verdicts and curves are kept as a measurement:
``OUTPUT/claim-NAME/DATE-COMMIT/``. A claim may take 20 minutes on two cores; one that takes more says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from difflib import get_close_matches
from multiprocessing import get_context
from pathlib import Path

import torch

from lightning_decentral.errors import ConfigurationError, to_install
from lightning_decentral.lab import results
from lightning_decentral.lab.claims.claim import Claim, Curve
from lightning_decentral.lab.claims.judging import Judgement, judge, together
from lightning_decentral.lab.claims.table import CLAIMS

Wanted = tuple[str, float, int]
"""A run: contender, learning rate and seed."""

_TUNING_SEED = 0
_CORES, _MINUTES = 2, 20.0  # of what a claim may take
_AXES = {
    "gradients": "gradients of all workers",
    "seconds": "virtual seconds",
    "megabytes": "MB sent by a worker",
    "queries": "thousand queries",
}
_MEASURED = {"accuracy": "accuracy, %", "loss": "loss", "digits": "-log10 of the gap"}


@dataclass(frozen=True)
class Ran:
    """What came of a claim.

    Args:
        rates: the learning rate of each contender.
        curves: of each contender, one for each seed.
        judgements: one for each statement.
        processor_seconds: of all runs together, those that chose the rates among them.
    """

    rates: dict[str, float]
    curves: dict[str, list[Curve]]
    judgements: list[Judgement]
    processor_seconds: float


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments; returns its exit status.

    Raises:
        ConfigurationError: for a claim that there is not, or fewer than two seeds.
    """
    parser = argparse.ArgumentParser(prog="lightning-decentral reproduce", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims, or all; none: list them")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each contender that are judged (5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (one for each core)")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "reproduce", help="where single runs are kept")
    parser.add_argument("--output", type=Path, default=results.DATA, help="where measurements are (results/data)")
    parser.add_argument("--no-wandb", action="store_true", help="do not log to W&B")
    options = parser.parse_args(list(argv))
    if not options.names:
        for claim in CLAIMS.values():
            print(f"{claim.name:<22} {claim.sentence}.")
        return 0
    if options.seeds < 2 or options.jobs < 1:
        raise ConfigurationError(
            f"reproduce got --seeds {options.seeds} and --jobs {options.jobs}, needs two seeds at least, for a "
            "difference without a spread says nothing, and one job. Use --seeds 5."
        )
    claims = _chosen(options.names)
    began = time.monotonic()
    for number, claim in enumerate(claims, 1):
        print(f"{number} of {len(claims)}: {claim.name}. {claim.sentence}.", flush=True)
        print(f"In the paper: {claim.measured_there}. Here: {claim.setting}", flush=True)
        folder = options.runs / f"{claim.name}-{results.commit_of_this()[0]}"
        with Runs(claim, folder, options.jobs) as runs:
            ran = run(runs, options.seeds)
        words = ["lightning-decentral", "reproduce", claim.name, "--seeds", str(options.seeds)]
        kept = keep(claim, ran, options.output, " ".join(words))
        if not options.no_wandb:
            print(log_to_wandb(claim, ran, Path("runs") / "reproduce"), flush=True)
        print(kept, flush=True)
    print(f"{len(claims)} claim{'s' * (len(claims) != 1)} in {(time.monotonic() - began) / 60:.1f} minutes.")
    return 0


class Runs:
    """The runs of one claim: in parallel, each kept in a file, none made twice.

    Args:
        claim: whose contenders run.
        folder: of the files.
        jobs: runs at a time.
    """

    def __init__(self, claim: Claim, folder: Path, jobs: int) -> None:
        self.claim = claim
        self._folder = folder
        self._jobs = jobs
        self._pool: ProcessPoolExecutor | None = None
        self._processor_seconds: dict[Wanted, float] = {}

    @property
    def processor_seconds(self) -> float:
        """The processor time of all runs that were asked for, whenever they were made."""
        return math.fsum(self._processor_seconds.values())

    def __enter__(self) -> Runs:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._jobs > 1:
            self._pool = ProcessPoolExecutor(self._jobs, get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def of(self, wanted: Iterable[Wanted]) -> dict[Wanted, Curve]:
        """Return the curves of contenders with learning rates and seeds; make those that are not there."""
        every = list(dict.fromkeys(wanted))
        missing = [one for one in every if not self._file(*one).exists()]
        began = time.monotonic()
        for done, ((contender, rate, seed), (curve, seconds)) in enumerate(self._made(missing), 1):
            kept = json.dumps({"processor_seconds": seconds, "curve": curve})
            self._write(self._file(contender, rate, seed), kept)
            left = (time.monotonic() - began) / done * (len(missing) - done)
            print(
                f"  [{done}/{len(missing)}] {contender}, rate {rate:g}, seed {seed}: {seconds:.0f} s of a core; "
                f"about {left:.0f} s to go",
                flush=True,
            )
        read = {one: json.loads(self._file(*one).read_text(encoding="utf-8")) for one in every}
        self._processor_seconds.update({one: kept["processor_seconds"] for one, kept in read.items()})
        return {one: kept["curve"] for one, kept in read.items()}

    def _made(self, missing: Sequence[Wanted]) -> Iterator[tuple[Wanted, tuple[Curve, float]]]:
        """Make runs, and tell of each as soon as it has ended: in this process, or in those of the pool."""
        if self._pool is None:
            yield from ((one, _one(self.claim, *one)) for one in missing)
            return
        pending = {self._pool.submit(_one_of_the_table, self.claim.name, *one): one for one in missing}
        for future in as_completed(pending):
            yield pending[future], future.result()

    def _file(self, contender: str, rate: float, seed: int) -> Path:
        return self._folder / f"{contender.replace(' ', '_')}-{rate:g}-{seed}.json"

    @staticmethod
    def _write(file: Path, text: str) -> None:
        beside = file.with_suffix(".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)


def run(runs: Runs, seeds: int) -> Ran:
    """Tune the contenders of a claim, run the seeds, and judge its statements."""
    claim = runs.claim
    tuned = [claim.tuned_on] if claim.tuned_on else list(claim.contenders)
    rates = {name: _tuned(runs, name) for name in tuned}
    if claim.tuned_on:
        rates = dict.fromkeys(claim.contenders, rates[claim.tuned_on])
    wanted = [(name, rates[name], seed) for name in claim.contenders for seed in range(1, seeds + 1)]
    found = runs.of(wanted)
    curves = {name: [found[name, rates[name], seed] for seed in range(1, seeds + 1)] for name in claim.contenders}
    judgements = []
    for statement in claim.statements:
        measure = claim.measures[statement.measure]
        values = {name: [measure.of(curve) for curve in curves[name]] for name in (statement.better, statement.than)}
        judgements.append(judge(statement, measure, values[statement.better], values[statement.than]))
    return Ran(rates, curves, judgements, runs.processor_seconds)


def keep(claim: Claim, ran: Ran, output: Path, command: str) -> str:
    """Keep what came of a claim as a measurement; returns its report."""
    from lightning_decentral.plots.curves import plot_curves

    body = (
        f"{_measured(claim, ran)}\n\n{_judged(claim, ran)}\n\nVerdict: **{together(ran.judgements)}**.\n\n"
        f"{_taken(ran.processor_seconds)}\n"
    )
    one = results.new(output, f"claim-{claim.name}", claim.sentence, command)
    points = [point for curves in ran.curves.values() for curve in curves for point in curve]
    axes = {name: title for name, title in _AXES.items() if any(point.get(name) for point in points)}
    measured = {name: title for name, title in _MEASURED.items() if any(name in point for point in points)}
    plot_curves(ran.curves, axes, measured, one.folder / "plot.png", claim.sentence)
    _write_curves(ran, one.folder / "curves.csv")
    known = {"tables": results.tables(body), "processor_seconds": round(ran.processor_seconds, 1)}
    results.Measurement(**{**vars(one), **known}).write()
    said = f"{claim.paper}. {claim.setting}\n\nIn the paper: {claim.measured_there}."
    report = f"# {claim.sentence}\n\n{results.environment()}\n\n`{command}`\n\n{said}\n\n{body}"
    (one.folder / "report.md").write_text(report, encoding="utf-8")
    return f"{body}\nKept in {one.folder}."


def log_to_wandb(claim: Claim, ran: Ran, folder: Path) -> str:
    """Log each run to W&B, grouped by the claim; returns where they are."""
    from importlib.util import find_spec

    if find_spec("wandb") is None:
        return f"Nothing was logged to W&B, which is not installed ({to_install('wandb')})."
    from lightning_decentral.loggers import OfflineFirstWandbLogger

    for name, curves in ran.curves.items():
        for seed, curve in enumerate(curves, 1):
            logger = OfflineFirstWandbLogger(
                name=f"{name}, seed {seed}",
                save_dir=str(folder),
                project="lightning-decentral-claims",
                group=claim.name,
                quiet=True,
            )
            logger.log_hyperparams({"contender": name, "learning_rate": ran.rates[name], "seed": seed})
            for point in curve:
                logger.log_metrics(dict(point), step=int(point.get("gradients", point.get("queries", 0.0))))
            logger.experiment.finish()
    return f"Logged to W&B, group {claim.name}, in {folder}."


def _taken(seconds: float) -> str:
    """Tell the processor time of a claim's runs; warn, if it is more than a claim may take."""
    said = f"The runs took {seconds / 60:.1f} minutes of one core."
    if seconds <= 60 * _MINUTES * _CORES:
        return said
    return f"{said} **That is more than {_MINUTES:g} minutes on {_CORES} cores, which a claim may take.**"


def _one(claim: Claim, contender: str, rate: float, seed: int) -> tuple[Curve, float]:
    """Make one run; returns its curve, and the seconds of processor time that it took.

    It has one thread, however many runs there are at a time: models are small, and figures depend on the threads.
    """
    threads, began = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)
    try:
        curve = claim.contenders[contender](rate, seed)
    finally:
        torch.set_num_threads(threads)
    return curve, time.process_time() - began


def _one_of_the_table(name: str, contender: str, rate: float, seed: int) -> tuple[Curve, float]:
    """Make one run in a process of the pool, which knows claims by their names."""
    return _one(CLAIMS[name], contender, rate, seed)


def _tuned(runs: Runs, name: str) -> float:
    """Choose a contender's learning rate with the seed for tuning."""
    claim = runs.claim
    measure = claim.measures[claim.tuned_by]
    rates = list(claim.rates)
    step = rates[1] / rates[0]
    for extension in range(claim.extensions + 1):
        found = runs.of((name, rate, _TUNING_SEED) for rate in rates)
        scores = [measure.of(found[name, rate, _TUNING_SEED]) for rate in rates]
        best = scores.index(min(scores) if measure.smaller_is_better else max(scores))
        if best not in (0, len(rates) - 1) or extension == claim.extensions:
            break
        rates = [rates[0] / step, *rates] if best == 0 else [*rates, rates[-1] * step]
    return rates[best]


def _measured(claim: Claim, ran: Ran) -> str:
    """Write the table of what was measured."""
    headings = ["contender", claim.rate, *(measure.title for measure in claim.measures.values())]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, curves in ran.curves.items():
        cells = [name, f"{ran.rates[name]:.3g}"]
        for measure in claim.measures.values():
            values = [measure.of(curve) for curve in curves]
            finite = [value for value in values if math.isfinite(value)]
            text = (
                f"{statistics.fmean(finite):.4g} ({min(finite):.4g} to {max(finite):.4g})" if finite else "not reached"
            )
            short = len(values) - len(finite)
            cells.append(text + (f", not reached with {short} of {len(values)} seeds" if finite and short else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _judged(claim: Claim, ran: Ran) -> str:
    """Write the table of statements."""
    headings = ["statement", "by", "mean (95 % interval)", "each seed", "needs", "verdict"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for statement, one in zip(claim.statements, ran.judgements, strict=True):
        unit = " times" if statement.by == "factor" else ""
        cells = [
            statement.sentence,
            claim.measures[statement.measure].title,
            f"{one.mean:.3g}{unit} ({one.low:.3g} to {one.high:.3g})",
            ", ".join(f"{value:.3g}" for value in one.values),
            f"{statement.margin:.3g}{unit} at least",
            one.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _write_curves(ran: Ran, file: Path) -> None:
    """Write what was measured in each run that was judged."""
    columns = list(
        dict.fromkeys(name for curves in ran.curves.values() for curve in curves for p in curve for name in p)
    )
    with file.open("w", newline="", encoding="utf-8") as target:
        table = csv.writer(target)
        table.writerow(["contender", "seed", *columns])
        for contender, curves in ran.curves.items():
            for seed, curve in enumerate(curves, 1):
                table.writerows([contender, seed, *(f"{point[name]:.6g}" for name in columns)] for point in curve)


def _chosen(names: Sequence[str]) -> list[Claim]:
    """Look the claims up."""
    if list(names) == ["all"]:
        return list(CLAIMS.values())
    for name in names:
        if name not in CLAIMS:
            close = ", ".join(get_close_matches(name, CLAIMS)) or ", ".join(CLAIMS)
            raise ConfigurationError(
                f"reproduce got the claim {name!r}, needs one of those that it lists without "
                f"arguments. Did you mean: {close}?"
            )
    return [CLAIMS[name] for name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
