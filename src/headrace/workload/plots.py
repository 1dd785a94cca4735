"""Plots for reports, as SVG text that stands inside an HTML page. The same data give the same bytes.

Words and axes have the colour of the page's text, and the ground is the page's: a plot is read on a light page and on a dark one.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator
from numpy.typing import ArrayLike

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#475569")
"""Of the first, second, ... series; after the last they begin again."""

INK = "#010203"
"""Stands for the colour of the page's text until the SVG is written."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headrace",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
SIZE_INCHES = (6.0, 3.2)
POINTS_MAX = 2_000
"""Of a curve: more cannot be seen, and would make the page large."""


def line(
    title: str,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    x: str = "",
    y: str = "",
    *,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = True,
    step: bool = False,
    whole: str = "",
) -> str:
    """Curves: name -> (x values, y values). `from_zero`: the y axis begins at 0. `step`: a value holds until the next. `whole`: which axes,
    of "xy", have ticks at whole numbers only."""
    with rc_context(STYLE):
        figure, axes = _figure(title, x, y)
        for name, (xs, ys) in series.items():
            across, up = _thinned(np.asarray(xs, dtype=float), np.asarray(ys, dtype=float))
            axes.plot(across, up, label=name, linewidth=1.4, drawstyle="steps-post" if step else "default")
        for axis in whole:
            getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(integer=True))
        return _finished(figure, axes, len(series), log_x, log_y, from_zero and not log_y)


def band(
    title: str,
    series: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    x: str = "",
    y: str = "",
    *,
    log_y: bool = False,
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> str:
    """Curves with what they vary by: name -> (x values, middle, low, high). `lines`: further ones without, name -> (x values, y values)."""
    with rc_context(STYLE):
        figure, axes = _figure(title, x, y)
        for name, columns in series.items():
            across, middle, low, high = (np.asarray(column, dtype=float) for column in columns)
            (drawn,) = axes.plot(across, middle, label=name, linewidth=1.4)
            axes.fill_between(across, low, high, alpha=0.2, color=drawn.get_color(), linewidth=0)
        for name, (xs, ys) in (lines or {}).items():
            axes.plot(np.asarray(xs, dtype=float), np.asarray(ys, dtype=float), label=name, linewidth=1.0)
        return _finished(figure, axes, len(series) + len(lines or {}), False, log_y, not log_y)


def stack(title: str, across: ArrayLike, layers: Mapping[str, ArrayLike], x: str = "", y: str = "") -> str:
    """Areas on top of each other: name -> height from each of `across` to the next."""
    with rc_context(STYLE):
        figure, axes = _figure(title, x, y)
        heights = np.array([np.asarray(layer, dtype=float) for layer in layers.values()])
        axes.stackplot(
            np.asarray(across, dtype=float),
            heights,
            labels=list(layers),
            colors=COLOURS,
            alpha=0.75,
            linewidth=0,
            step="post",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
        return _finished(figure, axes, 0, False, False, True)


def intervals(
    title: str,
    rows: Sequence[str],
    groups: Mapping[str, Sequence[tuple[float, float, float, bool]]],
    x: str = "",
    *,
    linear_below: float | None = None,
) -> str:
    """A dot and its interval for each row and group: group -> (middle, low, high, filled) by row; NaN: none. Zero is marked.

    `linear_below`: the axis is logarithmic beyond it, to both sides.
    """
    with rc_context(STYLE):
        figure, axes = _figure(title, x, "")
        figure.set_size_inches(2 * SIZE_INCHES[0], 1.2 + 0.13 * len(rows) * (1 + len(groups)))
        axes.axvline(0, color=INK, linewidth=0.8)
        for i, (name, points) in enumerate(groups.items()):
            colour = COLOURS[(i + 1) % len(COLOURS)]
            at = np.arange(len(rows)) + (i - (len(groups) - 1) / 2) * 0.7 / max(len(groups), 1)
            for place, (middle, low, high, filled) in zip(at, points, strict=True):
                axes.plot((low, high), (place, place), color=colour, linewidth=1.4)
                face = colour if filled else "none"
                axes.plot(middle, place, "o", color=colour, markersize=5, markerfacecolor=face)
            axes.plot([], [], "o", color=colour, label=name)
        axes.set_yticks(np.arange(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False, axis="y")
        if linear_below is not None:
            axes.set_xscale("symlog", linthresh=linear_below)
            axes.xaxis.set_major_locator(
                SymmetricalLogLocator(base=10, linthresh=linear_below, subs=(1.0, 2.0, 5.0))
            )
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _finished(figure, axes, 0, False, False, False)


def histogram(
    title: str,
    series: Mapping[str, ArrayLike],
    x: str = "",
    y: str = "share",
    *,
    bins: int = 50,
    log_x: bool = False,
) -> str:
    """Shares of values in `bins` equal parts (equal in log where `log_x`; values <= 0 are left out there)."""
    with rc_context(STYLE):
        figure, axes = _figure(title, x, y)
        columns = {name: _finite(values, log_x) for name, values in series.items()}
        edges = _edges([column for column in columns.values() if len(column)], bins, log_x)
        for name, column in columns.items():
            counts, _ = np.histogram(column, edges)
            axes.stairs(counts / max(len(column), 1), edges, label=name, fill=len(series) == 1, linewidth=1.4)
        return _finished(figure, axes, len(series), log_x, False, True)


def cdf(
    title: str,
    series: Mapping[str, ArrayLike],
    x: str = "",
    *,
    log_x: bool = False,
    marks: Mapping[str, float] | None = None,
) -> str:
    """The share of values at or below x. What is not finite (and <= 0 where `log_x`) is left out. `marks`: name -> x of a line across."""
    with rc_context(STYLE):
        figure, axes = _figure(title, x, "share at or below")
        for name, values in series.items():
            column = np.sort(_finite(values, log_x))
            share = np.arange(1, len(column) + 1) / max(len(column), 1)
            axes.plot(*_thinned(column, share), label=name, linewidth=1.4, drawstyle="steps-post")
        for i, (name, value) in enumerate((marks or {}).items(), 4):
            axes.axvline(value, color=COLOURS[i % len(COLOURS)], linestyle="--", linewidth=1.2, label=name)
        return _finished(figure, axes, len(series) + len(marks or {}), log_x, False, True)


def bars(
    title: str,
    values: Mapping[str, float],
    y: str = "",
    errors: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """One bar a name; `errors`: name -> (low, high) ends of its interval."""
    with rc_context(STYLE):
        figure, axes = _figure(title, "", y)
        places = np.arange(len(values))
        heights = np.array(list(values.values()), dtype=float)
        spread = None
        if errors:
            ends = np.array([errors.get(name, (value, value)) for name, value in values.items()], dtype=float)
            spread = np.abs(ends.T - heights)
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(values))]
        axes.bar(places, heights, yerr=spread, color=colours, capsize=3)
        axes.set_xticks(places, list(values))
        axes.grid(False, axis="x")
        return _finished(figure, axes, 0, False, False, False)


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=COLOURS)
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _finished(figure: Figure, axes: Axes, curves: int, log_x: bool, log_y: bool, from_zero: bool) -> str:
    if log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    if log_y:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    if from_zero:
        axes.set_ylim(bottom=0)
    if curves > 1:
        axes.legend()
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    # Many plots stand in one page: an id that nothing refers to is only a clash.
    svg = re.sub(r' id="[a-z0-9._]+_\d+"', "", svg[svg.index("<svg") :])
    return svg.replace(INK, "currentColor")


def _plain_ticks(axis: Axis) -> None:
    """Of a logarithmic axis: numbers as people write them, and more than whole decades where there are few."""
    low, high = axis.get_view_interval()
    few = low > 0 and high / low < 200
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _finite(values: ArrayLike, positive: bool) -> np.ndarray:
    column = np.asarray(values, dtype=float)
    return column[np.isfinite(column) & ((column > 0) | (not positive))]


def _edges(columns: list[np.ndarray], bins: int, log: bool) -> np.ndarray:
    if not columns:
        return np.linspace(1.0, 2.0, bins + 1)
    low, high = min(float(c.min()) for c in columns), max(float(c.max()) for c in columns)
    if low == high:
        low, high = (low / 1.5, high * 1.5) if log else (low - 0.5, high + 0.5)
    return np.geomspace(low, high, bins + 1) if log else np.linspace(low, high, bins + 1)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS_MAX points, the ends among them. Of each stretch the lowest and the highest stay, so that no peak is lost."""
    if len(x) <= POINTS_MAX:
        return x, y
    cuts = np.linspace(0, len(x), POINTS_MAX // 2, dtype=int)
    kept = {0, len(x) - 1}
    for begin, end in pairwise(cuts.tolist()):
        piece = np.nan_to_num(y[begin:end])
        kept.update((int(begin + piece.argmin()), int(begin + piece.argmax())))
    rows = np.array(sorted(kept))
    return x[rows], y[rows]
