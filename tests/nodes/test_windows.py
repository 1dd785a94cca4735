"""A handover of a model with a sliding window: what the window has passed is neither reserved, nor sent, nor kept."""

import pytest

from headrace.types.events import Landed, Write, Written
from headrace.types.ids import PoolId
from headrace.types.kv import BlockRun, GroupKind, KVGroup, KVSpec, TableRun
from headrace.types.messages import Dispatch, Joined, Leased, Matched, Publish, Role, Tail, Trim
from tests.nodes import harness
from tests.nodes.harness import POOL, ROUTER, D, InstanceBench, P, key, start

FULL = KVGroup(GroupKind.FULL, (0, 1), 1, 8)
WINDOW = KVGroup(GroupKind.WINDOW, (2,), 1, 8, window=8)


@pytest.fixture(autouse=True)
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SPEC", KVSpec((FULL, WINDOW), 4, "float32"))
    monkeypatch.setattr(harness, "BLOCKS", (64, 64))


def node_of(address: harness.Address, pool: int) -> InstanceBench:
    node = InstanceBench(address, spare=0, pool=pool, lease_blocks=16)
    runs = tuple(BlockRun(PoolId(pool), g, 0, 16) for g in (0, 1))
    node.hear(node.pool, Leased(runs, False, (0, 0)))
    node.meet((D if address == P else P, 1 - pool))
    return node


def test_the_target_wants_the_window_only_and_both_sides_count_alike():
    source, target = node_of(P, 0), node_of(D, 1)
    target.begin(start(total=30, role=Role.DECODE))
    dispatch = target.one(Dispatch, P)
    assert dispatch.table == (TableRun(0, 0, 0, 8), TableRun(1, 5, 0, 3))
    assert dispatch.expected == 8 * 2 + 3 * 1 + 1
    source.begin(start(total=30, role=Role.PREFILL))
    source.hear(D, dispatch)
    writes: list[Write] = []
    for _ in range(2):
        source.step()
        writes += source.commands(Write)
    tail = source.one(Tail, D)
    source.tell(*(Written(w.write, True) for w in writes))
    assert source.closed == [key()] and source.core.idle
    assert [s.total for s in source.core.memory.spare] == [16 - 7, 16 - 7], (
        "seven blocks of each were published"
    )
    target.tell(*(Landed(w.slot, w.weight, P) for w in reversed(writes)))
    target.hear(P, tail)
    assert target.one(Joined).blocks == 11
    assert target.one(Publish).table == (TableRun(0, 0, 0, 7), TableRun(1, 5, 0, 2))
    start_of = target.plans[0].starts[0]
    assert start_of.table == (TableRun(0, 0, 0, 8), TableRun(1, 5, 0, 3)) and start_of.computed == 30


def test_a_window_gives_blocks_back_while_it_decodes():
    node = node_of(P, 0)
    node.begin(start(total=12, emits_max=40))
    trims: list[Trim] = []
    for _ in range(20):
        node.step()
        trims += node.sent(Trim, POOL)
    assert [(t.group, t.below) for t in trims] == [(1, n) for n in range(1, 7)]
    sequence = node.core.sequences[key()]
    assert sequence.tables[0].count(-1) == 0 and sequence.tables[1].count(-1) == 6


def test_a_prefix_found_by_its_window_is_not_computed_again():
    node = node_of(P, 0)
    node.hear(ROUTER, start(total=30))
    node.hear(POOL, Matched(key(), 24, (TableRun(0, 0, 40, 6), TableRun(1, 4, 50, 2))))
    (plan,) = node.plans
    assert (plan.work[0].first, plan.work[0].count) == (24, 6)
    assert plan.starts[0].table == (
        TableRun(0, 0, 40, 6),
        TableRun(0, 6, 0, 2),
        TableRun(1, 4, 50, 2),
        TableRun(1, 6, 0, 2),
    )
    node.step()
    assert node.one(Publish).table == (TableRun(0, 6, 0, 1), TableRun(1, 6, 0, 1))
    assert node.one(Trim) == Trim(key(), 1, 5)
