"""A live migration from P (pool 0) to D (pool 1, or the same), each half played against the other by hand."""

import pytest

from headrace.types.events import Landed, PeerLost, Send, WakeAt, Write, Written
from headrace.types.ids import Address, PoolId, Slot
from headrace.types.kv import BlockRun, TableRun
from headrace.types.messages import (
    Abandon,
    Adopted,
    Cancel,
    Dispatch,
    Failed,
    Fenced,
    Handover,
    Joined,
    Leased,
    Match,
    Matched,
    Migrate,
    More,
    Moved,
    Offer,
    Prefilled,
    Quiet,
    Recall,
    Release,
    Role,
    Stay,
    Stayed,
    Tail,
    TokenRun,
    Tokens,
)
from headrace.types.request import FinishReason
from tests.nodes.harness import OTHER_POOL, POOL, ROUTER, SIZE, D, InstanceBench, P, hashes, info, key, start

SLOT = Slot(7)
PROMPT = 10


def source(tokens: int = 1, pool: int = 1, **limits: int) -> InstanceBench:
    """P runs a sequence that has drawn so many tokens."""
    node = InstanceBench(P, **{"move_blocks_last": 1, **limits})
    node.meet((D, pool))
    node.begin(start(total=PROMPT, emits_max=40))
    node.steps(tokens)
    return node


def offered(tokens: int = 1, pool: int = 1, **limits: int) -> InstanceBench:
    node = source(tokens, pool, **limits)
    node.hear(ROUTER, Migrate(D))
    assert node.one(Offer, ROUTER) == Offer(key(), D)
    return node


def room(at: int, count: int, known: int = PROMPT) -> Dispatch:
    """D wants logical blocks `at ..` in its block 20 + `at` on."""
    return Dispatch(key(), SLOT, (TableRun(0, at, 20 + at, count),), False, 2 * count + 1, known)


def writes(node: InstanceBench) -> list[tuple[int, int, int]]:
    """(first source block, first target block, count) of the last instant."""
    return [(w.source_first, w.target_first, w.count) for w in node.commands(Write)]


def acknowledge(node: InstanceBench, *, ok: bool = True) -> None:
    """All writes of the last instant have ended."""
    node.tell(*(Written(w.write, ok) for w in node.commands(Write)))


def last() -> InstanceBench:
    """P has all but its last writes acknowledged: three blocks, of which the third is not full."""
    node = offered(tokens=1, move_blocks_last=16)
    node.hear(D, room(0, 3))
    assert not writes(node), "a plan names it"
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 1, 1),) and not node.plans
    assert writes(node) == [(0, 20, 3)] and not node.sent(Tail)
    return node


# The source


def test_little_is_sent_in_one_piece_and_then_it_is_the_targets():
    node = last()
    acknowledge(node)
    assert node.one(Tail, D) == Tail(key(), SLOT, 2, hashes(1, 2), 3, 3 * 512, 1, 0, moved=True)
    assert node.one(Moved, ROUTER) == Moved(key(), D, 3, 3 * 512, 1, 0)
    assert node.closed == [key()] and node.core.idle and node.sent(Release, POOL)
    node.hear(D, Fenced(key(), SLOT))
    assert node.core.idle


def test_it_runs_on_while_much_is_left():
    node = offered(tokens=11)
    node.hear(D, room(0, 5, known=PROMPT + 10))
    assert writes(node) == [(0, 20, 5)], "computed are 20 tokens"
    node.steps(3)
    assert not node.sent(Tail), "it goes on meanwhile"
    acknowledge_first(node)
    assert not node.sent(More), "one block is left"
    node.step()
    assert node.one(More, D) == More(key(), SLOT, 24) and not node.plans
    node.hear(D, room(5, 1, known=PROMPT + 10))
    assert writes(node) == [(5, 25, 1)]
    acknowledge(node)
    tail = node.one(Tail, D)
    assert (tail.emitted, tail.blocks, tail.writes) == (5, 6, 2) and len(tail.hashes) == 6


def acknowledge_first(node: InstanceBench) -> None:
    """The one write that is in flight."""
    (write,) = node.core.sending._writes
    node.tell(Written(write, ok=True))


def test_what_has_grown_meanwhile_is_sent_by_further_stages():
    node = offered(tokens=3)
    node.hear(D, room(0, 3))
    assert writes(node) == [(0, 20, 3)]
    node.steps(9)
    acknowledge_first(node)
    assert node.one(More, D) == More(key(), SLOT, 21)
    node.hear(D, room(3, 3))
    assert writes(node) == [(3, 23, 2)], "the sixth is not full"
    node.step()
    acknowledge_first(node)
    node.step()
    assert not node.plans and writes(node) == [(5, 25, 1)]
    acknowledge(node)
    assert node.one(Tail, D).blocks == 6


def test_stages_are_bounded():
    node = offered(tokens=3, move_stages_max=1)
    node.hear(D, room(0, 3))
    node.steps(20)
    acknowledge_first(node)
    assert not node.sent(More)
    node.step()
    assert node.one(More, D).tokens == 33 and not node.plans, "six blocks are left, and it stands still"


def test_blocks_that_the_target_has_are_not_sent():
    node = offered(tokens=3)
    node.hear(D, room(2, 1))
    assert writes(node) == [(2, 22, 1)]


def test_tokens_that_are_told_in_groups_are_told_before_it_leaves():
    node = offered(tokens=2, move_blocks_last=16, stream_interval=8)
    node.hear(D, room(0, 3))
    node.step()
    acknowledge(node)
    assert node.one(Tokens).runs == (TokenRun(key(), 1, 2, None, hashes(1, 3)[2:]),)
    said = [type(c.message) for c in node.said if isinstance(c, Send) and c.target == ROUTER]
    assert said == [Tokens, Moved]


def test_with_one_pool_the_blocks_change_hands():
    node = offered(pool=0)
    node.hear(D, Dispatch(key(), SLOT, (), True, 2, PROMPT))
    node.step()
    assert node.one(Handover, POOL) == Handover(key(), D, (TableRun(0, 2, 2, 1),))
    assert node.one(Tail, D).moved and node.one(Moved, ROUTER).blocks == 0
    assert node.core.idle and not node.sent(Release) and node.free == 29


# Whom it offers


def test_the_lowest_priority_goes_and_of_those_the_shortest():
    node = InstanceBench(P, tokens_max=64)
    node.meet((D, 1))
    node.begin_all(
        start(1, 8, priority=0), start(2, 12, priority=1), start(3, 9, priority=1), start(4, 20, priority=1)
    )
    node.step()
    node.hear(ROUTER, Migrate(D))
    assert node.one(Offer) == Offer(key(3), D)
    node.hear(ROUTER, Migrate(D))
    assert not node.sent(Offer), "one at a time"


@pytest.mark.parametrize("why", ["prefilling", "held", "ends with the next token", "nobody"])
def test_who_does_not_go(why: str):
    node = InstanceBench(P)
    node.meet((D, 1))
    if why == "prefilling":
        node.begin(start(total=40))
    elif why == "held":
        node.begin(start(role=Role.PREFILL))
    elif why == "ends with the next token":
        node.begin(start(emits_max=2))
    if why != "nobody":
        node.step()
    node.hear(ROUTER, Migrate(D))
    assert not node.sent(Offer)


def test_nobody_goes_to_somebody_unknown():
    node = source()
    node.hear(ROUTER, Migrate(Address("x")))
    assert not node.sent(Offer)


# It stays


def runs_on(node: InstanceBench, tokens: int) -> None:
    """Its next token has this index, and nothing of the migration is left."""
    node.step()
    (run,) = node.one(Tokens).runs
    assert (run.first, run.count) == (tokens, 1)
    assert len(node.core.scheduler.running) == 1 and node.core.sending.idle


def test_the_router_does_not_want_it_there():
    node = offered()
    node.hear(ROUTER, Stay(key(), Address("x")))
    assert not node.sent(Stayed), "not about this one"
    node.hear(ROUTER, Stay(key(), D))
    assert node.one(Stayed, ROUTER) == Stayed(key(), D)
    runs_on(node, 1)
    node.hear(D, room(0, 3))
    assert not writes(node), "too late"


def test_a_target_that_never_makes_room_is_not_waited_for():
    node = offered(move_ns=50)
    node.tell(at_ns=node.now_ns + 49)
    assert not node.sent(Stayed)
    node.tell(at_ns=node.now_ns + 1)
    assert node.one(Stayed, ROUTER) == Stayed(key(), D)
    node.hear(D, room(0, 3))
    assert not writes(node)
    runs_on(node, 1)


def test_one_that_has_room_is_given_time():
    node = offered(tokens=3, move_ns=50)
    node.hear(D, room(0, 3))
    node.tell(at_ns=node.now_ns + 100)
    assert not node.sent(Stayed)


def test_who_was_not_wanted_there_is_not_offered_there_again():
    node = InstanceBench(P, tokens_max=64)
    node.meet((D, 1), (Address("x"), 1))
    node.begin_all(start(1, 8), start(2, 12))
    node.step()
    node.hear(ROUTER, Migrate(D))
    node.hear(ROUTER, Stay(key(1), D))
    node.hear(ROUTER, Migrate(D))
    assert node.one(Offer) == Offer(key(2), D)
    node.hear(ROUTER, Stay(key(2), D), Migrate(D))
    assert not node.sent(Offer)
    node.hear(ROUTER, Migrate(Address("x")))
    assert node.one(Offer) == Offer(key(1), Address("x"))


def test_the_target_gives_up_while_it_stands_still():
    node = last()
    (write,) = node.commands(Write)
    node.hear(D, Abandon(key(), SLOT))
    assert node.one(Stayed, ROUTER) == Stayed(key(), D) and not node.sent(Fenced)
    assert node.plans, "it goes on at once"
    node.tell(Written(write.write, ok=True))
    assert node.one(Fenced, D) == Fenced(key(), SLOT)
    runs_on(node, 2)


def test_a_target_that_gives_up_after_all_has_been_sent_is_answered():
    node = last()
    acknowledge(node)
    node.hear(D, Abandon(key(), SLOT))
    assert node.one(Fenced, D) and node.core.idle


def test_the_target_dies_while_it_stands_still():
    node = last()
    (write,) = node.commands(Write)
    node.lose(D)
    assert node.one(Stayed) and node.plans and not node.sent(Quiet)
    node.tell(Written(write.write, ok=True))
    assert node.one(Quiet, OTHER_POOL) == Quiet(D)
    runs_on(node, 2)


def test_a_failed_write_ends_the_migration_and_not_the_sequence():
    node = last()
    acknowledge(node, ok=False)
    assert node.one(Stayed) and not node.sent(Failed) and node.plans
    runs_on(node, 2)


def test_it_ends_before_it_has_left():
    node = offered(tokens=3)
    node.hear(D, room(0, 3))
    (write,) = node.commands(Write)
    node.step(finish={1: FinishReason.STOP})
    assert node.one(Tokens).runs[0].finish is FinishReason.STOP and not node.sent(Stayed)
    assert not node.closed, "a write reads its blocks"
    node.tell(Written(write.write, ok=True))
    assert node.closed == [key()] and node.core.idle


@pytest.mark.parametrize("stands", [False, True])
def test_it_is_cancelled(stands: bool):
    node = last() if stands else offered()
    node.hear(ROUTER, Cancel(key()))
    if stands:
        assert not node.closed
        (write,) = node.core.sending._writes
        node.tell(Written(write, ok=True))
    else:
        node.step()
    assert node.closed == [key()] and node.core.idle and not node.sent(Stayed)


def test_it_is_preempted():
    node = offered(tokens=3)
    node.hear(D, room(0, 3))
    (write,) = node.commands(Write)
    node.hear(POOL, Recall(on=True, force=True))
    node.step()
    assert node.one(Stayed, ROUTER) == Stayed(key(), D)
    node.hear(POOL, Recall(on=False, force=False))
    node.tell(Written(write.write, ok=True))
    assert node.core.sending.idle and not node.sent(Tail)
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 40, 8),), False, (9,)))
    node.hear(POOL, Matched(key(), 0, ()))
    assert node.plans, "it starts over"


def test_a_new_migration_is_not_disturbed_by_the_end_of_an_old_one():
    x = Address("x")
    node = last()
    (old,) = node.commands(Write)
    node.meet((x, 1))
    node.hear(ROUTER, Stay(key(), D))
    node.hear(ROUTER, Migrate(x))
    assert not node.sent(Offer), "a write of the old one is in flight"
    node.tell(Written(old.write, ok=True))
    node.hear(ROUTER, Migrate(x))
    assert node.one(Offer) == Offer(key(), x)
    node.hear(x, room(0, 3))
    node.hear(D, Abandon(key(), SLOT))
    assert node.one(Fenced, D) and not node.sent(Stayed)
    node.step()
    assert node.commands(Write)[0].target == x


# The target


def receiving(pool: int = 0, **limits: int) -> InstanceBench:
    """D waits for what P runs, of which it knows ten tokens."""
    node = InstanceBench(D, **limits)
    node.meet((P, 1 if pool == 0 else pool))
    node.begin(start(role=Role.DECODE, total=PROMPT, emits_max=20, history=3))
    return node


def test_the_target_makes_more_room_when_it_is_asked():
    node = receiving()
    first = node.one(Dispatch, P)
    assert first == Dispatch(key(), Slot(0), (TableRun(0, 0, 0, 3),), False, 7, PROMPT)
    node.hear(P, More(key(), Slot(0), 17))
    assert node.one(Dispatch, P) == Dispatch(key(), Slot(0), (TableRun(0, 3, 3, 2),), False, 11, PROMPT)
    node.hear(P, More(key(), Slot(0), 20))
    assert node.one(Dispatch, P).table == (), "there is room"


def test_it_goes_on_there_with_what_the_source_drew():
    node = receiving()
    node.hear(P, More(key(), Slot(0), 14))
    node.tell(Landed(Slot(0), 6, P))
    node.hear(P, Tail(key(), Slot(0), 5, hashes(1, 3), 4, 99, 2, skipped=2, moved=True))
    assert not node.sent(Joined) and not node.sent(Prefilled), "the router hears of it from the source"
    (plan,) = node.plans
    assert (plan.work[0].first, plan.work[0].count, plan.work[0].emits) == (14, 1, True)
    assert plan.starts[0].total == 15 and plan.starts[0].hashed == 3
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 3 + 5, 1),)


def test_the_tail_is_the_last_thing_even_if_writes_are_told_late():
    node = receiving()
    node.hear(P, Tail(key(), Slot(0), 1, hashes(1, 2), 3, 99, 1, moved=True))
    assert not node.plans
    node.tell(Landed(Slot(0), 6, P))
    assert node.plans


def test_a_target_without_room_for_more_gives_up():
    node = receiving(spare=4, sequences_max=2)
    node.hear(P, More(key(), Slot(0), 40))
    assert node.one(Failed, ROUTER).retry and node.one(Abandon, P) == Abandon(key(), Slot(0))
    node.hear(P, Fenced(key(), Slot(0)))
    assert node.closed == [key()] and node.core.idle and node.free == 4
    node.hear(P, More(key(), Slot(0), 44))
    assert not node.said, "that one is over"


def test_a_source_that_dies_after_its_last_word_leaves_a_sequence_to_be_begun_anew():
    node = receiving()
    node.tell(PeerLost(P, info(1)))
    assert node.one(Failed, ROUTER).retry and node.core.idle


def test_with_one_pool_the_target_needs_no_room():
    node = receiving(pool=0)
    assert node.one(Dispatch)
    shared = InstanceBench(D)
    shared.meet((P, 0))
    shared.hear(ROUTER, start(role=Role.DECODE, total=PROMPT))
    assert shared.one(Dispatch, P).shared and not shared.sent(Match)
    shared.hear(P, Tail(key(), Slot(0), 3, hashes(1, 3), 0, 0, 0, moved=True))
    shared.hear(POOL, Adopted(key(), (TableRun(0, 0, 50, 3),), (3,)))
    assert shared.plans[0].work[0].first == PROMPT + 2 and not shared.sent(Joined)


def test_nothing_waits_for_ever_at_the_target():
    node = receiving(receive_ns=50)
    (wake,) = node.commands(WakeAt) or [WakeAt(0)]
    node.tell(at_ns=max(wake.at_ns, node.now_ns + 60))
    assert node.one(Failed, ROUTER).retry and node.one(Abandon, P)


def test_a_block_is_named_by_its_size():
    assert SIZE == 4, "the numbers above count on it"
