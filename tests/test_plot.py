"""Promises of plot.py: curves lie where their numbers say, and no label can break the page."""
import math
import re
import xml.etree.ElementTree as ET

import pytest

from plumbing import plot
from plumbing.plot import Curve, svg, ticks


def lines(text: str) -> list[list[tuple[float, float]]]:
    """The points of every curve of an <svg>, in pixels."""
    return [[tuple(map(float, pair.split(","))) for pair in points.split()]
            for points in re.findall(r'<polyline points="([^"]*)"', text)]


@pytest.mark.parametrize("y, log", [([5, 10, 15], False), ([1, 10, 100], True)])
def test_equal_steps_are_equally_far_apart_and_up_is_more(y, log):
    (line,) = lines(svg([Curve("x", [1, 2, 3], y)], "steps", "loss", log=log))
    (x1, y1), (x2, y2), (x3, y3) = line
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x1 < x2
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2) and y1 > y2


def test_what_has_no_place_is_left_out():
    values = [None, math.nan, math.inf, 1.0, 0.0, -1.0]
    assert len(lines(svg([Curve("x", range(6), values)], "x", "y", log=True))[0]) == 1
    assert len(lines(svg([Curve("x", range(6), values)], "x", "y"))[0]) == 3
    assert "nothing to draw" in svg([Curve("x", [1], [math.nan])], "x", "y")
    assert "nothing to draw" in svg([], "x", "y")


def test_bars_lie_inside_the_axes_at_their_points():
    bars = Curve("x", [1, 2, 3], [5, None, 6], "#abcdef", spread=[4, 9, 3])
    text = svg([bars], "x", "y", zero=False)
    found = re.findall(r'<line x1="(\S+)" y1="(\S+)" x2="\1" y2="(\S+)" stroke="#abcdef"/>', text)
    (points,) = lines(text)
    assert [float(x) for x, _, _ in found] == [x for x, _ in points] and len(found) == 2
    for (_, low, high), (_, middle) in zip(found, points):
        assert plot.TOP <= float(high) < middle < float(low) <= plot.HEIGHT - plot.BOTTOM
    heights = [float(low) - float(high) for _, low, high in found]
    assert heights[0] / heights[1] == pytest.approx(4 / 3, rel=0.01)


def test_it_is_well_formed_whatever_the_labels_say():
    label = '<script>alert("&")</script>'
    text = svg([Curve(label, [1, 2], [3, 3])], label, label, marks=[1.5])
    words = [node.text for node in ET.fromstring(text).iter() if node.tag.endswith("text")]
    assert words.count(label) == 3 and "<script" not in text


def test_a_long_curve_is_thinned():
    (line,) = lines(svg([Curve("x", range(100000), range(100000))], "x", "y"))
    assert plot.MOST / 2 < len(line) <= plot.MOST


@pytest.mark.parametrize("low, high, log", [
    (0, 1, False), (0, 0.003, False), (0, 500000, False), (-3, 7, False),
    (0.01, 7, True), (1e-6, 10, True), (2.1, 2.6, True)])
def test_ticks_are_a_few_round_numbers_within_the_axis(low, high, log):
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 12 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert all(float(f"{t:.2g}") == pytest.approx(t) for t in found)
