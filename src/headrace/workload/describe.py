"""What a trace is like: rates, lengths, burstiness, sessions, categories, and what a prefix cache could serve of it."""

from collections.abc import Iterator

import msgspec
import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from headrace.types.errors import ConfigError
from headrace.types.trace import Ints, Trace
from headrace.workload.fit import variation
from headrace.workload.reading import ReadReport
from headrace.workload.reuse import Reuse, reuse
from headrace.workload.transform import first_turns

MINUTE_NS = 60_000_000_000
PERCENTILES = (50, 90, 99)
SPANS_S = (1, 10, 60)
"""Over which arrivals are counted for the index of dispersion."""


class Lengths(msgspec.Struct, frozen=True):
    """A column of whole numbers."""

    mean: float
    min: int
    p50: int
    p90: int
    p99: int
    max: int
    total: int

    @classmethod
    def of(cls, values: Ints) -> "Lengths":
        p50, p90, p99 = (int(np.percentile(values, p, method="inverted_cdf")) for p in PERCENTILES)
        return cls(
            mean=float(values.mean()),
            min=int(values.min()),
            p50=p50,
            p90=p90,
            p99=p99,
            max=int(values.max()),
            total=int(values.sum()),
        )


class Rates(msgspec.Struct, frozen=True):
    """Arrivals in time."""

    mean_per_s: float
    """0: all come at one instant."""
    peak_per_minute: int
    """Most in one minute, counted from the first arrival on."""
    gap_cv: float
    """Standard deviation / mean of the times between arrivals: 1 is Poisson, more is bursty."""
    dispersion: dict[str, float]
    """Variance / mean of the counts in spans of so many seconds: 1 is Poisson. Spans of which the trace has fewer than ten are left out."""


class Sessions(msgspec.Struct, frozen=True):
    """Requests that belong together."""

    sessions: int
    """With two turns or more."""
    requests: int
    """In those."""
    turns: Lengths
    wait_s: dict[str, float]
    """From one turn's arrival to the next one's: percentiles."""


class Prefixes(msgspec.Struct, frozen=True):
    """What an infinite prefix cache would serve, and caches of some sizes. Answers are not cached; only full blocks are."""

    block_size: int
    blocks: int
    different: int
    block_rate: float
    """Share of the prompts' full blocks."""
    token_rate: float
    """Share of the prompts' tokens."""
    by_cache_blocks: dict[str, float]
    """Share of tokens that a cache of so many blocks serves, by least recent use."""


class Category(msgspec.Struct, frozen=True):
    requests: int
    prompt_mean: float
    output_mean: float


class Description(msgspec.Struct, frozen=True):
    name: str
    requests: int
    duration_s: float
    rates: Rates
    prompt: Lengths
    output: Lengths
    hidden_share: float
    """Of all output tokens, those that the user does not see."""
    sessions: Sessions | None
    """None: not known, or none."""
    prefixes: Prefixes | None
    """None: the trace has no block ids."""
    categories: dict[str, Category]
    tenants: dict[str, int]


def describe(trace: Trace, found: Reuse | None = None) -> Description:
    """`found`: what `reuse` gave for it, if that is known. Raises ConfigError for a trace without requests."""
    if not len(trace):
        raise ConfigError(f"{trace.name}: has no requests")
    return Description(
        name=trace.name,
        requests=len(trace),
        duration_s=trace.duration_ns * 1e-9,
        rates=rates(trace),
        prompt=Lengths.of(trace.prompt),
        output=Lengths.of(trace.output),
        hidden_share=float(trace.hidden.sum() / trace.output.sum()),
        sessions=sessions(trace),
        prefixes=prefixes(found or reuse(trace)) if len(trace.hash_ids) else None,
        categories=dict(_categories(trace)),
        tenants=_counts(trace.tenant, trace.tenants),
    )


def rates(trace: Trace) -> Rates:
    since = trace.arrival_ns - trace.arrival_ns[0]
    dispersion: dict[str, float] = {}
    for span_s in SPANS_S:
        spans = trace.duration_ns // (span_s * 1_000_000_000)  # whole ones only
        if spans >= 10:
            number = since // (span_s * 1_000_000_000)
            counts = np.bincount(number[number < spans], minlength=spans)
            dispersion[str(span_s)] = float(counts.var() / counts.mean())
    duration_s = trace.duration_ns * 1e-9
    return Rates(
        mean_per_s=(len(trace) - 1) / duration_s if duration_s else 0.0,
        peak_per_minute=int(np.bincount(since // MINUTE_NS).max()),
        gap_cv=variation(np.diff(since)),
        dispersion=dispersion,
    )


def sessions(trace: Trace) -> Sessions | None:
    head = first_turns(trace)
    _, number, counts = np.unique(head, return_inverse=True, return_counts=True)
    several = counts > 1
    if not several.any():
        return None
    order = np.argsort(number, kind="stable")
    same = np.diff(number[order]) == 0
    waits = np.diff(trace.arrival_ns[order])[same] * 1e-9
    return Sessions(
        sessions=int(several.sum()),
        requests=int(counts[several].sum()),
        turns=Lengths.of(counts[several]),
        wait_s={f"p{p}": float(np.percentile(waits, p)) for p in PERCENTILES},
    )


def prefixes(found: Reuse) -> Prefixes:
    sizes = [10**power for power in range(1, 12) if 10**power < found.different] + [found.different]
    return Prefixes(
        block_size=found.block_size,
        blocks=found.blocks,
        different=found.different,
        block_rate=found.block_rate(),
        token_rate=found.token_rate(),
        by_cache_blocks={str(size): found.token_rate(size) for size in sizes},
    )


def _categories(trace: Trace) -> Iterator[tuple[str, Category]]:
    if trace.categories == ("",):
        return
    for number, name in enumerate(trace.categories):
        rows = trace.category == number
        if rows.any():
            yield (
                name,
                Category(int(rows.sum()), float(trace.prompt[rows].mean()), float(trace.output[rows].mean())),
            )


def _counts(column: Ints, names: tuple[str, ...]) -> dict[str, int]:
    if names == ("",):
        return {}
    return dict(zip(names, np.bincount(column, minlength=len(names)).tolist(), strict=True))


def tables(found: Description, report: ReadReport | None = None) -> RenderableType:
    """For a terminal."""
    parts: list[RenderableType] = [_overview(found, report), _lengths(found)]
    if found.prefixes is not None:
        parts.append(_prefixes(found.prefixes))
    if found.categories:
        parts.append(_classes(found))
    return Group(*parts)


def facts(found: Description) -> list[tuple[str, str]]:
    """The figures that are not lengths, named, as people read them."""
    rows = [
        ("requests", f"{found.requests:,}"),
        ("duration", f"{found.duration_s:,.1f} s"),
        ("mean rate", f"{found.rates.mean_per_s:,.3f} requests/s"),
        ("peak", f"{found.rates.peak_per_minute:,} requests in a minute"),
        ("CV of the gaps (Poisson: 1)", f"{found.rates.gap_cv:.2f}"),
    ]
    for span, value in found.rates.dispersion.items():
        rows.append((f"dispersion of counts in {span} s (Poisson: 1)", f"{value:.2f}"))
    if found.hidden_share:
        rows.append(("hidden output tokens", f"{found.hidden_share:.1%}"))
    if found.sessions is not None:
        known = found.sessions
        rows += [
            ("sessions of several turns", f"{known.sessions:,} with {known.requests:,} requests"),
            ("their turns", f"mean {known.turns.mean:.1f}, P90 {known.turns.p90}, most {known.turns.max}"),
            ("turn to turn", f"P50 {known.wait_s['p50']:,.1f} s, P90 {known.wait_s['p90']:,.1f} s"),
        ]
    if found.tenants:
        rows.append(("tenants", f"{len(found.tenants):,}"))
    return rows


def _overview(found: Description, report: ReadReport | None) -> Table:
    table = Table(title=escape(found.name), show_header=False, title_justify="left", title_style="bold")
    for name, value in facts(found):
        table.add_row(name, value)
    for line in report.lines() if report is not None else ():
        table.add_row("read", escape(line))
    return table


def _lengths(found: Description) -> Table:
    table = Table("tokens", *(f"P{p}" for p in PERCENTILES), "mean", "min", "max", "total")
    for name, of in (("prompt", found.prompt), ("output", found.output)):
        whole = (of.p50, of.p90, of.p99)
        table.add_row(
            name,
            *(f"{v:,}" for v in whole),
            f"{of.mean:,.1f}",
            *(f"{v:,}" for v in (of.min, of.max, of.total)),
        )
    return table


def _prefixes(found: Prefixes) -> Table:
    title = (
        f"Prefix cache, blocks of {found.block_size} tokens: {found.different:,} different of {found.blocks:,}; an infinite cache "
        f"serves {found.block_rate:.1%} of full blocks, {found.token_rate:.1%} of prompt tokens"
    )
    table = Table("cache, blocks", "tokens", "prompt tokens served (LRU)", title=title, title_justify="left")
    for size, rate in found.by_cache_blocks.items():
        table.add_row(f"{int(size):,}", f"{int(size) * found.block_size:,}", f"{rate:.1%}")
    return table


def _classes(found: Description) -> Table:
    table = Table("category", "requests", "share", "mean prompt", "mean output")
    for name, kind in found.categories.items():
        share = f"{kind.requests / found.requests:.1%}"
        table.add_row(
            escape(name) or "(none)",
            f"{kind.requests:,}",
            share,
            f"{kind.prompt_mean:,.0f}",
            f"{kind.output_mean:,.0f}",
        )
    return table
