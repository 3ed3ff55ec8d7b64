"""What each worker did and for whom it waited: read from the files of the callback `Timeline`, and drawn."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.plots.canvas import figure, save

TOGETHER = ("NeighborExchange", "NeighborAverage", "AllReduce")  # what all who take part begin at the same place
NETWORK = -1  # in the place of a worker: nobody was late, the bytes were under way
_LOOKS = {  # of a kind of time: its colour and, where colour is not seen, its pattern
    "gradient": ("#0072B2", ""),
    "gradient and waiting": ("#7FB2D5", r"\\"),
    "update": ("#E69F00", ""),
    "meeting": ("#D9D9D9", "xx"),
    "validation": ("#CC79A7", "..."),
    "waiting": ("#F2F2F2", "////"),
}


@dataclass(frozen=True)
class Waiting:
    """A time in which a worker only waited; see `lightning_decentral.traffic.Wait`. Seconds of the run's clock."""

    began: float
    ended: float
    asked: float
    place: tuple[int, ...]
    word: str
    peers: tuple[int, ...] | None


@dataclass(frozen=True)
class WorkerTimeline:
    """What one worker did.

    Attributes:
        rank: of the worker.
        host: its machine.
        workers: how many there are.
        method: what it trains with.
        spans: kind, begin and end of what it did, in seconds; waits inside them are not taken out.
        waits: when it waited.
    """

    rank: int
    host: str
    workers: int
    method: str
    spans: tuple[tuple[str, float, float], ...]
    waits: tuple[Waiting, ...]

    def seconds(self) -> dict[str, float]:
        """Tell how long it did each kind of thing, and `waiting`; the rest is data and whatever else the loop does."""
        total: dict[str, float] = defaultdict(float)
        for kind, began, ended in self.spans:
            inside = sum(max(0.0, min(ended, w.ended) - max(began, w.began)) for w in self.waits)
            total[kind] += ended - began - inside
        total["waiting"] = sum(wait.ended - wait.began for wait in self.waits)
        begin, end = extent([self])
        total["other"] = max(0.0, end - begin - sum(total.values()))
        return dict(total)


def read_timelines(folder: Path) -> list[WorkerTimeline]:
    """Read the files ``worker-*.json`` of a folder, by rank.

    Raises:
        ConfigurationError: if there is none, or they are of runs with different numbers of workers.
    """
    found = []
    for path in folder.glob("worker-*.json"):
        record = json.loads(path.read_text())
        waits = [
            Waiting(began, ended, asked, tuple(place), word, None if peers is None else tuple(peers))
            for began, ended, asked, place, word, peers in record["waits"]
        ]
        spans = tuple((kind, began, ended) for kind, began, ended in record["spans"])
        found.append(
            WorkerTimeline(record["rank"], record["host"], record["workers"], record["method"], spans, tuple(waits))
        )
    if not found:
        raise ConfigurationError(
            f"A timeline got the folder {folder} without a file worker-0.json, needs those that the callback "
            "`Timeline` writes at the end of `fit`. Give the folder timeline/ of a run."
        )
    if len({one.workers for one in found}) > 1:
        raise ConfigurationError(
            f"A timeline got the folder {folder} with files of runs with different numbers of workers, needs those of "
            "one run. Delete the older ones."
        )
    return sorted(found, key=lambda one: one.rank)


def extent(timelines: Iterable[WorkerTimeline]) -> tuple[float, float]:
    """Tell from when to when something is known, in seconds."""
    spans = [span for one in timelines for span in one.spans]
    return min((begin for _, begin, _ in spans), default=0.0), max((end for _, _, end in spans), default=0.0)


def blame(timelines: Sequence[WorkerTimeline]) -> dict[int, list[tuple[int, float]]]:
    """Divide each wait of each worker between the one that came last and the network.

    Workers that exchange something begin to at the same place of their programs. Until the last of those waited for
    has come there, it is that one which is waited for; what is left of the wait is the network's. A wait for something
    that has no such place, as a call, is the network's and the answer's.

    Returns:
        Of each rank, for each of its waits: the worker that came last, or `NETWORK`, and the seconds until it came.
    """
    came = {(one.rank, wait.place): wait.asked for one in timelines for wait in one.waits}
    known = [one.rank for one in timelines]
    shares: dict[int, list[tuple[int, float]]] = {}
    for one in timelines:
        shares[one.rank] = []
        for wait in one.waits:
            peers = [rank for rank in known if rank != one.rank] if wait.peers is None else wait.peers
            there = [(came[peer, wait.place], peer) for peer in peers if (peer, wait.place) in came]
            if wait.word not in TOGETHER:
                there = []
            moment, peer = max(there, default=(wait.began, NETWORK))
            late = min(max(moment - wait.began, 0.0), wait.ended - wait.began)
            shares[one.rank].append((peer, late) if late > 0 else (NETWORK, 0.0))
    return shares


def who_waited_for_whom(timelines: Sequence[WorkerTimeline]) -> dict[tuple[int, int], float]:
    """Add up the seconds for which one worker waited for another, or for `NETWORK`."""
    total: dict[tuple[int, int], float] = defaultdict(float)
    shares = blame(timelines)
    for one in timelines:
        for wait, (peer, late) in zip(one.waits, shares[one.rank], strict=True):
            total[one.rank, peer] += late
            total[one.rank, NETWORK] += wait.ended - wait.began - late
    return dict(total)


def write_page(timelines: Sequence[WorkerTimeline], path: Path) -> None:
    """Write one HTML page that needs no other file: timelines to zoom into, who waited for whom, where time went."""
    shares, looks = blame(timelines), _looks(timelines)
    data = []
    for one in timelines:
        waits = [
            [wait.began, wait.ended, wait.word, wait.place[1], *share]
            for wait, share in zip(one.waits, shares[one.rank], strict=True)
        ]
        data.append({"rank": one.rank, "host": one.host, "spans": one.spans, "waits": waits})
    page = Path(__file__).with_name("timeline.html").read_text(encoding="utf-8")
    filled = {
        "TITLE": html.escape(_title(timelines)),
        "SECONDS": _table(
            ["worker", *(f"{kind}, s" for kind in (*looks, "other"))],
            [
                [f"{one.rank} on {one.host}", *(f"{one.seconds().get(kind, 0.0):.3f}" for kind in (*looks, "other"))]
                for one in timelines
            ],
        ),
        "WAITS": _table(*_waits_table(timelines)),
        "COLOURS": json.dumps({kind: colour for kind, (colour, _) in looks.items()}),
        "DATA": json.dumps(data).replace("</", "<\\/"),
    }
    for name, text in filled.items():
        page = page.replace(f"@{name}@", text)
    path.write_text(page, encoding="utf-8")


def draw_timeline(timelines: Sequence[WorkerTimeline], path: Path, steps: int = 12) -> None:
    """Draw the middle of the timelines, and who waited for whom in all of them, as a PNG.

    Args:
        timelines: of the workers.
        path: of the picture.
        steps: how many steps of the slowest worker are shown.
    """
    drawn, ((times, matrix),) = figure(
        1, 2, 14.0, 0.42 * len(timelines) + 2.6, width_ratios=(3, 0.4 + 0.25 * len(timelines))
    )
    begin, end = extent(timelines)
    slowest = max((e - b for one in timelines for b, e in _steps(one)), default=end - begin)
    middle = (begin + end) / 2
    begin, end = max(begin, middle - steps * slowest / 2), min(end, middle + steps * slowest / 2)
    looks = _looks(timelines)
    for row, one in enumerate(timelines):
        bars = {kind: [(b, e - b) for k, b, e in one.spans if k == kind and e > begin and b < end] for kind in looks}
        bars["waiting"] = [(w.began, w.ended - w.began) for w in one.waits if w.ended > begin and w.began < end]
        for kind, (colour, pattern) in looks.items():
            times.broken_barh(
                bars[kind], (row - 0.4, 0.8), facecolor=colour, hatch=pattern, edgecolor="black", linewidth=0.3,
                label=kind if row == 0 else None,
            )  # fmt: skip
    times.set_xlim(begin, end)
    times.set_yticks(range(len(timelines)), [f"worker {one.rank}" for one in timelines])
    times.invert_yaxis()
    times.set_xlabel("seconds since training began")
    times.set_title("what each worker did (white: data, and other things of the loop)", fontsize="medium")
    headings, rows = _waits_table(timelines)
    total = who_waited_for_whom(timelines)
    peers = [one.rank for one in timelines] + [NETWORK]
    values = [[total.get((one.rank, peer), 0.0) for peer in peers] for one in timelines]
    largest = max(map(max, values)) or 1.0
    matrix.imshow(values, cmap="Greys", vmin=0.0, vmax=1.5 * largest, aspect="auto")
    for y, row_texts in enumerate(rows):
        for x, text in enumerate(row_texts[1:-1]):
            colour = "white" if values[y][x] > 0.9 * largest else "black"
            matrix.annotate(text, (x, y), ha="center", va="center", fontsize="small", color=colour)
    matrix.set_xticks(range(len(peers)), [*headings[1:-2], "network"])
    matrix.set_yticks(range(len(timelines)), [str(one.rank) for one in timelines])
    matrix.set_xlabel("for worker")
    matrix.set_ylabel("worker waited")
    matrix.set_title("seconds waited", fontsize="medium")
    handles, labels = times.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(drawn, path, _title(timelines))


def _looks(timelines: Sequence[WorkerTimeline]) -> dict[str, tuple[str, str]]:
    """Return how the kinds of time look that there are."""
    found = {"waiting", *(kind for one in timelines for kind, _, _ in one.spans)}
    return {kind: look for kind, look in _LOOKS.items() if kind in found}


def _steps(one: WorkerTimeline) -> list[tuple[float, float]]:
    begins = [begin for kind, begin, _ in one.spans if kind.startswith("gradient")]
    return list(pairwise(begins))


def _title(timelines: Sequence[WorkerTimeline]) -> str:
    first = timelines[0]
    of = "" if len(timelines) == first.workers else f" (of {first.workers})"
    return f"Timeline of {len(timelines)} workers{of}, {first.method}"


def _waits_table(timelines: Sequence[WorkerTimeline]) -> tuple[list[str], list[list[str]]]:
    """Make a row for each worker: the seconds for which it waited for each other one, for the network, and in all."""
    total = who_waited_for_whom(timelines)
    peers = [one.rank for one in timelines]
    rows = []
    for one in timelines:
        values = [total.get((one.rank, peer), 0.0) for peer in (*peers, NETWORK)]
        cells = [
            "" if peer == one.rank else f"{value:.3f}" for peer, value in zip((*peers, NETWORK), values, strict=True)
        ]
        rows.append([f"worker {one.rank}", *cells, f"{sum(values):.3f}"])
    return ["", *map(str, peers), "network, answers", "in all"], rows


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
