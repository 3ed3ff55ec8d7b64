"""Parallel coordinates: what each run was told and what it reached, one line for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_decentral.plots.canvas import figure, legend_below, line_style, save

_MIDDLE = 0.5


def plot_parallel(
    runs: Sequence[tuple[str, Mapping[str, float]]], columns: Mapping[str, str], path: Path, title: str
) -> None:
    """Draw a vertical axis for each column, from its smallest value to its largest, and a line for each run.

    Args:
        runs: of each its contender, which gives the line its look, and its values by column. A line has a gap where a
            value is missing.
        columns: what a name is called below its axis.
        path: of the picture.
        title: over it.
    """
    drawn, ((panel,),) = figure(1, 1, max(5.0, 1.9 * len(columns) + 1.5), 4.0)
    contenders = list(dict.fromkeys(contender for contender, _ in runs))
    ends = {name: [values[name] for _, values in runs if name in values] for name in columns}
    for contender, values in runs:
        heights = [_height(values.get(name), ends[name]) for name in columns]
        style = {**line_style(contenders.index(contender)), "linewidth": 1.1, "alpha": 0.8}
        first = contender not in panel.get_legend_handles_labels()[1]
        panel.plot(range(len(columns)), heights, label=contender if first else None, **style)
    for place, name in enumerate(columns):
        panel.axvline(place, color="grey", linewidth=0.8, zorder=0)
        for height, value in ((-0.02, min(ends[name])), (1.02, max(ends[name]))):
            panel.text(place, height, f"{value:.4g}", ha="center", va="top" if height < 0 else "bottom", fontsize=8)
    panel.set_xticks(range(len(columns)), list(columns.values()), fontsize=8)
    panel.tick_params(axis="x", length=0, pad=14)
    panel.set_yticks([])
    panel.set_ylim(-0.08, 1.08)
    panel.margins(x=0.08)
    panel.spines[:].set_visible(False)
    legend_below(drawn, panel)
    save(drawn, path, title)


def _height(value: float | None, values: Sequence[float]) -> float:
    """Return the place of a value between the smallest and the largest; NaN, which draws nothing, if it is missing."""
    if value is None:
        return float("nan")
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else _MIDDLE
