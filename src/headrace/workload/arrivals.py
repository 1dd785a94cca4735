"""When requests come: point processes. Each draws all instants at once from a generator of its own.

Every process is a renewal process of mean 1 on a clock that runs with the rate: an arrival stands where the integral of the rate reaches
the sum of the gaps so far. Gaps are Gamma with `shape` a: their coefficient of variation is 1 / sqrt(a), so 1 is Poisson and less comes in
bursts (BurstGPT, section 4).
"""

from math import ceil
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.errors import ConfigError
from headrace.types.trace import Ints

Floats = NDArray[np.float64]
NS_PER_S = 1e9


class Regular(msgspec.Struct, frozen=True, tag_field="kind", tag="regular", forbid_unknown_fields=True):
    """Equal gaps."""

    rate_per_s: float = 1.0


class Poisson(msgspec.Struct, frozen=True, tag_field="kind", tag="poisson", forbid_unknown_fields=True):
    rate_per_s: float = 1.0


class Gamma(msgspec.Struct, frozen=True, tag_field="kind", tag="gamma", forbid_unknown_fields=True):
    """Bursts: Gamma gaps."""

    rate_per_s: float = 1.0
    shape: float = 0.25
    cv: float | None = None
    """Of the gaps, in place of `shape`: shape = 1 / cv^2."""


class OnOff(msgspec.Struct, frozen=True, tag_field="kind", tag="on_off", forbid_unknown_fields=True):
    """A rate while on, another while off, for times that are exponential or fixed; it begins on."""

    on_rate_per_s: float = 2.0
    off_rate_per_s: float = 0.0
    on_s: float = 10.0
    """Mean."""
    off_s: float = 10.0
    fixed: bool = False
    """Every time on and off is the mean."""


class Diurnal(msgspec.Struct, frozen=True, tag_field="kind", tag="diurnal", forbid_unknown_fields=True):
    """A rate that follows the day: rate x (1 - swing x cos(2 pi (t / period + phase))), lowest at the begin; or a table."""

    rate_per_s: float = 1.0
    """Mean over a period."""
    swing: float = 0.8
    """0..1."""
    period_s: float = 86_400.0
    phase: float = 0.0
    """Share of a period by which it is ahead."""
    table: tuple[float, ...] = ()
    """Relative rates of equal parts of a period, in place of the cosine."""
    shape: float = 1.0


class Windows(msgspec.Struct, frozen=True, tag_field="kind", tag="windows", forbid_unknown_fields=True):
    """A rate and a shape for each window, over and over: what `fit` finds."""

    window_s: float = 1200.0
    rates_per_s: tuple[float, ...] = (1.0,)
    shapes: tuple[float, ...] = (1.0,)


Arrivals: TypeAlias = Regular | Poisson | Gamma | OnOff | Diurnal | Windows


def instants(process: Arrivals, rows: int, rng: np.random.Generator) -> Ints:
    """`rows` arrivals from 0 on, nanoseconds, ascending. Raises ConfigError for a setting out of its range."""
    match process:
        case Regular(rate):
            seconds = np.arange(rows) / _positive(rate, "rate_per_s")
        case Poisson(rate):
            seconds = np.cumsum(rng.standard_exponential(rows)) / _positive(rate, "rate_per_s")
        case Gamma(rate, shape, cv):
            shape = shape if cv is None else 1.0 / _positive(cv, "cv") ** 2
            seconds = np.cumsum(_gaps(shape, rows, rng)) / _positive(rate, "rate_per_s")
        case OnOff():
            seconds = _on_off(process, rows, rng)
        case Diurnal():
            seconds = _diurnal(process, rows, rng)
        case Windows():
            seconds = _windows(process, rows, rng)
    return np.rint(seconds * NS_PER_S).astype(np.int64)


def _on_off(process: OnOff, rows: int, rng: np.random.Generator) -> Floats:
    on, off = _positive(process.on_s, "on_s"), _positive(process.off_s, "off_s")
    rates = np.array([process.on_rate_per_s, process.off_rate_per_s])
    if (rates < 0).any() or not rates.any():
        raise ConfigError("arrivals: on_rate_per_s and off_rate_per_s must not be negative, and one above 0")
    clock = np.cumsum(rng.standard_exponential(rows))
    edges, area = np.zeros(1), np.zeros(1)
    while rows and area[-1] < clock[-1]:
        cycles = ceil((clock[-1] - area[-1]) / (rates @ [on, off])) + 1
        spans = np.ones((cycles, 2)) if process.fixed else rng.standard_exponential((cycles, 2))
        spans = (spans * [on, off]).ravel()
        edges = np.concatenate((edges, edges[-1] + np.cumsum(spans)))
        area = np.concatenate((area, area[-1] + np.cumsum(spans * np.tile(rates, cycles))))
    return _where(clock, edges, area)


def _diurnal(process: Diurnal, rows: int, rng: np.random.Generator) -> Floats:
    period = _positive(process.period_s, "period_s")
    if not 0 <= process.swing <= 1:
        raise ConfigError(f"arrivals: swing is {process.swing}; give 0 to 1")
    table = np.array(process.table)
    if len(table) and ((table < 0).any() or not table.any()):
        raise ConfigError("arrivals: table has rates relative to each other, none negative and one above 0")
    parts = len(table) or 1440
    edges = np.linspace(0.0, 1.0, parts + 1)
    if len(table):
        area = np.concatenate(([0.0], np.cumsum(table) / table.sum()))
        whole = (
            np.concatenate((edges[:-1] - 1, edges, edges[1:] + 1)),
            np.concatenate((area[:-1] - 1, area, area[1:] + 1)),
        )
        shifted = np.interp(edges + process.phase % 1.0, *whole) if process.phase else area
        area = shifted - shifted[0]
    else:
        turn = 2 * np.pi * (edges + process.phase)
        area = edges - process.swing * (np.sin(turn) - np.sin(turn[0])) / (2 * np.pi)
    clock = np.cumsum(_gaps(process.shape, rows, rng)) / (
        _positive(process.rate_per_s, "rate_per_s") * period
    )
    return (np.floor(clock) + _where(clock % 1.0, edges, area)) * period


def _windows(process: Windows, rows: int, rng: np.random.Generator) -> Floats:
    span = _positive(process.window_s, "window_s")
    rates, shapes = np.array(process.rates_per_s), np.array(process.shapes)
    if len(rates) != len(shapes) or (rates < 0).any() or not rates.any():
        raise ConfigError(
            "arrivals: windows have one shape for each rate; no rate is negative, and one is above 0"
        )
    pieces, found, window = list[Floats](), 0, 0
    due = float(
        _gaps(float(shapes[0]), 1, rng)[0]
    )  # of the next arrival, on the clock that runs with the rate, from the window's begin
    while found < rows:
        rate, shape = float(rates[window % len(rates)]), float(shapes[window % len(rates)])
        if due >= rate * span:
            due, window = due - rate * span, window + 1
            continue
        draws = min(rows - found, int((rate * span - due) * 1.1) + 16)
        marks = due + np.concatenate(([0.0], np.cumsum(_gaps(shape, draws, rng))))
        count = min(int(np.searchsorted(marks, rate * span)), draws)
        pieces.append(window * span + marks[:count] / rate)
        found, due = found + count, float(marks[count])
    return np.concatenate(pieces) if pieces else np.zeros(0)


def _gaps(shape: float, rows: int, rng: np.random.Generator) -> Floats:
    """Of mean 1."""
    return rng.standard_gamma(_positive(shape, "shape"), rows) / shape


def _where(clock: Floats, edges: Floats, area: Floats) -> Floats:
    """Times at which the integral of the rate, `area` at `edges`, reaches `clock`."""
    return np.interp(clock, area, edges)


def _positive(value: float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise ConfigError(f"arrivals: {name} is {value}; give a number above 0")
    return value
