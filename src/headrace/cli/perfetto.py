"""A sample of a run's requests as Chrome trace events, for ui.perfetto.dev or chrome://tracing.

Each instance is a process; what overlaps there lies on rows of its own. A request is queued and prefilled on the one, its KV is on its
way to the other, where it is decoded. Spans carry the request's number, so that a search finds all of them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np

from headrace.types.outcomes import Outcomes, RunData

KINDS = ("queued", "prefill", "transfer", "decode")


class Span(NamedTuple):
    instance: int
    begin_ns: int
    end_ns: int
    kind: str
    row: int


def spans(run: RunData, requests_max: int) -> bytes:
    """JSON. Of more requests than that, every so-many-th."""
    outcomes = run.outcomes
    rows = np.unique(np.linspace(0, len(outcomes) - 1, min(requests_max, len(outcomes))).astype(np.int64))
    found = sorted(span for row in rows.tolist() for span in _of(outcomes, row))
    events: list[dict[str, Any]] = []
    for number, name in enumerate(outcomes.instances):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
        events.append(
            {"ph": "M", "name": "process_sort_index", "pid": number, "args": {"sort_index": number}}
        )
    lanes: dict[tuple[int, str], list[int]] = {}
    for span in found:
        lane = _lane(lanes.setdefault((span.instance, span.kind), []), span)
        events.append(
            {
                "ph": "X",
                "pid": span.instance,
                "tid": KINDS.index(span.kind) * 10_000 + lane,
                "ts": span.begin_ns / 1e3,
                "dur": (span.end_ns - span.begin_ns) / 1e3,
                "name": f"{span.kind} {span.row + 1}",
                "cat": span.kind,
                "args": _facts(outcomes, span.row),
            }
        )
    for (instance, kind), ends in lanes.items():
        for lane in range(len(ends)):
            tid = KINDS.index(kind) * 10_000 + lane
            events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": instance,
                    "tid": tid,
                    "args": {"name": f"{kind} {lane + 1}"},
                }
            )
    about = {
        "run": run.name,
        "seed": run.seed,
        "clock": run.clock,
        "requests": f"{len(rows)} of {len(outcomes)}",
    }
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _of(outcomes: Outcomes, row: int) -> Iterator[Span]:
    """The spans of one request: of its last attempt, as far as it got."""
    arrival, prefill_at, first, joined, finished = (
        int(getattr(outcomes, name)[row])
        for name in ("arrival_ns", "prefill_ns", "first_ns", "joined_ns", "finished_ns")
    )
    prefill, decode = int(outcomes.prefill[row]), int(outcomes.decode[row])
    if not finished or prefill < 0:
        return
    decode = prefill if decode < 0 else decode
    if prefill_at > arrival:
        yield Span(prefill, arrival, prefill_at, "queued", row)
    if first > prefill_at:
        yield Span(prefill, prefill_at, first, "prefill", row)
    begin = first
    if decode != prefill and joined:
        begin = max(first, joined)
        if begin > first:
            yield Span(decode, first, begin, "transfer", row)
    if finished > begin:
        yield Span(decode, begin, finished, "decode", row)


def _lane(ends: list[int], span: Span) -> int:
    """The lowest row of its kind that is free; `ends`: when each row's last span ends."""
    for lane, end in enumerate(ends):
        if end <= span.begin_ns:
            ends[lane] = span.end_ns
            return lane
    ends.append(span.end_ns)
    return len(ends) - 1


def _facts(outcomes: Outcomes, row: int) -> dict[str, int]:
    return {
        name: int(getattr(outcomes, name)[row])
        for name in ("prompt", "output", "cached", "bytes_moved", "recomputed", "attempts")
    } | {"request": row + 1}
