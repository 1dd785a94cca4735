from collections.abc import Callable
from itertools import count

import pytest

from headrace.transfer.runs import expected_weight
from headrace.transfer.source import Outgoing
from headrace.types.events import Write
from headrace.types.ids import Address, RequestId, SequenceKey, Slot, WriteId
from headrace.types.kv import GroupKind, KVGroup, KVSpec, TableRun
from headrace.types.messages import Dispatch

KEY = SequenceKey(RequestId(1))
TARGET = Address("d")
SPEC = KVSpec(
    (KVGroup(GroupKind.FULL, (0, 1), 1, 8), KVGroup(GroupKind.WINDOW, (2,), 1, 8, window=4)), 4, "float32"
)


def session(*table: TableRun, shared: bool = False) -> Outgoing:
    dispatch = Dispatch(KEY, Slot(9), table, shared, expected=0)
    return Outgoing(dispatch, TARGET, SPEC)


def numbers() -> Callable[[], WriteId]:
    serial = count(1)
    return lambda: WriteId(next(serial))


def moved(writes: list[Write]) -> list[tuple[int, int, int]]:
    return [(w.group, w.source_first + i, w.target_first + i) for w in writes for i in range(w.count)]


def test_each_wanted_block_is_sent_once_whatever_the_chunks():
    outgoing = session(TableRun(0, 1, 20, 4), TableRun(1, 3, 30, 2))
    tables = [[5, 6, 7, 9, 8], [-1, -1, -1, 4, 5]]
    ids = numbers()
    sent: list[Write] = []
    for ready in (0, 1, 3, 3, 2, 5):
        sent += outgoing.advance(tables, ready, ids)
    assert sorted(moved(sent)) == [(0, 6, 20), (0, 7, 21), (0, 8, 23), (0, 9, 22), (1, 4, 30), (1, 5, 31)]
    assert [w.write for w in sent] == list(range(1, len(sent) + 1))
    assert sum(w.weight for w in sent) + 1 == expected_weight([4, 2], [2, 1])
    assert outgoing.blocks == 6 and outgoing.writes == len(sent)
    assert outgoing.bytes == 4 * SPEC.block_bytes(0) + 2 * SPEC.block_bytes(1)
    assert {w.slot for w in sent} == {9} and {w.target for w in sent} == {TARGET}


def test_a_run_that_is_contiguous_on_both_sides_is_one_write():
    writes = session(TableRun(0, 0, 20, 4)).advance([[5, 6, 7, 8], []], 4, numbers())
    assert [(w.source_first, w.target_first, w.count, w.weight) for w in writes] == [(5, 20, 4, 8)]


def test_a_preempted_source_does_not_send_again_what_it_computes_again():
    outgoing = session(TableRun(0, 0, 20, 4))
    ids = numbers()
    outgoing.advance([[5, 6, 7], []], 3, ids)
    assert outgoing.advance([[1], []], 1, ids) == []
    assert moved(outgoing.advance([[1, 2, 3, 4], []], 4, ids)) == [(0, 4, 23)]


def test_it_is_done_when_the_tail_is_sent_and_every_write_is_acknowledged():
    outgoing = session(TableRun(0, 0, 20, 1))
    (write,) = outgoing.advance([[5], []], 1, numbers())
    assert not outgoing.quiet and not outgoing.done
    outgoing.tail_sent = True
    assert not outgoing.done
    outgoing.acknowledge(write.write)
    assert outgoing.quiet and outgoing.done


def test_a_stopped_session_sends_no_more():
    outgoing = session(TableRun(0, 0, 20, 2))
    (write,) = outgoing.advance([[5, 6], []], 1, numbers())
    outgoing.stop()
    assert outgoing.advance([[5, 6], []], 2, numbers()) == [] and not outgoing.quiet
    outgoing.acknowledge(write.write)
    assert outgoing.quiet


def test_with_one_pool_nothing_is_written():
    assert session(shared=True).advance([[5], []], 1, numbers()) == []


def test_a_block_that_is_gone_is_never_sent():
    with pytest.raises(AssertionError, match="trimmed"):
        session(TableRun(1, 0, 20, 1)).advance([[], [-1]], 1, numbers())


def moving(*table: TableRun) -> Outgoing:
    return Outgoing(Dispatch(KEY, Slot(9), table, shared=False, expected=0), TARGET, SPEC, moving=True)


def test_a_table_may_be_extended_while_its_blocks_are_sent():
    outgoing = moving(TableRun(0, 0, 20, 2))
    ids = numbers()
    assert moved(outgoing.advance([[5, 6, 7], []], 3, ids)) == [(0, 5, 20), (0, 6, 21)]
    outgoing.extend((TableRun(0, 2, 30, 1), TableRun(1, 2, 40, 1)))
    assert moved(outgoing.advance([[5, 6, 7], [-1, -1, 9]], 3, ids)) == [(0, 7, 30), (1, 9, 40)]
    assert outgoing.skipped == 0 and outgoing.blocks == 4


def test_what_a_window_has_passed_meanwhile_is_skipped_and_counted():
    outgoing = moving(TableRun(0, 0, 20, 2), TableRun(1, 0, 30, 2))
    writes = outgoing.advance([[5, 6], [-1, 9]], 2, numbers())
    assert moved(writes) == [(0, 5, 20), (0, 6, 21), (1, 9, 31)]
    assert sum(w.weight for w in writes) + outgoing.skipped + 1 == expected_weight([2, 2], [2, 1])


def test_what_is_not_there_at_all_is_counted_too():
    outgoing = moving(TableRun(0, 1, 20, 3), TableRun(1, 1, 30, 3))
    writes = outgoing.advance([[5, 6], [-1, 9]], 2, numbers())
    outgoing.drop_rest()
    assert moved(writes) == [(0, 6, 20), (1, 9, 30)]
    assert sum(w.weight for w in writes) + outgoing.skipped + 1 == expected_weight([3, 3], [2, 1])
    assert outgoing.advance([[5, 6, 7, 8], [-1, 9, 10, 11]], 4, numbers()) == []


def layered(writes: list[Write]) -> list[tuple[int, int, int, int, int]]:
    """(group, layer, source, target, weight of one block) of each layer of each block."""
    return [
        (w.group, w.layer + layer, w.source_first + i, w.target_first + i, w.weight // w.count)
        for w in writes
        for i in range(w.count)
        for layer in range(w.layers or len(SPEC.groups[w.group].layers))
    ]


def test_layers_leave_one_after_the_other_each_once():
    outgoing = session(TableRun(0, 0, 20, 3), TableRun(1, 2, 30, 1))
    tables = [[5, 6, 7], [-1, -1, 4]]
    ids = numbers()
    first = outgoing.advance(tables, 2, ids, 1)
    assert layered(first) == [(0, 0, 5, 20, 1), (0, 0, 6, 21, 1)] and first[0].layers == 1
    assert outgoing.advance(tables, 2, ids, 1) == []
    second = outgoing.advance(tables, 2, ids, 2)
    assert layered(second) == [(0, 1, 5, 20, 1), (0, 1, 6, 21, 1)]
    rest = outgoing.advance(tables, 3, ids)
    assert layered(rest) == [(0, 0, 7, 22, 2), (0, 1, 7, 22, 2), (1, 0, 4, 30, 1)]
    assert sum(w.weight for w in first + second + rest) + 1 == expected_weight([3, 1], [2, 1])
    assert outgoing.blocks == 4
    assert outgoing.bytes == 3 * SPEC.block_bytes(0) + SPEC.block_bytes(1)


def test_layers_that_were_sent_before_a_preemption_are_not_sent_again():
    outgoing = session(TableRun(0, 0, 20, 2))
    ids = numbers()
    outgoing.advance([[5, 6], []], 2, ids, 1)
    assert layered(outgoing.advance([[1], []], 1, ids)) == [(0, 1, 1, 20, 1)]
    assert layered(outgoing.advance([[1, 9], []], 2, ids)) == [(0, 1, 9, 21, 1)]
