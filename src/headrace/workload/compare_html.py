"""A comparison as one HTML page: who wins where in its first sentences, then intervals, distributions and the table."""

import numpy as np

from headrace.workload import fidelity as fidelities
from headrace.workload import frame
from headrace.workload.compare import Comparison, Difference, MetricComparison, change_as_text, verdicts
from headrace.workload.fidelity import FidelityReport
from headrace.workload.html import flattened
from headrace.workload.metrics import number_as_text
from headrace.workload.report import words

TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, after the first",
    "e2e": "End to end",
}
LINEAR_BELOW = 10.0
"""Percent: where changes of more than 100% are drawn too, the axis is logarithmic beyond this."""


def comparison_html(comparison: Comparison, fidelity: FidelityReport | None = None) -> str:
    """The page. `fidelity`: how well the simulation of the recorded deployment itself matched, for a "what if"."""
    seeds = len(comparison.seeds)
    baseline = comparison.variants[0]
    lead = [
        comparison.origin,
        *verdicts(comparison),
        f"{len(comparison.variants)} variants over {seeds} {'seed' if seeds == 1 else 'seeds'}; each seed gives all of them the same "
        f"requests. The baseline is {baseline}.",
    ]
    parts = [changes(comparison), distributions(comparison), figures(comparison)]
    if fidelity is not None:
        lead.append(fidelities.sentence(fidelity))
        table = frame.table(fidelities.HEADS, fidelities.rows_of(fidelity))
        parts.append(frame.section("How well the simulation matches the live deployment", table))
    parts.append(settings(comparison))
    return frame.page(f"Comparison: {', '.join(comparison.variants)}", lead, parts)


def changes(comparison: Comparison) -> str:
    """A dot and an interval for each metric and variant."""
    from headrace.workload import plots

    metrics = [metric for metric in comparison.metrics if any(each.relative for each in metric.differences)]
    groups = {
        name: [point(comparison.against_baseline(metric, name)) for metric in metrics]
        for name in comparison.variants[1:]
    }
    if not metrics:
        return ""
    ends = np.abs([end for points in groups.values() for *numbers, _ in points for end in numbers])
    wide = bool(np.nanmax(ends, initial=0.0) > 100)
    rows = [
        f"{metric.label} {'(less is better)' if metric.lower_is_better else '(more is better)'}"
        for metric in metrics
    ]
    svg = plots.intervals(
        f"Change against {comparison.variants[0]}",
        rows,
        groups,
        "change of the mean over seeds [%]",
        linear_below=LINEAR_BELOW if wide else None,
    )
    reading = (
        "A dot is the mean change, the line its 95% confidence interval over seeds. Filled dots are beyond noise (5%, corrected for the "
        "number of metrics); hollow ones are not."
    )
    if wide:
        reading += f" Beyond {LINEAR_BELOW:g}% the axis is logarithmic."
    return frame.section("Changes", frame.plots(frame.figure(svg, reading, wide=True)))


def point(difference: Difference | None) -> tuple[float, float, float, bool]:
    """As `plots.intervals` takes it, in percent."""
    if difference is None or difference.relative is None:
        return np.nan, np.nan, np.nan, False
    middle, low, high = (100 * value for value in difference.relative)
    return middle, low, high, difference.verdict in ("better", "worse")


def distributions(comparison: Comparison) -> str:
    """The variants' latencies over each other."""
    from headrace.workload import plots

    drawn: list[str] = []
    for name, of_variant in comparison.curves.items():
        ends = np.array(list(of_variant.values()))
        scale, unit = (1.0, "ms") if np.median(ends) < 1_000 else (1e3, "s")
        least, most = ends[:, 2].min(), ends[:, -1].max()
        log = bool(least > 0 and most / least > 30)
        curves = {
            variant: (np.array(curve) / scale, comparison.levels) for variant, curve in of_variant.items()
        }
        svg = plots.line(
            TITLES[name], curves, f"{TITLES[name].lower()} [{unit}]", "share at or below", log_x=log
        )
        reading = "How many of the successful requests took at most so long, the mean over seeds: further left is better."
        drawn.append(frame.figure(svg, reading + (" The time axis is logarithmic." if log else "")))
    return frame.section("Latency", frame.plots(*drawn)) if drawn else ""


def figures(comparison: Comparison) -> str:
    """Means by metric and variant, and who wins."""
    baseline, *others = comparison.variants
    rows: list[list[frame.Cell]] = []
    for metric in comparison.metrics:
        row: list[frame.Cell] = [
            f"{metric.label} [{metric.unit}]",
            metric.winner or "",
            mean_as_text(metric, baseline),
        ]
        row += [change(metric, name, comparison.against_baseline(metric, name)) for name in others]
        rows.append(row)
    reading = frame.note(
        "Means over seeds. Changes are seed by seed, with 95% confidence intervals; colour: beyond noise, green better. A variant wins a "
        "metric only if it beats every other one beyond noise."
    )
    return frame.section(
        "Figures", reading, frame.table(["Metric", "wins", f"{baseline} (baseline)", *others], rows)
    )


def settings(comparison: Comparison) -> str:
    """Those that all variants have alike, and those that differ; empty without any."""
    flat = {name: dict(flattened(group)) for name, group in comparison.settings.items()}
    keys = list(dict.fromkeys(key for group in flat.values() for key in group))
    rows = [[key, *(words(flat[name][key]) if key in flat[name] else "" for name in flat)] for key in keys]
    apart = [row for row in rows if len(set(row[1:])) > 1]
    alike = [row[:2] for row in rows if len(set(row[1:])) == 1]
    tables = [
        frame.table(["What differs", *flat], apart, words=True) if apart else "",
        frame.table(["What is the same", ""], alike, words=True) if alike else "",
    ]
    return frame.section("Settings", *tables) if rows else ""


def mean_as_text(metric: MetricComparison, variant: str) -> str:
    mean = metric.means[variant]
    return "-" if mean is None else number_as_text(mean)


def change(metric: MetricComparison, variant: str, difference: Difference | None) -> frame.Cell:
    """A variant's mean and its change; coloured if beyond noise."""
    mean = mean_as_text(metric, variant)
    if difference is None:
        return mean
    kinds = {"better": "good", "worse": "bad"}
    return f"{mean} ({change_as_text(difference) or '-'})", kinds.get(difference.verdict, "")
