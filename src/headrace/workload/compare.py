"""Variants compared over seeds: who wins on which metric, and whether it is beyond noise.

Each seed gives every variant the same requests (common random numbers), so differences are taken seed by seed, and what the requests
alone do to a figure falls out. A difference is beyond noise if its paired t-test says so at 5% after Holm's correction over the metrics
of a pair; only then does anybody win.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from headrace.types.errors import ConfigError
from headrace.types.outcomes import Floats, RunData
from headrace.workload.metrics import METRICS, Metric, value_as_text
from headrace.workload.report import RunReport, as_json, origin, summarize
from headrace.workload.stats import SEEDS_MIN, estimate, holm

ALPHA = 0.05
LEVELS = np.append(np.linspace(0, 0.995, 200), (0.999, 1.0))
"""Of the distributions kept for plots."""
LOST_APART = 1.0
"""Percentage points of lost requests by which variants may differ before latencies mislead."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What `second` does to a metric beside `first`: second - first, seed by seed."""

    first: str
    second: str
    seeds: int
    mean: float | None
    low: float | None
    """Ends of the 95% confidence interval; None for too few seeds."""
    high: float | None
    relative: tuple[float, float, float] | None
    """Mean, low, high as shares of the mean of `first`; low and high are NaN for too few seeds."""
    p: float | None
    p_corrected: float | None
    verdict: str
    """Of `second`: "better" | "worse" (beyond noise) | "noise" | "same" (no difference at all) | "seeds" (too few to tell)."""


class MetricComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One metric over all variants."""

    key: str
    label: str
    unit: str
    lower_is_better: bool
    values: dict[str, list[float | None]]
    """By variant, in the order of seeds; None: that run has none."""
    means: dict[str, float | None]
    differences: list[Difference]
    """Of every pair of variants, the earlier first."""
    leaders: list[str]
    """The best by mean, then those that it does not beat beyond noise."""
    winner: str | None
    """The best, if it beats all others beyond noise."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All metrics over all variants."""

    clock: str
    origin: str
    """Live or simulated, with which cost model."""
    variants: list[str]
    """The first is the baseline."""
    seeds: list[int]
    seeds_matter: bool
    """Some figure differs from seed to seed; else repeats repeat nothing but themselves."""
    metrics: list[MetricComparison]
    levels: list[float]
    curves: dict[str, dict[str, list[float]]]
    """ttft, tpot, e2e -> variant -> milliseconds at `levels`, the mean over seeds."""
    settings: dict[str, dict[str, Any]]
    """Of the cluster, by variant."""

    def to_json(self) -> bytes:
        return as_json(self)

    def against_baseline(self, metric: MetricComparison, variant: str) -> Difference | None:
        """None for the baseline itself."""
        pair = (self.variants[0], variant)
        return next((each for each in metric.differences if (each.first, each.second) == pair), None)


def compare(runs: Iterable[RunData], skip_s: tuple[float, float] = (0.0, 0.0)) -> Comparison:
    """Runs with their variant as `name` and their `seed`; the first variant is the baseline.

    One run is held at a time, so that an iterator saves memory. Raises ConfigError for fewer than two variants, or a variant that has one
    seed twice.
    """
    reports: dict[str, dict[int, RunReport]] = {}
    curves: dict[str, dict[str, list[Floats]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        of_variant = reports.setdefault(run.name, {})
        if run.seed in of_variant:
            raise ConfigError(f"compare: variant {run.name!r} has seed {run.seed} twice")
        of_variant[run.seed] = summarize(run, skip_s)
        for name, curve in distributions(run).items():
            curves[name][run.name].append(curve)
    if len(reports) < 2:
        raise ConfigError(
            f"compare: {len(reports)} variant given, at least 2 are needed: name them with --vary"
        )
    seeds = sorted({seed for of_variant in reports.values() for seed in of_variant})
    figures = {metric.key: figures_of(metric, reports, seeds) for metric in METRICS}
    seeds_matter = any(
        len({value for value in values if value is not None}) > 1
        for variants in figures.values()
        for values in variants.values()
    )
    metrics = [metric for metric in METRICS if says_something(figures[metric.key])]
    pairs = list(combinations(reports, 2))
    differences = {pair: all_differences(*pair, metrics, figures, seeds_matter) for pair in pairs}
    sample = next(iter(next(iter(reports.values())).values()))
    return Comparison(
        clock=sample.clock,
        origin=origin(sample.clock, sample.facts),
        variants=list(reports),
        seeds=seeds,
        seeds_matter=seeds_matter,
        metrics=[
            decided(metric, figures[metric.key], [differences[pair][i] for pair in pairs])
            for i, metric in enumerate(metrics)
        ],
        levels=LEVELS.tolist(),
        curves={
            name: {variant: np.mean(each, axis=0).tolist() for variant, each in of_name.items()}
            for name, of_name in curves.items()
        },
        settings={name: next(iter(of_variant.values())).settings for name, of_variant in reports.items()},
    )


def distributions(run: RunData) -> dict[str, Floats]:
    """Milliseconds at LEVELS; without those that have no values."""
    columns = {"ttft": run.outcomes.ttft_s(), "tpot": run.outcomes.tpot_s(), "e2e": run.outcomes.e2e_s()}
    good = {name: column[run.outcomes.succeeded & ~np.isnan(column)] for name, column in columns.items()}
    return {name: np.quantile(column, LEVELS) * 1e3 for name, column in good.items() if len(column)}


def figures_of(
    metric: Metric, reports: dict[str, dict[int, RunReport]], seeds: Sequence[int]
) -> dict[str, list[float | None]]:
    """By variant, in the order of seeds."""
    return {
        variant: [metric.of(of_variant[seed]) if seed in of_variant else None for seed in seeds]
        for variant, of_variant in reports.items()
    }


def says_something(figures: dict[str, list[float | None]]) -> bool:
    """Somebody has a figure other than 0."""
    return any(value for values in figures.values() for value in values)


def all_differences(
    first: str,
    second: str,
    metrics: Sequence[Metric],
    figures: dict[str, dict[str, list[float | None]]],
    seeds_matter: bool,
) -> list[Difference]:
    """Of one pair, by metric, corrected for how many there are."""
    pairs = [
        [
            (a, b)
            for a, b in zip(figures[metric.key][first], figures[metric.key][second], strict=True)
            if a is not None and b is not None
        ]
        for metric in metrics
    ]
    found = [estimate([b - a for a, b in pair]) if seeds_matter else None for pair in pairs]
    # Where nothing differs, nothing is tested.
    tested = [i for i, each in enumerate(found) if each is not None and any(a != b for a, b in pairs[i])]
    corrected = dict(zip(tested, holm([found[i].p for i in tested if found[i]]), strict=True))  # type: ignore[union-attr]
    made: list[Difference] = []
    for i, (metric, pair, each) in enumerate(zip(metrics, pairs, found, strict=True)):
        mean = float(np.mean([b - a for a, b in pair])) if pair else None
        start = float(np.mean([a for a, _ in pair])) if pair else 0.0
        low, high = (each.low, each.high) if each else (None, None)
        ends = (np.nan, np.nan) if each is None else (each.low, each.high)
        made.append(
            Difference(
                first=first,
                second=second,
                seeds=len(pair),
                mean=mean,
                low=low,
                high=high,
                relative=None
                if mean is None or start == 0
                else (mean / start, ends[0] / start, ends[1] / start),
                p=each.p if each else None,
                p_corrected=corrected.get(i),
                verdict=verdict_of(metric, pair, mean, corrected.get(i)),
            )
        )
    return made


def verdict_of(
    metric: Metric, pair: Sequence[tuple[float, float]], mean: float | None, p: float | None
) -> str:
    """As `Difference.verdict` says it."""
    if pair and all(a == b for a, b in pair):
        return "same"
    if p is None or mean is None:
        return "seeds"
    if p >= ALPHA:
        return "noise"
    return "better" if (mean < 0) == metric.lower_is_better else "worse"


def decided(
    metric: Metric, figures: dict[str, list[float | None]], differences: list[Difference]
) -> MetricComparison:
    """Who leads, and whether one wins."""
    known = {name: [v for v in values if v is not None] for name, values in figures.items()}
    means = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    sign = 1 if metric.lower_is_better else -1
    ranked = sorted(
        (name for name in means if known[name]), key=lambda name: sign * float(np.mean(known[name]))
    )
    beaten = {
        loser
        for each in differences
        for winner, loser, how in ((each.first, each.second, "worse"), (each.second, each.first, "better"))
        if winner == ranked[0] and each.verdict == how
    }
    leaders = [name for name in ranked if name not in beaten]
    return MetricComparison(
        key=metric.key,
        label=metric.label,
        unit=metric.unit,
        lower_is_better=metric.lower_is_better,
        values=figures,
        means=means,
        differences=differences,
        leaders=leaders,
        winner=leaders[0] if len(leaders) == 1 and len(ranked) == len(means) else None,
    )


def verdicts(comparison: Comparison) -> Iterator[str]:
    """What came out, in sentences: who wins where, where noise decides, and what to be careful with."""
    count = len(comparison.seeds)
    if not comparison.seeds_matter and count > 1:
        yield (
            "The seeds changed nothing: each variant gave the same figures for every seed. Differences hold for these requests; how far "
            "they hold for others is not known, so no winner is named. Vary the requests with the seed."
        )
    elif count < SEEDS_MIN:
        yield (
            f"Not enough seeds to tell a difference from noise ({count} given, {SEEDS_MIN} are the least, 5 or more are better): no winner "
            "is named."
        )
    by_outcome: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for metric in comparison.metrics:
        by_outcome[outcome_of(comparison, metric)].append(metric.label)
    for (what, *names), labels in sorted(by_outcome.items(), key=lambda item: item[0][0] != "wins"):
        where, who = grouped(labels), listed(names)
        match what:
            case "wins":
                yield f"{who} wins beyond noise on: {where}."
            case "noise":
                yield f"No winner, noise decides between {who}, on: {where}."
            case "tie":
                yield f"{who} are the same, and ahead of the others beyond noise, on: {where}."
            case "same":
                yield f"No difference at all on: {where}."
            case "unknown":
                yield f"Too few runs have a figure to name a winner on: {where}."
    yield from cautions(comparison)


def outcome_of(comparison: Comparison, metric: MetricComparison) -> tuple[str, ...]:
    """What is said of a metric, and the variants it is said of."""
    kinds = {each.verdict for each in metric.differences}
    if kinds == {"same"}:
        return ("same",)
    if metric.winner is not None:
        return "wins", metric.winner
    if "seeds" in kinds:
        few = len(comparison.seeds) < SEEDS_MIN or not comparison.seeds_matter
        return ("few",) if few else ("unknown",)
    leaders = sorted(metric.leaders, key=comparison.variants.index)
    among = {each.verdict for each in metric.differences if each.first in leaders and each.second in leaders}
    return "tie" if among == {"same"} else "noise", *leaders


def cautions(comparison: Comparison) -> Iterator[str]:
    """Where a figure alone misleads."""
    if comparison.clock != "wall":
        yield (
            "Noise is that of the requests: a difference smaller than the cost model's own error may not hold on a real deployment."
        )
    lost = next((metric for metric in comparison.metrics if metric.key == "lost_share"), None)
    if lost is not None:
        shares = [share for share in lost.means.values() if share is not None]
        if shares and max(shares) - min(shares) > LOST_APART:
            yield (
                f"Careful: between {min(shares):.1f}% and {max(shares):.1f}% of the requests were lost, and latencies are of those that "
                "completed. A variant that loses slow requests looks fast."
            )


def listed(names: Sequence[str]) -> str:
    """As in "a, b and c"."""
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def grouped(labels: Sequence[str]) -> str:
    """As in "TTFT (mean, P50), Throughput"."""
    parts: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        name, _, part = label.partition(", ")
        parts[name].extend([part] if part else [])
    return ", ".join(f"{name} ({', '.join(each)})" if each else name for name, each in parts.items())


def change_as_text(difference: Difference) -> str:
    """ "+3.1% ± 0.4%": half the interval's width after the sign."""
    if difference.verdict == "same":
        return "same"
    if difference.relative is None:
        return ""
    middle, low, high = difference.relative
    reach = "" if np.isnan(low) else f" ± {abs(high - low) / 2:.1%}"
    return f"{middle:+.1%}{reach}"


def render_comparison(comparison: Comparison) -> RenderableType:
    """Metrics by variants for a terminal. Colour and arrows only for what is beyond noise."""
    baseline, *others = comparison.variants
    table = Table("Metric", title_justify="left")
    table.add_column(f"{escape(baseline)}\n(baseline)", justify="right")
    for name in others:
        table.add_column(escape(name), justify="right")
    table.add_column("wins")
    for metric in comparison.metrics:
        cells = [metric.label]
        for name in comparison.variants:
            mean = metric.means[name]
            text = "-" if mean is None else value_as_text(mean, metric.unit)
            difference = comparison.against_baseline(metric, name)
            cells.append(text if difference is None else marked(text, difference))
        table.add_row(*cells, f"[bold]{escape(metric.winner)}[/]" if metric.winner else "")
    seeds = len(comparison.seeds)
    reading = (
        f"{len(comparison.variants)} variants over {seeds} {'seed' if seeds == 1 else 'seeds'}, the same requests to each. Change against "
        f"{baseline}, with its 95% interval; bold and arrows are beyond noise (5%, corrected for {len(comparison.metrics)} metrics)."
    )
    sentences = [escape(sentence) for sentence in verdicts(comparison)]
    return Group(f"[bold]{escape(comparison.origin)}[/]", *sentences, table, f"[dim]{escape(reading)}[/]")


def marked(text: str, difference: Difference) -> str:
    """A cell of the terminal's table."""
    change = change_as_text(difference)
    if difference.verdict not in ("better", "worse") or difference.mean is None:
        return f"{text} [dim]{change}[/]"
    colour = "green" if difference.verdict == "better" else "red"
    return f"{text} [bold {colour}]{'↓' if difference.mean < 0 else '↑'} {change}[/]"
