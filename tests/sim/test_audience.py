"""Clients of the timing simulation: what they ask, how their blocks are named, and what they note."""

from typing import Any

import numpy as np

from headrace.sim.audience import Audience
from headrace.types.events import Deliver, Reject
from headrace.types.ids import Address, BlockHash, RequestId, SequenceKey
from headrace.types.messages import Role, Start
from headrace.types.request import NEVER_NS, FinishReason, Timeline
from headrace.types.trace import Trace, block_name, make_trace

BEGIN_NS = 1_000


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def trace_of(block_size: int, *ids: list[int], prompts: list[int], outputs: list[int], **more: Any) -> Trace:
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    named = (
        {"block_size": block_size, "hash_ids": ints(*[i for row in ids for i in row]), "hash_starts": starts}
        if block_size
        else {}
    )
    return make_trace("t", ints(*range(len(prompts))), ints(*prompts), ints(*outputs), **named, **more)


def audience_of(trace: Trace, size: int = 4, **more: Any) -> Audience:
    return Audience(trace, size, ("i0", "i1"), begin_ns=BEGIN_NS, **more)


def names_of(audience: Audience, row: int, count: int) -> list[BlockHash]:
    """Of the first blocks of all that a request says."""
    audience.request(row)
    start = Start(SequenceKey(RequestId(row + 1)), Role.WHOLE, 8, 0, 4, (), 0, NEVER_NS)
    script, _ = audience.payload_for(start, Address("i0"))
    assert script.name is not None
    return [script.name(i) for i in range(count)]


def test_without_names_nothing_is_shared():
    request = audience_of(trace_of(0, prompts=[9], outputs=[3])).request(0)
    assert request.hashes == ()
    assert (request.prompt, request.tokens_max, request.arrival_ns) == (9, 3, BEGIN_NS)


def test_equal_blocks_keep_their_names():
    request = audience_of(trace_of(4, [7, 8], prompts=[11], outputs=[3])).request(0)
    assert request.hashes == (block_name(7), block_name(8))


def test_larger_blocks_are_cut():
    request = audience_of(trace_of(8, [7, 8], prompts=[17], outputs=[3])).request(0)
    assert request.hashes == (block_name(7, 0), block_name(7, 1), block_name(8, 0), block_name(8, 1))


def test_smaller_blocks_are_joined_and_named_by_the_last():
    """An id names all before it too, so the last one says it all; what does not fill a block of ours has no name."""
    request = audience_of(trace_of(2, [5, 6, 7, 8, 9], prompts=[10], outputs=[3])).request(0)
    assert request.hashes == (block_name(6), block_name(8))


def test_what_is_generated_has_the_names_of_the_next_turn():
    trace = trace_of(4, [1, 2], [1, 2, 3, 4, 5], prompts=[8, 23], outputs=[8, 2], follows=ints(-1, 0))
    names = names_of(audience_of(trace), 0, 4)
    assert names == [block_name(n) for n in (1, 2, 3, 4)]


def test_the_next_turn_names_no_more_than_was_said():
    """Its own words are in its prompt, too: those blocks are not what this turn generated."""
    trace = trace_of(4, [1, 2], [1, 2, 3, 4, 5], prompts=[8, 23], outputs=[6, 2], follows=ints(-1, 0))
    names = names_of(audience_of(trace), 0, 4)
    assert names[:3] == [block_name(n) for n in (1, 2, 3)]
    assert names[3] not in {block_name(n) for n in range(10)}


def test_what_nobody_goes_on_from_has_names_of_its_own():
    trace = trace_of(4, [1, 2], [1, 2], prompts=[8, 8], outputs=[8, 8])
    audience = audience_of(trace)
    one, two = names_of(audience, 0, 4), names_of(audience, 1, 4)
    assert one[:2] == two[:2]
    assert len({*one, *two}) == 2 + 4


def test_of_two_next_turns_the_first_counts():
    trace = trace_of(
        4, [1], [1, 2, 3], [1, 8, 9], prompts=[4, 12, 12], outputs=[8, 1, 1], follows=ints(-1, 0, 0)
    )
    assert names_of(audience_of(trace), 0, 3) == [block_name(n) for n in (1, 2, 3)]


def test_a_limit_above_what_comes_out_makes_it_stop_by_itself():
    audience = audience_of(trace_of(0, prompts=[9, 9], outputs=[3, 30]), output_limit=20, deadline_ns=500)
    assert [audience.request(row).tokens_max for row in (0, 1)] == [20, 30]
    assert audience.request(0).deadline_ns == BEGIN_NS + 500
    for row, stops in ((0, True), (1, False)):
        start = Start(SequenceKey(RequestId(row + 1)), Role.WHOLE, 9, 2, 20, (), 0, NEVER_NS)
        script, history = audience.payload_for(start, Address("i1"))
        assert (script.stops, history) == (stops, 2)


def test_what_is_delivered_is_noted_on_the_trace_s_clock():
    audience = audience_of(trace_of(0, prompts=[9], outputs=[3]), ingress_ns=10, egress_ns=7)
    assert audience.due_ns(0) == BEGIN_NS + 10
    audience.request(0)
    key = SequenceKey(RequestId(1))
    for role, name in ((Role.PREFILL, "i1"), (Role.DECODE, "i0")):
        audience.payload_for(Start(key, role, 9, 0, 3, (), 0, NEVER_NS), Address(name))
    audience.deliver(Deliver(RequestId(1), 0, key, 0, 1, None, None), BEGIN_NS + 50)
    timeline = Timeline(
        placed_ns=BEGIN_NS + 12, prefill_ns=BEGIN_NS + 20, cached=4, bytes_moved=99, attempts=2
    )
    audience.deliver(Deliver(RequestId(1), 0, key, 1, 2, FinishReason.LENGTH, timeline), BEGIN_NS + 80)
    o = audience.outcomes
    assert (o.first_ns[0], o.finished_ns[0], o.placed_ns[0], o.prefill_ns[0], o.joined_ns[0]) == (
        57,
        87,
        12,
        20,
        0,
    )
    assert (o.output[0], o.cached[0], o.bytes_moved[0], o.attempts[0]) == (3, 4, 99, 2)
    assert (o.prefill[0], o.decode[0]) == (1, 0)
    assert audience.unfinished == 0 and audience.waiting() == []


def test_who_is_rejected_or_leaves_is_noted_once():
    audience = audience_of(trace_of(0, prompts=[9, 9], outputs=[3, 3]))
    audience.request(0)
    audience.request(1)
    assert audience.waiting() == [1, 2]
    audience.reject(Reject(RequestId(1), "no room", overloaded=True), 5)
    assert audience.withdraw(RequestId(2), None) and not audience.withdraw(RequestId(2), None)
    errors = [audience.outcomes.errors[i] for i in audience.outcomes.error]
    assert errors == ["overloaded", "withdrawn"]
    assert audience.unfinished == 0
