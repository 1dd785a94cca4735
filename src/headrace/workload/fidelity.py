"""How far a simulation is from the live run it stands for: its error by metric, beside the spread of live repeats."""

from collections.abc import Sequence
from statistics import median

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from headrace.types.errors import ConfigError
from headrace.types.outcomes import RunData
from headrace.workload.metrics import LATENCIES, THROUGHPUT, value_as_text
from headrace.workload.report import as_json, origin, summarize


class FidelityFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One metric."""

    key: str
    """As in `metrics`: "ttft_p99_ms", "output_tokens_per_s"."""
    label: str
    unit: str
    live: float
    """The median of the live repeats."""
    simulated: float
    error: float
    """(simulated - live) / live."""
    spread: float | None
    """(most - least) / median of the live repeats; None for one."""

    def within(self, limit: float) -> bool:
        """The error is at most `limit`, or twice the spread where that is more."""
        return abs(self.error) <= max(limit, 2 * (self.spread or 0.0))


class FidelityReport(msgspec.Struct, frozen=True, kw_only=True):
    """All metrics that both have."""

    origin: str
    """Of the simulation."""
    live_runs: int
    figures: list[FidelityFigure]

    def to_json(self) -> bytes:
        return as_json(self)

    def figure(self, key: str) -> FidelityFigure | None:
        return next((each for each in self.figures if each.key == key), None)


def fidelity(
    live: Sequence[RunData], simulated: RunData, skip_s: tuple[float, float] = (0.0, 0.0)
) -> FidelityReport:
    """Of the same requests on the same deployment. Raises ConfigError without a live run."""
    if not live:
        raise ConfigError("fidelity: no live run is given to compare the simulation with")
    measured = [summarize(run, skip_s) for run in live]
    answer = summarize(simulated, skip_s)
    figures: list[FidelityFigure] = []
    for metric in (*LATENCIES, THROUGHPUT):
        repeats = [value for report in measured if (value := metric.of(report)) is not None]
        value, middle = metric.of(answer), median(repeats) if repeats else 0.0
        if value is None or middle == 0:
            continue
        figures.append(
            FidelityFigure(
                key=metric.key,
                label=metric.label,
                unit=metric.unit,
                live=middle,
                simulated=value,
                error=(value - middle) / middle,
                spread=(max(repeats) - min(repeats)) / middle if len(repeats) > 1 else None,
            )
        )
    return FidelityReport(
        origin=origin(simulated.clock, simulated.facts), live_runs=len(live), figures=figures
    )


def sentence(report: FidelityReport) -> str:
    """What was compared, and the largest error of all."""
    runs = f"{report.live_runs} live {'run' if report.live_runs == 1 else 'runs'}"
    if not report.figures:
        return f"Simulated beside {runs} of the same deployment: no figure is known of both."
    worst = max(report.figures, key=lambda each: abs(each.error))
    return f"Simulated beside {runs} of the same requests on the same deployment: the largest error is {worst.error:+.1%} ({worst.label})."


def rows_of(report: FidelityReport) -> list[tuple[str, str, str, str, str]]:
    """Metric, live, simulated, error, spread of live repeats."""
    return [
        (
            each.label,
            value_as_text(each.live, each.unit),
            value_as_text(each.simulated, each.unit),
            f"{each.error:+.1%}",
            "one run" if each.spread is None else f"{each.spread:.1%}",
        )
        for each in report.figures
    ]


HEADS = ("Metric", "live, median", "simulated", "error", "spread of live runs")


def render_fidelity(report: FidelityReport) -> RenderableType:
    """For a terminal."""
    table = Table(HEADS[0], title_justify="left")
    for name in HEADS[1:]:
        table.add_column(name, justify="right")
    for row in rows_of(report):
        table.add_row(*row)
    return Group(f"[bold]{escape(sentence(report))}[/]", table)
