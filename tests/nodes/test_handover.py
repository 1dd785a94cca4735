"""Both halves of a handover: the source P (pool 0) and the target D (pool 1, or the same), each played against the other by hand."""

import pytest
from msgspec.structs import replace

from headrace.types.events import Distrust, Landed, WakeAt, Write, Written
from headrace.types.ids import Address, PoolId, Slot, WriteId
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
    Prefilled,
    Publish,
    Quiet,
    Recall,
    Release,
    Resume,
    Role,
    Tail,
    TokenRun,
    Tokens,
    Unfenced,
)
from headrace.types.request import FinishReason
from tests.nodes.harness import OTHER_POOL, POOL, ROUTER, D, InstanceBench, P, hashes, key, start

SLOT = Slot(7)
TABLE = (TableRun(0, 0, 20, 3),)
CANCEL = Cancel(key())
TAIL = Tail(key(), Slot(0), 1, hashes(1, 2), blocks=3, bytes=99, writes=2)


def dispatch(table: tuple[TableRun, ...] = TABLE, *, shared: bool = False) -> Dispatch:
    weight = 2 * sum(run.count for run in table) + 1 + shared
    return Dispatch(key(), SLOT, table, shared, weight)


def source(**limits: int) -> InstanceBench:
    node = InstanceBench(P, **limits)
    node.meet((D, 1))
    return node


def held(**limits: int) -> InstanceBench:
    """P has prefilled ten tokens and holds them."""
    node = source(**limits)
    node.begin(start(role=Role.PREFILL))
    node.step()
    return node


def sending() -> tuple[InstanceBench, Write]:
    """P holds, and its one write is in flight."""
    node = held()
    node.hear(D, dispatch())
    (write,) = node.commands(Write)
    return node, write


# The source


def test_a_prefilled_sequence_is_held_with_its_first_token_told():
    node = held()
    assert node.one(Prefilled, ROUTER) and node.one(Tokens).runs == (TokenRun(key(), 0, 1),)
    assert node.core.observe(0).held == 1 and node.free == 29 and not node.closed


def test_what_is_held_is_sent_when_somebody_asks():
    node, write = sending()
    assert (write.source_first, write.target_first, write.count, write.weight) == (0, 20, 3, 6)
    assert (write.target, write.slot) == (D, SLOT)
    assert node.one(Tail, D) == Tail(
        key(), SLOT, 1, hashes(1, 2), blocks=3, bytes=3 * 2 * 2 * 8 * 4 * 4, writes=1
    )
    assert not node.closed and not node.sent(Release), "the write still reads"
    node.tell(Written(write.write, True))
    assert node.closed == [key()] and node.one(Release, POOL) and node.core.idle and node.free == 30


@pytest.mark.parametrize("early", [True, False])
def test_chunks_are_sent_as_they_finish(early: bool):
    node = source()
    if early:
        node.hear(D, dispatch((TableRun(0, 1, 20, 8),)))
    node.begin(start(total=34, role=Role.PREFILL))
    if not early:
        node.hear(D, dispatch((TableRun(0, 1, 20, 8),)))
    sent: list[tuple[int, int, int]] = []
    for _ in range(3):
        node.step()
        sent += [(w.source_first, w.target_first, w.count) for w in node.commands(Write)]
    assert sent == [(1, 20, 3), (4, 23, 4), (8, 27, 1)]
    assert (node.one(Tail).blocks, node.one(Tail).writes) == (8, 3)
    for n in (3, 1, 2):
        assert not node.closed
        node.tell(Written(WriteId(n), True))
    assert node.closed == [key()] and node.core.idle


def test_tokens_go_out_before_the_ids_are_closed():
    node = source()
    node.hear(D, dispatch((), shared=False))
    node.begin(start(role=Role.PREFILL))
    said = [type(getattr(c, "message", c)).__name__ for c in node.step()]
    assert node.closed == [key()], "the target had everything"
    assert said.index("Tokens") < said.index("Close") and said.index("Tail") < said.index("Close")


def test_a_sequence_that_ends_with_its_first_token_moves_nothing():
    node = source()
    node.begin(start(role=Role.PREFILL))
    node.hear(D, dispatch())
    node.step(finish={1: FinishReason.STOP})
    assert not node.commands(Write) and not node.sent(Tail) and node.closed == [key()]
    node.hear(D, Abandon(key(), SLOT))
    assert node.one(Fenced, D) == Fenced(key(), SLOT) and node.core.idle


def test_a_dispatch_that_comes_too_late_is_fenced_when_its_target_gives_up():
    node = held()
    node.hear(ROUTER, CANCEL)
    node.hear(D, dispatch())
    assert not node.commands(Write) and not node.core.idle
    node.hear(D, Abandon(key(), SLOT))
    assert node.one(Fenced) == Fenced(key(), SLOT) and node.core.idle


def test_with_one_pool_the_blocks_change_hands():
    node = InstanceBench(P)
    node.meet((D, 0))
    node.begin(start(role=Role.PREFILL))
    node.step()
    node.hear(D, dispatch((), shared=True))
    assert node.one(Handover, POOL) == Handover(key(), D, (TableRun(0, 2, 2, 1),))
    assert node.one(Tail, D).blocks == 0 and not node.commands(Write)
    assert node.closed == [key()] and not node.sent(Release) and node.core.idle
    assert node.free == 29, "they are the target's now"


def test_a_held_sequence_can_go_on_here():
    node = held()
    node.hear(ROUTER, Resume(key()))
    assert node.plans and node.plans[0].work[0].first == 10
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 1, 1),) and not node.sent(Prefilled)
    node.hear(D, dispatch())
    assert not node.commands(Write), "it is nobody else's any more"


def test_what_nobody_fetches_in_time_fails_and_is_free():
    node = held(hold_ns=50)
    (wake,) = node.commands(WakeAt)
    node.tell(at_ns=wake.at_ns - 1)
    assert not node.said
    node.tell(at_ns=wake.at_ns)
    assert node.one(Failed, ROUTER).retry and node.closed == [key()] and node.core.idle


def test_what_is_being_fetched_has_no_such_deadline():
    node = held(hold_ns=50)
    node.hear(D, dispatch())
    node.tell(at_ns=10**12)
    assert not node.said


def test_a_failed_write_fails_the_attempt_after_the_others_are_quiet():
    node = held()
    node.hear(D, dispatch((TableRun(0, 0, 20, 1), TableRun(0, 1, 30, 2))))
    first, second = node.commands(Write)
    node.tell(Written(first.write, False))
    assert node.one(Failed, ROUTER).retry and not node.closed and not node.sent(Release)
    node.hear(ROUTER, CANCEL)
    node.hear(D, Abandon(key(), SLOT))
    assert not node.sent(Fenced), "a write may still land"
    node.tell(Written(second.write, True))
    assert node.one(Fenced, D) == Fenced(key(), SLOT) and node.closed == [key()] and node.core.idle


def test_a_cancelled_source_keeps_its_blocks_while_a_write_reads_them():
    node, write = sending()
    node.hear(ROUTER, CANCEL)
    assert not node.closed and node.free == 29
    node.tell(Written(write.write, True))
    assert node.closed == [key()] and node.core.idle


def test_an_abandoned_session_sends_no_more():
    node = source()
    node.begin(start(total=34, role=Role.PREFILL))
    node.hear(D, dispatch((TableRun(0, 0, 20, 9),)))
    node.step()
    (write,) = node.commands(Write)
    node.hear(D, Abandon(key(), SLOT))
    assert not node.sent(Fenced)
    node.step()
    assert not node.commands(Write)
    node.tell(Written(write.write, True))
    assert node.one(Fenced, D)
    node.hear(ROUTER, CANCEL)
    node.step()
    assert node.closed == [key()] and node.core.idle


def test_a_source_that_is_preempted_sends_each_block_once():
    node = source()
    node.begin(start(total=34, role=Role.PREFILL))
    node.hear(D, dispatch((TableRun(0, 0, 20, 9),)))
    node.step()
    (write,) = node.commands(Write)
    node.hear(POOL, Recall(on=True, force=True))
    node.step()
    (second,) = node.commands(Write)
    node.tell(Written(write.write, True))
    assert not node.plans and not node.sent(Release), "its blocks are being read"
    node.tell(Written(second.write, True))
    assert node.one(Release) == Release(key())
    node.hear(POOL, Recall(on=False, force=False))
    assert node.one(Match).key == key()
    node.hear(POOL, Matched(key(), 8, (TableRun(0, 0, 50, 2),)))
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 10, 8),), False, (0,)))
    targets = [(w.target_first, w.count) for w in (write, second)]
    while node.core.scheduler.inflight:
        node.step()
        targets += [(w.target_first, w.count) for w in node.commands(Write)]
    covered = sorted(block for first, count in targets for block in range(first, first + count))
    assert covered == list(range(20, 29)) and node.sent(Tail)


# The source, when its target dies


def test_no_write_is_started_towards_the_dead_and_the_pool_is_told_when_the_last_has_ended():
    node, write = sending()
    node.lose(D)
    assert not node.sent(Quiet)
    node.tell(Written(write.write, False))
    assert node.one(Quiet, OTHER_POOL) == Quiet(D) and not node.sent(Failed)
    assert node.closed == [key()] and node.core.idle, "nobody will come for it"
    node.hear(ROUTER, CANCEL)


def test_without_a_session_the_pool_is_told_at_once():
    node = source()
    node.lose(D)
    assert node.one(Quiet, OTHER_POOL) == Quiet(D)


def test_a_target_that_dies_while_the_prompt_is_computed():
    node = source()
    node.begin(start(total=34, role=Role.PREFILL))
    node.hear(D, dispatch((TableRun(0, 0, 20, 9),)))
    node.lose(D)
    assert not node.closed, "plans in flight name it"
    node.steps(len(node.core.scheduler.inflight))
    assert not node.commands(Write) and not node.sent(Tail) and not node.sent(Failed)
    assert node.closed == [key()], "the router begins anew"


def test_an_early_dispatch_of_a_dead_target_is_forgotten():
    node = source()
    node.hear(D, dispatch())
    node.lose(D)
    node.begin(start(role=Role.PREFILL))
    node.step()
    assert not node.commands(Write) and node.core.observe(0).held == 1


def test_a_fence_that_a_dead_target_waited_for_is_not_answered():
    node, write = sending()
    node.hear(D, Abandon(key(), SLOT))
    node.lose(D)
    node.tell(Written(write.write, True))
    assert not node.sent(Fenced) and node.one(Quiet)


# The target


def target(**limits: int) -> InstanceBench:
    node = InstanceBench(D, pool=1, **limits)
    node.meet((P, 0))
    return node


def receiving(**limits: int) -> InstanceBench:
    """D has asked P for ten tokens' KV: three blocks, weight 7."""
    node = target(**limits)
    node.begin(start(role=Role.DECODE))
    return node


def test_blocks_are_reserved_and_the_source_is_told():
    node = receiving()
    assert node.one(Dispatch, P) == Dispatch(key(), Slot(0), (TableRun(0, 0, 0, 3),), False, 7, 10)
    assert node.core.observe(0).receiving == 1 and node.free == 29 and not node.plans


def test_only_what_is_not_here_already_is_asked_for():
    node = target()
    node.hear(ROUTER, start(total=8, role=Role.DECODE))
    assert node.one(Match, OTHER_POOL).limit == 8, "nothing has to be computed here"
    node.hear(OTHER_POOL, Matched(key(), 8, (TableRun(0, 0, 50, 2),)))
    assert node.one(Dispatch).table == () and node.one(Dispatch).expected == 1
    node.hear(P, TAIL)
    assert node.one(Joined) == Joined(key(), node.now_ns, 8, 3, 99, 2)
    assert node.plans[0].starts[0].computed == 8


@pytest.mark.parametrize("tail_at", [0, 1, 2])
def test_it_joins_when_all_is_here_in_whatever_order(tail_at: int):
    node = receiving()
    for i in range(3):
        assert not node.sent(Joined)
        if i == tail_at:
            node.hear(P, TAIL)
        else:
            node.tell(Landed(Slot(0), 2 if i == min({0, 1, 2} - {tail_at}) else 4, P))
    assert node.one(Joined, ROUTER) == Joined(key(), node.now_ns, 0, 3, 99, 2)
    assert node.one(Publish, OTHER_POOL) == Publish(key(), (TableRun(0, 0, 0, 2),), hashes(1, 2))
    (plan,) = node.plans
    assert (plan.starts[0].total, plan.starts[0].computed, plan.work[0].first) == (11, 10, 10)
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 1, 1),) and not node.sent(Prefilled)
    assert not node.core.receiving._sessions and not node.commands(WakeAt)


@pytest.mark.parametrize(
    ("source", "weight", "why"),
    [(P, 7, "where 6 were to come"), (Address("q"), 1, "which p#0 writes"), (P, 65535, "6 were to come")],
)
def test_a_count_that_cannot_be_is_not_believed_and_the_honest_one_still_is(
    source: Address, weight: int, why: str
):
    node = receiving()
    node.tell(Landed(Slot(0), weight, source))
    (distrust,) = node.commands(Distrust)
    assert distrust.peer == source and why in distrust.why
    node.hear(P, TAIL)
    assert not node.sent(Joined), "the tail's own part was not taken by a write"
    node.tell(Landed(Slot(0), 6, P))
    assert node.one(Joined, ROUTER)


def test_a_tail_that_skips_what_has_come_is_not_believed():
    node = receiving()
    node.tell(Landed(Slot(0), 6, P))
    node.hear(P, replace(TAIL, skipped=1))
    assert [d.peer for d in node.commands(Distrust)] == [P] and not node.sent(Joined)


def test_a_history_is_part_of_what_is_received():
    node = target()
    node.begin(start(total=10, history=3, role=Role.DECODE))
    node.tell(Landed(Slot(0), 6, P))
    node.hear(P, TAIL)
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 4, 1),)


def shared() -> InstanceBench:
    node = InstanceBench(D)
    node.meet((P, 0))
    node.hear(ROUTER, start(role=Role.DECODE))
    return node


ADOPTED = Adopted(key(), (TableRun(0, 0, 50, 2), TableRun(0, 2, 60, 1)), (2,))


@pytest.mark.parametrize("tail_first", [True, False])
def test_with_one_pool_nothing_is_reserved_and_the_blocks_come_by_the_pool(tail_first: bool):
    node = shared()
    assert node.one(Dispatch, P) == Dispatch(key(), Slot(0), (), True, 2, 10) and not node.sent(Match)
    told = [(P, TAIL), (POOL, ADOPTED)]
    for who, message in told if tail_first else reversed(told):
        assert not node.plans
        node.hear(who, message)
    assert node.one(Joined) and not node.sent(Publish)
    assert node.plans[0].starts[0].table == (TableRun(0, 0, 50, 2), TableRun(0, 2, 60, 1))
    node.step(finish={1: FinishReason.STOP})
    assert node.one(Release, POOL) and node.closed == [key()] and node.free == 33 and node.core.idle


@pytest.mark.parametrize("told", [(), (TAIL,), (ADOPTED,)])
def test_a_shared_handover_that_nobody_wants_any_more(told: tuple[Tail | Adopted, ...]):
    node = shared()
    for message in told:
        node.hear(P if isinstance(message, Tail) else POOL, message)
    node.hear(ROUTER, CANCEL)
    assert node.one(Abandon, P) and node.closed == [key()]
    if ADOPTED not in told:
        node.hear(POOL, ADOPTED)
    assert node.one(Release, POOL) == Release(key()) and node.free == 33
    if TAIL not in told:
        node.hear(P, TAIL)
    node.hear(P, Fenced(key(), Slot(0)))
    assert node.core.idle


def test_a_source_of_one_pool_that_dies_before_the_handover():
    node = shared()
    node.lose(P, pool=0)
    assert node.one(Failed, ROUTER).retry and node.closed == [key()] and node.core.idle
    node.hear(POOL, ADOPTED)
    assert node.one(Release) and node.free == 33


# The target gives up


def test_memory_is_not_free_before_the_source_says_that_it_writes_no_more():
    node = receiving()
    node.tell(Landed(Slot(0), 2, P))
    node.hear(ROUTER, CANCEL)
    assert node.one(Abandon, P) == Abandon(key(), Slot(0)) and not node.closed and node.free == 29
    node.tell(Landed(Slot(0), 4, P))
    node.hear(P, TAIL)
    assert not node.sent(Joined) and node.free == 29, "too late to be wanted"
    node.hear(P, Fenced(key(), Slot(0)))
    assert node.closed == [key()] and node.free == 32 and node.core.idle


def test_a_source_that_does_not_answer_is_reported_until_it_is_gone():
    node = receiving(fence_ns=50)
    node.hear(ROUTER, CANCEL)
    (wake,) = node.commands(WakeAt)
    node.hear(ROUTER, CANCEL)
    for _ in range(2):
        (wake,) = node.commands(WakeAt)
        node.tell(at_ns=wake.at_ns)
        assert node.one(Unfenced, ROUTER) == Unfenced(P) and node.free == 29
    node.lose(P, pool=0)
    assert node.closed == [key()] and node.free == 32 and not node.sent(Failed)
    node.hear(P, Fenced(key(), Slot(0)))
    assert node.core.idle


def test_what_does_not_come_in_time_is_given_up():
    node = receiving(receive_ns=50)
    (wake,) = node.commands(WakeAt) or [WakeAt(52)]
    node.tell(at_ns=60)
    assert node.one(Failed, ROUTER) == Failed(key(), "no KV came in time", retry=True)
    assert node.one(Abandon, P) and not node.closed
    node.hear(P, Fenced(key(), Slot(0)))
    assert node.closed == [key()] and wake.at_ns <= 60


def test_what_never_gets_a_place_is_given_up_too():
    node = target(spare=0, receive_ns=50)
    node.begin(start(role=Role.DECODE))
    node.tell(at_ns=60)
    assert node.one(Failed).retry and node.closed == [key()] and not node.sent(Abandon)


def test_a_late_answer_to_an_old_slot_says_nothing_about_a_new_one():
    node = receiving()
    node.hear(P, Fenced(key(), Slot(3)), Fenced(key(9), Slot(0)))
    node.hear(P, Tail(key(), Slot(3), 1, (), 0, 0, 0))
    assert node.core.observe(0).receiving == 1 and not node.said


# The target, when its source dies


@pytest.mark.parametrize("stage", ["matching", "matched", "receiving", "fencing"])
def test_a_source_that_dies_ends_what_waits_for_it(stage: str):
    node = target(spare=0 if stage == "matched" else 32)
    node.hear(ROUTER, start(role=Role.DECODE))
    if stage != "matching":
        node.hear(OTHER_POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
    if stage == "fencing":
        node.hear(ROUTER, CANCEL)
    node.lose(P, pool=0)
    assert len(node.sent(Failed)) == (stage != "fencing")
    assert node.closed == [key()] and len(node.sent(Release)) == (stage != "matching")
    assert node.core.idle and node.free == (0 if stage == "matched" else 32)


def test_what_has_joined_does_not_need_its_source():
    node = receiving()
    node.tell(Landed(Slot(0), 6, P))
    node.hear(P, TAIL)
    node.lose(P, pool=0)
    assert not node.sent(Failed) and not node.closed
    node.step()
    assert node.one(Tokens)


def test_under_pressure_what_is_being_received_stays():
    node = receiving()
    node.hear(OTHER_POOL, Recall(on=True, force=True))
    assert node.core.observe(0).receiving == 1 and not node.sent(Abandon)
    node.tell(Landed(Slot(0), 6, P))
    node.hear(P, TAIL)
    assert node.one(Joined)
