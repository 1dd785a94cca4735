"""Turns that go on from each other: one growing text a session, of which each prompt is a beginning.

A session's text is the system prompt that its tenant's sessions share, then message, answer, message, answer, ... A turn's prompt is all of
it up to and with the turn's message, so the blocks of one turn's prompt and answer are the beginning of the next turn's. Ids of blocks
wholly within the system prompt are the tenant's; all others are the session's own.
"""

from dataclasses import dataclass

import numpy as np

from headrace.types.trace import Ints, Trace, make_trace
from headrace.workload.transform import take


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """One row a turn, sessions after each other, turns in their order."""

    session: Ints
    """From 0, ascending."""
    message: Ints
    """New tokens of the turn's prompt."""
    output: Ints
    pause_ns: Ints
    """From the end of the answer before (or from the session's begin) to this turn's arrival."""


def spoken(
    name: str,
    turns: Turns,
    begin_ns: Ints,
    tenant: Ints,
    system: Ints,
    *,
    block_size: int,
    context_max: int,
    token_ns: int,
    end_ns: int | None = None,
) -> Trace:
    """The trace of these turns, by arrival.

    `begin_ns` and `tenant`: by session. `system`: tokens of each tenant's system prompt. A session ends before the turn whose prompt and
    answer would be longer than `context_max`, or which would come after `end_ns`. An answer takes `token_ns` a token, and the user waits
    for its end.
    """
    owner = tenant[turns.session]
    answered = turns.output * token_ns
    prompt = system[owner] + _within(turns.session, turns.message) + _before(turns.session, turns.output)
    arrival = (
        begin_ns[turns.session] + _within(turns.session, turns.pause_ns) + _before(turns.session, answered)
    )
    # Prompts and times grow, so that what is kept of a session are its first turns.
    kept = np.flatnonzero((prompt + turns.output <= context_max) & (end_ns is None or arrival <= end_ns))
    first = np.concatenate(([True], np.diff(turns.session) != 0))[: len(turns.session)]
    follows = np.where(first, -1, np.arange(len(first)) - 1)
    ids, starts = _ids(turns.session, owner, prompt, system, block_size, len(begin_ns))
    trace = make_trace(
        name,
        arrival,
        prompt,
        turns.output,
        block_size=block_size,
        hash_ids=ids,
        hash_starts=starts,
        follows=follows,
        session=turns.session,
        tenant=owner,
        tenants=tuple(f"tenant {number}" for number in range(len(system))) if len(system) > 1 else ("",),
    )
    return take(trace, kept[np.argsort(arrival[kept], kind="stable")])


def session_column(counts: Ints) -> Ints:
    """The session of each turn, from the number of turns of each."""
    return np.repeat(np.arange(len(counts)), counts)


def _within(session: Ints, values: Ints) -> Ints:
    """Sums within each session, with the turn's own."""
    if not len(values):
        return values
    total = np.cumsum(values)
    first = np.flatnonzero(np.concatenate(([True], np.diff(session) != 0)))
    sizes = np.diff(np.concatenate((first, [len(values)])))
    return total - np.repeat(total[first] - values[first], sizes)


def _before(session: Ints, values: Ints) -> Ints:
    """Sums within each session, without the turn's own."""
    return _within(session, values) - values


def _ids(
    session: Ints, owner: Ints, prompt: Ints, system: Ints, size: int, sessions: int
) -> tuple[Ints, Ints]:
    """Ids of every turn's full blocks, and where each turn's begin. Tenants' ids come first, then each session's."""
    counts = prompt // size
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    shared = system // size
    tenant_first = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(shared)))
    longest = np.zeros(sessions, dtype=np.int64)
    np.maximum.at(longest, session, counts)
    session_first = tenant_first[-1] + np.cumsum(longest) - longest
    of_tenant, of_session = np.repeat(owner, counts), np.repeat(session, counts)
    own = session_first[of_session] + place
    return np.where(place < shared[of_tenant], tenant_first[of_tenant] + place, own), starts
