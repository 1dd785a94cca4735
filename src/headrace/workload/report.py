"""What a load came to: latencies, throughput, errors; as a table and as JSON."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from headrace.workload.load import Goals, LoadConfig


class Outcome(msgspec.Struct):
    """One request as the client saw it. Instants are on one clock, in seconds; 0 has not happened."""

    begun_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    """Last event with text."""
    ended_s: float = 0.0
    events: int = 0
    gaps_s: list[float] = msgspec.field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    """Its kind; empty: it succeeded."""

    def token(self, now_s: float) -> None:
        """An event with text came."""
        self.events += 1
        if self.first_s:
            self.gaps_s.append(now_s - self.last_s)
        else:
            self.first_s = now_s
        self.last_s = now_s

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.begun_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.begun_s

    @property
    def tpot_s(self) -> float | None:
        """Per output token after the first; None for one token."""
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def meets(self, goals: Goals) -> bool:
        """It succeeded within all goals."""
        pairs = ((goals.ttft_ms, self.ttft_s), (goals.tpot_ms, self.tpot_s), (goals.e2e_ms, self.e2e_s))
        return not self.error and all(
            goal is None or value is None or value * 1e3 <= goal for goal, value in pairs
        )


class Spread(msgspec.Struct, frozen=True):
    """A distribution, milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread | None":
        """None for no values."""
        if not seconds:
            return None
        values = np.asarray(seconds) * 1e3
        median, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(float(values.mean()), float(median), float(p90), float(p99), float(values.max()))


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of one load."""

    config: LoadConfig
    model: str
    duration_s: float
    completed: int
    failed: int
    errors: dict[str, int]
    """Counts by kind."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    concurrency: float
    """Mean number of requests under way."""
    goodput_per_s: float | None
    """Requests a second that met all goals; None without goals."""
    goodput_share: float | None
    """Of all requests sent."""
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def summarize(config: LoadConfig, model: str, outcomes: list[Outcome], duration_s: float) -> LoadReport:
    """The report of these outcomes. Latencies are of requests that succeeded."""
    good = [outcome for outcome in outcomes if not outcome.error]
    errors: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    inputs, outputs = sum(o.input_tokens for o in good), sum(o.output_tokens for o in good)
    met = sum(outcome.meets(config.goals) for outcome in outcomes) if config.goals != Goals() else None
    span = max(duration_s, 1e-9)
    # The key is a secret, and a report is written to files.
    public = msgspec.structs.replace(config, api_key=None)
    return LoadReport(
        config=public,
        model=model,
        duration_s=duration_s,
        completed=len(good),
        failed=len(outcomes) - len(good),
        errors=dict(sorted(errors.items())),
        input_tokens=inputs,
        output_tokens=outputs,
        cached_tokens=sum(o.cached_tokens for o in good),
        requests_per_s=len(good) / span,
        output_tokens_per_s=outputs / span,
        total_tokens_per_s=(inputs + outputs) / span,
        concurrency=sum(o.e2e_s for o in outcomes) / span,
        goodput_per_s=None if met is None else met / span,
        goodput_share=None if met is None else met / len(outcomes),
        ttft_ms=Spread.of([o.ttft_s for o in good if o.first_s]),
        tpot_ms=Spread.of([tpot for o in good if (tpot := o.tpot_s) is not None]),
        itl_ms=Spread.of([gap for o in good for gap in o.gaps_s]),
        e2e_ms=Spread.of([o.e2e_s for o in good]),
    )


def render(report: LoadReport) -> RenderableType:
    """The report for a terminal."""
    totals = Table(title=f"Load on {report.model}", show_header=False, title_justify="left")
    totals.add_column()
    totals.add_column(justify="right")
    rows = [
        ("Requests completed", f"{report.completed}"),
        ("Requests failed", f"{report.failed}"),
        ("Duration", f"{report.duration_s:.2f} s"),
        ("Requests under way, mean", f"{report.concurrency:.1f}"),
        ("Input tokens (cached)", f"{report.input_tokens} ({report.cached_tokens})"),
        ("Output tokens", f"{report.output_tokens}"),
        ("Requests", f"{report.requests_per_s:.2f} /s"),
        ("Output tokens", f"{report.output_tokens_per_s:.1f} /s"),
        ("Input and output tokens", f"{report.total_tokens_per_s:.1f} /s"),
    ]
    if report.goodput_per_s is not None and report.goodput_share is not None:
        rows.append(("Goodput", f"{report.goodput_per_s:.2f} /s ({report.goodput_share:.1%})"))
    for row in rows:
        totals.add_row(*row)
    times = Table("Milliseconds", title_justify="left")
    for name in ("mean", "median", "p90", "p99", "max"):
        times.add_column(name, justify="right")
    spreads = {
        "Time to first token": report.ttft_ms,
        "Time per output token": report.tpot_ms,
        "Between tokens": report.itl_ms,
        "End to end": report.e2e_ms,
    }
    for name, spread in spreads.items():
        values = ("-",) * 5 if spread is None else tuple(f"{v:.2f}" for v in msgspec.structs.astuple(spread))
        times.add_row(name, *values)
    parts: list[RenderableType] = [totals, times]
    if report.errors:
        errors = Table("Error", "Requests")
        for kind, count in report.errors.items():
            errors.add_row(kind, str(count))
        parts.append(errors)
    return Group(*parts)


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; yields what `run_load` takes as `progress`."""
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("requests", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
