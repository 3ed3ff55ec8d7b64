"""The report of a race, as a measurement: the page, its table, two plots, the raw figures as CSV; and W&B runs."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from lightning_decentral.errors import to_install
from lightning_decentral.lab.bench.figures import (
    BASELINE,
    BUSY,
    NO_COMMUNICATION,
    OWN_WORK,
    Row,
    Spread,
    seconds_per_step,
)
from lightning_decentral.lab.bench.runner import Results, Run
from lightning_decentral.lab.results import Measurement, environment, tables

_CURVE_POINTS = 60
_COLUMNS = (
    "contender", "round", "worker", "steps", "seconds", "seconds_per_step", "bytes_sent", "cpu_seconds",
    "memory_bytes", "cores_busy",
)  # fmt: skip
_EXPLANATION = (
    "What the columns say: [how to read a race](../../../../docs/results/how-to-read-a-race.md). Medians of the "
    "rounds; smallest and largest in parentheses."
)


def write(results: Results, rows: Sequence[Row], measurement: Measurement) -> None:
    """Write the page, the plot and the figures of every run into the folder of a measurement.

    Args:
        results: of the race.
        rows: of it.
        measurement: whose folder is there, and empty.
    """
    folder = measurement.folder
    text = page(results, rows, measurement.title, measurement.command, plot="plot.png")
    (folder / "report.md").write_text(text, encoding="utf-8")
    _write_csv(results, folder / "figures.csv")
    _plot(results, rows, folder / "plot.png", measurement.title)
    dataclasses.replace(measurement, tables=tables(text)).write()


def page(results: Results, rows: Sequence[Row], title: str, command: str, plot: str) -> str:
    """Return the text of a report, in Markdown."""
    lines = [f"# {title}", "", environment(), "", f"`{command}`", "", _setting(results), "", table(rows), ""]
    busy = [row.contender.title for row in rows if row.cores_are_the_limit]
    if busy:
        lines += [
            f"\\* The cores, more than the links, are the limit of: {', '.join(busy)}. They were more than {BUSY:.0%} "
            "busy, or what these do for communication would keep all of them busy for more than "
            f"{OWN_WORK:.0%} of the exposed seconds: hosts of their own would do it side by side.",
            "",
        ]
    lines += [f"![Step time with its limit, and loss against seconds]({plot})", "", _EXPLANATION, ""]
    if results.left_out:
        lines += ["Not in the table:", ""]
        lines += [f"* {name}: {reason}" for name, reason in results.left_out.items()]
        lines += [""]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Return one line per contender, in Markdown."""
    heading = (
        "contender", "s/step", "speed", "exposed s", "MB/step", "peak MB/s", "limit s", "/ limit", "predicted s",
        "/ predicted", "CPU ms", "cores", "memory MB", "most MB", "loss", "accuracy",
    )  # fmt: skip
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row in rows:
        cells = (
            row.contender.title + (" \\*" if row.cores_are_the_limit else ""),
            _number(row.seconds_per_step.median),
            _spread(row.speed),
            _number(row.exposed_seconds.median),
            _number(row.bytes_per_step / 1e6),
            _number(row.peak_bytes_per_second / 1e6),
            _number(row.limit_seconds),
            _spread(row.over_limit),
            _number(row.predicted_seconds),
            _number(row.over_prediction.median),
            _number(row.cpu_seconds_per_step * 1e3),
            "-" if math.isnan(row.cores_busy) else f"{row.cores_busy:.0%}",
            _number(row.memory_bytes / 1e6),
            _number(row.most_memory_bytes / 1e6),
            f"{row.evaluation_loss:.3f}",
            f"{row.evaluation_accuracy:.1%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def log_to_wandb(results: Results, rows: Sequence[Row], group: str, folder: Path) -> str:
    """Return one W&B run per contender: its row as the summary, and its loss over the seconds. Returns where they
    are."""
    if importlib.util.find_spec("wandb") is None:
        return f"Nothing was logged to W&B, which is not installed ({to_install('wandb')})."
    from lightning_decentral.loggers import OfflineFirstWandbLogger

    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        logger = OfflineFirstWandbLogger(
            name=row.contender.name, save_dir=str(folder), project="lightning-decentral-bench", group=group, quiet=True
        )
        for step, (seconds, loss) in enumerate(curve(_first(results, row.contender.name))):
            logger.log_metrics({"seconds": seconds, "loss": loss}, step=step)
        logger.log_hyperparams(dataclasses.asdict(results.race.task))
        figures = dataclasses.asdict(row)
        del figures["contender"]
        logger.experiment.summary.update(figures)
        logger.experiment.finish()
    return f"Logged to W&B, group {group}, in {folder}."


def curve(run: Run) -> list[tuple[float, float]]:
    """Seconds since all began to count, and the mean loss of all workers' batches around then."""
    begin = min(record.begins[record.warm_up_steps] for record in run.records)
    points = sorted(
        (end - begin, loss)
        for record in run.records
        for end, loss in list(zip(record.ends, record.losses, strict=True))[record.warm_up_steps :]
    )
    size = max(len(run.records), len(points) // _CURVE_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def _first(results: Results, name: str) -> Run:
    return next(run for run in results.runs if run.contender.name == name)


def _setting(results: Results) -> str:
    race, task = results.race, results.race.task
    where = (
        f"{race.workers} processes of this machine over loopback"
        if race.cluster is None
        else f"{race.workers} emulated hosts on this machine ({race.cluster.name})"
    )
    compute = "real computing and nothing else"
    if task.compute == "sleep":
        compute = (
            f"{task.compute_seconds:g} s of computing per step as if by an accelerator: what the real forward and "
            "backward pass of a layer leave of its time is a *sleep*, with the cores free"
        )
    slow = "".join(f"; worker {rank} {factor:g} times slower" for rank, factor in task.slowdown.items())
    length = f"{task.steps} steps" if task.seconds is None else f"{task.seconds:g} s"
    text = (
        f"{where}; MLP of {task.actual_bytes / 1e6:.3g} MB on MNIST digits, {task.batch_size} per worker and step, SGD "
        f"with momentum {task.momentum:g}; {compute}{slow}. {race.rounds} round{'s' * (race.rounds != 1)}, in each the "
        f"contenders one after the other, {length} after {task.warm_up_steps} steps to warm up, one thread per worker."
    )
    alone = [one.title for one in race.contenders if one.each_gradient]
    if alone:
        rate = task.for_each_gradient(race.workers).learning_rate
        text += (
            f" {', '.join(alone)}: each worker's gradient is applied by itself, so without momentum and at the rate "
            f"{rate:.3g}, which is {task.learning_rate:g} / ((1 - {task.momentum:g}) * {race.workers})."
        )
    if math.isfinite(results.ceiling_bytes_per_second):
        ceiling = results.ceiling_bytes_per_second * 8e-9
        text += f" With no limits and nothing else to do, the cores carry {ceiling:.3g} Gbit/s."
    return text


def _write_csv(results: Results, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for run in results.runs:
            for record in run.records:
                memory = record.memory_peak_bytes - record.memory_before_bytes
                figures = [f"{record.seconds:.6f}", f"{seconds_per_step(run):.6f}", record.bytes_sent]
                figures += [f"{record.cpu_seconds:.3f}", memory, f"{run.cores_busy:.3f}"]
                writer.writerow([run.contender.name, run.round, record.rank, record.steps, *figures])


def _plot(results: Results, rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(13, 0.32 * len(rows) + 2.6))
    names = [row.contender.title for row in rows]
    medians = [row.seconds_per_step.median for row in rows]
    below = [row.seconds_per_step.median - row.seconds_per_step.smallest for row in rows]
    above = [row.seconds_per_step.largest - row.seconds_per_step.median for row in rows]
    colors = [_color(row) for row in rows]
    places = range(len(rows))
    bars.barh(places, medians, xerr=[below, above], color=colors, error_kw={"lw": 0.8})
    for place, row in zip(places, rows, strict=True):
        if not math.isnan(row.limit_seconds):
            bars.plot([row.limit_seconds] * 2, [place - 0.42, place + 0.42], color="black", lw=2)
    bars.set_yticks(list(places), names)
    bars.invert_yaxis()
    bars.set_xlabel("seconds per step (black: the limit)")
    for index, row in enumerate(rows):
        points = curve(_first(results, row.contender.name))
        style = ("-", "--", ":")[index // 10 % 3]
        curves.plot(*zip(*points, strict=True), style, color=f"C{index % 10}", label=row.contender.title, lw=1.2)
    curves.set_xlabel("seconds")
    curves.set_ylabel("training loss, mean of the workers")
    curves.set_yscale("log")
    curves.grid(alpha=0.3)
    curves.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _color(row: Row) -> str:
    if row.contender.name in (NO_COMMUNICATION, "lightning_none"):
        return "lightgray"
    if row.contender.name in (BASELINE, "lightning_ddp"):
        return "tab:blue"
    return "tab:green" if row.contender.module == "ours" else "tab:orange"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _spread(spread: Spread) -> str:
    if math.isnan(spread.median):
        return "-"
    return f"{spread.median:.2f} ({spread.smallest:.2f} to {spread.largest:.2f})"
