import pytest

from headrace.engine.ordering import priority
from headrace.engine.sequence import Status
from headrace.types.kv import TableRun
from headrace.types.messages import Role
from headrace.types.plan import Growth
from tests.engine.build import (
    MIXED,
    give,
    matched,
    memory_of,
    numbers,
    policies_of,
    reap,
    retire,
    scheduler_of,
    sequence_of,
    shape,
)


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_draws():
    scheduler = scheduler_of(memory_of(20))
    sequence = sequence_of(1, 40)
    matched(scheduler, sequence)
    shapes = []
    for _ in range(4):
        shapes.append(shape(scheduler.plan(0)))
        retire(scheduler, [sequence])
    assert shapes == [[(1, 0, 16, False)], [(1, 16, 16, False)], [(1, 32, 8, True)], [(1, 40, 1, True)]]


def test_budgets_of_tokens_and_sequences_hold():
    scheduler = scheduler_of(memory_of(40), sequences_max=3)
    sequences = [sequence_of(n, 10) for n in range(5)]
    matched(scheduler, *sequences)
    first = scheduler.plan(0)
    assert shape(first) == [(0, 0, 10, True), (1, 0, 6, False)]
    assert numbers(scheduler.running) == [0, 1, 2] and numbers(scheduler.waiting) == [3, 4]
    retire(scheduler, sequences)
    assert shape(scheduler.plan(0)) == [(0, 10, 1, True), (1, 6, 4, True), (2, 0, 10, True)]


def test_two_plans_in_flight_count_the_token_that_is_on_its_way():
    scheduler = scheduler_of(memory_of(20), depth=2)
    sequence = sequence_of(1, 5)
    matched(scheduler, sequence)
    assert shape(scheduler.plan(0)) == [(1, 0, 5, True)]
    assert shape(scheduler.plan(0)) == [(1, 5, 1, True)]
    assert scheduler.plan(0) is None, "two are in flight"
    assert (sequence.pending, sequence.scheduled, sequence.total) == (2, 6, 5)
    retire(scheduler, [sequence])
    assert shape(scheduler.plan(0)) == [(1, 6, 1, True)]
    assert (sequence.pending, sequence.total, sequence.computed) == (2, 6, 5)


@pytest.mark.parametrize("depth", [1, 2])
def test_no_more_is_drawn_than_the_limit(depth: int):
    scheduler = scheduler_of(memory_of(20), depth=depth)
    sequence = sequence_of(1, 5, emits_max=3)
    matched(scheduler, sequence)
    drawn = 0
    for _ in range(8):
        while scheduler.plan(0) is not None:
            pass
        if scheduler.inflight:
            drawn += sum(w.emits for w in retire(scheduler, [sequence]).work)
    assert drawn == 3 and sequence.remaining == 0


def test_a_prefill_sequence_draws_once_and_is_held_with_its_blocks():
    scheduler = scheduler_of(memory_of(20), depth=2)
    sequence = sequence_of(1, 5, role=Role.PREFILL)
    matched(scheduler, sequence)
    scheduler.plan(0)
    assert scheduler.plan(0) is None and len(scheduler.inflight) == 1
    retire(scheduler, [sequence])
    scheduler.hold(sequence)
    assert sequence.status is Status.HELD and scheduler.plan(0) is None
    sequence.role = Role.WHOLE
    scheduler.join(sequence)
    assert shape(scheduler.plan(0)) == [(1, 5, 1, True)]


def test_a_sequence_that_a_plan_names_cannot_be_held():
    scheduler = scheduler_of(memory_of(20))
    sequence = sequence_of(1, 5)
    matched(scheduler, sequence)
    scheduler.plan(0)
    with pytest.raises(AssertionError):
        scheduler.hold(sequence)


# Admission


def test_prefixes_are_looked_up_ahead_and_in_order():
    scheduler = scheduler_of(memory_of(20), sequences_max=3)
    sequences = [sequence_of(n, 8, arrival_ns=-n) for n in range(5)]
    for sequence in sequences:
        scheduler.enqueue(sequence)
    assert scheduler.plan(0) is None
    assert numbers(scheduler.wishes.match) == [4, 3, 2]
    assert [s.status for s in sequences] == [Status.WAITING] * 2 + [Status.MATCHING] * 3


def test_prefixes_are_looked_up_while_the_plans_in_flight_run():
    scheduler = scheduler_of(memory_of(20))
    running, arrived = sequence_of(1, 8), sequence_of(2, 8)
    matched(scheduler, running)
    scheduler.plan(0)
    scheduler.enqueue(arrived)
    assert scheduler.plan(0) is None and numbers(scheduler.wishes.match) == [2]
    scheduler.wishes.match.clear()
    arrived.status = Status.MATCHED
    assert scheduler.plan(0) is None and not scheduler.wishes.match
    retire(scheduler, [running])
    assert shape(scheduler.plan(0)) == [(1, 8, 1, True), (2, 0, 8, True)]


def test_nobody_overtakes_the_head_of_the_line():
    scheduler = scheduler_of(memory_of(3))
    big, small = sequence_of(1, 16), sequence_of(2, 4)
    matched(scheduler, big, small)
    assert scheduler.plan(0) is None
    assert scheduler.memory.need == [4] and numbers(scheduler.waiting) == [1, 2]
    give(scheduler.memory, 1, first=10)
    assert shape(scheduler.plan(0)) == [(1, 0, 16, True)]


def test_the_head_of_the_line_waits_for_its_own_lookup():
    scheduler = scheduler_of(memory_of(8))
    first, second = sequence_of(1, 4), sequence_of(2, 4)
    scheduler.enqueue(first)
    matched(scheduler, second)
    assert scheduler.plan(0) is None and numbers(scheduler.wishes.match) == [1]
    first.status = Status.MATCHED
    assert shape(scheduler.plan(0)) == [(1, 0, 4, True), (2, 0, 4, True)]


def test_the_priority_order_admits_the_urgent_first():
    ordering = priority.Policy(priority.Config())
    scheduler = scheduler_of(memory_of(8), sequences_max=1, policies=policies_of(ordering=ordering))
    late, urgent = sequence_of(1, 4, priority=5), sequence_of(2, 4, priority=-1)
    matched(scheduler, late, urgent)
    assert shape(scheduler.plan(0)) == [(2, 0, 4, True)] and numbers(scheduler.waiting) == [1]


def test_under_pressure_nobody_is_admitted():
    scheduler = scheduler_of(memory_of(8))
    matched(scheduler, sequence_of(1, 4))
    scheduler.memory.pressed = True
    assert scheduler.plan(0) is None and scheduler.memory.need == [0]


def test_prefixes_that_wait_behind_a_short_head_are_given_back():
    """They may be all that it lacks: nothing else would ever free them."""
    scheduler = scheduler_of(memory_of(0))
    head, behind = sequence_of(1, 8), sequence_of(2, 8)
    matched(scheduler, head, behind)
    for sequence, first in ((head, 40), (behind, 50)):
        scheduler.memory.adopt(sequence, (TableRun(0, 0, first, 1),), [1])
    assert scheduler.plan(0) is None and not scheduler.wishes.unlock, "not before the pool has said so"
    give(scheduler.memory, 0, short=True)
    scheduler.plan(0)
    assert numbers(scheduler.wishes.unlock) == [2] and head.status is Status.MATCHED
    assert scheduler.memory.need == [1] and not scheduler.wishes.match, "nor are they locked again at once"


def test_a_sequence_to_receive_reserves_all_and_is_not_planned():
    scheduler = scheduler_of(memory_of(8, 8, spec=MIXED), sequences_max=1)
    sequence, other = sequence_of(1, 18, role=Role.DECODE, groups=2), sequence_of(2, 4, groups=2)
    matched(scheduler, sequence, other)
    scheduler.memory.trim(sequence, sequence.total)
    assert scheduler.plan(0) is None
    assert sequence.status is Status.RECEIVING and sequence.tables == [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]
    assert numbers(scheduler.wishes.receive) == [1] and numbers(scheduler.waiting) == [2], "it has a place"
    sequence.role, sequence.computed, sequence.scheduled, sequence.total = Role.WHOLE, 18, 18, 19
    scheduler.join(sequence)
    assert shape(scheduler.plan(0)) == [(1, 18, 1, True)]


# The difference to the plan before


def test_plans_are_numbered_and_tell_only_what_is_new():
    scheduler = scheduler_of(memory_of(4))
    sequence = sequence_of(1, 7)
    matched(scheduler, sequence)
    give(scheduler.memory, 4, first=10)
    plan = scheduler.plan(0)
    assert plan is not None and (plan.step, plan.base) == (1, 0)
    (start,) = plan.starts
    assert (start.total, start.computed, start.hashed, start.table) == (7, 0, 1, (TableRun(0, 0, 0, 2),))
    told: list[tuple[Growth, ...]] = []
    for step in range(2, 5):
        retire(scheduler, [sequence])
        plan = scheduler.plan(0)
        assert plan is not None and (plan.step, plan.base, plan.starts) == (step, step - 1, ())
        told.append(plan.growth)
    assert told == [(), (Growth(sequence.key, (TableRun(0, 2, 2, 1),)),), ()]


def test_a_prefix_found_is_part_of_the_first_table():
    scheduler = scheduler_of(memory_of(4))
    sequence = sequence_of(1, 12)
    matched(scheduler, sequence)
    scheduler.memory.adopt(sequence, (TableRun(0, 0, 40, 2),), [2])
    sequence.published = [2]
    sequence.scheduled = sequence.computed = 8
    plan = scheduler.plan(0)
    assert plan is not None and shape(plan) == [(1, 8, 4, True)]
    assert plan.starts[0].computed == 8
    assert plan.starts[0].table == (TableRun(0, 0, 40, 2), TableRun(0, 2, 0, 1))


def test_who_is_preempted_is_told_once_and_grows_no_more():
    scheduler = scheduler_of(memory_of(8))
    first, second = sequence_of(1, 4), sequence_of(2, 4)
    matched(scheduler, first, second)
    scheduler.plan(0)
    retire(scheduler, [first, second])
    scheduler._secure()
    scheduler.stop(first, ends=False)
    assert reap(scheduler) == [first]
    plan = scheduler.plan(0)
    assert plan is not None and plan.ends == (first.key,)
    assert [g.key for g in plan.growth] == [second.key]
    retire(scheduler, [second])
    plan = scheduler.plan(0)
    assert plan is not None and plan.ends == ()


def test_who_leaves_for_good_is_closed_and_not_named_again():
    scheduler = scheduler_of(memory_of(8))
    first, second = sequence_of(1, 4), sequence_of(2, 4)
    matched(scheduler, first, second)
    scheduler.plan(0)
    retire(scheduler, [first, second])
    scheduler._secure()
    scheduler.stop(first, ends=False)
    reap(scheduler)
    scheduler.stop(first, ends=True)
    reap(scheduler)
    plan = scheduler.plan(0)
    assert plan is not None and plan.ends == () and [g.key for g in plan.growth] == [second.key]


# Shortage


def run_dry(depth: int = 1):
    """Two sequences of two full blocks each, and no block more: the first needs one."""
    scheduler = scheduler_of(memory_of(4, total=4), depth=depth)
    first, second = sequence_of(1, 8), sequence_of(2, 8)
    matched(scheduler, first, second)
    scheduler.plan(0)
    return scheduler, first, second


def test_whom_memory_lacks_for_waits_and_it_is_asked_for():
    scheduler, first, second = run_dry()
    retire(scheduler, [first, second])
    assert scheduler.plan(0) is None
    assert scheduler.memory.need == [2]
    assert numbers(scheduler.running) == [1, 2], "nobody is stopped before the pool has said that it is short"


def test_the_last_in_order_is_stopped_for_the_first():
    scheduler, first, second = run_dry()
    retire(scheduler, [first, second])
    scheduler.plan(0)
    give(scheduler.memory, 0, short=True)
    assert scheduler.plan(0) is None
    assert second.status is Status.STOPPING and not second.ends and scheduler.memory.need == [1]
    reap(scheduler)
    assert second.status is Status.WAITING and (second.lost, scheduler.preemptions) == (8, 1)
    plan = scheduler.plan(0)
    assert shape(plan) == [(1, 8, 1, True)]
    assert plan is not None and plan.ends == (second.key,) and plan.starts == ()


def test_a_preempted_sequence_starts_over_with_what_it_had_drawn():
    scheduler, first, second = run_dry()
    retire(scheduler, [first, second])
    give(scheduler.memory, 0, short=True)
    scheduler.plan(0)
    reap(scheduler)
    scheduler.plan(0)
    second.status = Status.MATCHED
    give(scheduler.memory, 9, first=20)
    retire(scheduler, [first, second])
    plan = scheduler.plan(0)
    assert shape(plan) == [(1, 9, 1, True), (2, 0, 9, True)]
    assert plan is not None and plan.ends == ()
    (start,) = plan.starts
    assert start.key == second.key and (start.total, start.computed) == (9, 0)
    assert sum(r.count for r in start.table) == 3


def test_ended_and_started_again_in_one_plan():
    scheduler, first, second = run_dry()
    retire(scheduler, [first, second])
    give(scheduler.memory, 0, short=True)
    scheduler.plan(0)
    reap(scheduler)
    give(scheduler.memory, 9, first=20)
    second.status = Status.MATCHED
    plan = scheduler.plan(0)
    assert plan is not None and plan.ends == (second.key,)
    assert [s.key for s in plan.starts] == [second.key] and [g.key for g in plan.growth] == [first.key]


def test_blocks_of_a_stopped_sequence_wait_for_the_plans_that_name_them():
    scheduler, first, second = run_dry(depth=2)
    assert scheduler.plan(0) is None, "no block for either's next token"
    give(scheduler.memory, 0, short=True)
    scheduler.plan(0)
    assert second.status is Status.STOPPING and second.pending == 1
    assert reap(scheduler) == [] and scheduler.memory.spare[0].total == 0
    retire(scheduler, [first, second])
    assert second.emitted == 1, "what it drew counts"
    assert reap(scheduler) == [second] and scheduler.memory.spare[0].total == 2
    assert (second.total, second.pending, second.scheduled) == (9, 0, 0)


def test_a_sequence_that_is_being_sent_keeps_its_blocks():
    scheduler, first, second = run_dry()
    retire(scheduler, [first, second])
    scheduler.stop(second, ends=True)
    assert scheduler.drained(lambda key: key == second.key) == []
    assert scheduler.drained(lambda key: False) == [second]


def test_behind_the_first_that_lacks_nobody_is_given_any():
    scheduler = scheduler_of(memory_of(4))
    first, second = sequence_of(1, 8), sequence_of(2, 4)
    matched(scheduler, first, second)
    scheduler.plan(0)
    retire(scheduler, [first, second])
    first.total += 12
    assert scheduler.plan(0) is None
    assert scheduler.memory.spare[0].total == 1 and scheduler.memory.need == [5]


def test_a_cancelled_sequence_ends_even_while_it_is_being_preempted():
    scheduler, first, second = run_dry()
    scheduler.stop(second, ends=False)
    scheduler.stop(second, ends=True)
    scheduler.stop(second, ends=False)
    retire(scheduler, [first, second])
    assert reap(scheduler) == [second] and scheduler.waiting == [] and scheduler.memory.spare[0].total == 2


def test_a_sequence_whose_last_step_before_a_preemption_drew_its_token_is_held():
    scheduler = scheduler_of(memory_of(4))
    sequence = sequence_of(1, 5, role=Role.PREFILL)
    matched(scheduler, sequence)
    scheduler.plan(0)
    scheduler.stop(sequence, ends=False)
    retire(scheduler, [sequence])
    scheduler.hold(sequence)
    assert sequence.status is Status.HELD and reap(scheduler) == []


def test_another_holders_need_stops_the_last_in_order_once():
    scheduler, first, second = run_dry()
    retire(scheduler, [first, second])
    scheduler.force = True
    scheduler.memory.pressed = True
    scheduler.plan(0)
    assert second.status is Status.STOPPING and not scheduler.force
    scheduler.plan(0)
    assert first.status is Status.RUNNING


def test_the_only_sequence_can_be_stopped_for_another_holder_and_is_not_for_itself():
    scheduler = scheduler_of(memory_of(2))
    only = sequence_of(1, 8)
    matched(scheduler, only)
    scheduler.plan(0)
    retire(scheduler, [only])
    give(scheduler.memory, 0, short=True)
    assert scheduler.plan(0) is None and only.status is Status.RUNNING
    scheduler.force = True
    scheduler.plan(0)
    assert only.status is Status.STOPPING


def test_the_first_in_order_always_gets_on():
    """Six sequences that need all the memory each: they finish, one after the other, in order."""
    scheduler = scheduler_of(memory_of(6, total=6))
    sequences = [sequence_of(n, 8, emits_max=16) for n in range(6)]
    for sequence in sequences:
        scheduler.enqueue(sequence)
    finished: list[int] = []
    for _ in range(400):
        plan = scheduler.plan(0)
        if plan is not None:
            retire(scheduler, sequences)
            for sequence in [s for s in scheduler.running if s.emitted >= s.emits_max]:
                finished.append(sequence.key.request)
                scheduler.stop(sequence, ends=True)
        reap(scheduler)
        for sequence in scheduler.wishes.match:
            sequence.status = Status.MATCHED
        scheduler.wishes.match.clear()
        lease = scheduler.memory.request()
        if lease is not None:
            give(scheduler.memory, 0, short=any(lease.need))
    assert finished == list(range(6))
    assert scheduler.memory.spare[0].runs() == [(0, 6)]
    assert scheduler.preemptions
