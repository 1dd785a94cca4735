"""What D (pool 1) has generated goes back to P (pool 0), each half played against the other by hand."""

from headrace.nodes.limits import Caching
from headrace.types.events import Landed
from headrace.types.ids import Address, SequenceKey, Slot
from headrace.types.kv import TableRun
from headrace.types.messages import (
    Cancel,
    Drain,
    Fetch,
    Found,
    Keep,
    Match,
    Matched,
    Publish,
    Recall,
    Release,
    Returned,
    Role,
    Tail,
)
from headrace.types.request import FinishReason
from tests.nodes.harness import OTHER_POOL, POOL, ROUTER, D, InstanceBench, P, hashes, key, start

CHAIN = SequenceKey(key().request, 0, -1)
ERRAND = SequenceKey(key().request, -1, -1)
NAMES = hashes(1, 5)


def decoder(caching: Caching = Caching.RETURN) -> InstanceBench:
    """D has received a sequence of 10 tokens, and the first one drawn, from P."""
    node = InstanceBench(D, pool=1, caching=caching)
    node.meet((P, 0))
    node.begin(start(role=Role.DECODE))
    node.tell(Landed(Slot(0), 6, P))
    node.hear(P, Tail(key(), Slot(0), 1, NAMES[:2], 3, 0, 1))
    return node


def said(node: InstanceBench, tokens: int) -> InstanceBench:
    """So many more tokens are drawn, the last of which ends the sequence."""
    for _ in range(tokens - 1):
        node.step()
    node.step(finish={1: FinishReason.STOP})
    return node


def test_the_whole_chain_is_offered_when_the_last_token_is_drawn():
    node = said(decoder(), 7)
    assert node.one(Keep, P) == Keep(key(), hashes(1, 4)), "of 17 tokens with KV four blocks are full"
    assert node.one(Release, OTHER_POOL) == Release(key())


def test_what_was_stopped_by_its_client_is_offered_too():
    node = decoder()
    for _ in range(4):
        node.step()
    node.hear(ROUTER, Cancel(key()))
    assert node.one(Keep, P) == Keep(key(), hashes(1, 3))


def test_nothing_is_offered_that_the_other_has():
    assert not said(decoder(), 1).sent(Keep), "no block was filled beyond the prompt's"


def test_only_that_step_of_caching_returns():
    for caching in (Caching.NONE, Caching.PREFILL, Caching.INCREMENT):
        node = InstanceBench(D, pool=1, caching=caching)
        node.meet((P, 0))
        node.hear(ROUTER, start(role=Role.DECODE))
        if node.sent(Match):
            assert caching is Caching.INCREMENT
            node.hear(OTHER_POOL, Matched(key(), 0, ()))
        node.tell(Landed(Slot(0), 6, P))
        node.hear(P, Tail(key(), Slot(0), 1, NAMES[:2], 3, 0, 1))
        assert bool(node.sent(Publish)) == (caching is Caching.INCREMENT)
        assert not said(node, 7).sent(Keep)


def prefiller(**limits: int) -> InstanceBench:
    node = InstanceBench(P, **limits)
    node.meet((D, 1))
    return node


def test_what_is_lacking_is_fetched_and_indexed():
    node = prefiller()
    node.hear(D, Keep(key(), NAMES))
    assert node.one(Match, POOL) == Match(CHAIN, NAMES, 20)
    node.hear(POOL, Matched(CHAIN, 8, (TableRun(0, 0, 50, 2),)))
    assert node.one(Fetch, D) == Fetch(ERRAND, Slot(0), (TableRun(0, 2, 0, 3),), NAMES)
    assert not node.core.idle and not node.plans
    node.tell(Landed(Slot(0), 4, D))
    node.hear(D, Found(ERRAND, Slot(0), 4, 2, 512))
    assert node.one(Publish, POOL) == Publish(CHAIN, (TableRun(0, 2, 0, 2),), NAMES[1:4], 1)
    assert node.one(Release, POOL) == Release(CHAIN)
    assert node.one(Returned, ROUTER) == Returned(CHAIN, 8, 512)
    assert node.core.idle and node.free == 30 and not node.plans


def test_what_is_here_already_is_let_go_at_once():
    node = prefiller()
    node.hear(D, Keep(key(), NAMES))
    node.hear(POOL, Matched(CHAIN, 20, (TableRun(0, 0, 50, 5),)))
    assert node.one(Release, POOL) == Release(CHAIN) and not node.sent(Fetch) and not node.sent(Returned)
    assert node.core.idle


def test_where_memory_is_pressed_nothing_is_taken():
    node = prefiller()
    node.hear(POOL, Recall(on=True, force=False))
    node.hear(D, Keep(key(), NAMES))
    assert not node.sent(Match) and node.core.idle
    node = prefiller()
    node.hear(D, Keep(key(), NAMES))
    node.hear(POOL, Recall(on=True, force=False), Matched(CHAIN, 4, (TableRun(0, 0, 50, 1),)))
    assert not node.sent(Fetch) and node.one(Release, POOL) == Release(CHAIN) and node.core.idle


def test_who_drains_or_does_not_know_the_other_takes_nothing():
    node = prefiller()
    node.hear(Address("stranger"), Keep(key(), NAMES))
    assert not node.sent(Match)
    node.hear(ROUTER, Drain())
    node.hear(D, Keep(key(), NAMES))
    assert not node.sent(Match) and node.core.idle


def test_the_others_end_leaves_nothing_behind():
    node = prefiller()
    node.hear(D, Keep(key(), NAMES))
    node.hear(POOL, Matched(CHAIN, 8, (TableRun(0, 0, 50, 2),)))
    node.lose(D)
    assert node.one(Release, POOL) == Release(CHAIN)
    assert node.core.idle and node.free == 32


def test_one_that_is_slow_is_given_up_and_its_blocks_wait_for_the_fence():
    node = prefiller(fetch_ns=100)
    node.hear(D, Keep(key(), NAMES))
    node.hear(POOL, Matched(CHAIN, 8, (TableRun(0, 0, 50, 2),)))
    node.tell(at_ns=node.now_ns + 100)
    assert node.one(Release, POOL) == Release(CHAIN) and node.free == 29
    assert not node.core.idle
    node.hear(D, Found(ERRAND, Slot(0), 2, 6))
    assert node.core.idle and node.free == 32
