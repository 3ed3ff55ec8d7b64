"""``lightning-decentral report``: the offline runs of W&B as one page of HTML, which needs no network and no account.

Runs are grouped as they were logged: by claim (``reproduce``), race (``bench``), comparison (``compare``) or recipe. A
group has a table of what its contenders reached, curves, and parallel coordinates of what each run was told and what
it reached. Runs that differ in their seed only are one contender.
"""

from __future__ import annotations

import argparse
import base64
import html
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.loggers.offline_runs import OfflineRun, read_offline_runs
from lightning_decentral.plots.canvas import require_matplotlib
from lightning_decentral.plots.curves import plot_curves
from lightning_decentral.plots.parallel import plot_parallel

_AXES = (  # what curves are drawn over, where it was logged; the most telling first
    "seconds",
    "progress/seconds",
    "megabytes",
    "progress/megabytes",
    "queries",
    "gradients",
    "epoch",
    "trainer/global_step",
)
_MOST_AXES = 3
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; display: block; margin: 1em 0; }
section { border-top: 2px solid #888; margin-top: 2.5em; }
"""


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status, 0.

    Raises:
        ConfigurationError: if there are no runs with figures, or what it needs is not installed.
    """
    parser = argparse.ArgumentParser(prog="lightning-decentral report", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="with the runs, below it too (runs)")
    parser.add_argument("--output", type=Path, help="the page (FOLDER/report.html)")
    options = parser.parse_args(argv)
    require_matplotlib("`report`")
    runs = [run for run in read_offline_runs(options.folder) if run.history]
    if not runs:
        raise ConfigurationError(
            f"The runs in {str(options.folder)!r} have logged no figures yet, a report needs some. Let one validate."
        )
    output: Path = options.output or options.folder / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs), encoding="utf-8")
    groups = {(run.project, run.group) for run in runs}
    print(f"{_count(len(runs), 'run')} in {_count(len(groups), 'group')}: {output}")
    return 0


def page(runs: Sequence[OfflineRun]) -> str:
    """Write the page of these runs."""
    groups: dict[tuple[str, str], list[OfflineRun]] = {}
    for run in runs:
        groups.setdefault((run.project, run.group), []).append(run)
    titles = {key: key[1] or "without a group" for key in groups}
    contents = "".join(
        f'<li><a href="#group-{number}">{html.escape(titles[key])}</a>: {_count(len(group), "run")}, '
        f"{html.escape(key[0])}</li>"
        for number, (key, group) in enumerate(groups.items())
    )
    sections = "".join(
        f'<section id="group-{number}"><h2>{html.escape(titles[key])}</h2>{_group(titles[key], group)}</section>'
        for number, (key, group) in enumerate(groups.items())
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs</title><style>{_STYLE}</style></head>'
        f"<body><h1>Runs</h1><ul>{contents}</ul>{sections}</body></html>\n"
    )


def contender(run: OfflineRun) -> str:
    """Return what a run is a repetition of: its name without the seed."""
    return re.sub(r"[,-]? ?seed[ -]?\d+$", "", run.name) or run.job_type or "a run"


def _group(title: str, runs: Sequence[OfflineRun]) -> str:
    """Write the table and the pictures of a group."""
    by_name: dict[str, list[OfflineRun]] = {}
    for run in runs:
        by_name.setdefault(contender(run), []).append(run)
    known = list(dict.fromkeys(name for run in runs for point in run.history for name in point))
    axes = [name for name in _AXES if name in known]
    measures = [name for name in known if name not in axes]
    shown = axes[:_MOST_AXES] or known[:1]
    parts = [_table(by_name, [*measures, *axes])]
    curves = {name: [_finite(run.history) for run in own] for name, own in by_name.items()}
    for measure in measures:
        over = [axis for axis in shown if any(axis in p and measure in p for run in runs for p in run.history)]
        if over:
            parts.append(
                _picture(
                    f"{title}: {measure}",
                    lambda path, over=over, measure=measure: plot_curves(  # type: ignore[misc]
                        curves, {axis: axis for axis in over}, {measure: measure}, path, title
                    ),
                )
            )
    told = [_numbers(run.config) for run in runs]
    names = dict.fromkeys(name for numbers in told for name in numbers)
    lines = [(contender(run), {**own, **_last(run.history)}) for run, own in zip(runs, told, strict=True)]
    columns = [  # an axis on which all runs are at one place says nothing
        name for name in (*names, *measures, *shown) if len({values[name] for _, values in lines if name in values}) > 1
    ]
    if len(runs) > 1 and len(columns) > 1:
        parts.append(
            _picture(
                f"{title}: parallel coordinates",
                lambda path: plot_parallel(lines, {name: name for name in columns}, path, "each run, at its end"),
            )
        )
    return "".join(parts)


def _table(runs: Mapping[str, Sequence[OfflineRun]], columns: Sequence[str]) -> str:
    """Write a row for each contender: the mean of its runs' last values, and their spread."""
    rows = []
    for name, own in runs.items():
        ends = [_last(run.history) for run in own]
        cells = [html.escape(name), str(len(own))]
        for column in columns:
            values = [end[column] for end in ends if column in end]
            cells.append(_spread(values))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("contender", "runs", *columns))
    return f"<p>At the end of each run:</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _picture(words: str, draw: Callable[[Path], None]) -> str:
    """Draw a picture, and put it into the page itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        draw(path)
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/svg+xml;base64,{data}">'


def _finite(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Leave out what cannot be drawn."""
    return [{name: value for name, value in point.items() if math.isfinite(value)} for point in history]


def _last(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the last finite value of each figure."""
    return {name: value for point in _finite(history) for name, value in point.items()}


def _numbers(config: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Return the settings that are numbers; those of parts have the part's name before theirs."""
    found: dict[str, float] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[before + name] = float(value)
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{math.fsum(values) / len(values):.4g}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.4g} to {max(values):.4g})"
