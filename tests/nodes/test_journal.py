"""A journal fed back to a fresh core gives the same commands, to the byte."""

import msgspec
import pytest

from headrace.nodes.instance import Instance
from headrace.nodes.journal import Journaled, Record, replay
from headrace.types.events import Command, Event, PeerUp, Received
from headrace.types.messages import Matched, Role
from tests.nodes.harness import POOL, ROUTER, D, InstanceBench, info, key, start
from tests.nodes.test_handover import dispatch


def instance() -> Instance:
    return InstanceBench(spare=0).core


def life() -> list[tuple[int, list[Event]]]:
    """A prefill that is handed over, by instant."""
    return [
        (5, [PeerUp(D, info(1)), Received(ROUTER, start(total=4, role=Role.PREFILL))]),
        (9, [Received(POOL, Matched(key(), 0, ())), Received(D, dispatch(()))]),
        (12, []),
    ]


def play(core: Journaled) -> list[list[Command]]:
    said: list[list[Command]] = []
    for now_ns, events in life():
        for event in events:
            core.handle(event, now_ns)
        said.append(core.settle(now_ns))
    return said


def test_a_replay_says_what_was_said():
    written: list[bytes] = []
    core = Journaled(instance(), lambda record: written.append(msgspec.msgpack.encode(record)))
    said = play(core)
    records = [msgspec.msgpack.decode(line, type=Record) for line in written]
    assert [(r.now_ns, len(r.events)) for r in records] == [(5, 2), (9, 2), (12, 0)]
    again = replay(instance(), records)
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(said) and any(said)


def test_equal_lives_have_equal_digests_and_others_do_not():
    first, second, third = (Journaled(instance()) for _ in range(3))
    play(first)
    play(second)
    assert first.digest == second.digest
    third.handle(life()[0][1][0], 5)
    third.settle(5)
    assert third.digest != first.digest
    assert first.observe(20) == second.observe(20)


def test_an_instant_is_recorded_before_it_is_decided():
    """So that the journal of a core that raised shows what it was told."""
    records: list[Record] = []
    core = Journaled(instance(), records.append)
    core.handle(Received(ROUTER, start()), 5)
    with pytest.raises(AssertionError, match="twice"):
        core.handle(Received(ROUTER, start()), 5)
    core.settle(5)
    assert [(r.now_ns, len(r.events)) for r in records] == [(5, 2)]
