from headrace.types.ids import PoolId
from headrace.types.kv import BlockRun, TableRun
from headrace.types.messages import Lease, Leased, Return, Role, Trim
from tests.engine.build import FULL, MIXED, SIZE, WINDOW, give, memory_of, sequence_of


def test_a_table_grows_where_it_ends():
    memory = memory_of(4)
    give(memory, 5, first=10)
    sequence, other = sequence_of(1, 20), sequence_of(2, 4)
    assert memory.missing(sequence, 5) == [2] and memory.missing(sequence, 8) == [2]
    memory.grow(sequence, [2])
    memory.grow(other, [1])
    memory.grow(sequence, [3])
    memory.grow(sequence, [1])
    assert sequence.tables == [[0, 1, 10, 11, 12, 13]]
    assert sequence.tables == [[0, 1, 10, 11, 12, 13]] and other.tables == [[2]]
    assert memory.missing(sequence, 24) == [0]


def test_a_full_group_starts_in_one_piece_and_a_window_with_its_first_chunk():
    memory = memory_of(9, 9, spec=MIXED)
    assert memory.missing_at_start(sequence_of(1, 33, groups=2), 8) == [9, 2]
    received = sequence_of(2, 33, role=Role.DECODE, groups=2)
    memory.trim(received, received.total)
    assert received.tables == [[], [-1] * 6] and received.trimmed == [0, 6]
    assert memory.missing_at_start(received, 8) == [9, 3]


def test_what_the_pool_named_comes_before_what_is_grown():
    memory = memory_of(4, 4, spec=MIXED)
    sequence = sequence_of(1, 20, groups=2)
    memory.adopt(sequence, (TableRun(0, 0, 30, 2), TableRun(0, 2, 40, 2), TableRun(1, 2, 50, 2)), [4, 4])
    assert sequence.tables == [[30, 31, 40, 41], [-1, -1, 50, 51]] and sequence.trimmed == [0, 2]
    sequence.published = [4, 4]
    memory.grow(sequence, [1, 1])
    assert memory.private(sequence) == [TableRun(0, 4, 0, 1), TableRun(1, 4, 0, 1)]
    memory.free(sequence)
    assert [s.total for s in memory.spare] == [4, 4]
    assert (sequence.tables, sequence.published, sequence.trimmed) == ([[], []], [0, 0], [0, 0])


def test_full_blocks_are_published_once_their_kv_and_their_hash_are_there():
    memory = memory_of(8)
    sequence = sequence_of(1, 13)
    memory.grow(sequence, [4])
    assert memory.publish(sequence) is None
    sequence.computed = 11
    message = memory.publish(sequence)
    assert message is not None and message.table == (TableRun(0, 0, 0, 2),)
    assert message.hashes == tuple(sequence.hashes[:2])
    assert memory.publish(sequence) is None
    sequence.computed = 18
    message = memory.publish(sequence)
    assert message is not None and message.table == (TableRun(0, 2, 2, 1),), "the fourth has no hash yet"
    assert message.first == 1, "the hash before it goes along"
    assert message.hashes == tuple(sequence.hashes[1:3]) and memory.private(sequence) == [
        TableRun(0, 3, 3, 1)
    ]


def test_windows_give_back_what_they_have_passed():
    memory = memory_of(8, 8, spec=MIXED)
    sequence = sequence_of(1, 24, groups=2)
    memory.grow(sequence, [6, 6])
    sequence.computed = 12
    memory.publish(sequence)
    assert memory.trim(sequence, 12) == [Trim(sequence.key, 1, 1)]
    assert sequence.tables[1] == [-1, 1, 2, 3, 4, 5] and memory.spare[1].runs() == [(6, 2)]
    assert memory.trim(sequence, 12) == []
    # Past what is published: private blocks come back at once.
    assert memory.trim(sequence, 23) == [Trim(sequence.key, 1, 3)]
    assert sequence.tables[1] == [-1, -1, -1, -1, 4, 5] and memory.spare[1].runs() == [(3, 1), (6, 2)]
    memory.free(sequence)
    assert [s.runs() for s in memory.spare] == [[(3, 5)], [(3, 5)]]


def test_full_groups_are_never_trimmed():
    memory = memory_of(8)
    sequence = sequence_of(1, 24)
    memory.grow(sequence, [6])
    assert memory.trim(sequence, 24) == [] and FULL.window == 0 and WINDOW.window == 2 * SIZE


def test_a_window_that_needs_nothing_of_the_prefix_starts_after_it():
    memory = memory_of(4, 4, spec=MIXED)
    sequence = sequence_of(1, 8, groups=2)
    memory.adopt(sequence, (TableRun(0, 0, 30, 1),), [1, 1])
    assert sequence.tables == [[30], [-1]] and sequence.trimmed == [0, 1]
    assert memory.missing(sequence, 8) == [1, 1]


# The lease


def test_a_need_is_asked_for_once():
    memory = memory_of(2)
    assert memory.request() is None
    memory.need = [5]
    assert memory.request() == Lease((3,), (3,))
    assert memory.request() is None
    memory.need = [6]
    assert memory.request() == Lease((4,), (4,))
    give(memory, 4, first=10)
    assert memory.request() is None and memory.spare[0].total == 6


def test_a_part_of_what_was_needed_leaves_the_rest_asked():
    memory = memory_of(0)
    memory.need = [5]
    assert memory.request() == Lease((5,), (5,))
    give(memory, 2, short=True)
    assert memory.short and memory.request() == Lease((3,), (3,))
    give(memory, 0, short=True)
    assert memory.request() is None
    give(memory, 3, first=10)
    assert not memory.short and memory.request() is None


def test_a_need_that_has_gone_is_taken_back():
    memory = memory_of(0)
    memory.need = [5]
    memory.request()
    give(memory, 0, short=True)
    memory.need = [0]
    assert memory.request() == Lease((0,), (0,))
    assert memory.request() is None


def test_blocks_are_asked_for_before_work_waits_for_them():
    memory = memory_of(4, lease_blocks=8)
    assert memory.request() is None
    memory.spare[0].take(1)
    assert memory.request() == Lease((0,), (5,))
    assert memory.request() is None
    memory.need = [6]
    assert memory.request() == Lease((3,), (11,)), "three for the work, eight beyond"


def test_a_pool_without_blocks_in_the_group_that_runs_low_is_left_alone():
    """It would answer at once, with nothing, for ever."""
    memory = memory_of(8, 0, spec=MIXED, lease_blocks=8)
    memory.leased(Leased((), False, (20, 0)))
    assert memory.request() is None
    memory.leased(Leased((), False, (20, 3)))
    assert memory.request() == Lease((0, 0), (0, 8))


def test_what_exceeds_the_high_water_goes_back():
    memory = memory_of(35, lease_blocks=8)
    assert memory.surplus() == Return((BlockRun(PoolId(0), 0, 0, 3),))
    assert memory.surplus() is None
    memory.need = [40]
    give(memory, 6, first=40)
    assert memory.surplus() is None, "work waits for it"


def test_under_pressure_nothing_spare_is_kept_and_nothing_is_asked_ahead():
    memory = memory_of(3, lease_blocks=8)
    memory.pressed = True
    assert memory.request() is None
    memory.need = [1]
    assert memory.surplus() == Return((BlockRun(PoolId(0), 0, 0, 2),))
    memory.need = [2]
    assert memory.request() == Lease((1,), (1,))


def test_what_was_asked_for_ahead_is_not_given_back_while_something_waits():
    memory = memory_of(0, lease_blocks=4)
    memory.need = [40]
    assert memory.request() is not None
    give(memory, 44)
    assert memory.surplus() is None
    running = sequence_of(2, 4)
    memory.grow(running, [3])
    assert memory.covers([40]), "what runs took of it, and the one that waits can still start"
    memory.need = [0]
    given = memory.surplus()
    assert given is not None and memory.spare[0].total == 16
