"""Proved here: what pictures say is what was measured, and their lines can be told apart without colour."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from lightning_decentral.plots.canvas import band, figure, legend_below, line_style
from lightning_decentral.plots.steps import lines_that_differ


def test_a_band_of_seeds_that_were_measured_at_the_same_places() -> None:
    at, mean, smallest, largest = band([([1, 2, 4], [3.0, 5.0, 6.0]), ([1, 2, 4], [1.0, 5.0, 9.0])])
    assert at == [1, 2, 4]
    assert (mean, smallest, largest) == ([2.0, 5.0, 7.5], [1.0, 5.0, 6.0], [3.0, 5.0, 9.0])


def test_a_band_of_seeds_that_took_different_times() -> None:
    """Each measurement of each seed is in it: the second of one with the second of the other."""
    at, mean, smallest, largest = band([([1, 2, 3], [0.1, 0.2, 0.3]), ([3, 6, 9], [0.3, 0.6, 0.9])])
    assert at == [2, 4, 6]
    assert mean == pytest.approx([0.2, 0.4, 0.6])
    assert (smallest, largest) == ([0.1, 0.2, 0.3], [0.3, 0.6, 0.9])


def test_a_seed_that_was_done_earlier() -> None:
    at, mean, smallest, largest = band([([1, 2], [3.0, 5.0]), ([3], [7.0])])
    assert (at, mean, smallest, largest) == ([2, 2], [5.0, 5.0], [3.0, 5.0], [7.0, 5.0])


def brightness(colour: str) -> float:
    red, green, blue = (int(colour[first : first + 2], 16) / 255 for first in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("count", [2, 8, 20])
def test_lines_differ_without_colour(count: int) -> None:
    styles = [line_style(index) for index in range(count)]
    assert all(one["linestyle"] != two["linestyle"] for one, two in pairwise(styles))
    for one, two in combinations(styles, 2):
        same = one["linestyle"] == two["linestyle"] and one["marker"] == two["marker"]
        assert not same
    for one, two in pairwise(styles[:7]):
        assert abs(brightness(one["color"]) - brightness(two["color"])) > 0.08


@pytest.mark.parametrize("longest", ["DPSGD", "MomentumTracking OnePeerExponential"])
def test_a_legend_is_not_wider_than_its_figure(longest: str) -> None:
    pytest.importorskip("matplotlib")
    drawn, ((panel,),) = figure(1, 1, 12.5, 6.0)
    for index in range(24):
        panel.plot([0, 1], [0, index], label=longest if index % 2 else "DDP", **line_style(index))
    legend_below(drawn, panel)
    drawn.canvas.draw()
    legend = drawn.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= drawn.bbox.width
    assert len(drawn.legends[0].get_texts()) == 24


def test_methods_whose_lines_are_one_to_the_eye_share_it() -> None:
    lines = lines_that_differ(["a", "b", "c"], [[1.0, 2.0], [1.0, 2.1], [1.004, 2.01]])
    assert lines == [(["a", "c"], [1.0, 2.0]), (["b"], [1.0, 2.1])]
