"""What all pictures share: a figure that needs no screen, lines that differ without colour, a legend beside them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_decentral.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, ordered so that neighbours differ in brightness too; patterns and markers do the rest.
_COLOURS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#009E73")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDEST_LEGEND = 5  # entries beside each other


def require_matplotlib(what: str) -> None:
    """Refuse to go on where pictures cannot be drawn.

    Args:
        what: would be drawn, to begin the sentence with.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError(
            f"{what} needs matplotlib, which is not installed. Install the recipes' packages: "
            "pip install lightning-decentral[recipes]."
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
    """Put what the lines of a panel are below all panels, where it covers none."""
    handles, labels = panel.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), _WIDEST_LEGEND), frameon=False)


def save(drawn: Figure, path: Path, title: str) -> None:
    """Write a figure under a title; the file's ending says as what."""
    drawn.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120)


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[Any, Any, Any, Any]:
    """Bring curves of several seeds together: the mean of all, with the smallest and the largest.

    Args:
        curves: of each seed, the places and the values there. Places rise.

    Returns:
        Places, mean, smallest and largest, as arrays: at as many places as the longest curve has, where all curves are
        defined; between two of its points a curve is straight.
    """
    import numpy as np

    first, last = max(places[0] for places, _ in curves), min(places[-1] for places, _ in curves)
    count = max(len(places) for places, _ in curves)
    if last < first:  # one seed was done before another had begun
        last = first
    at = np.linspace(first, last, count) if count > 1 else np.array([first])
    if all(list(places) == list(curves[0][0]) for places, _ in curves):
        at = np.asarray(curves[0][0], dtype=float)  # where they were measured
    values = np.stack([np.interp(at, places, values) for places, values in curves])
    return at, values.mean(axis=0), values.min(axis=0), values.max(axis=0)
