"""One run as one HTML page: headline figures, latencies, load, pools, queues, transfers, roles, errors, instances, settings."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from headrace.types.outcomes import Floats, Ints, RunData
from headrace.workload import frame
from headrace.workload.report import (
    RunReport,
    bytes_as_text,
    met_goals,
    origin,
    rows_of,
    spreads_of,
    summarize,
    words,
)

WINDOWS_MAX = 100
"""Of a run, for rates over time; fewer for few requests,"""
WINDOW_REQUESTS = 16
"""so that one holds so many on average."""
SAMPLES_MAX = 400
"""Of a fleet's state over time: more cannot be seen."""
EXTREMES = 5
"""Instances listed at either end."""
GOALS_MAX = 4
"""Different goals drawn in one plot."""


def run_html(run: RunData, skip_s: tuple[float, float] = (0.0, 0.0)) -> str:
    """The page. `skip_s` is as in `summarize`: it holds for figures and tables; plots show the whole run. Raises ConfigError."""
    report = summarize(run, skip_s)
    instances = len(run.outcomes.instances)
    lead = [
        origin(report.clock, report.facts),
        f"Seed {report.seed}: {len(run.outcomes):,} requests in {report.duration_s:,.1f} s"
        + (f" on {instances:,} instances." if instances else "."),
    ]
    if any(skip_s):
        lead.append(
            "Figures and tables leave out the first {:g} s and the last {:g} s. Plots show all.".format(
                *skip_s
            )
        )
    parts = [frame.cards(headline(report)), latencies(run, report)]
    if len(run.outcomes):
        parts.append(load_over_time(run))
    parts += [fleet(run), errors(run, report), instance_loads(run), all_figures(report)]
    return frame.page(report.name, lead, filter(None, parts))


def headline(report: RunReport) -> Iterator[tuple[str, str, str]]:
    """(name, value, more) of what people look for first."""
    asked = report.completed + report.failed + report.unfinished
    yield "Completed", f"{report.completed:,}", f"{report.failed:,} failed, of {asked:,}"
    yield "Throughput", f"{report.output_tokens_per_s:,.0f}", "output tokens a second"
    if report.goodput_per_s is None or report.goodput_share is None:
        yield "Requests", f"{report.requests_per_s:,.2f}", "a second; no goals were set"
    else:
        yield (
            "Goodput",
            f"{report.goodput_share:.1%}",
            f"{report.goodput_per_s:,.2f} requests a second met all goals",
        )
    names = {"TTFT": report.ttft_ms, "TPOT": report.tpot_ms, "End to end": report.e2e_ms}
    for name, spread in names.items():
        if spread is not None:
            yield f"{name}, P99", milliseconds(spread.p99), f"median {milliseconds(spread.median)}"
    if report.input_tokens and report.cached_tokens:
        share = report.cached_tokens / report.input_tokens
        yield "Cached", f"{share:.1%}", "of the prompt tokens came from a cache"


def milliseconds(value: float) -> str:
    return f"{value:,.1f} ms" if value < 10_000 else f"{value / 1e3:,.1f} s"


def latencies(run: RunData, report: RunReport) -> str:
    """Distributions with goals, and their table."""
    good = run.outcomes.succeeded
    ttft_goal, tpot_goal = run.goals or (np.zeros(0, dtype=np.int64),) * 2
    none = np.zeros(0, dtype=np.int64)
    drawn = (
        ("Time to first token", run.outcomes.ttft_s()[good], ttft_goal),
        ("Time per output token, after the first", run.outcomes.tpot_s()[good], tpot_goal),
        ("End to end", run.outcomes.e2e_s()[good], none),
    )
    figures = [latency(title, seconds[~np.isnan(seconds)], goals) for title, seconds, goals in drawn]
    if good.any():
        figures.append(ttft_over_time(run))
    rows = [
        [name, *(("-",) * 5 if spread is None else (f"{v:,.2f}" for v in msgspec.structs.astuple(spread)))]
        for name, spread in spreads_of(report).items()
    ]
    times = frame.table(["Milliseconds", "mean", "median", "P90", "P99", "max"], rows)
    return frame.section("Latency", times, frame.plots(*filter(None, figures)))


def latency(title: str, seconds: Floats, goals: Ints) -> str:
    """One distribution; empty without values."""
    from headrace.workload import plots

    if not len(seconds):
        return ""
    low, middle, high = np.percentile(seconds, (1, 50, 100))
    scale, unit = (1e3, "ms") if middle < 1 else (1.0, "s")
    log = bool(low > 0 and high / low > 30)
    values = np.unique(goals[goals >= 0]) * 1e-9
    marks = {f"goal {value * scale:g} {unit}": float(value * scale) for value in values[:GOALS_MAX]}
    reading = "How many of the successful requests took at most so long: further left is better."
    if log:
        reading += " The time axis is logarithmic."
    if len(values) > GOALS_MAX:
        reading += f" Of {len(values)} different goals the {GOALS_MAX} tightest are drawn."
    elif marks:
        reading += " Where a dashed line crosses the curve is the share within that goal."
    svg = plots.cdf(title, {"requests": seconds * scale}, f"{title.lower()} [{unit}]", log_x=log, marks=marks)
    return frame.figure(svg, reading)


def span_unit(duration_s: float) -> tuple[float, str]:
    """Seconds per unit of the time axis, and its name."""
    if duration_s < 600:
        return 1.0, "s"
    return (60.0, "min") if duration_s < 4 * 3600 else (3600.0, "h")


def windows(run: RunData) -> int:
    """Equal parts into which the run is cut."""
    return min(WINDOWS_MAX, max(5, len(run.outcomes) // WINDOW_REQUESTS))


def windows_of(run: RunData, at_ns: Ints) -> Ints:
    """Which part of the run each instant lies in."""
    since_s = (at_ns - int(run.outcomes.arrival_ns.min())) * 1e-9
    count = windows(run)
    return np.clip((since_s / (max(run.duration_s, 1e-9) / count)).astype(np.int64), 0, count - 1)


def ttft_over_time(run: RunData) -> str:
    """Median and P99 of the requests that arrived in each window."""
    from headrace.workload import plots

    outcomes, good = run.outcomes, run.outcomes.succeeded
    unit_s, unit = span_unit(run.duration_s)
    window, middle, tail = by_window(windows_of(run, outcomes.arrival_ns[good]), outcomes.ttft_s()[good])
    begins = window * run.duration_s / windows(run) / unit_s
    times = {"median": (begins, middle * 1e3), "P99": (begins, tail * 1e3)}
    svg = plots.line("Time to first token over time", times, f"arrival [{unit}]", "TTFT [ms]", log_y=True)
    return frame.figure(
        svg,
        "Of the successful requests, by when they arrived. A rise without an end means more load than the fleet can carry. "
        "The latency axis is logarithmic.",
    )


def load_over_time(run: RunData) -> str:
    """By window: arrivals, completions and goodput a second, and requests under way."""
    from headrace.workload import plots

    outcomes = run.outcomes
    count = windows(run)
    length_s = max(run.duration_s, 1e-9) / count
    unit_s, unit = span_unit(run.duration_s)
    begins = np.arange(count) * length_s / unit_s
    good, met = outcomes.succeeded, met_goals(run)

    def rate(at_ns: Ints) -> Floats:
        return np.bincount(windows_of(run, at_ns), minlength=count) / length_s

    rates = {"arrived": rate(outcomes.arrival_ns), "completed": rate(outcomes.finished_ns[good])}
    if met is not None:
        rates["completed within goals"] = rate(outcomes.finished_ns[met])
    shown = {name: (begins, values) for name, values in rates.items()}
    reading = f"Requests a second in windows of {length_s:.3g} s. Where completions stay below arrivals, a queue grows."
    if met is None:
        reading += " No goals were set, so there is no goodput."
    axis = f"time [{unit}]"
    figures = [frame.figure(plots.line("Rate of requests", shown, axis, "requests / s", step=True), reading)]
    # A failed request of which no end is known counts as ended when it arrived.
    known = np.where(
        (outcomes.error > 0) & (outcomes.finished_ns == 0), outcomes.arrival_ns, outcomes.finished_ns
    )
    under_way = np.cumsum(rate(outcomes.arrival_ns) - rate(known[known > 0])) * length_s
    svg = plots.line(
        "Requests under way",
        {"requests": (begins + length_s / unit_s, under_way)},
        axis,
        "requests",
        step=True,
    )
    figures.append(frame.figure(svg, "Arrived, and not yet ended, at the end of each window."))
    return frame.section("Load", frame.plots(*figures))


def by_window(window: Ints, seconds: Floats) -> tuple[Ints, Floats, Floats]:
    """Windows that hold any, and the median and P99 of each."""
    order = np.argsort(window, kind="stable")
    held, starts = np.unique(window[order], return_index=True)
    pairs = [np.percentile(piece, (50, 99)) for piece in np.split(seconds[order], starts[1:]) if len(piece)]
    middle, tail = np.array(pairs).reshape(-1, 2).T
    return held, middle, tail


def fleet(run: RunData) -> str:
    """What was sampled of the instances over time; empty if nothing was."""
    from headrace.workload import plots

    series = run.series
    if not len(series.at_ns):
        return ""
    origin_ns = int(run.outcomes.arrival_ns.min()) if len(run.outcomes) else int(series.at_ns[0])
    unit_s, unit = span_unit(run.duration_s)
    at: Floats = (series.at_ns - origin_ns) * np.float64(1e-9 / unit_s)
    axis = f"time [{unit}]"
    figures: list[str] = []
    if "kv_used" in series.values:
        figures.append(kv_use(at, series.values["kv_used"], axis))
    queues = {
        name: (at, total(series.values[name]))
        for name in ("waiting", "running", "receiving")
        if name in series.values
    }
    if queues:
        reading = "Sequences over all instances: waiting for a turn, running, and receiving KV. A queue that only grows is overload."
        figures.append(frame.figure(plots.line("Queues", queues, axis, "sequences"), reading))
    if "bytes_in_flight" in series.values:
        figures.append(transfers(at, total(series.values["bytes_in_flight"]), axis))
    leanings = {
        name.removeprefix("leaning_"): total(series.values[name])
        for name in ("leaning_prefill", "leaning_decode", "leaning_mixed")
        if name in series.values
    }
    if leanings:
        rows = thinned(len(at))
        layers = {name: values[rows] for name, values in leanings.items()}
        reading = "How many instances lean to prefill, to decode, or take both; the height is all of them."
        figures.append(frame.figure(plots.stack("Roles", at[rows], layers, axis, "instances"), reading))
    return frame.section("Fleet", frame.plots(*figures))


def total(values: Floats) -> Floats:
    """Over all instances: [samples]."""
    return values if values.ndim == 1 else values.sum(axis=1)


def thinned(rows: int) -> Ints:
    """At most SAMPLES_MAX rows, evenly spread."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLES_MAX)).astype(np.int64))


def kv_use(at: Floats, used: Floats, axis: str) -> str:
    """The share of the pools in use: mean, the middle nine tenths, and the fullest."""
    from headrace.workload import plots

    used = used[:, None] if used.ndim == 1 else used
    begins = thinned(len(at))
    fullest = np.maximum.reduceat(used.max(axis=1), begins) * 100
    low, high = np.percentile(used[begins], (5, 95), axis=1) * 100
    mean = used[begins].mean(axis=1) * 100
    svg = plots.band(
        "KV use",
        {"mean": (at[begins], mean, low, high)},
        axis,
        "share of the pool [%]",
        lines={"fullest": (at[begins], fullest)},
    )
    reading = "The line is the mean over instances, the band holds nine tenths of them. At 100% an instance must evict or preempt."
    return frame.figure(svg, reading)


def transfers(at: Floats, count: Floats, axis: str) -> str:
    """KV that moves: mean of each stretch of samples, between its least and its most."""
    from headrace.workload import plots

    scale, unit = (2**30, "GiB") if count.max(initial=0) >= 2**30 else (2**20, "MiB")
    begins = thinned(len(at))
    mean = np.add.reduceat(count, begins) / np.diff(begins, append=len(count)) / scale
    low, high = np.minimum.reduceat(count, begins) / scale, np.maximum.reduceat(count, begins) / scale
    svg = plots.band("KV under way", {"mean": (at[begins], mean, low, high)}, axis, f"in flight [{unit}]")
    reading = "KV that was being sent between instances; the band is from the least to the most. A plateau means links at their limit."
    return frame.figure(svg, reading)


def errors(run: RunData, report: RunReport) -> str:
    """Kinds and when; a sentence if there were none."""
    from headrace.workload import plots

    if not report.errors:
        return frame.section("Errors", frame.note("No request failed."))
    outcomes = run.outcomes
    asked = report.completed + report.failed + report.unfinished
    rows = [[kind, f"{count:,}", f"{count / asked:.2%}"] for kind, count in report.errors.items()]
    unit_s, unit = span_unit(run.duration_s)
    at = (outcomes.arrival_ns[outcomes.error > 0] - int(outcomes.arrival_ns.min())) * 1e-9 / unit_s
    counts, edges = np.histogram(at, windows(run), (0, max(run.duration_s, 1e-9) / unit_s))
    svg = plots.line(
        "Failed requests",
        {"failed": (edges[:-1], counts)},
        f"arrival [{unit}]",
        "requests",
        step=True,
        whole="y",
    )
    reading = (
        f"Requests that failed, by when they arrived, in windows of {run.duration_s / windows(run):.3g} s."
    )
    return frame.section(
        "Errors", frame.table(["Error", "requests", "share"], rows), frame.plots(frame.figure(svg, reading))
    )


def instance_loads(run: RunData) -> str:
    """Who prefilled and who decoded how much, and how even that is. Empty if unknown."""
    from headrace.workload import plots

    outcomes, good = run.outcomes, run.outcomes.succeeded
    kinds = (
        ("prefill", outcomes.prefill, outcomes.prompt - outcomes.cached, "prompt tokens computed"),
        ("decode", outcomes.decode, outcomes.output, "tokens generated"),
    )
    curves: dict[str, tuple[Ints, Floats]] = {}
    tables: list[str] = []
    count = len(outcomes.instances)
    if not count:
        return ""
    for role, instance, tokens, what in kinds:
        known = good & (instance >= 0)
        requests = np.bincount(instance[known], minlength=count)
        work = np.bincount(instance[known], tokens[known], count).astype(np.float64)
        order = np.argsort(-work, kind="stable")[: int((requests > 0).sum())]
        if len(order):
            tables.append(busiest(outcomes.instances, order, requests, work, (role, what)))
            scale = max(float(work[order].mean()), 1e-9)
            curves[f"{what} ({len(order):,} instances)"] = np.arange(1, len(order) + 1), work[order] / scale
    if not curves:
        return ""
    reading = (
        "Instances that did such work, from the busiest to the idlest; 1 is their mean, and a flat line is even load. What failed requests "
        "cost is not counted."
    )
    svg = plots.line("Load by instance", curves, "rank of the instance", "times the mean", whole="x")
    return frame.section("Instances", frame.tables(*tables), frame.plots(frame.figure(svg, reading)))


def busiest(names: tuple[str, ...], order: Ints, requests: Ints, work: Floats, kind: tuple[str, str]) -> str:
    """The two ends of those that did a kind of work, which `order` ranks."""
    listed, (role, what) = order.tolist(), kind
    if len(listed) > 2 * EXTREMES:
        listed = [*listed[:EXTREMES], -1, *listed[-EXTREMES:]]
    scale = max(float(work[order].mean()), 1e-9)
    rows = [
        [names[i], f"{requests[i]:,}", f"{work[i]:,.0f}", f"{work[i] / scale:.2f}"]
        if i >= 0
        else ["…", "", "", ""]
        for i in listed
    ]
    head = f"{role.capitalize()}: {len(order):,} of {len(names):,} instances"
    return frame.table([head, "requests", what, "of the mean"], rows)


def all_figures(report: RunReport) -> str:
    """Every figure, counter, setting and fact, as tables."""
    parts = [frame.section("Figures", frame.table(["", ""], rows_of(report)))]
    groups: dict[str, Mapping[str, Any]] = {
        "Counters": report.counters,
        "How it was made": report.facts,
        "Settings": report.settings,
    }
    for title, group in groups.items():
        if group:
            rows = [[key, _value(key, value)] for key, value in flattened(group)]
            parts.append(frame.section(title, frame.table(["", ""], rows, words=True)))
    return "".join(parts)


def flattened(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted name."""
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(key: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,} ({bytes_as_text(value)})" if "bytes" in key and value >= 1024 else f"{value:,}"
    return words(value)
