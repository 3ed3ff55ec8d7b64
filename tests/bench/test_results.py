"""Proved here: a measurement is a folder that is written once and read back; the newest of a subject comes first; any
command's tables and files are kept by one command, and a command that fails leaves nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import lightning_decentral
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab import results

REPORT = """# Boxes

| box | weight |
|---|---|
| red \\* | 1.5 (1 to 2) |
| `a \\| b` | 3 |
"""


def test_tables_are_found_in_markdown() -> None:
    (table,) = results.tables(REPORT)
    assert table == results.Table("Boxes", ["box", "weight"], [["red \\*", "1.5 (1 to 2)"], ["`a \\| b`", "3"]])
    assert table.cell("red", "weight") == "1.5 (1 to 2)"
    with pytest.raises(ConfigurationError, match="needs one of the rows red"):
        table.cell("blue", "weight")
    twice = results.Table("Boxes", ["box", "share", "share"], [["red", "1", "2"]])
    with pytest.raises(ConfigurationError, match="a name that no other has"):
        twice.cell("red", "share")


def test_a_command_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, left = tmp_path / "data", tmp_path / "left"
    left.mkdir()
    program = f"open({str(left / 'curves.csv')!r}, 'w').write('a'); print({REPORT!r}, end='')"
    command = [sys.executable, "-c", program, "--output", str(left)]
    for _ in range(2):  # again at the same commit: a folder of its own
        assert results.main(["boxes", "--output", str(data), "--", *command]) == 0
    assert "| red" in capsys.readouterr().out
    first, second = results.measurements("boxes", data)
    assert first.folder.parent == second.folder.parent == data / "boxes"
    assert first.title == "Boxes"
    assert first.tables == results.tables(REPORT)
    assert {path.name for path in first.folder.iterdir()} == {"about.json", "tables.json", "report.md", "curves.csv"}
    assert (first.folder / "report.md").read_text() == REPORT
    assert "--output" in first.command


def test_a_command_that_fails_leaves_nothing(tmp_path: Path) -> None:
    assert results.main(["boxes", "--output", str(tmp_path), "--", sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert not list(tmp_path.iterdir())


def test_outside_of_a_repository_the_version_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert results.commit_of_this() == (f"v{lightning_decentral.__version__}", False)
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no git
    assert results.commit_of_this() == (f"v{lightning_decentral.__version__}", False)


def test_the_newest_comes_first_and_an_unknown_subject_is_named(tmp_path: Path) -> None:
    for day in ("2026-01-02", "2026-01-03", "2026-01-01"):
        one = results.new(tmp_path, "boxes", "Boxes", "true")
        one.write()
        about = json.loads((one.folder / "about.json").read_text())
        (one.folder / "about.json").write_text(json.dumps({**about, "measured": f"{day}T00:00:00+00:00"}))
    assert [one.measured[8:10] for one in results.measurements("boxes", tmp_path)] == ["03", "02", "01"]
    with pytest.raises(ConfigurationError, match=r"need one of which there is a measurement .*: boxes"):
        results.measurements("balls", tmp_path)


def test_a_page_shows_the_newest_data_and_what_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "docs")
    import measured

    monkeypatch.setattr(measured, "DATA", tmp_path)
    one = results.new(tmp_path, "boxes", "Boxes", "python benchmarks/boxes.py --fast")
    results.Measurement(**{**vars(one), "tables": results.tables(REPORT)}).write()
    (one.folder / "plot.png").write_bytes(b"")
    shown = measured.result("boxes", tmp_path / "page.md")
    folder = f"boxes/{one.folder.name}"
    assert f"![Boxes]({folder}/plot.png)" in shown
    assert "| red \\* | 1.5 (1 to 2) |" in shown
    assert "lab.results boxes -- python -m lightning_decentral.lab.benchmarks.boxes --fast" in shown.replace(
        " \\\n   ", ""
    )
    assert measured.figure("boxes", "red", "weight") == "1.5"
    with pytest.raises(ValueError, match="need a row and a column"):
        measured.figure("boxes", "red", "height")
