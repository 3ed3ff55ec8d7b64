"""What all pictures share: a figure that needs no screen, lines that differ without colour, a legend beside them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_decentral.errors import ConfigurationError, to_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, ordered so that neighbours differ in brightness too; patterns and markers do the rest.
_COLOURS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#009E73")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDEST_LEGEND = 5  # entries beside each other
_CHARACTER_POINTS, _HANDLE_POINTS = 6.0, 56.0  # width in a legend, at most: of a character, and of a line's sample


def require_matplotlib(what: str) -> None:
    """Refuse to go on where pictures cannot be drawn.

    Args:
        what: would be drawn, to begin the sentence with.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError(
            f"{what} needs matplotlib, which is not installed. Install the recipes' packages: {to_install('recipes')}."
        )


def figure(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with panels, in inches; it has no window, and nothing global is changed."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False, **shared).tolist()


def line_style(index: int) -> dict[str, Any]:
    """Give the look of the line with this number; those of different lines differ in greyscale too."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def legend_below(drawn: Figure, panel: Axes) -> None:
    """Put what the lines of a panel are below all panels, where it covers none, in as many columns as have room."""
    handles, labels = panel.get_legend_handles_labels()
    if not labels:
        return
    longest = max(len(line) for label in labels for line in label.splitlines())
    room = int(drawn.get_figwidth() * 72 / (_CHARACTER_POINTS * longest + _HANDLE_POINTS))
    columns = max(min(len(labels), _WIDEST_LEGEND, room), 1)
    drawn.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def save(drawn: Figure, path: Path, title: str) -> None:
    """Write a figure under a title; the file's ending says as what."""
    drawn.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120)


def band(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Bring curves of several seeds together, point by point: the mean of all, with the smallest and the largest.

    A point is a measurement of the same number in each seed, wherever each made it: seeds that took different times are
    drawn at the mean of their times, so that no measurement is left out.

    Args:
        curves: of each seed, the places and the values there.

    Returns:
        Mean places, and the mean, the smallest and the largest value at each. Where one seed was done before others,
        the rest is that of the others.
    """
    places, means, smallest, largest = [], [], [], []
    for number in range(max(len(at) for at, _ in curves)):
        there = [(at[number], values[number]) for at, values in curves if number < len(at)]
        places.append(fmean(place for place, _ in there))
        means.append(fmean(value for _, value in there))
        smallest.append(min(value for _, value in there))
        largest.append(max(value for _, value in there))
    return places, means, smallest, largest
