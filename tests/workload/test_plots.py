"""Plots: SVG text of bounded size, the same for the same data, whatever the data."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from headrace.workload import plots

NOISE = np.random.Generator(np.random.PCG64(1)).random(200_000)


def points(svg: str) -> int:
    """Of the longest path."""
    return max(len(re.findall(r"[ML] ", path)) for path in re.findall(r' d="([^"]*)"', svg))


def test_the_same_data_give_the_same_bytes():
    first, again = (plots.line("t", {"a": ([0, 1, 2], [3, 1, 2])}, "x", "y") for _ in range(2))
    assert first == again and first.startswith("<svg")
    assert first != plots.line("t", {"a": ([0, 1, 2], [3, 1, 4])}, "x", "y")


def test_long_curves_are_thinned():
    across = np.arange(len(NOISE))
    assert points(plots.line("t", {"a": (across, NOISE)})) <= plots.POINTS_MAX + 2
    assert points(plots.cdf("t", {"a": NOISE})) <= 2 * plots.POINTS_MAX + 4  # each step has two
    assert len(plots.line("t", {"a": (across, NOISE)})) < 300_000


def test_a_lone_peak_is_seen():
    flat = np.zeros(100_000)
    peak = flat.copy()
    peak[54_321] = 1.0
    across = np.arange(100_000)
    assert points(plots.line("t", {"a": (across, peak)})) > points(plots.line("t", {"a": (across, flat)}))


@pytest.mark.parametrize(
    "values", [[], [5.0], [0.0, 0.0], [np.nan, np.inf], [1.0, 10.0, np.nan, -3.0]], ids=str
)
@pytest.mark.parametrize("log_x", [False, True])
def test_any_values_give_a_picture(values: list[float], log_x: bool):
    for svg in (
        plots.histogram("t", {"a": values, "b": [1.0, 2.0]}, log_x=log_x),
        plots.cdf("t", {"a": values}, log_x=log_x),
        plots.line("t", {"a": (np.arange(1, len(values) + 1), values)}, log_x=log_x),
    ):
        ElementTree.fromstring(svg)


def test_bars_have_names_and_titles_are_text():
    svg = plots.bars("a < b & c", {"first": 1.0, "second": 2.0}, "s", {"first": (0.5, 1.5)})
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "a < b & c" in text and "first" in text and "second" in text
