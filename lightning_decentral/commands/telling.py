"""What `compare` says while a run is under way, and what its figures mean at the end."""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Curve = list[dict[str, float]]
SECONDS = "progress/seconds"
STALENESS = ("staleness/mean", "staleness/max")
_LOOK_SECONDS, _QUIET_SECONDS = 0.5, 10.0


def read_curve(path: Path) -> Curve:
    """Read the validations of a run from the ``metrics.csv`` of a `CSVLogger`: one dict of numbers each.

    What is logged at the end of an epoch, as the staleness of its gradients, goes to that epoch's last validation.
    """
    curve: Curve = []
    ends: dict[float, dict[str, float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value) for key, value in row.items() if value}
            if SECONDS in numbers:
                curve.append(numbers)
            if all(key in numbers for key in STALENESS):
                ends[numbers["epoch"]] = {key: numbers[key] for key in STALENESS}
    for index, point in enumerate(curve):
        if index + 1 == len(curve) or curve[index + 1]["epoch"] != point["epoch"]:
            point.update(ends.get(point["epoch"], {}))
    return curve


def metrics_of(curves: Sequence[Curve]) -> list[str]:
    """Find the names of what was validated; accuracies and losses alike."""
    names = dict.fromkeys(key for curve in curves for point in curve for key in point if key.startswith("val_"))
    return [name for name in names if not name.endswith(("_step", "_epoch"))]


def falls(metric: str) -> bool:
    """Tell whether less of a metric is better."""
    return "loss" in metric or "bits" in metric or "perplexity" in metric


def run_and_tell(
    command: Sequence[str],
    environment: Mapping[str, str],
    metrics: Path,
    name: str,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Run a training in a process of its own, and say a line at every validation, and at least every ten seconds.

    Args:
        command: of the training.
        environment: of the process.
        metrics: where it logs its validations, as CSV.
        name: of the run, with which each line begins.
        say: gets each line.

    Returns:
        The exit code.
    """
    began = said = time.monotonic()
    told = 0
    with subprocess.Popen(command, env=environment) as running:
        try:
            while True:
                ended = _ended(running)
                points = _so_far(metrics)
                for point in points[told:]:
                    say(f"{name}: {_in_words(point)}")
                    said = time.monotonic()
                told = max(told, len(points))
                if ended:
                    return running.returncode
                if time.monotonic() - said >= _QUIET_SECONDS:
                    said = time.monotonic()
                    say(f"{name}: under way for {said - began:.0f} s, {told} validations so far")
        except BaseException:
            running.kill()
            raise


def meaning(curves: Mapping[tuple[str, int], Curve]) -> str:
    """Say in two sentences for each strategy how it compares with the first: its time, and when it was as good.

    Args:
        curves: of all runs, by strategy and seed. All means are over the seeds that both strategies have.
    """
    names = list(dict.fromkeys(name for name, _ in curves))
    metrics = metrics_of(list(curves.values()))
    metric = next((one for one in metrics if not falls(one)), metrics[0] if metrics else None)
    sentences = []
    for name in names[1:]:
        seeds = [seed for own, seed in curves if own == name and (names[0], seed) in curves]
        if seeds:
            pairs = [(curves[names[0], seed], curves[name, seed]) for seed in seeds]
            sentences.append(_times(names[0], name, pairs))
            if metric is not None:
                sentences.append(_reached(names[0], name, pairs, metric))
    return "\n".join(sentences)


def _times(first: str, name: str, pairs: Sequence[tuple[Curve, Curve]]) -> str:
    """Return one sentence on seconds per epoch."""
    epochs = [statistics.mean(len(pair[side]) for pair in pairs) for side in (0, 1)]
    seconds = [statistics.mean(pair[side][-1][SECONDS] for pair in pairs) for side in (0, 1)]
    ratio = seconds[0] / epochs[0] / (seconds[1] / epochs[1])
    speed = f"{ratio:.1f} times as fast" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
    return (
        f"{name} took {seconds[1]:.0f} s for {epochs[1]:g} epochs and {first} {seconds[0]:.0f} s for {epochs[0]:g}: "
        f"{name} is {speed}{_over(pairs)}."
    )


def _reached(first: str, name: str, pairs: Sequence[tuple[Curve, Curve]], metric: str) -> str:
    """Return one sentence on when a strategy was as good as the first one at its end."""
    goals = [[point[metric] for point in pair[0] if metric in point][-1] for pair in pairs]
    own = [[point[metric] for point in pair[1] if metric in point][-1] for pair in pairs]
    sign = -1 if falls(metric) else 1
    reached = []
    for (_, curve), goal in zip(pairs, goals, strict=True):
        there = [p[SECONDS] for p in curve if metric in p and sign * p[metric] >= sign * goal]
        reached.append(there[0] if there else math.inf)
    goal, end = statistics.mean(goals), statistics.mean(own)
    if all(map(math.isfinite, reached)):
        return (
            f"It reached {first}'s last {metric} ({goal:.4g}) after {statistics.mean(reached):.0f} s, and ended with "
            f"{end:.4g}{_over(pairs)}."
        )
    if len(pairs) == 1:
        return f"It did not reach {first}'s last {metric} ({goal:.4g}): it ended with {end:.4g}."
    missed = sum(not math.isfinite(seconds) for seconds in reached)
    return (
        f"With {missed} of {len(pairs)} seeds it did not reach {first}'s last {metric}. The means of all seeds are "
        f"{end:.4g}, and {goal:.4g} of {first}."
    )


def _over(pairs: Sequence[object]) -> str:
    return f" (means of {len(pairs)} seeds)" if len(pairs) > 1 else ""


def _ended(running: subprocess.Popen[bytes]) -> bool:
    """Tell whether a process has ended; waits for it a little."""
    try:
        running.wait(_LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _so_far(metrics: Path) -> Curve:
    """Return the validations that a run has logged; none while the file is being written."""
    try:
        return read_curve(metrics)
    except (OSError, ValueError):
        return []


def _in_words(point: Mapping[str, float]) -> str:
    figures = ", ".join(f"{metric} {point[metric]:.4g}" for metric in metrics_of([[dict(point)]]))
    return f"epoch {point.get('epoch', math.nan) + 1:.0f} done after {point[SECONDS]:.0f} s of training: {figures}"
