"""Proved here: offline runs of W&B are read as far as they go, and become one page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_decentral.commands.main import main
from lightning_decentral.commands.report import contender, page
from lightning_decentral.loggers.offline_runs import OfflineRun, read_offline_runs

pytest.importorskip("wandb")

BLOCK = 32 * 1024


def _record(**parts: Any) -> bytes:
    from wandb.proto import wandb_internal_pb2 as records

    record = records.Record()
    for name, value in parts.get("run", {}).items():
        setattr(record.run, name, value)
    for name, value in parts.get("config", {}).items():
        record.config.update.add(key=name, value_json=json.dumps(value))
    for name, value in parts.get("history", {}).items():
        record.history.item.add(nested_key=[name], value_json=json.dumps(value))
    data: bytes = record.SerializeToString()
    return data


def _write(folder: Path, number: int, records: list[bytes]) -> Path:
    """Write a file as W&B does: records in pieces, none of which crosses a block of 32 KiB."""
    out = bytearray(b":W&B\xe1\xbe\x00")
    for record in records:
        kind, rest = 1, record
        while True:
            left = BLOCK - len(out) % BLOCK
            if left < 7:
                out += bytes(left)
                continue
            piece, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[kind == 1, not rest]
            out += bytes(4) + len(piece).to_bytes(2, "little") + bytes([kind]) + piece
            if not rest:
                break
            kind = 3
    file = folder / "wandb" / f"offline-run-{number}-abc" / f"run-abc{number}.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(out)
    return file


def _run(folder: Path, number: int, name: str, seed: int, padding: int = 0) -> Path:
    records = [
        _record(run={"display_name": name, "project": "claims", "run_group": "one <claim>", "run_id": "abc"}),
        _record(config={"seed": seed, "model": {"rate": 0.1 * number}, "note": "x" * padding, "_wandb": {}}),
        *(_record(history={"seconds": t, "accuracy": 10.0 * t + seed, "_step": t}) for t in range(1, 4)),
    ]
    return _write(folder, number, records)


@pytest.mark.parametrize("padding", [0, BLOCK - 130, BLOCK - 7, 3 * BLOCK])
def test_a_run_is_read_whatever_its_records_cross(padding: int, tmp_path: Path) -> None:
    _run(tmp_path, 1, "D-PSGD, seed 2", 2, padding)
    (run,) = read_offline_runs(tmp_path)
    assert (run.name, run.project, run.group) == ("D-PSGD, seed 2", "claims", "one <claim>")
    assert run.config == {"seed": 2, "model": {"rate": 0.1}, "note": "x" * padding}
    assert run.history == [{"seconds": t, "accuracy": 10.0 * t + 2} for t in range(1, 4)]


def test_a_run_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    file = _run(tmp_path, 1, "D-PSGD", 2)
    file.write_bytes(file.read_bytes()[:-5])
    (run,) = read_offline_runs(tmp_path)
    assert [point["seconds"] for point in run.history] == [1, 2]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "need one with runs of W&B" in capsys.readouterr().err
    file = _run(tmp_path, 1, "D-PSGD", 2)
    file.write_bytes(b"nonsense")
    assert main(["report", str(tmp_path)]) == 2
    assert "is no file of W&B" in capsys.readouterr().err


class _Page(HTMLParser):
    """Collects what a page refers to, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.places += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]
        self._in_cell = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)


def test_the_page_has_tables_and_pictures_and_refers_to_nothing_elsewhere(tmp_path: Path) -> None:
    for number, (name, seed) in enumerate([("D-PSGD, seed 1", 1), ("D-PSGD, seed 2", 2), ("all-reduce, seed 1", 1)]):
        _run(tmp_path, number, name, seed)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    read = _Page(text)
    assert "one &lt;claim&gt;" in text
    assert "<claim>" not in text
    assert all(place.startswith(("#", "data:image/svg+xml;base64,")) for place in read.places)
    assert sum(place.startswith("data:") for place in read.places) == 2  # accuracy over seconds; parallel coordinates
    assert not re.search(r"<script|@import|url\(", text)
    assert read.cells == [
        *("contender", "runs", "accuracy", "seconds"),
        *("D-PSGD", "2", "31.5 (31 to 32)", "3"),
        *("all-reduce", "1", "31", "3"),
    ]


def test_runs_that_differ_by_their_seed_are_one_contender_and_one_run_is_enough() -> None:
    def named(name: str) -> OfflineRun:
        return OfflineRun(Path("x"), name=name, history=[{"loss": float("nan")}, {"loss": 1.0}])

    assert {contender(named(name)) for name in ("ddp-seed3", "ddp, seed 12", "ddp")} == {"ddp"}
    assert "<td>1</td>" in page([named("ddp")])
