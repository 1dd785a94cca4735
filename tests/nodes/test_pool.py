import pytest

from headrace.types.events import Landed, PeerLost, PeerUp, Received
from headrace.types.ids import Address, PoolId, Slot
from headrace.types.kv import BlockRun, TableRun
from headrace.types.messages import (
    Adopted,
    Drain,
    Handover,
    Indexed,
    Lease,
    Leased,
    Match,
    Matched,
    Publish,
    Quiet,
    Recall,
    Release,
    Return,
)
from tests.nodes.harness import ROUTER, D, P, PoolBench, hashes, info, key

E = Address("e")


def lease(need: int, want: int | None = None, since_ns: int = 0) -> Lease:
    return Lease((need,), (need if want is None else want,), since_ns)


def back(first: int, count: int) -> Return:
    return Return((BlockRun(PoolId(0), 0, first, count),))


def test_a_need_is_met_with_what_is_wanted_beyond_it_if_there_is_as_much():
    pool = PoolBench(blocks=16)
    pool.hear(P, lease(3, 10))
    assert pool.one(Leased, P) == Leased((BlockRun(PoolId(0), 0, 0, 10),), False, (6,))
    pool.hear(D, lease(2, 10))
    assert pool.one(Leased, D) == Leased((BlockRun(PoolId(0), 0, 10, 6),), False, (0,))
    pool.tell()
    assert not pool.said


def test_who_is_short_is_told_and_gets_what_comes_free_first():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(7))
    pool.hear(D, lease(3))
    assert pool.one(Leased, D) == Leased((BlockRun(PoolId(0), 0, 7, 1),), True, (0,))
    pool.hear(P, back(0, 1))
    assert pool.one(Leased, D).short and pool.leased(D) == 2
    pool.hear(P, back(1, 3))
    assert pool.one(Leased, D) == Leased((BlockRun(PoolId(0), 0, 1, 1),), False, (2,))


def test_the_oldest_request_is_served_first():
    pool = PoolBench(blocks=8, holders=(P, D, E))
    pool.hear(P, lease(8))
    pool.hear(E, lease(1, since_ns=7))
    assert pool.one(Leased, E) == Leased((), True, (0,))
    pool.hear(D, lease(6, since_ns=3))
    pool.hear(P, back(0, 4))
    assert pool.leased(D) == 4 and pool.leased(E) == 0
    pool.hear(P, back(4, 4))
    assert pool.leased(D) == 6 and pool.leased(E) == 1


def test_asking_again_keeps_the_place_and_replaces_the_need():
    pool = PoolBench(blocks=8, holders=(P, D, E))
    pool.hear(P, lease(8))
    pool.hear(D, lease(2, since_ns=1))
    pool.hear(E, lease(2, since_ns=2))
    pool.hear(D, lease(3, since_ns=1))
    pool.hear(P, back(0, 3))
    assert pool.leased(D) == 3 and pool.leased(E) == 0


def test_an_older_request_takes_the_first_place_and_the_pressure_moves():
    pool = PoolBench(blocks=8, holders=(P, D, E))
    pool.hear(P, lease(8))
    pool.hear(D, lease(2, since_ns=5))
    pool.hear(E, lease(2, since_ns=1))
    assert pool.sent(Recall, D) == [Recall(on=True, force=True)]
    pool.hear(P, back(0, 2))
    assert pool.leased(E) == 2 and pool.leased(D) == 0
    assert pool.sent(Recall, D) == [Recall(on=False, force=False)]


def test_a_need_taken_back_leaves_the_queue_and_ends_the_pressure():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(8))
    pool.hear(D, lease(2))
    assert pool.one(Recall, P) == Recall(on=True, force=False)
    pool.hear(D, lease(0))
    assert not pool.one(Leased, D).short and pool.one(Recall, P) == Recall(on=False, force=False)


def test_who_only_asks_ahead_takes_nothing_from_who_needs():
    pool = PoolBench(blocks=8)
    pool.tell(Received(D, lease(0, 8)), Received(P, lease(3, since_ns=9)))
    assert (pool.leased(P), pool.leased(D)) == (3, 5) and not pool.sent(Recall)


def test_pressure_is_on_while_somebody_is_short_and_is_told_once():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(8))
    assert not pool.sent(Recall)
    pool.hear(D, lease(2))
    assert pool.one(Recall) == Recall(on=True, force=False) and pool.sent(Recall, P)
    pool.hear(P, back(0, 1))
    assert not pool.sent(Recall)
    pool.hear(P, back(1, 1))
    assert pool.one(Recall, P) == Recall(on=False, force=False)


def test_who_joins_while_somebody_is_short_is_under_pressure_too():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(8))
    pool.hear(D, lease(2))
    pool.tell(PeerUp(E, info()))
    assert pool.one(Recall, E) == Recall(on=True, force=False)


def test_who_is_short_behind_the_first_is_forced_until_the_first_is_served():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(5))
    pool.hear(D, lease(5, since_ns=1))
    pool.hear(P, lease(1, since_ns=2))
    assert pool.one(Recall, P) == Recall(on=True, force=True) and not pool.sent(Recall, D)
    pool.tell()
    assert not pool.sent(Recall), "it was asked and has not answered"
    pool.hear(P, back(0, 1))
    assert pool.one(Recall, P) == Recall(on=True, force=True), "that was not enough"
    pool.hear(P, back(1, 1))
    assert pool.one(Recall, P) == Recall(on=False, force=False)
    assert pool.leased(D) == 5, "and now the other is first"
    assert pool.one(Recall, D) == Recall(on=True, force=False)


def test_giving_up_only_published_blocks_is_an_answer_too():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(4))
    pool.hear(P, Publish(key(), (TableRun(0, 0, 0, 1),), hashes(1, 1)))
    pool.hear(D, lease(6))
    pool.hear(P, lease(1))
    assert pool.one(Recall, P).force
    pool.hear(P, Release(key()))
    assert pool.leased(D) == 5 and pool.one(Recall, P).force


def test_when_the_first_dies_the_next_is_first():
    pool = PoolBench(blocks=8, holders=(P, D, E))
    pool.hear(P, lease(8))
    pool.hear(D, lease(2))
    pool.hear(E, lease(2))
    pool.tell(PeerLost(D, info()))
    assert pool.one(Recall, E) == Recall(on=False, force=False)
    pool.hear(P, back(0, 2))
    assert pool.leased(E) == 2


def test_published_blocks_are_found_locked_and_released():
    pool = PoolBench(blocks=4)
    pool.hear(P, lease(2))
    pool.hear(P, Publish(key(), (TableRun(0, 0, 0, 2),), hashes(1, 2)))
    pool.hear(D, Match(key(2), hashes(1, 2), 99))
    assert pool.one(Matched, D) == Matched(key(2), 8, (TableRun(0, 0, 0, 2),))
    pool.hear(P, Release(key()))
    pool.hear(P, lease(3))
    assert pool.one(Leased, P).short
    pool.hear(D, Release(key(2)))
    assert not pool.one(Leased, P).short


def test_a_handover_moves_everything_to_the_target():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(3))
    pool.hear(P, Publish(key(), (TableRun(0, 0, 0, 2),), hashes(1, 2)))
    pool.hear(P, Handover(key(), D, (TableRun(0, 2, 2, 1),)))
    assert pool.one(Adopted, D) == Adopted(key(), (TableRun(0, 0, 0, 2), TableRun(0, 2, 2, 1)), (2,))
    assert (pool.leased(P), pool.leased(D)) == (0, 1)


def test_what_is_handed_to_the_dead_is_free():
    pool = PoolBench(blocks=8)
    pool.hear(P, lease(3))
    pool.hear(P, Publish(key(), (TableRun(0, 0, 0, 2),), hashes(1, 2)))
    pool.tell(PeerLost(D, info()))
    pool.hear(P, Handover(key(), D, (TableRun(0, 2, 2, 1),)))
    assert not pool.sent(Adopted) and pool.core.blocks.available() == (8,)


def dead_with_blocks(holders: tuple[Address, ...] = (P, D, E)) -> PoolBench:
    pool = PoolBench(blocks=8, holders=holders)
    pool.hear(D, lease(5))
    return pool


def test_a_dead_holders_blocks_wait_until_every_writer_has_said_quiet():
    pool = dead_with_blocks()
    pool.tell(PeerLost(D, info()))
    assert pool.core.blocks.available() == (3,)
    pool.hear(P, Quiet(D))
    pool.hear(P, Quiet(D))
    assert pool.core.blocks.available() == (3,)
    pool.hear(E, Quiet(D))
    assert pool.core.blocks.available() == (8,)


def test_quiet_may_come_before_the_loss_is_known_here():
    pool = dead_with_blocks()
    pool.hear(E, Quiet(D))
    pool.hear(P, Quiet(D))
    assert pool.core.blocks.available() == (3,), "its blocks are still its own"
    pool.tell(PeerLost(D, info()))
    assert pool.core.blocks.available() == (8,)


def test_a_writer_that_dies_writes_no_more():
    pool = dead_with_blocks()
    pool.tell(PeerLost(D, info()))
    pool.hear(P, Quiet(D))
    pool.tell(PeerLost(E, info()))
    assert pool.core.blocks.available() == (8,)


def test_instances_of_other_pools_are_writers_too_and_later_ones_are_not():
    pool = dead_with_blocks(holders=(D,))
    other = Address("x")
    pool.tell(PeerUp(other, info(pool=1)))
    pool.tell(PeerLost(D, info()), PeerUp(E, info()))
    assert pool.core.blocks.available() == (3,)
    pool.hear(other, Quiet(D))
    assert pool.core.blocks.available() == (8,)


def test_a_lone_holders_blocks_are_free_when_it_dies():
    pool = dead_with_blocks(holders=(D,))
    pool.tell(PeerLost(D, info()))
    assert pool.core.blocks.available() == (8,)


def test_a_quiet_about_one_life_says_nothing_about_the_next():
    pool = dead_with_blocks()
    again = Address(D.name, 1)
    pool.tell(PeerLost(D, info()))
    pool.hear(P, Quiet(D))
    pool.hear(E, Quiet(D))
    pool.tell(PeerUp(again, info()))
    pool.hear(again, lease(5))
    pool.hear(P, Quiet(D))
    pool.tell(PeerLost(again, info()))
    assert pool.core.blocks.available() == (3,)


def test_what_comes_free_from_quarantine_goes_to_who_is_short():
    pool = dead_with_blocks()
    pool.hear(P, lease(6))
    pool.tell(PeerLost(D, info()))
    pool.hear(E, Quiet(D))
    pool.hear(P, Quiet(D))
    assert pool.leased(P) == 6 and not pool.one(Leased, P).short


def test_strangers_and_the_dead_are_not_heard():
    pool = PoolBench(blocks=4, holders=(P,))
    pool.hear(D, lease(2))
    assert not pool.said
    pool.tell(PeerLost(P, info()), Received(P, lease(2)))
    assert not pool.said and pool.core.blocks.available() == (4,)


@pytest.mark.parametrize("event", [Landed(Slot(0), 1, P), Received(P, Drain())])
def test_what_is_not_for_a_pool_is_an_error(event: Landed | Received):
    with pytest.raises(TypeError, match="no use"):
        PoolBench().tell(event)


# Who listens


def told(pool: PoolBench) -> list[Indexed]:
    return pool.sent(Indexed, ROUTER)


def test_a_listener_is_told_what_enters_and_leaves_the_index():
    pool = PoolBench(blocks=4, listener=ROUTER)
    pool.hear(P, Lease((3,), (3,)))
    assert not told(pool)
    names = hashes(1, 2)
    pool.hear(P, Publish(key(1), (TableRun(0, 0, 0, 2),), names))
    assert told(pool) == [Indexed(1, names, ())]
    pool.hear(P, Match(key(2), names, 8), Release(key(1)), Release(key(2)))
    assert not told(pool), "it is cached, as before"
    pool.hear(D, Lease((3,), (3,)))
    assert told(pool) == [Indexed(2, (), names[::-1])], "leaves first"


def test_what_leaves_and_comes_back_in_one_instant_is_there():
    pool = PoolBench(blocks=2, listener=ROUTER)
    (name,) = hashes(1, 1)
    pool.hear(P, Lease((1,), (1,)))
    pool.hear(P, Publish(key(1), (TableRun(0, 0, 0, 1),), (name,)), Release(key(1)))
    pool.core.blocks.grant(D, 0, 2)
    pool.hear(D, Publish(key(2), (TableRun(0, 0, 0, 1),), (name,)))
    assert told(pool) == [Indexed(2, (name,), ())]


def test_nobody_listens_unless_he_says_so():
    pool = PoolBench(blocks=4)
    pool.hear(P, Lease((1,), (1,)))
    pool.hear(P, Publish(key(1), (TableRun(0, 0, 0, 1),), hashes(1, 1)))
    assert not pool.sent(Indexed)
