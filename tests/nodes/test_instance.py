"""An instance alone: sequences that run here from start to end, and every way out."""

from itertools import pairwise

import pytest

from headrace.types.events import Distrust, Execute, Landed, StepDone, Submitted, WakeAt
from headrace.types.ids import PoolId, RequestId, Slot
from headrace.types.kv import BlockRun, TableRun
from headrace.types.messages import (
    Begun,
    Cancel,
    Drain,
    Failed,
    Lease,
    Leased,
    Match,
    Matched,
    Prefilled,
    Publish,
    Recall,
    Refused,
    Release,
    Resume,
    Return,
    Role,
    TokenRun,
    Tokens,
)
from headrace.types.plan import StepResult
from headrace.types.request import FinishReason, Request
from tests.nodes.harness import POOL, ROUTER, D, InstanceBench, P, hashes, key, start

CANCEL = Cancel(key())


def test_a_whole_sequence_from_start_to_end():
    node = InstanceBench()
    node.hear(ROUTER, start(total=10, emits_max=2))
    assert node.one(Match, POOL) == Match(key(), hashes(1, 2), 9), "one token at least is computed"
    node.hear(POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
    (plan,) = node.plans
    assert node.one(Begun, ROUTER) == Begun(key(), node.now_ns, 4)
    assert (plan.starts[0].computed, plan.starts[0].hashed) == (4, 2)
    node.step()
    assert node.one(Prefilled, ROUTER) == Prefilled(key(), node.now_ns)
    assert node.one(Tokens, ROUTER) == Tokens((TokenRun(key(), 0, 1),))
    assert node.one(Publish, POOL) == Publish(key(), (TableRun(0, 1, 0, 1),), hashes(1, 2))
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 1, 1, FinishReason.LENGTH),)
    assert node.one(Release, POOL) == Release(key()) and node.closed == [key()]
    assert node.free == 31 and node.core.idle


def test_new_blocks_are_named_with_the_tokens_that_fill_them():
    node = InstanceBench()
    node.begin(start(total=10))
    node.steps(2)
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 2, 1, None, (hashes(1, 3)[2],)),)
    assert node.one(Publish).table == (TableRun(0, 2, 2, 1),)


def test_a_history_counts_from_where_it_ended():
    node = InstanceBench()
    node.begin(start(total=10, history=3, emits_max=1))
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 3, 1, FinishReason.LENGTH),)


def test_many_tokens_are_told_in_one_message():
    node = InstanceBench()
    node.begin_all(*(start(n, total=4) for n in (1, 2, 3)))
    node.step()
    assert [run.key.request for run in node.one(Tokens).runs] == [1, 2, 3]


def test_an_end_that_the_executor_saw_first_is_discarded_in_the_next_plan():
    node = InstanceBench(depth=2)
    node.begin(start(total=8))
    assert len(node.core.scheduler.inflight) == 2
    node.step(finish={1: FinishReason.STOP})
    assert node.one(Tokens).runs[0].finish is FinishReason.STOP and not node.closed
    assert node.free == 29, "the plan in flight still writes there"
    node.step()
    assert not node.sent(Tokens) and node.closed == [key()] and node.free == 30


def test_an_error_ends_one_sequence_and_no_other():
    node = InstanceBench()
    node.begin_all(start(1, total=4), start(2, total=4))
    node.step()
    node.step(error={1: "not a number"})
    assert node.one(Failed, ROUTER) == Failed(key(1), "not a number", retry=False)
    assert [run.key.request for run in node.one(Tokens).runs] == [2] and node.closed == [key(1)]


def test_results_come_in_the_order_of_plans():
    node = InstanceBench(depth=2)
    node.begin(start())
    with pytest.raises(AssertionError, match="order"):
        node.tell(StepDone(StepResult(node.core.scheduler.inflight[1].plan.step, ())))


def test_plans_follow_each_other():
    node = InstanceBench(depth=2)
    plans = [c.plan for c in node.begin(start(total=4, emits_max=6)) if isinstance(c, Execute)]
    while node.core.scheduler.inflight:
        node.step()
        plans += node.plans
    assert all(after.base == before.step for before, after in pairwise(plans)) and plans[0].base == 0


# What is not taken


def test_a_draining_instance_refuses_and_finishes_what_it_has():
    node = InstanceBench()
    node.begin(start(1, emits_max=1))
    node.hear(ROUTER, Drain(), start(2))
    assert node.one(Refused, ROUTER) == Refused(key(2), "draining") and node.closed == [key(2)]
    assert node.core.observe(9).draining
    node.step()
    assert node.one(Tokens).runs[0].finish is FinishReason.LENGTH


def test_a_full_queue_refuses():
    node = InstanceBench(waiting_max=1)
    node.hear(ROUTER, start(1), start(2))
    assert node.one(Refused) == Refused(key(2), "queue full")


def test_what_can_never_fit_fails_for_good():
    node = InstanceBench()
    node.hear(ROUTER, start(total=250, emits_max=7))
    failed = node.one(Failed, ROUTER)
    assert not failed.retry and "257 tokens need [65] blocks" in failed.reason and node.closed == [key()]
    node.hear(ROUTER, start(2, total=250, emits_max=6))
    assert not node.sent(Failed)


def test_a_source_that_is_gone_is_not_waited_for():
    node = InstanceBench(D)
    node.meet((P, 1))
    node.lose(P)
    node.hear(ROUTER, start(role=Role.DECODE))
    assert node.one(Failed) == Failed(key(), "p#0 was lost", retry=True)
    node.hear(P, Drain())
    assert not node.core.observe(9).draining, "nor is the dead one heard"


def test_a_start_is_never_doubled():
    node = InstanceBench()
    node.hear(ROUTER, start())
    with pytest.raises(AssertionError, match="twice"):
        node.hear(ROUTER, start())


@pytest.mark.parametrize("event", [Submitted(Request(RequestId(1), 1, (), 1))])
def test_what_is_not_for_an_instance_is_an_error(event: Submitted):
    node = InstanceBench()
    with pytest.raises(TypeError, match="no use"):
        node.tell(event)
    with pytest.raises(TypeError, match="no use"):
        node.hear(P, Matched(key(), 0, ()), Return(()))


def test_whoever_counts_for_no_slot_is_distrusted_and_all_goes_on():
    node = InstanceBench()
    node.tell(Landed(Slot(3), 1, P))
    assert node.commands(Distrust) == [Distrust(P, "it counted 1 for slot 3, which nobody waits for")]
    assert node.core.idle


# Cancel, at every stage


def test_cancel_of_what_is_not_here_is_fine():
    assert InstanceBench().hear(ROUTER, CANCEL, Resume(key(7))) == []


def test_cancel_before_the_lookup_is_answered():
    node = InstanceBench()
    node.hear(ROUTER, start())
    node.hear(ROUTER, CANCEL)
    assert node.closed == [key()] and not node.sent(Release)
    node.hear(POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
    assert node.one(Release, POOL) == Release(key()), "what was locked meanwhile is unlocked"
    assert node.core.idle and node.free == 32


def test_cancel_while_its_prefix_waits():
    node = InstanceBench(spare=1)
    node.begin(start(total=10), 4, (TableRun(0, 0, 50, 1),))
    assert node.one(Lease, POOL).need == (1,)
    node.hear(ROUTER, CANCEL)
    assert node.one(Release) == Release(key()) and node.closed == [key()] and node.core.idle


@pytest.mark.parametrize("depth", [1, 2])
def test_cancel_frees_nothing_before_the_plans_in_flight_have_run(depth: int):
    node = InstanceBench(depth=depth)
    node.begin(start(total=40))
    node.step()
    assert len(node.core.scheduler.inflight) == depth
    node.hear(ROUTER, CANCEL)
    for _ in range(depth):
        assert node.free == 22 and not node.closed and not node.sent(Release)
        node.step()
        assert not node.sent(Tokens)
    assert node.one(Release) == Release(key()) and node.closed == [key()]
    assert node.free + 4 == 32 and node.core.idle, "four blocks are published: the pool's now"


def test_cancel_of_what_ends_anyway():
    node = InstanceBench(depth=2)
    node.begin(start(total=8))
    node.step(finish={1: FinishReason.STOP})
    node.hear(ROUTER, CANCEL)
    node.step()
    assert node.closed == [key()] and node.core.idle


def test_cancel_of_what_is_held():
    node = InstanceBench()
    node.begin(start(role=Role.PREFILL))
    node.step()
    node.hear(ROUTER, CANCEL)
    assert node.closed == [key()] and node.one(Release) and node.core.idle and node.free == 30


def test_cancel_of_what_was_preempted():
    node = InstanceBench()
    node.begin(start(total=8))
    node.hear(POOL, Recall(on=True, force=True))
    assert node.free == 0, "all spare went back"
    node.hear(ROUTER, CANCEL)
    node.step()
    assert node.closed == [key()] and not node.sent(Match) and node.core.idle
    assert node.one(Return).runs == (BlockRun(PoolId(0), 0, 0, 2),)


# Pressure and preemption


def test_another_holders_need_stops_the_last_and_it_starts_over():
    node = InstanceBench()
    node.begin_all(start(1, total=4), start(2, total=4))
    node.step()
    node.hear(POOL, Recall(on=True, force=True))
    node.step()
    assert [w.key.request for w in node.plans[0].work] == [1]
    assert node.one(Release, POOL) == Release(key(2)) and not node.sent(Match), "not while others need it"
    assert not node.closed
    node.hear(POOL, Recall(on=False, force=False))
    again = node.one(Match, POOL)
    assert (again.key, again.hashes, again.limit) == (key(2), hashes(2, 1), 5)
    node.step()
    assert node.plans[0].ends == (key(2),)
    node.hear(POOL, Matched(key(2), 4, (TableRun(0, 0, 50, 1),)))
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 10, 8),), False, (0,)))
    node.step()
    assert [w.key.request for w in node.plans[0].work] == [1, 2]
    assert not node.sent(Begun), "it was told once"


def test_tokens_that_are_computed_again_are_counted():
    node = InstanceBench()
    node.begin(start(total=8, emits_max=3))
    node.steps(2)
    node.hear(POOL, Recall(on=True, force=True))
    node.hear(POOL, Recall(on=False, force=False))
    assert node.core.sequences[key()].emitted == 2
    node.step()
    run = node.one(Tokens).runs[0]
    assert (run.first, run.finish) == (2, FinishReason.LENGTH)


def test_a_preempted_sequence_goes_on_where_it_was():
    node = InstanceBench()
    node.begin(start(total=8, emits_max=4))
    node.step()
    node.hear(POOL, Recall(on=True, force=True))
    node.step()
    assert node.one(Tokens).runs[0].first == 1, "what the plan in flight drew counts"
    node.hear(POOL, Recall(on=False, force=False))
    node.hear(POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 10, 8),), False, (0,)))
    (plan,) = node.plans
    assert (plan.starts[0].total, plan.starts[0].computed, plan.work[0].count) == (10, 4, 6)
    node.step()
    assert node.one(Tokens).runs == (TokenRun(key(), 2, 1),) and not node.sent(Prefilled)
    node.step()
    assert node.one(Tokens).runs[0].finish is FinishReason.LENGTH
    assert node.one(Tokens).runs[0].recomputed == 5


def test_a_lookup_that_is_answered_under_pressure_is_given_back_and_made_again():
    node = InstanceBench(spare=4)
    node.hear(ROUTER, start())
    node.hear(POOL, Recall(on=True, force=False))
    node.hear(POOL, Matched(key(), 4, (TableRun(0, 0, 50, 1),)))
    assert node.one(Release) == Release(key()) and not node.plans
    node.hear(POOL, Recall(on=False, force=False))
    assert node.one(Match).key == key()


def test_given_back_and_looked_up_again_in_one_instant():
    node = InstanceBench(spare=0)
    node.begin(start(), 4, (TableRun(0, 0, 50, 1),))
    node.hear(POOL, Recall(on=True, force=False), Recall(on=False, force=False))
    kinds = [type(c.message) for c in node.said if hasattr(c, "message")]
    assert kinds.index(Release) < kinds.index(Match)


def test_prefixes_behind_a_short_head_are_unlocked_until_it_is_served():
    node = InstanceBench(spare=0)
    node.hear(ROUTER, start(1, total=8), start(2, total=8))
    node.hear(POOL, Matched(key(1), 0, ()), Matched(key(2), 4, (TableRun(0, 0, 50, 1),)))
    assert node.one(Lease).need == (2,)
    node.hear(POOL, Leased((), True, (0,)))
    assert node.one(Release) == Release(key(2))
    node.tell()
    assert not node.said
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 5, 2),), False, (9,)))
    assert node.plans and node.one(Match).key == key(2)


def test_what_waits_asks_for_memory_once():
    node = InstanceBench(spare=0)
    node.begin(start(total=10))
    assert node.one(Lease, POOL) == Lease((3,), (3,), since_ns=1)
    node.tell()
    assert not node.said
    node.hear(POOL, Leased((BlockRun(PoolId(0), 0, 5, 3),), False, (9,)))
    assert node.plans[0].starts[0].table == (TableRun(0, 0, 5, 3),)


# Reports


def test_a_report_says_how_much_there_is_to_do():
    node = InstanceBench(sequences_max=2)
    for n in (1, 2, 3):
        node.hear(ROUTER, start(n, total=20))
    node.hear(POOL, Matched(key(1), 0, ()), Matched(key(2), 0, ()))
    report = node.core.observe(77)
    assert report == node.core.observe(77), "looking changes nothing"
    assert (report.observed_at_ns, report.waiting, report.running) == (77, 1, 2)
    assert report.tokens_waiting == 4 + 20 + 20
    assert (report.blocks_total, report.blocks_free) == (64, 22)


def test_a_deadline_is_a_wake_and_nothing_is_asked_twice():
    node = InstanceBench(hold_ns=50)
    node.begin(start(role=Role.PREFILL))
    node.step()
    assert node.commands(WakeAt) == [WakeAt(node.now_ns + 50)]
    node.tell()
    assert not node.said
