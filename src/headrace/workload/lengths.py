"""How long things are: whole numbers of at least 1, as tokens, turns, or milliseconds of a pause."""

from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from headrace.types.errors import ConfigError
from headrace.types.trace import Ints, Trace
from headrace.workload.reading import ReadReport, csv_columns, floats, text_of
from headrace.workload.traces import find, read

LARGEST = 2**40


class Constant(msgspec.Struct, frozen=True, tag_field="kind", tag="constant", forbid_unknown_fields=True):
    value: int = 1


class Uniform(msgspec.Struct, frozen=True, tag_field="kind", tag="uniform", forbid_unknown_fields=True):
    """Each whole number from low to high alike."""

    low: int = 1
    high: int = 1024


class Zipf(msgspec.Struct, frozen=True, tag_field="kind", tag="zipf", forbid_unknown_fields=True):
    """P(k) ~ k^-exponent for k = 1..max (BurstGPT's example server: exponent 1.1, below 1,024)."""

    exponent: float = 1.1
    max: int = 1023


class Lognormal(msgspec.Struct, frozen=True, tag_field="kind", tag="lognormal", forbid_unknown_fields=True):
    """exp of a normal, rounded, kept within min..max."""

    median: float = 256.0
    sigma: float = 1.0
    """Of the natural logarithm."""
    min: int = 1
    max: int = 131_072


class Empirical(msgspec.Struct, frozen=True, tag_field="kind", tag="empirical", forbid_unknown_fields=True):
    """Values drawn with repetition: those given, or a column of a file."""

    values: tuple[int, ...] = ()
    file: str = ""
    """A trace of any known format, or a CSV with a header; a path, or below the data folder."""
    column: str = ""
    """prompt or output of a trace, or the name of a column of a CSV."""


Lengths: TypeAlias = Constant | Uniform | Zipf | Lognormal | Empirical


def draw(lengths: Lengths, rows: int, rng: np.random.Generator) -> Ints:
    """`rows` values, each at least 1. Raises ConfigError for settings out of their range, or a file that has no such column."""
    match lengths:
        case Constant(value):
            _ordered(1, value, "value")
            return np.full(rows, value, dtype=np.int64)
        case Uniform(low, high):
            _ordered(1, low, "low")
            _ordered(low, high, "high")
            return rng.integers(low, high, rows, endpoint=True)
        case Zipf(exponent, most):
            _ordered(1, most, "max")
            if most > 10_000_000:
                raise ConfigError(f"lengths: max is {most:,}; Zipf takes at most 10,000,000")
            share = np.cumsum(np.arange(1, most + 1, dtype=np.float64) ** -exponent)
            return np.searchsorted(share, rng.random(rows) * share[-1], side="right") + 1
        case Lognormal(median, sigma, least, most):
            _ordered(1, least, "min")
            _ordered(least, most, "max")
            if not (median > 0 and sigma >= 0):
                raise ConfigError(
                    f"lengths: median is {median} and sigma {sigma}; give a median above 0, sigma not below"
                )
            values = median * np.exp(sigma * rng.standard_normal(rows))
            return np.clip(np.rint(values), least, most).astype(np.int64)
        case Empirical():
            return rng.choice(known(lengths), rows)


def known(lengths: Empirical) -> Ints:
    """The values that are drawn from."""
    if lengths.values:
        values = np.array(lengths.values, dtype=np.int64)
        _ordered(1, int(values.min()), "smallest value")
        return values
    if not lengths.file or not lengths.column:
        raise ConfigError("lengths: empirical needs values, or file and column")
    path = find(lengths.file)
    if lengths.column in ("prompt", "output"):
        trace, _ = read(path)
        return getattr(trace, lengths.column)
    return _csv_column(path, lengths.column)


def joint(file: str, rows: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Prompt and output lengths drawn together from the rows of a trace, with repetition, so that what belongs together stays so."""
    trace = trace_of(file)
    chosen = rng.integers(0, len(trace), rows)
    return trace.prompt[chosen], trace.output[chosen]


def trace_of(file: str) -> Trace:
    """A trace by its name; its times do not matter here."""
    return read(find(file), sort=True)[0]


def _csv_column(path: Path, column: str) -> Ints:
    report = ReadReport(str(path), "csv")
    rows, cells = csv_columns(text_of(path), report, (column,))
    values = rows.tokens(floats(cells[column]), column)[rows.good]
    if report.bad or not len(values):
        raise ConfigError(f"{path}: " + "; ".join(report.lines()))
    return values


def _ordered(low: int, value: int, name: str) -> None:
    if not low <= value <= LARGEST:
        raise ConfigError(f"lengths: {name} is {value:,}; give at least {low:,}")
