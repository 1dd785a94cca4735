"""Fetching a cached prefix: P (pool 0) asks D (pool 1), each half played against the other by hand."""

import pytest

from headrace.types.events import Landed, Write, Written
from headrace.types.ids import Address, PoolId, SequenceKey, Slot
from headrace.types.kv import BlockRun, TableRun
from headrace.types.messages import (
    Abandon,
    Begun,
    Cancel,
    Fenced,
    Fetch,
    Found,
    Lease,
    Leased,
    Match,
    Matched,
    Publish,
    Quiet,
    Recall,
    Release,
    Role,
    Start,
    Unfenced,
)
from tests.nodes.harness import (
    OTHER_POOL,
    POOL,
    ROUTER,
    D,
    InstanceBench,
    P,
    hashes,
    key,
    start,
)

ERRAND = SequenceKey(key().request, -1, 0)
NAMES = hashes(1, 5)


def ask(total: int = 20, **settings: object) -> Start:
    return start(total=total, fetch=D, **settings)


def asker(message: Start | None = None, own: int = 0, **limits: int) -> InstanceBench:
    """P has looked up its own prefix (of so many blocks) and asked D for the rest."""
    node = InstanceBench(P, **limits)
    node.meet((D, 1))
    node.hear(ROUTER, message or ask())
    assert not node.plans and node.one(Match, POOL) == Match(key(), NAMES, 19)
    node.hear(POOL, Matched(key(), own * 4, (TableRun(0, 0, 50, own),) if own else ()))
    return node


def computed(node: InstanceBench) -> int:
    """Tokens that need no computing, by the first plan."""
    (plan,) = node.plans
    assert plan.work[0].first == plan.starts[0].computed
    return plan.work[0].first


# The asker


def test_what_is_missing_is_asked_for_and_counts_as_a_hit():
    node = asker(own=1)
    assert node.one(Fetch, D) == Fetch(ERRAND, Slot(0), (TableRun(0, 1, 0, 3),), NAMES[:4])
    assert not node.plans, "it is in no queue yet"
    node.tell(Landed(Slot(0), 4, D))
    node.hear(D, Found(ERRAND, Slot(0), 3, 2))
    assert node.one(Publish, POOL) == Publish(key(), (TableRun(0, 1, 0, 2),), NAMES[:3])
    assert computed(node) == 12 and node.one(Begun, ROUTER) == Begun(key(), node.now_ns, 12, 8)
    assert node.free == 32 - 4, "the third came back, and two more blocks are in use"
    node.step()
    node.hear(ROUTER, Cancel(key()))
    node.step()
    assert node.core.idle and node.one(Release, POOL) == Release(key())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_end_may_come_before_the_blocks(order: tuple[int, int]):
    node = asker()
    for what in order:
        assert not node.plans
        if what:
            node.tell(Landed(Slot(0), 8, D))
        else:
            node.hear(D, Found(ERRAND, Slot(0), 4, 0))
    assert computed(node) == 16


def test_the_other_has_nothing():
    node = asker(own=2)
    node.hear(D, Found(ERRAND, Slot(0), 1, 4))
    assert computed(node) == 8 and not node.sent(Publish)
    assert node.one(Begun).fetched == 0


def poor() -> InstanceBench:
    """P has two blocks in hand and would receive four."""
    node = InstanceBench(P, spare=2)
    node.meet((D, 1))
    node.hear(ROUTER, ask())
    node.hear(POOL, Matched(key(), 0, ()))
    assert not node.sent(Fetch) and node.one(Lease, POOL) == Lease((0,), (2,), 0)
    return node


def test_room_is_asked_for():
    node = poor()
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 40, 2),), False, (9,)))
    assert sorted((run.first, run.count) for run in node.one(Fetch, D).table) == [(0, 2), (40, 2)]
    assert node.core.memory.wish == [0]


def test_without_room_it_is_computed():
    node = poor()
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 40, 1),), False, (0,)))
    assert not node.sent(Fetch) and node.one(Lease, POOL).need == (2,), "for computing it"
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 50, 4),), False, (0,)))
    assert computed(node) == 0


def test_what_is_freed_is_room_as_well():
    node = InstanceBench(P, spare=3)
    node.meet((D, 1))
    node.begin(start(2, 3, emits_max=1))
    node.hear(ROUTER, ask())
    node.hear(POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
    assert node.one(Lease), "of three blocks in hand one is in use"
    node.step()
    assert node.one(Fetch, D).slot == Slot(0)


@pytest.mark.parametrize("why", ["stranger", "same pool", "no full block", "all is here", "pressed"])
def test_nobody_is_asked(why: str):
    node = InstanceBench(P)
    node.meet((D, 0 if why == "same pool" else 1))
    if why == "pressed":
        node.hear(POOL, Recall(on=True, force=False))
        node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 40, 8),), False, (9,)))
    message = start(total=3) if why == "no full block" else ask()
    if why == "stranger":
        message = start(total=20, fetch=Address("x"))
    node.hear(ROUTER, message)
    if why != "no full block":
        tokens = 16 if why == "all is here" else 0
        node.hear(POOL, Matched(key(), tokens, (TableRun(0, 0, 50, 4),) if tokens else ()))
    assert not node.sent(Fetch) and key() in node.core.sequences
    if why in ("stranger", "same pool", "no full block", "all is here"):
        assert node.plans


def test_a_prefill_with_an_early_dispatch_may_fetch_too():
    node = asker(ask(role=Role.PREFILL))
    node.tell(Landed(Slot(0), 8, D))
    node.hear(D, Found(ERRAND, Slot(0), 4, 0))
    assert computed(node) == 16


# It is given up


def late() -> InstanceBench:
    """P has given up waiting, and computes."""
    node = asker(fetch_ns=50, fence_ns=200)
    node.tell(at_ns=node.now_ns + 50)
    assert node.one(Abandon, D) == Abandon(ERRAND, Slot(0)) and computed(node) == 0
    return node


def test_who_is_slow_is_not_waited_for():
    node = late()
    free = node.free
    assert free == 32 - 4 - 5, "what may still be written into is kept apart"
    node.hear(D, Fenced(ERRAND, Slot(0)))
    assert node.free == free + 4 and not node.core.fetching._getting
    node.hear(D, Found(ERRAND, Slot(0), 4, 0))
    assert not node.said


def test_what_comes_too_late_is_not_used():
    node = late()
    node.tell(Landed(Slot(0), 8, D))
    free = node.free
    node.hear(D, Found(ERRAND, Slot(0), 4, 0))
    assert node.free == free + 4 and not node.sent(Publish)
    node.hear(D, Fenced(ERRAND, Slot(0)))
    assert node.free == free + 4


def test_who_does_not_confirm_is_reported():
    node = late()
    node.tell(at_ns=node.now_ns + 200)
    assert node.one(Unfenced, ROUTER) == Unfenced(D)
    node.lose(D)
    assert not node.core.fetching._getting


def test_the_other_dies():
    node = asker(own=1)
    free = node.free
    node.lose(D)
    assert computed(node) == 4 and node.free == free + 3 - 4


def test_the_other_dies_before_it_is_asked():
    node = InstanceBench(P)
    node.meet((D, 1))
    node.hear(ROUTER, ask())
    node.lose(D)
    node.hear(POOL, Matched(key(), 0, ()))
    assert not node.sent(Fetch) and node.plans


def test_a_write_of_the_other_fails():
    node = asker()
    node.hear(D, Found(ERRAND, Slot(0), 4, 0))
    node.hear(D, Fenced(ERRAND, Slot(0)))
    assert computed(node) == 0 and not node.core.fetching._getting


@pytest.mark.parametrize("when", ["looking up", "fetching"])
def test_it_is_cancelled(when: str):
    node = InstanceBench(P)
    node.meet((D, 1))
    node.hear(ROUTER, ask())
    if when == "fetching":
        node.hear(POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
    node.hear(ROUTER, Cancel(key()))
    assert node.closed == [key()]
    if when == "fetching":
        assert node.one(Release, POOL) == Release(key()) and node.free == 29 and not node.core.idle
        assert node.one(Abandon, D)
        node.hear(D, Fenced(ERRAND, Slot(0)))
    else:
        node.hear(POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
        assert node.one(Release, POOL) == Release(key())
    assert node.core.idle and node.free == 32


# The other


def giver(tokens: int = 12) -> InstanceBench:
    """D's pool has so many tokens of the chain."""
    node = InstanceBench(D, pool=1)
    node.meet((P, 0))
    table = (TableRun(0, 1, 20, 3),)
    node.hear(P, Fetch(ERRAND, Slot(3), table, NAMES[:4]))
    assert node.one(Match, OTHER_POOL) == Match(ERRAND, NAMES[:4], 16)
    runs = (TableRun(0, 0, 40, tokens // 4),) if tokens else ()
    node.hear(OTHER_POOL, Matched(ERRAND, tokens, runs))
    return node


def test_what_the_pool_has_is_written_and_locked_until_that_has_ended():
    node = giver()
    (write,) = node.commands(Write)
    assert (write.source_first, write.target_first, write.count, write.weight) == (41, 20, 2, 4)
    assert node.one(Found, P) == Found(ERRAND, Slot(3), 3, 2, 1024) and not node.sent(Release)
    node.tell(Written(write.write, ok=True))
    assert node.one(Release, OTHER_POOL) == Release(ERRAND) and node.core.idle


@pytest.mark.parametrize("tokens", [0, 4])
def test_who_has_no_more_than_the_asker_says_so(tokens: int):
    node = giver(tokens)
    assert node.one(Found, P) == Found(ERRAND, Slot(3), tokens // 4, 6) and not node.commands(Write)
    assert len(node.sent(Release)) == bool(tokens) and node.core.idle


def test_an_asker_that_goes_on_is_answered_when_the_writes_have_ended():
    node = giver()
    (write,) = node.commands(Write)
    node.hear(P, Abandon(ERRAND, Slot(3)))
    assert not node.sent(Fenced) and not node.sent(Release)
    node.tell(Written(write.write, ok=True))
    assert node.one(Fenced, P) == Fenced(ERRAND, Slot(3)) and node.one(Release, OTHER_POOL)
    assert node.core.idle


def test_an_asker_that_goes_on_before_the_pool_has_answered():
    node = InstanceBench(D, pool=1)
    node.meet((P, 0))
    node.hear(P, Fetch(ERRAND, Slot(3), (TableRun(0, 0, 20, 3),), NAMES[:3]), Abandon(ERRAND, Slot(3)))
    assert node.one(Fenced, P)
    node.hear(OTHER_POOL, Matched(ERRAND, 12, (TableRun(0, 0, 40, 3),)))
    assert node.one(Release, OTHER_POOL) == Release(ERRAND)
    assert not node.commands(Write) and node.core.idle


def test_a_write_that_fails_is_told_by_the_fence():
    node = giver()
    (write,) = node.commands(Write)
    node.tell(Written(write.write, ok=False))
    assert node.one(Fenced, P) == Fenced(ERRAND, Slot(3)) and node.one(Release, OTHER_POOL)
    assert node.core.idle


@pytest.mark.parametrize("when", ["looking up", "writing"])
def test_the_asker_dies(when: str):
    if when == "writing":
        node = giver()
        (write,) = node.commands(Write)
        node.lose(P, 0)
        assert not node.sent(Quiet)
        node.tell(Written(write.write, ok=True))
        assert node.one(Quiet, POOL) == Quiet(P)
    else:
        node = InstanceBench(D, pool=1)
        node.meet((P, 0))
        node.hear(P, Fetch(ERRAND, Slot(3), (TableRun(0, 0, 20, 3),), NAMES[:3]))
        node.lose(P, 0)
        node.hear(OTHER_POOL, Matched(ERRAND, 12, (TableRun(0, 0, 40, 3),)))
        assert not node.commands(Write)
    assert node.one(Release, OTHER_POOL) == Release(ERRAND) and node.core.idle
