"""Traces from traces: rows chosen, times changed, several put together. Nothing is changed in place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from headrace.types.draws import uniform
from headrace.types.errors import ConfigError
from headrace.types.request import Slo
from headrace.types.trace import Ints, Trace

ROW_COLUMNS = (
    "arrival_ns",
    "prompt",
    "output",
    "session",
    "category",
    "tenant",
    "priority",
    "goal",
    "hidden",
)
"""One value a row, which moves with it unchanged."""
NS_PER_S = 1_000_000_000


def take(trace: Trace, rows: ArrayLike) -> Trace:
    """These rows in this order. A turn whose earlier turn is not taken, or stands after it now, follows none."""
    chosen = np.asarray(rows, dtype=np.int64)
    counts = np.diff(trace.hash_starts)[chosen]
    starts = _starts(counts)
    places = np.arange(starts[-1]) + np.repeat(trace.hash_starts[chosen] - starts[:-1], counts)
    at = np.full(len(trace) + 1, -1, dtype=np.int64)
    at[chosen] = np.arange(len(chosen))
    follows = at[trace.follows[chosen]]  # -1 reads the last, which is never set
    follows[follows >= np.arange(len(chosen))] = -1
    columns: dict[str, Any] = {name: getattr(trace, name)[chosen] for name in ROW_COLUMNS}
    return replace(trace, **columns, hash_ids=trace.hash_ids[places], hash_starts=starts, follows=follows)


def faster(trace: Trace, factor: float) -> Trace:
    """The same requests in 1 / factor of the time."""
    if not 0 < factor < float("inf"):
        raise ConfigError(f"a trace cannot be made {factor} times faster; give a number above 0")
    arrival = np.rint(trace.arrival_ns / factor).astype(np.int64)
    return replace(trace, name=f"{trace.name}, {factor:g} x as fast", arrival_ns=arrival)


def at_rate(trace: Trace, rate_per_s: float) -> Trace:
    """The same requests at another mean rate. Raises ConfigError for a trace that has no rate: all at one instant."""
    if not trace.duration_ns:
        raise ConfigError(f"{trace.name}: all requests come at one instant; there is no rate to change")
    if not 0 < rate_per_s < float("inf"):
        raise ConfigError(f"a rate of {rate_per_s} requests/s is impossible; give a number above 0")
    rate = (len(trace) - 1) * NS_PER_S / trace.duration_ns
    return replace(faster(trace, rate_per_s / rate), name=f"{trace.name}, at {rate_per_s:g} requests/s")


def between(trace: Trace, begin_ns: int, end_ns: int) -> Trace:
    """What arrives in [begin, end), with times from `begin`. Raises ConfigError if nothing does."""
    rows = np.arange(*np.searchsorted(trace.arrival_ns, (begin_ns, end_ns)))
    if not len(rows):
        span = f"{begin_ns / NS_PER_S:g} s to {end_ns / NS_PER_S:g} s"
        raise ConfigError(
            f"{trace.name}: nothing arrives in {span}; it ends at {trace.arrival_ns[-1:] / NS_PER_S} s"
        )
    part = take(trace, rows)
    return replace(part, arrival_ns=part.arrival_ns - begin_ns)


def rows_between(trace: Trace, begin: int, end: int) -> Trace:
    """Rows begin..end - 1, the first at time 0. Raises ConfigError if there are none."""
    if not 0 <= begin < min(end, len(trace)):
        raise ConfigError(f"{trace.name}: has {len(trace):,} rows, so none in {begin:,} to {end:,}")
    part = take(trace, np.arange(begin, min(end, len(trace))))
    return replace(part, arrival_ns=part.arrival_ns - part.arrival_ns[0])


def sample(trace: Trace, share: float, seed: int) -> Trace:
    """About this share of the requests. Turns that belong together stay together; a draw depends on nothing but the first one's number."""
    if not 0 < share <= 1:
        raise ConfigError(f"a sample of {share} is impossible; give a share above 0, at most 1")
    group = first_turns(trace)
    heads = np.unique(group)
    kept = heads[[uniform(seed, "sample", head) < share for head in heads.tolist()]]
    return take(trace, np.flatnonzero(np.isin(group, kept)))


def first_turns(trace: Trace) -> Ints:
    """For each row, the first row of its session, or else of the turns that it follows; itself where it is alone."""
    group = np.arange(len(trace))
    later = np.flatnonzero(trace.follows >= 0)
    group[later] = trace.follows[later]
    while len(later):  # doubles the way back each time
        further = group[group]
        later = np.flatnonzero(further != group)
        group = further
    known = np.flatnonzero(trace.session >= 0)
    _, first, number = np.unique(trace.session[known], return_index=True, return_inverse=True)
    group[known] = known[first][number]
    return group


def merge(traces: Sequence[Trace]) -> Trace:
    """All requests by arrival; of equal times the earlier trace's first. Blocks and sessions of different traces have nothing in common.

    Raises ConfigError if block sizes differ (0 goes with any).
    """
    sizes = sorted({trace.block_size for trace in traces if trace.block_size})
    if not traces or len(sizes) > 1:
        raise ConfigError(
            f"merge needs traces of one block size; these have {', '.join(map(str, sizes)) or 'no trace'}"
        )
    categories, tenants, goals = (
        tuple(dict.fromkeys(name for trace in traces for name in getattr(trace, plural)))
        for plural in ("categories", "tenants", "goals")
    )
    rows = sessions = blocks = 0
    parts: dict[str, list[Ints]] = {name: [] for name in (*ROW_COLUMNS, "follows", "hash_ids", "counts")}
    for trace in traces:
        for name in ("arrival_ns", "prompt", "output", "priority", "hidden"):
            parts[name].append(getattr(trace, name))
        parts["category"].append(_renumbered(trace.category, trace.categories, categories))
        parts["tenant"].append(_renumbered(trace.tenant, trace.tenants, tenants))
        parts["goal"].append(_renumbered(trace.goal, trace.goals, goals))
        parts["session"].append(np.where(trace.session < 0, -1, trace.session + sessions))
        parts["follows"].append(np.where(trace.follows < 0, -1, trace.follows + rows))
        ids, known = _from(trace.hash_ids, blocks)
        parts["hash_ids"].append(ids)
        parts["counts"].append(np.diff(trace.hash_starts))
        rows, blocks = rows + len(trace), blocks + known
        sessions += int(trace.session.max(initial=-1)) + 1
    columns = {name: np.concatenate(column) for name, column in parts.items()}
    counts = columns.pop("counts")
    name = " + ".join(trace.name for trace in traces)
    whole = Trace(
        name,
        block_size=sizes[0] if sizes else 0,
        hash_starts=_starts(counts),
        categories=categories,
        tenants=tenants,
        goals=goals,
        **columns,
    )
    return take(whole, np.argsort(whole.arrival_ns, kind="stable"))


def tile(trace: Trace, rows: int, *, fresh: bool) -> Trace:
    """The trace over and over until there are `rows` requests, each time later by its duration and one mean gap.

    `fresh`: each time with blocks and sessions of its own; else the same blocks come again (sessions are new in any case).
    """
    if rows < 1 or not len(trace):
        raise ConfigError(f"{trace.name}: cannot be tiled to {rows:,} rows")
    times = -(-rows // len(trace))
    span = trace.duration_ns + round(trace.duration_ns / max(len(trace) - 1, 1))
    turn = np.repeat(np.arange(times), len(trace))
    sessions = int(trace.session.max(initial=-1)) + 1
    ids, known = _from(trace.hash_ids, 0) if fresh else (trace.hash_ids, 0)
    columns: dict[str, Any] = {name: np.tile(getattr(trace, name), times) for name in ROW_COLUMNS}
    follows = np.tile(trace.follows, times)
    columns["arrival_ns"] = columns["arrival_ns"] + turn * span
    columns["session"] = np.where(columns["session"] < 0, -1, columns["session"] + turn * sessions)
    whole = replace(
        trace,
        name=f"{trace.name}, tiled to {rows:,}",
        **columns,
        hash_ids=np.tile(ids, times) + np.repeat(np.arange(times) * known, len(ids)),
        hash_starts=_starts(np.tile(np.diff(trace.hash_starts), times)),
        follows=np.where(follows < 0, -1, follows + turn * len(trace)),
    )
    return take(whole, np.arange(rows))


def clip(trace: Trace, prompt_max: int | None = None, output_max: int | None = None) -> Trace:
    """Longer prompts lose their end, longer outputs too. A turn that no longer begins with all of an earlier one follows none."""
    if min(prompt_max or 1, output_max or 1) < 1 or 0 in (prompt_max, output_max):
        raise ConfigError("lengths are clipped to at least 1 token")
    prompt = np.minimum(trace.prompt, trace.prompt.max(initial=1) if prompt_max is None else prompt_max)
    output = np.minimum(trace.output, trace.output.max(initial=1) if output_max is None else output_max)
    counts = np.diff(trace.hash_starts)
    kept = np.minimum(counts, prompt // trace.block_size) if trace.block_size else counts
    place = np.arange(len(trace.hash_ids)) - np.repeat(trace.hash_starts[:-1], counts)
    whole = (prompt == trace.prompt) & (output == trace.output)
    known = trace.follows >= 0
    fits = prompt >= (trace.prompt + trace.output)[trace.follows]
    return replace(
        trace,
        prompt=prompt,
        output=output,
        hidden=np.minimum(trace.hidden, output),
        hash_ids=trace.hash_ids[place < np.repeat(kept, counts)],
        hash_starts=_starts(kept),
        follows=np.where(known & whole[trace.follows] & fits, trace.follows, -1),
    )


def with_goal(trace: Trace, goal: Slo, category: str | None = None) -> Trace:
    """The trace with this goal for one category, or for all (None)."""
    rows = _of(trace, category)
    goals = trace.goals if goal in trace.goals else (*trace.goals, goal)
    return replace(trace, goals=goals, goal=np.where(rows, goals.index(goal), trace.goal))


def with_priority(trace: Trace, priority: int, category: str | None = None) -> Trace:
    """The trace with this priority for one category, or for all (None)."""
    return replace(trace, priority=np.where(_of(trace, category), priority, trace.priority))


def _of(trace: Trace, category: str | None) -> np.ndarray:
    if category is None:
        return np.ones(len(trace), dtype=bool)
    if category not in trace.categories:
        raise ConfigError(
            f"{trace.name}: has no category {category!r}; it has: {', '.join(map(repr, trace.categories))}"
        )
    return trace.category == trace.categories.index(category)


def _renumbered(column: Ints, names: Sequence[object], among: Sequence[object]) -> Ints:
    return np.array([among.index(name) for name in names], dtype=np.int64)[column]


def _from(ids: Ints, first: int) -> tuple[Ints, int]:
    """The same ids renamed to first, first + 1, ..., and how many different ones there are."""
    different, number = np.unique(ids, return_inverse=True)
    return number.astype(np.int64) + first, len(different)


def _starts(counts: Ints) -> Ints:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))
