"""What the pages show of measurements: tables, plots, commands and single figures, from ``results/data``."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_decentral.lab.claims.table import CLAIMS
from lightning_decentral.lab.results import Measurement, measurements, name

ROOT = Path(__file__).parents[1]
DATA = ROOT / "results" / "data"
_RACE = ("contender", "speed", "s/step", "exposed s", "MB/step", "/ limit", "CPU ms", "memory MB", "most MB", "loss")
_NEW = "most MB"  # in races since December 2026
_HEADINGS = {"speed": "speed, DDP = 1"}
# Races of AD-PSGD before this moment are of another default.
_NEW_DEFAULT = "2026-11-29T21:32"
_OLD_DEFAULT = (
    "AD-PSGD has its default until November 2026 here: each step waited for its own call to a random partner. With the "
    "present one this was not measured yet.\n"
)
# How a command of an older report is called today.
_RENAMED = (
    (r"python benchmarks/(\w+)\.py", r"python -m lightning_decentral.lab.benchmarks.\1"),
    (r"--output docs/results", "--output results/data"),
)


@dataclass(frozen=True)
class Subject:
    """How a subject is shown.

    Args:
        table: which of its report's tables.
        columns: some of them; empty: all.
        command: that measures it today; empty: that of the newest measurement, as it is called today.
    """

    table: int = 0
    columns: tuple[str, ...] = ()
    command: str = ""


_COMPARE = "lightning-decentral compare -c recipes/images/base.yaml"
_RECORD = "python -m lightning_decentral.lab.results"
SUBJECTS = {
    "frontier": Subject(
        command=f"{_RECORD} frontier -- python -m lightning_decentral.lab.benchmarks.frontier --output runs/frontier"
    ),
    "demo": Subject(command="python3 tasks.py demo"),
    "schedules": Subject(
        command="lightning-decentral torture --method adpsgd,acid,swarm,dpsgd,apsgd,staleness_aware,delay_adaptive,"
        "ringmaster,rennala,backup_workers,stale_synchronous,malenia,ringleader,async_easgd,fedbuff,delayed_nesterov,"
        "diloco,local_sgd,slowmo,bmuf --seeds 500 --tally runs/schedules.json"
    ),
    "schedules-with-rounds": Subject(
        command="lightning-decentral torture --method dpsgd,diloco,slowmo,bmuf,local_sgd --seeds 1000 "
        "--tally runs/schedules-with-rounds.json"
    ),
    **{f"gpu-{part}": Subject(command="python3 tasks.py gpu") for part in ("compressors", "layers", "processes")},
    "compressed-training": Subject(
        command="C=recipes/images/compression M=recipes/images/method; "
        f"{_COMPARE} -c $M/ddp.yaml --workers 4 --epochs 10 --model.depth 8 --seeds 1,2,3 "
        "--strategies ddp,$C/int8.yaml,$C/orq_9.yaml,$C/scaled_sign.yaml,$M/ef.yaml,$M/saef.yaml"
    ),
    "compressors": Subject(columns=("compressor", "bits per element", "error", "compress", "decompress")),
    "large-batch": Subject(table=1),
    "step-ahead": Subject(table=1),
    "rebuilt-200mbit": Subject(
        command="lightning-decentral bench --cluster clusters/homogeneous.yaml --batch-size 8 --rounds 2 --steps 32 "
        "--warm-up 16 --contenders ddp,dpsgd,adpsgd,moniqua_sgd,ddp_int8"
    ),
    "pipelines-petra": Subject(
        command="git clone https://github.com/stephane-rivaud/PETRA; "
        "PETRA=$PWD/PETRA python -m lightning_decentral.lab.benchmarks.petra"
    ),
    "rebuilt-simulator": Subject(command="python -m lightning_decentral.lab.benchmarks.simulator"),
    "compressors-fused": Subject(
        command="LIGHTNING_DECENTRAL_COMPILE=1 python -m lightning_decentral.lab.benchmarks.compression --rounds 7"
    ),
}


def result(subject: str, page: Path) -> str:
    """The plot, the table, the source and the command of the newest measurement, and the earlier ones as a list."""
    if not (DATA / subject).is_dir():
        return f"*Not measured yet.*\n\n```bash\n{_wrapped(SUBJECTS[subject].command)}\n```\n"
    newest, *earlier = measurements(subject, DATA)
    parts = []
    for plot in sorted(newest.folder.glob("plot*.*")):
        title = newest.title if plot.stem == "plot" else f"{newest.title}: {plot.stem.removeprefix('plot-')}"
        parts.append(f"![{title}]({_link(plot, page)})\n")
    parts.append(_rows(subject, newest))
    if newest.measured < _NEW_DEFAULT and re.search(r"^\| (AD-PSGD|adpsgd)\b", parts[-1], re.MULTILINE):
        parts.append(textwrap.fill(_OLD_DEFAULT, 120) + "\n")
    parts.append(f"{_source(newest, page)}\n")
    parts.append(f"```bash\n{_wrapped(_command(subject, newest))}\n```\n")
    if earlier:
        parts.append("Earlier: " + ", ".join(_dated(one, page) for one in earlier) + ".\n")
    return "\n".join(parts)


def picture(subject: str, page: Path) -> str:
    """The plot of the newest measurement."""
    newest = measurements(subject, DATA)[0]
    return f"![{newest.title}]({_link(newest.folder / 'plot.png', page)})\n"


def table(subject: str, page: Path, *names: str) -> str:
    """The table of the newest measurement and its source: all rows of it, or some."""
    newest = measurements(subject, DATA)[0]
    source = _source(newest, page).replace(" To repeat it:", "").replace("\nTo repeat it:", "")
    return f"{_rows(subject, newest, names)}\n{source}\n"


def figure(subject: str, row: str, column: str) -> str:
    """The first number of a cell of the newest measurement that has this row."""
    for one in measurements(subject, DATA):
        for table in one.tables:
            if column in table.columns and row in [name(cells[0]) for cells in table.rows]:
                number = re.search(r"-?\d[\d.,]*( ?%)?", table.cell(row, column))
                assert number is not None, f"{subject}: no number in {table.cell(row, column)!r}"
                return number[0]
    raise ValueError(f"Got {subject!r}, {row!r}, {column!r}, need a row and a column of a table. Correct the page.")


def claims(page: Path) -> str:
    """All claims with their verdicts, and then each with its picture, its tables and its command."""
    rows, parts = [], []
    for claim in CLAIMS.values():
        if not (DATA / f"claim-{claim.name}").is_dir():
            rows.append([f"`{claim.name}`", f"{claim.sentence}.", "not measured yet"])
            continue
        newest, *earlier = measurements(f"claim-{claim.name}", DATA)
        verdicts = [row[-1] for row in newest.tables[1].rows]
        verdict = next(known for known in ("not seen", "not separable here", "seen") if known in verdicts)
        rows.append([f"[`{claim.name}`](#{claim.name})", f"{claim.sentence}.", verdict])
        parts.append(f"## {claim.name}\n")
        parts.append(f"{textwrap.fill(f'{claim.sentence}. {claim.paper}. Here: {claim.setting}', 120)}\n")
        parts.append(f"{textwrap.fill(f'In the paper: {claim.measured_there}.', 120)}\n")
        parts.append(f"![{claim.sentence}]({_link(newest.folder / 'plot.png', page)})\n")
        parts.extend(markdown(table.columns, table.rows) for table in newest.tables)
        if newest.processor_seconds is not None:
            parts.append(f"All runs took {newest.processor_seconds / 60:.1f} minutes of one core.\n")
        parts.append(f"{_source(newest, page)}\n")
        parts.append(f"```bash\n{_wrapped(newest.command)}\n```\n")
        if earlier:
            parts.append("Earlier: " + ", ".join(_dated(one, page) for one in earlier) + ".\n")
    return "\n".join([markdown(["claim", "what the paper claims", "here"], rows), *parts])


def every(page: Path) -> str:
    """All subjects that were measured, with all measurements."""
    lines = []
    for folder in sorted(path for path in DATA.iterdir() if path.is_dir()):
        newest, *earlier = measurements(folder.name, DATA)
        line = [folder.name, newest.title, _dated(newest, page), ", ".join(_dated(one, page) for one in earlier)]
        lines.append(line)
    return markdown(["subject", "what", "newest", "earlier"], lines)


def _rows(subject: str, one: Measurement, names: Sequence[str] = ()) -> str:
    """The columns that are shown of a subject."""
    shown = SUBJECTS.get(subject, Subject())
    source = one.tables[shown.table]
    race = source.columns[:2] == ["contender", "s/step"]
    columns = shown.columns or tuple(each for each in _RACE if race and (each != _NEW or each in source.columns))
    # By position where all are shown: in older reports two columns have one name.
    chosen = [source.columns.index(column) for column in columns] or list(range(len(source.columns)))
    rows = [[row[index] for index in chosen] for row in source.rows if not names or name(row[0]) in names]
    headings = [source.columns[index] for index in chosen]
    return markdown([_HEADINGS.get(heading, heading) if race else heading for heading in headings], rows)


def _link(path: Path, page: Path) -> str:
    return os.path.relpath(path, page.parent)


def _dated(one: Measurement, page: Path) -> str:
    return f"[{one.measured[:10]}]({_link(one.folder / 'report.md', page)})"


def _source(one: Measurement, page: Path) -> str:
    changes = ", with uncommitted changes" if one.changed else ""
    files = [f"[the report]({_link(one.folder / 'report.md', page)})"]
    files += [f"[{file.name}]({_link(file, page)})" for file in sorted(one.folder.glob("*.csv"))]
    said = f"Measured {one.measured[:10]} at commit `{one.commit}`{changes}, on {one.machine}: {', '.join(files)}."
    return textwrap.fill(f"{said} To repeat it:", 120, break_on_hyphens=False, break_long_words=False)


def _command(subject: str, one: Measurement) -> str:
    """What measures a subject today."""
    if subject in SUBJECTS and SUBJECTS[subject].command:
        return SUBJECTS[subject].command
    command = one.command
    for old, new in _RENAMED:
        command = re.sub(old, new, command)
    if command.startswith("lightning-decentral bench "):
        words = shlex.split(command)
        for option in ("--name", "--title"):
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
        return shlex.join([*words, "--name", subject])
    if command.startswith("python "):
        return f"{_RECORD} {subject} -- {command}"
    return command


def _wrapped(command: str) -> str:
    """A command in lines of at most 110 characters."""
    lines, line = [], ""
    for word in re.findall(r"(?:'[^']*'|\"[^\"]*\"|\S)+", command):
        if line and len(line) + len(word) > 106:
            lines.append(line + " \\")
            line = "   "
        line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(lines) + "\n"
