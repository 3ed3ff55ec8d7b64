"""``lightning-decentral timeline``: draw what workers recorded, where their files had to be brought together first."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_decentral.plots.canvas import require_matplotlib
from lightning_decentral.plots.timeline import draw_timeline, read_timelines, write_page


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status, 0.

    Raises:
        ConfigurationError: if the folder has no files of workers, or matplotlib is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-decentral timeline",
        description="Draw who computed and who waited for whom, from the files of the callback Timeline.",
    )
    parser.add_argument("folder", type=Path, help="with a file worker-RANK.json of each worker; the results go there")
    folder: Path = parser.parse_args(argv).folder
    require_matplotlib("`timeline`")
    timelines = read_timelines(folder)
    write_page(timelines, folder / "timeline.html")
    draw_timeline(timelines, folder / "timeline.png")
    print(f"{len(timelines)} of {timelines[0].workers} workers: {folder}/timeline.html and timeline.png")
    return 0
