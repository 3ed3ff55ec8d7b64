"""Measurements, as they are kept: ``results/data/SUBJECT/DATE-COMMIT/``, one folder each, which nobody changes later.

A folder has ``about.json`` (when, where, by which command), ``report.md`` (what was printed), ``tables.json`` (its
tables) and whatever plots and raw figures there are. The pages in ``docs/results`` take their tables from the newest
folder of each subject.

``bench --output results/data --name SUBJECT`` writes such a folder. Any other command is recorded by::

    python -m lightning_decentral.lab.results SUBJECT -- COMMAND

which runs it and keeps what it prints. Where the command has an ``--output FOLDER``, the tables (``.csv``) and pictures
that it leaves there are kept, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from lightning_decentral.errors import ConfigurationError

DATA = Path("results") / "data"
"""Where measurements are, from the root of the repository."""

_KEPT = (".csv", ".png", ".svg")


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Args:
        title: the heading above it.
        columns: their names.
        rows: of cells, as text in Markdown; as many in each as there are columns.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]

    def cell(self, row: str, column: str) -> str:
        """Look up what stands in a row, which is named by its first cell, and a column.

        Raises:
            ConfigurationError: if there is no such row or column, or more than one.
        """
        names = [name(cells[0]) for cells in self.rows]
        if names.count(row) != 1 or self.columns.count(column) != 1:
            raise ConfigurationError(
                f"The table {self.title!r} got the row {row!r} and the column {column!r}, needs one of the "
                f"rows {', '.join(names)} and one of the columns {', '.join(self.columns)}, a name that no "
                "other has. Correct the name."
            )
        return self.rows[names.index(row)][self.columns.index(column)]


@dataclass(frozen=True)
class Measurement:
    """One folder.

    Args:
        folder: with the data.
        title: of the report.
        measured: date and time, in ISO 8601.
        commit: of the code.
        changed: whether there were uncommitted changes, so that the commit does not tell the code.
        machine: processor and versions, in words.
        command: that was run.
        tables: of the report.
        processor_seconds: that it took, of one core; none where nobody counted.
    """

    folder: Path
    title: str
    measured: str
    commit: str
    changed: bool
    machine: str
    command: str
    tables: list[Table] = field(default_factory=list)
    processor_seconds: float | None = None

    @staticmethod
    def read(folder: Path) -> Measurement:
        """Read a folder."""
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        tables = json.loads((folder / "tables.json").read_text(encoding="utf-8"))
        return Measurement(folder, **about, tables=[Table(**table) for table in tables])

    def write(self) -> None:
        """Write ``about.json`` and ``tables.json`` into the folder."""
        about = {key: value for key, value in asdict(self).items() if key not in ("folder", "tables")}
        if self.processor_seconds is None:
            del about["processor_seconds"]
        (self.folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        tables = [json.dumps(asdict(table), ensure_ascii=False) for table in self.tables]
        text = "[\n" + ",\n".join(tables) + "\n]\n" if tables else "[]\n"
        (self.folder / "tables.json").write_text(text, encoding="utf-8")


def measurements(subject: str, data: Path = DATA) -> list[Measurement]:
    """Read all measurements of a subject; the newest comes first.

    Raises:
        ConfigurationError: if there is none.
    """
    found = [Measurement.read(path.parent) for path in (data / subject).glob("*/about.json")]
    if not found:
        raise ConfigurationError(
            f"Got the subject {subject!r}, need one of which there is a measurement in {data}: "
            f"{', '.join(subjects(data))}. Correct the name, or measure it."
        )
    return sorted(found, key=lambda one: one.measured, reverse=True)


def subjects(data: Path = DATA) -> list[str]:
    """List the names of the subjects that have been measured."""
    return sorted({path.parents[1].name for path in data.glob("*/*/about.json")})


def new(output: Path, subject: str, title: str, command: str) -> Measurement:
    """Make the folder of a measurement that is made now: ``OUTPUT/SUBJECT/DATE-COMMIT``."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    commit, changed = commit_of_this()
    name = f"{now.date()}-{commit}"
    folder, number = output / subject / name, 1
    while folder.exists():  # measured again at the same commit
        number += 1
        folder = output / subject / f"{name}-{number}"
    folder.mkdir(parents=True)
    return Measurement(folder, title, now.isoformat(), commit, changed, machine(), command)


def tables(text: str) -> list[Table]:
    """Find the tables in Markdown."""
    found, title, lines = [], "", text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#"):
            title = line.lstrip("# ")
        if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line) and number:
            rows = []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(_cells(row))
            found.append(Table(title, _cells(lines[number - 1]), rows))
    return found


def machine() -> str:
    """Processor, system and versions, in words."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "lightning", "lightning-decentral"))
    return (
        f"{os.cpu_count()} cores of {model}, {platform.system()} {platform.release()}; Python "
        f"{platform.python_version()}, {packages}"
    )


def environment() -> str:
    """Date, machine, versions and commit, as one Markdown line."""
    commit, changed = commit_of_this()
    return f"{datetime.date.today()}; {machine()}; commit {commit}{' with changes' if changed else ''}."


def name(cell: str) -> str:
    """Return the name in the first cell of a row, without the mark of a footnote."""
    return cell.removesuffix("\\*").strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and keep what it prints and leaves; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_decentral.lab.results", description=__doc__)
    parser.add_argument("subject", help="what is measured, as stragglers-demo")
    parser.add_argument("--title", help="of the report")
    parser.add_argument("--output", type=Path, default=DATA, help="where measurements are (results/data)")
    parser.add_argument("command", nargs="+", help="after --")
    words = list(sys.argv[1:] if argv is None else argv)
    ours = words.index("--") + 1 if "--" in words else len(words)  # the command may have one of its own
    options = parser.parse_args([*words[:ours], *(["command"] if words[ours:] else [])])
    options.command = words[ours:] or options.command
    command = shlex.join(options.command)
    began = datetime.datetime.now().timestamp()
    with subprocess.Popen(options.command, stdout=subprocess.PIPE, text=True, bufsize=1) as running:
        said = []
        for line in running.stdout or ():
            print(line, end="", flush=True)
            said.append(line)
    if running.returncode:
        print(f"Nothing was kept: {command} ended with {running.returncode}.", file=sys.stderr)
        return running.returncode
    left = _output_of(options.command)
    body = "".join(said).replace(sys.executable, "python")
    if left is not None and (left / "table.md").exists():  # what `compare` means to be read
        body = (left / "table.md").read_text(encoding="utf-8")
    title = options.title or next((line[2:] for line in said if line.startswith("# ")), options.subject).strip()
    one = new(options.output, options.subject, title, command)
    for file in sorted(left.iterdir()) if left else ():
        if file.suffix in _KEPT and file.stat().st_mtime >= began - 1:
            shutil.copy(file, one.folder)
    Measurement(**{**vars(one), "tables": tables(body)}).write()
    report = body if body.startswith("# ") else f"# {title}\n\n{environment()}\n\n`{command}`\n\n{body}"
    (one.folder / "report.md").write_text(report, encoding="utf-8")
    print(f"Kept in {one.folder}. The pages: python docs/generate.py")
    return 0


def _output_of(command: Sequence[str]) -> Path | None:
    """Return the folder that a command was given."""
    for option, value in pairwise(command):
        if option == "--output" and Path(value).is_dir():
            return Path(value)
    return None


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def commit_of_this() -> tuple[str, bool]:
    """Return the commit that is checked out, and whether files differ from it; outside of a repository the version of
    this package."""
    commit, changed = _git("rev-parse", "--short=7", "HEAD"), _git("status", "--porcelain", "-uno")
    return commit or f"v{_version('lightning-decentral')}", bool(changed)


def _git(*words: str) -> str:
    """Return what git says; nothing outside of a repository, or where it is not installed."""
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


if __name__ == "__main__":
    sys.exit(main())
