"""The one report of a run, live or simulated: latencies, throughput, errors; as a table and as JSON.

Metrics are defined in `types.outcomes`. Latencies are of requests that succeeded; rates count what ended within the window.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from headrace.types.errors import ConfigError
from headrace.types.outcomes import Outcomes, RunData

Mask = NDArray[np.bool_]


class Spread(msgspec.Struct, frozen=True):
    """A distribution, milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: ArrayLike) -> "Spread | None":
        """NaN is no value; None for no values. Percentiles are exact."""
        values = np.asarray(seconds, dtype=np.float64)
        values = values[~np.isnan(values)]
        if not len(values):
            return None
        median, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(*(float(v) * 1e3 for v in (values.mean(), median, p90, p99, values.max())))


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of one run."""

    name: str
    seed: int
    clock: str
    """"wall" (live) | "virtual" (simulated)."""
    duration_s: float
    """Of the whole run."""
    skipped_s: tuple[float, float]
    """Left out at the begin and at the end: what follows is of the rest."""
    completed: int
    failed: int
    unfinished: int
    """Neither: still under way when the run ended."""
    errors: dict[str, int]
    """Counts by kind."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    """Of the input tokens, those found in a cache. These three are of completed requests."""
    recomputed_tokens: int
    bytes_moved: int
    """KV that went from instance to instance."""
    retries: int
    """Attempts after a request's first. These three are of all requests; a client does not see them."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    concurrency: float
    """Mean number of requests under way."""
    goodput_per_s: float | None
    """Requests a second that met all their goals; None without goals."""
    goodput_share: float | None
    """Of all requests."""
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    """Between tokens, as a client saw them; None where only a request's begin and end are known."""
    e2e_ms: Spread | None
    counters: dict[str, int]
    settings: dict[str, Any]
    facts: dict[str, Any]

    def to_json(self) -> bytes:
        return as_json(self)


def as_json(data: object) -> bytes:
    """Indented JSON; numpy's numbers as numbers, what JSON has no form for as text."""
    plain = msgspec.to_builtins(data, enc_hook=lambda x: x.item() if isinstance(x, np.generic) else str(x))
    return msgspec.json.format(msgspec.json.encode(plain), indent=2)


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The part of a run that is measured, [begin_ns, end_ns], and which requests arrived and ended in it."""

    begin_ns: int
    end_ns: int
    arrived: Mask
    ended: Mask

    @property
    def span_s(self) -> float:
        return max((self.end_ns - self.begin_ns) * 1e-9, 1e-9)


def window_of(run: RunData, skip_s: tuple[float, float] = (0.0, 0.0)) -> Window:
    """Raises ConfigError if nothing is left, or `skip_s` is negative."""
    outcomes = run.outcomes
    if min(skip_s) < 0 or (any(skip_s) and sum(skip_s) >= run.duration_s):
        raise ConfigError(
            f"skip {skip_s[0]:g} s and {skip_s[1]:g} s of a run of {run.duration_s:.3f} s: nothing is left to measure"
        )
    first_ns = int(outcomes.arrival_ns.min()) if len(outcomes) else 0
    begin_ns = first_ns + round(skip_s[0] * 1e9)
    end_ns = first_ns + round((run.duration_s - skip_s[1]) * 1e9)
    if not any(skip_s):
        # Everything counts, also what ended a rounding error after the end.
        everything = np.ones(len(outcomes), dtype=np.bool_)
        return Window(begin_ns, end_ns, everything, everything)
    arrived = (outcomes.arrival_ns >= begin_ns) & (outcomes.arrival_ns <= end_ns)
    ended = (outcomes.finished_ns >= begin_ns) & (outcomes.finished_ns <= end_ns)
    return Window(begin_ns, end_ns, arrived, ended)


def met_goals(run: RunData) -> Mask | None:
    """By request: it succeeded within its goals. None if no request has any."""
    if run.goals is None or all((goal < 0).all() for goal in run.goals):
        return None
    return run.outcomes.meets(*run.goals)


def concurrency(outcomes: Outcomes, window: Window) -> float:
    """Mean number of requests under way in the window; one that has not ended is so to the end."""
    ended = np.where(
        outcomes.finished_ns > 0,
        outcomes.finished_ns,
        np.where(outcomes.error == 0, window.end_ns, outcomes.arrival_ns),
    )
    inside = np.minimum(ended, window.end_ns) - np.maximum(outcomes.arrival_ns, window.begin_ns)
    return float(np.maximum(inside, 0).sum() * 1e-9 / window.span_s)


def summarize(run: RunData, skip_s: tuple[float, float] = (0.0, 0.0)) -> RunReport:
    """The figures of a run, without its first and last seconds where `skip_s` says so (warm-up, drain). Raises ConfigError."""
    outcomes, window = run.outcomes, window_of(run, skip_s)
    succeeded, met = outcomes.succeeded, met_goals(run)
    good, span = succeeded & window.ended, window.span_s
    measured = succeeded & window.arrived
    kinds = np.bincount(outcomes.error[window.arrived], minlength=len(outcomes.errors))
    errors = {name: int(n) for name, n in zip(outcomes.errors[1:], kinds[1:], strict=True) if n}
    inputs, outputs = int(outcomes.prompt[good].sum()), int(outcomes.output[good].sum())
    arrived = int(window.arrived.sum())
    completed, failed = int(good.sum()), sum(errors.values())
    return RunReport(
        name=run.name,
        seed=run.seed,
        clock=run.clock,
        duration_s=run.duration_s,
        skipped_s=skip_s,
        completed=completed,
        failed=failed,
        unfinished=arrived - failed - int(measured.sum()),
        errors=dict(sorted(errors.items())),
        input_tokens=inputs,
        output_tokens=outputs,
        cached_tokens=int(outcomes.cached[good].sum()),
        recomputed_tokens=int(outcomes.recomputed[window.arrived].sum()),
        bytes_moved=int(outcomes.bytes_moved[window.arrived].sum()),
        retries=int(np.maximum(outcomes.attempts[window.arrived] - 1, 0).sum()),
        requests_per_s=completed / span,
        output_tokens_per_s=outputs / span,
        total_tokens_per_s=(inputs + outputs) / span,
        concurrency=concurrency(outcomes, window),
        goodput_per_s=None if met is None else int((met & window.ended).sum()) / span,
        goodput_share=None if met is None else int((met & window.arrived).sum()) / max(arrived, 1),
        ttft_ms=Spread.of(outcomes.ttft_s()[measured]),
        tpot_ms=Spread.of(outcomes.tpot_s()[measured]),
        itl_ms=None if run.gaps_s is None else Spread.of(run.gaps_s),
        e2e_ms=Spread.of(outcomes.e2e_s()[measured]),
        counters=dict(run.counters),
        settings=run.settings,
        facts=run.facts,
    )


def origin(clock: str, facts: Mapping[str, Any]) -> str:
    """What the figures are: live, or simulated, and then how well the cost model is known to hold."""
    if clock == "wall":
        return "Live, on the wall clock."
    model, error = facts.get("cost_model", "not named"), facts.get("cost_error")
    return f"Simulated, on a virtual clock. Cost model: {words(model)}. Its measured error: {words(error, True)}."


def words(value: object, ratio: bool = False) -> str:
    """A fact as text. `ratio`: numbers are shares, shown as percent."""
    match value:
        case None:
            return "not measured"
        case bool():
            return "yes" if value else "no"
        case float() if ratio:
            return f"{value:.1%}"
        case float():
            return f"{value:.6g}"
        case Mapping():
            return ", ".join(f"{key} {words(each, ratio)}" for key, each in value.items())
        case list() | tuple():
            return ", ".join(words(each, ratio) for each in value)
        case _:
            return str(value)


def bytes_as_text(count: float) -> str:
    """With the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def rows_of(report: RunReport) -> list[tuple[str, str]]:
    """Counts and rates with their names; what did not occur is left out where few care."""
    cached = report.cached_tokens / max(report.input_tokens, 1)
    rows = [
        ("Requests completed", f"{report.completed:,}"),
        ("Requests failed", f"{report.failed:,}"),
        ("Requests unfinished", f"{report.unfinished:,}" if report.unfinished else ""),
        ("Retries", f"{report.retries:,}" if report.retries else ""),
        ("Duration", f"{report.duration_s:.2f} s"),
        (
            "Left out, begin and end",
            "{:g} s, {:g} s".format(*report.skipped_s) if any(report.skipped_s) else "",
        ),
        ("Requests under way, mean", f"{report.concurrency:,.1f}"),
        ("Input tokens (cached)", f"{report.input_tokens:,} ({cached:.1%})"),
        ("Output tokens", f"{report.output_tokens:,}"),
        ("Tokens recomputed", f"{report.recomputed_tokens:,}" if report.recomputed_tokens else ""),
        ("KV moved", bytes_as_text(report.bytes_moved) if report.bytes_moved else ""),
        ("Requests", f"{report.requests_per_s:,.2f} /s"),
        ("Output tokens", f"{report.output_tokens_per_s:,.1f} /s"),
        ("Input and output tokens", f"{report.total_tokens_per_s:,.1f} /s"),
    ]
    if report.goodput_per_s is not None and report.goodput_share is not None:
        rows.append(("Goodput", f"{report.goodput_per_s:,.2f} /s ({report.goodput_share:.1%})"))
    return [row for row in rows if row[1]]


def spreads_of(report: RunReport) -> dict[str, Spread | None]:
    """Latencies with their names; that between tokens only where it is known."""
    spreads = {
        "Time to first token": report.ttft_ms,
        "Time per output token": report.tpot_ms,
        "Between tokens": report.itl_ms,
        "End to end": report.e2e_ms,
    }
    return {name: spread for name, spread in spreads.items() if spread or name != "Between tokens"}


def render(report: RunReport) -> RenderableType:
    """The report for a terminal. The first line says whether it is live or simulated."""
    totals = Table(
        title=f"{escape(report.name)}, seed {report.seed}", show_header=False, title_justify="left"
    )
    totals.add_column()
    totals.add_column(justify="right")
    for row in rows_of(report):
        totals.add_row(*row)
    times = Table("Milliseconds", title_justify="left")
    for name in ("mean", "median", "p90", "p99", "max"):
        times.add_column(name, justify="right")
    for name, spread in spreads_of(report).items():
        values = ("-",) * 5 if spread is None else tuple(f"{v:.2f}" for v in msgspec.structs.astuple(spread))
        times.add_row(name, *values)
    parts: list[RenderableType] = [f"[bold]{escape(origin(report.clock, report.facts))}[/]", totals, times]
    if report.errors:
        errors = Table("Error", "Requests")
        for kind, count in report.errors.items():
            errors.add_row(escape(kind), f"{count:,}")
        parts.append(errors)
    return Group(*parts)


@contextmanager
def progress_bar(
    console: Console | None = None, what: str = "requests"
) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; yields what `run_load` takes as `progress`: told how many are done, of how many."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
