"""What all readers of traces share: lines, columns of numbers, bad rows by reason, order in time."""

import csv
import gzip
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.types.errors import ConfigError
from headrace.types.trace import Ints, Trace, make_trace
from headrace.workload.transform import take

T = TypeVar("T", bound=Hashable)
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

LINES_NAMED = 5
"""Of bad rows, for each reason."""
TOKENS_MAX = 2**40
"""A longer prompt is a broken number."""


@dataclass(slots=True)
class BadRows:
    count: int
    lines: list[int]
    """Numbers of the first ones, from 1."""


@dataclass(slots=True)
class ReadReport:
    """What became of the rows of a file: `rows = kept + failed + sum of bad`; failed rows that were asked for are kept."""

    path: str
    format: str
    rows: int = 0
    kept: int = 0
    failed: int = 0
    """Requests that the file says have failed, left out unless asked for."""
    bad: dict[str, BadRows] = field(default_factory=dict[str, BadRows])
    """By reason."""
    moved: int = 0
    """Rows that sorting put elsewhere."""
    notes: list[str] = field(default_factory=list[str])

    @property
    def bad_count(self) -> int:
        return sum(bad.count for bad in self.bad.values())

    def lines(self) -> list[str]:
        """For people."""
        text = [f"{self.format}: {self.rows:,} rows, {self.kept:,} kept, {self.failed:,} failed"]
        for reason, bad in self.bad.items():
            named = ", ".join(map(str, bad.lines)) + (", ..." if bad.count > len(bad.lines) else "")
            text.append(f"{bad.count:,} bad: {reason} (line {named})")
        if self.moved:
            text.append(f"{self.moved:,} rows were put in order of time")
        return text + self.notes


class Rows:
    """The rows of one file while they are read: which are good, and why the others are not."""

    def __init__(self, numbers: Ints, report: ReadReport) -> None:
        self.numbers = numbers
        """Line numbers in the file, from 1."""
        self.good: Mask = np.ones(len(numbers), dtype=bool)
        self.report = report
        report.rows += len(numbers)

    def reject(self, wrong: Mask, reason: str) -> None:
        """Rows are rejected for the first thing that is wrong with them."""
        new = np.flatnonzero(wrong & self.good)
        if len(new):
            bad = self.report.bad.setdefault(reason, BadRows(0, []))
            bad.count += len(new)
            bad.lines = sorted([*bad.lines, *self.numbers[new[:LINES_NAMED]].tolist()])[:LINES_NAMED]
            self.good[new] = False

    def fail(self, failed: Mask) -> None:
        """The file says that these did not succeed: leave them out, and count them."""
        new = failed & self.good
        self.report.failed += int(new.sum())
        self.good &= ~new

    def tokens(self, values: Floats, name: str) -> Ints:
        """A column of token counts; rows with another thing are rejected."""
        self.reject(~np.isfinite(values), f"{name} is not a number")
        whole = np.where(self.good, values, 1.0)
        self.reject(whole != np.floor(whole), f"{name} is not a whole number")
        self.reject(whole < 0, f"{name} is negative")
        self.reject(whole == 0, f"{name} is zero")
        self.reject(whole > TOKENS_MAX, f"{name} is impossibly large")
        return np.where(self.good, whole, 1.0).astype(np.int64)

    def instants(self, values: Floats, unit_ns: int, name: str) -> Ints:
        """A column of times in units of `unit_ns`, in nanoseconds."""
        self.reject(~np.isfinite(values), f"{name} is not a number")
        self.reject(
            np.abs(np.where(self.good, values, 0.0)) * unit_ns > 2.0**62, f"{name} is impossibly large"
        )
        return np.rint(np.where(self.good, values, 0.0) * unit_ns).astype(np.int64)


def finish(
    name: str,
    rows: Rows,
    arrival_ns: Ints,
    prompt: Ints,
    output: Ints,
    *,
    sort: bool,
    negative: bool = False,
    **columns: Any,
) -> Trace:
    """The trace of the good rows, begun at its first arrival.

    `columns` as `make_trace` takes them, of all rows, good or not. `negative`: times below zero are not wrong (instants of a calendar).
    Raises ConfigError for a file without a good row, and for unsorted or negative times unless `sort`.
    """
    kept = np.flatnonzero(rows.good)
    report = rows.report
    report.kept = len(kept)
    if not len(kept):
        raise ConfigError(f"{report.path}: no good row; " + "; ".join(report.lines()))
    order = kept
    if sort:
        order = kept[np.argsort(arrival_ns[kept], kind="stable")]
        report.moved = int((order != kept).sum())
    else:
        _in_order(rows, kept, arrival_ns, negative)
    whole = make_trace(name, arrival_ns - arrival_ns[order[0]], prompt, output, **columns)
    return take(whole, order)


def _in_order(rows: Rows, kept: Ints, arrival_ns: Ints, negative: bool) -> None:
    times = arrival_ns[kept]
    below = kept[:0] if negative else kept[times < 0]
    back = kept[1:][np.diff(times) < 0]
    for wrong, what in ((below, "its time is negative"), (back, "its time is before that of the row above")):
        if len(wrong):
            raise ConfigError(
                f"{rows.report.path}, line {rows.numbers[wrong[0]]}: {what} ({len(wrong):,} such rows); "
                "`--sort` puts the rows in order and begins at the earliest"
            )


def text_of(path: Path) -> str:
    """A text file, packed by gzip or not. Raises ConfigError if it cannot be read."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            f"no trace {path}: is the name right? tools/fetch_data.py fetches public ones"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"trace {path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"trace {path}: is not text: {error}") from error


def csv_columns(text: str, report: ReadReport, wanted: Sequence[str]) -> tuple[Rows, dict[str, list[str]]]:
    """Cells by column, for every column of the header. Raises ConfigError if a wanted one is absent.

    Rows with too few or too many cells are rejected, and theirs are empty here. Empty lines are no rows.
    """
    try:
        lines = list(csv.reader(text.replace("\r\n", "\n").split("\n")))
    except csv.Error as error:
        raise ConfigError(f"{report.path}: is no CSV as {report.format} has it: {error}") from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    absent = [name for name in wanted if name not in header]
    if absent:
        begin = ", ".join(header)[:100] or "nothing"
        raise ConfigError(
            f"{report.path}: as {report.format} it needs the column {absent[0]!r}; its first line is: {begin}"
        )
    numbers = np.array([at for at, cells in enumerate(lines[1:], 2) if cells], dtype=np.int64)
    cells = [line for line in lines[1:] if line]
    rows = Rows(numbers, report)
    width = len(header)
    wrong = np.fromiter((len(line) != width for line in cells), dtype=bool, count=len(cells))
    rows.reject(wrong, f"it has not {width} fields")
    for at in np.flatnonzero(wrong).tolist():
        cells[at] = [""] * width
    return rows, {name: [line[at] for line in cells] for at, name in enumerate(header)}


def floats(cells: Sequence[str]) -> Floats:
    """Numbers; NaN for what is none."""
    try:
        return np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
    except ValueError:
        return np.fromiter(map(_float, cells), dtype=np.float64, count=len(cells))


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def classes(cells: Sequence[T]) -> tuple[Ints, tuple[T, ...]]:
    """Numbers of different values, in order of first appearance, and the values."""
    numbers: dict[T, int] = {}
    column = [numbers.setdefault(cell, len(numbers)) for cell in cells]
    return np.array(column, dtype=np.int64), tuple(numbers)
