"""Curves of runs that are compared: what was reached after so many epochs, seconds and bytes; and how far apart and how
late the workers were meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_decentral.plots.canvas import band, figure, legend_below, line_style, save

Curve = Sequence[Mapping[str, float]]
"""Measurements of one run, in order: numbers by name."""


def plot_curves(
    runs: Mapping[str, Sequence[Curve]],
    axes: Mapping[str, str],
    measures: Mapping[str, str],
    path: Path,
    title: str,
    from_zero: bool = False,
) -> None:
    """Draw every measure (a row of panels) against every axis (a column), with a line for each contender.

    A line is the mean over a contender's runs, measurement by measurement; the band around it goes from the smallest to
    the largest. Who has none of the measures is left out.

    Args:
        runs: the runs of each contender, one for each seed.
        axes: what a name on the horizontal axis is called there, with its unit.
        measures: the same of the vertical axes.
        path: of the picture.
        title: over it.
        from_zero: whether the vertical axes begin at 0.
    """
    from matplotlib.ticker import MaxNLocator

    shown = [
        (index, contender, curves)
        for index, (contender, curves) in enumerate(runs.items())
        if any(set(axes) & set(point) and set(measures) & set(point) for curve in curves for point in curve)
    ]
    drawn, panels = figure(len(measures), len(axes), 4.2 * len(axes), 2.7 * len(measures) + 1.0, sharey="row")
    for row, (measure, measure_label) in zip(panels, measures.items(), strict=True):
        for panel, (axis, axis_label) in zip(row, axes.items(), strict=True):
            for index, contender, curves in shown:
                known = [
                    ([point[axis] for point in points], [point[measure] for point in points])
                    for curve in curves
                    if (points := [point for point in curve if measure in point and axis in point])
                ]
                if not known:
                    panel.plot([], [], label=contender, **line_style(index))  # in the legend all the same
                    continue
                at, mean, smallest, largest = band(known)
                style = line_style(index)
                if len(known) > 1:
                    panel.fill_between(at, smallest, largest, color=style["color"], alpha=0.2, linewidth=0)
                panel.plot(at, mean, label=contender, **style)
            panel.set_xlabel(axis_label)
            panel.set_xlim(left=0)
            if axis == "epoch":
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(alpha=0.3)
        row[0].set_ylabel(measure_label)
        if from_zero:
            row[0].set_ylim(bottom=0)
    legend_below(drawn, panels[0][0])
    if any(len(curves) > 1 for curves in runs.values()):
        title += "\npoints: each validation, mean over the seeds; bands: from the smallest to the largest"
    save(drawn, path, title)
