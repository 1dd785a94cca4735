"""How often a plan may run unchanged, against trying each number; and growth as separate plans would have done it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.memory import Memory
from headrace.engine.policies import FOREVER
from headrace.engine.repeats import Issued, repeat_max, settle_repeats
from headrace.engine.sequence import Sequence, Status
from headrace.kv.pool import first_block_needed
from headrace.nodes.instance import Instance
from headrace.nodes.limits import InstanceConfig
from headrace.types.ids import Address, PoolId, SequenceKey, StepId
from headrace.types.messages import InstanceInfo, TokenRun
from headrace.types.plan import StepPlan, StepResult, Work
from headrace.types.request import FinishReason
from tests.engine.build import MIXED, PLAIN, SIZE, memory_of, policies_of, sequence_of


def running(memory: Memory, n: int, total: int, *, emits_max: int = 1000, emitted: int = 1) -> Sequence:
    """A decode whose plan (one token) was just issued: the table covers it, the token is pending."""
    sequence = sequence_of(n, total, emits_max=emits_max, groups=len(memory.spare))
    sequence.status = Status.RUNNING
    sequence.emitted, sequence.pending = emitted, 1
    memory.grow(sequence, memory.missing(sequence, total))
    sequence.scheduled = total
    return sequence


def test_the_nearest_limit_bounds_it():
    memory = memory_of(20, lease_blocks=20, total=20)
    memory.pool_free = [0]
    rows = [running(memory, 1, 8, emits_max=30), running(memory, 2, 8, emits_max=12)]
    # One token was emitted before, one is pending: the twelfth comes with the eleventh run.
    assert repeat_max(rows, FOREVER, memory, overheard=False, watched=False) == 11
    assert repeat_max(rows, 5, memory, overheard=False, watched=False) == 5


def test_a_last_token_on_its_way_leaves_one_run():
    memory = memory_of(60)
    rows = [running(memory, 1, 8, emits_max=2)]
    assert repeat_max(rows, FOREVER, memory, overheard=False, watched=False) == 1


def test_who_is_overheard_stops_where_a_block_is_full():
    memory = memory_of(60)
    rows = [running(memory, 1, 8), running(memory, 2, 10)]
    # After this run 8 and 10 tokens have KV: the first has filled a block just now, the second does after two more.
    assert repeat_max(rows, FOREVER, memory, overheard=True, watched=False) == 1
    assert repeat_max(rows[1:], FOREVER, memory, overheard=True, watched=False) == 3


def test_windows_stop_where_they_give_a_block_back():
    for total in range(8, 24):
        memory = memory_of(30, 30, spec=MIXED, lease_blocks=30, total=30)
        memory.pool_free = [0, 0]
        row = running(memory, total, total)
        times = repeat_max([row], FOREVER, memory, overheard=True, watched=False)
        window = MIXED.groups[1].window
        # Run n leaves total + n - 1 tokens: a block is full, or the next token needs none of the window's first block.
        given = [
            n
            for n in range(1, 9)
            if first_block_needed(window, total + n - 1, SIZE)
            != first_block_needed(window, total + n - 2, SIZE)
        ]
        filled = [n for n in range(1, 9) if (total + n - 1) % SIZE == 0]
        assert times == min(given + filled), total


def test_it_stops_before_more_is_asked_for():
    """Low water is half of what is kept in hand, and counts only while the pool has something left."""
    memory = memory_of(6, lease_blocks=4, total=64)
    row = running(memory, 1, 4)
    # Five are in hand: three may be used before fewer than two are.
    assert memory.headroom() == 3
    assert repeat_max([row], FOREVER, memory, overheard=False, watched=False) == 1 + 3 * SIZE
    memory.pool_free = [0]
    assert repeat_max([row], FOREVER, memory, overheard=False, watched=False) == 1 + 5 * SIZE


def test_while_something_waits_for_memory_nothing_is_used():
    memory = memory_of(6)
    row = running(memory, 1, 6)
    assert repeat_max([row], FOREVER, memory, overheard=False, watched=True) == 3
    """Two more tokens fit into the block at hand."""


def test_what_goes_back_after_this_plan_is_not_counted():
    memory = memory_of(40, lease_blocks=1)
    row = running(memory, 1, 4)
    assert memory.headroom() <= 4
    assert repeat_max([row], FOREVER, memory, overheard=False, watched=False) <= 1 + 4 * SIZE


@settings(max_examples=150, deadline=None)
@given(
    totals=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    spare=st.integers(0, 12),
    horizon=st.integers(1, 40),
    watched=st.booleans(),
)
def test_it_is_the_largest_number_that_memory_allows(
    totals: list[int], spare: int, horizon: int, watched: bool
):
    """Each further run is tried on a copy: it must find its blocks in hand."""
    memory = memory_of(sum(-(-t // SIZE) for t in totals) + spare)
    rows = [running(memory, n, total) for n, total in enumerate(totals)]
    memory.pool_free = [0]
    room = 0 if watched else memory.headroom()
    wanted = 1
    used = 0
    for more in range(1, horizon):
        used += sum((row.scheduled + more - 1) % SIZE == 0 for row in rows)
        if used > room:
            break
        wanted = more + 1
    assert repeat_max(rows, horizon, memory, overheard=False, watched=watched) == wanted


@settings(max_examples=100, deadline=None)
@given(
    totals=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    strides=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    mixed=st.booleans(),
)
def test_growth_is_that_of_separate_plans(totals: list[int], strides: list[int], mixed: bool):
    """In strides, or one run at a time: the same blocks at the same places."""
    tables: list[list[list[list[int]]]] = []
    for steps in (strides, [1] * sum(strides)):
        spec = MIXED if mixed else PLAIN
        memory = memory_of(*[60] * len(spec.groups), spec=spec)
        rows = [running(memory, n, total) for n, total in enumerate(totals)]
        for number, stride in enumerate(steps):
            plan = _plan(rows, number + 1)
            issued = Issued(plan, rows, open=True)
            settle_repeats(issued, StepResult(plan.step, (), repeats=stride, left=1), memory)
            assert issued.left == 1 and not issued.open
        tables.append([row.tables for row in rows])
    assert tables[0] == tables[1]


def test_runs_that_are_told_of_add_up():
    memory = memory_of(30)
    rows = [running(memory, 1, 8)]
    plan = _plan(rows, 7)
    rows[0].last_step = 7
    issued = Issued(plan, rows, open=True)
    assert settle_repeats(issued, StepResult(plan.step, (), repeats=5, left=2), memory) == 6
    assert (issued.repeats, issued.left, issued.open, issued.last_step) == (5, 2, False, 13)
    assert (rows[0].scheduled, rows[0].pending, rows[0].last_step) == (14, 7, 13)
    assert settle_repeats(issued, StepResult(plan.step, (), repeats=1, left=1), memory) == 0
    assert settle_repeats(issued, StepResult(plan.step, (), repeats=1, left=0), memory) == 0
    assert (issued.repeats, issued.left, issued.last_step) == (7, 0, 13)


def test_what_is_not_open_runs_as_often_as_was_said():
    memory = memory_of(30)
    rows = [running(memory, 1, 8)]
    plan = _plan(rows, 1)
    with pytest.raises(AssertionError, match="only an open plan"):
        settle_repeats(Issued(plan, rows), StepResult(plan.step, (), repeats=2, left=0), memory)


# What the router is told


def told(interval: int, strides: list[int], *, ends: bool = False) -> list[TokenRun]:
    """Runs of tokens after the first one was told, as they are drawn in strides."""
    info = InstanceInfo(PoolId(0), Address("pool0"), "mixed", 8, (64,))
    config = InstanceConfig(stream_interval=interval)
    instance = Instance(Address("i"), Address("router"), info, PLAIN, policies_of(), config)
    sequence = sequence_of(1, 9)
    sequence.emitted = sequence.told = 1
    runs: list[TokenRun | None] = []
    for number, stride in enumerate(strides):
        sequence.emitted += stride
        sequence.total += stride
        last = ends and number == len(strides) - 1
        finish = FinishReason.LENGTH if last else None
        runs.append(instance.results.told(sequence, finish, everything=last))
    return [run for run in runs if run is not None]


@pytest.mark.parametrize("interval", [1, 2, 5, 2**30])
@pytest.mark.parametrize("strides", [[1] * 13, [4, 4, 5], [13], [7, 1, 5]])
def test_tokens_are_told_in_whole_intervals(interval: int, strides: list[int]):
    runs = told(interval, strides)
    assert sum(run.count for run in runs) == 13 // interval * interval
    assert all(run.count % interval == 0 for run in runs)
    at = 1
    for run in runs:
        assert run.first == at
        at += run.count


@pytest.mark.parametrize("interval", [1, 3, 2**30])
def test_at_the_end_the_rest_is_told(interval: int):
    runs = told(interval, [4, 4, 5], ends=True)
    assert sum(run.count for run in runs) == 13
    assert [run.finish for run in runs][-1] is FinishReason.LENGTH


def _plan(rows: list[Sequence], step: int) -> StepPlan:
    work = tuple(Work(SequenceKey(row.key.request), row.scheduled, 1, True) for row in rows)
    return StepPlan(StepId(step), StepId(step - 1), (), (), (), work, repeat_max=100)
