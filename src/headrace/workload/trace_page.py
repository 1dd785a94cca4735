"""A trace's description as one HTML page that needs nothing else: tables, and plots of rates, lengths, gaps and reuse."""

from collections.abc import Iterator

import numpy as np

from headrace.types.trace import Trace
from headrace.workload import frame, plots
from headrace.workload.describe import Description, Prefixes, facts
from headrace.workload.reading import ReadReport
from headrace.workload.reuse import Reuse
from headrace.workload.transform import first_turns

BINS = 120
"""Parts of the duration in which rates are counted."""


def trace_page(trace: Trace, found: Description, known: Reuse | None, report: ReadReport | None) -> str:
    """`known`: how blocks are reused, if the trace has ids. `report`: what became of the file's rows."""
    lead = [
        f"{found.requests:,} requests in {found.duration_s:,.1f} s",
        *(report.lines() if report is not None else ()),
    ]
    parts = [frame.section("Figures", frame.table(["", ""], facts(found))), _lengths(found)]
    if found.categories:
        parts.append(_categories(found))
    parts += [
        frame.section("Arrivals", frame.plots(*_arrivals(trace))),
        frame.section("Lengths", frame.plots(*_sizes(trace))),
    ]
    if found.prefixes is not None and known is not None:
        parts.append(_prefixes(found.prefixes, known))
    return frame.page(found.name, lead, parts)


def _lengths(found: Description) -> str:
    rows = [
        (
            name,
            *(f"{value:,}" for value in (of.p50, of.p90, of.p99)),
            f"{of.mean:,.1f}",
            f"{of.min:,}",
            f"{of.max:,}",
            f"{of.total:,}",
        )
        for name, of in (("prompt", found.prompt), ("output", found.output))
    ]
    return frame.section(
        "Tokens", frame.table(["", "P50", "P90", "P99", "mean", "min", "max", "total"], rows)
    )


def _categories(found: Description) -> str:
    rows = [
        (name or "(none)", f"{kind.requests:,}", f"{kind.prompt_mean:,.0f}", f"{kind.output_mean:,.0f}")
        for name, kind in found.categories.items()
    ]
    return frame.section("Categories", frame.table(["", "requests", "mean prompt", "mean output"], rows))


def _prefixes(found: Prefixes, known: Reuse) -> str:
    sizes, rates = known.curve()
    curve = {"served": (sizes * known.block_size, rates * 100)}
    svg = plots.line("Prompt tokens served by a prefix cache", curve, "cache, tokens", "%", log_x=True)
    rows = [
        (f"{int(size):,}", f"{int(size) * found.block_size:,}", f"{rate:.1%}")
        for size, rate in found.by_cache_blocks.items()
    ]
    return frame.section(
        "Prefix cache",
        frame.note(
            f"{found.different:,} different blocks of {found.block_size} tokens among {found.blocks:,}. An infinite cache serves "
            f"{found.block_rate:.1%} of full blocks, {found.token_rate:.1%} of prompt tokens; answers are not cached."
        ),
        frame.table(["cache, blocks", "tokens", "prompt tokens served"], rows),
        frame.plots(
            frame.figure(svg, "By the cache's size, with the least recently used block evicted first.")
        ),
    )


def _arrivals(trace: Trace) -> Iterator[str]:
    if not trace.duration_ns:
        yield frame.note("All requests come at one instant.")
        return
    seconds = (trace.arrival_ns - trace.arrival_ns[0]) * 1e-9
    part_s = seconds[-1] / BINS
    number = np.minimum((seconds / part_s).astype(np.int64), BINS - 1)
    times = np.arange(BINS) * part_s

    def rate(weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return times, np.bincount(number, weights=weights, minlength=BINS) / part_s

    each = f"Mean over each {part_s:,.3g} s."
    yield frame.figure(
        plots.line("Requests", {"requests": rate(None)}, "time, s", "requests/s", step=True), each
    )
    tokens = {"prompt": rate(trace.prompt), "output": rate(trace.output)}
    yield frame.figure(
        plots.line("Tokens that are asked for", tokens, "time, s", "tokens/s", step=True), each
    )
    gaps = np.diff(seconds)
    least = gaps.mean() / 1000  # a logarithm has no place for 0
    poisson = -np.log1p(-np.linspace(0, 0.9999, len(gaps))) * gaps.mean()
    shares = plots.cdf(
        "Times between arrivals",
        {"trace": np.maximum(gaps, least), "Poisson of this rate": np.maximum(poisson, least)},
        "seconds",
        log_x=True,
    )
    yield frame.figure(
        shares,
        "A trace that is above Poisson on the left and below on the right comes in bursts. "
        f"Times below {least:.2g} s stand there.",
    )


def _sizes(trace: Trace) -> Iterator[str]:
    lengths = {"prompt": trace.prompt, "output": trace.output}
    yield frame.figure(
        plots.histogram("Tokens", lengths, "tokens", "share of requests", log_x=True),
        "Parts are equal in logarithm.",
    )
    yield frame.figure(
        plots.cdf("Tokens", lengths, "tokens", log_x=True), "Share of requests with at most so many tokens."
    )
    turns = np.unique(first_turns(trace), return_counts=True)[1]
    if turns.max() > 1:
        yield frame.figure(
            plots.cdf("Turns", {"sessions": turns}, "turns"), "Share of sessions with at most so many turns."
        )
