"""The timing executor by hand: when it tells of what, in closed form and step by step; and workers that slow each other down."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.sim.loop import Loop
from headrace.sim.timing import Host, Running, Script, TimingWorker
from headrace.types.events import Event, Received, StepDone
from headrace.types.ids import Address, BlockHash, PoolId, RequestId, SequenceKey, StepId
from headrace.types.messages import Drain, InstanceInfo, Role, Start
from headrace.types.plan import SequenceStart, StepPlan, StepResult, Work
from headrace.types.request import NEVER_NS, FinishReason
from tests.sim.timing_worlds import Stairs

US = 1_000_000
"""Picoseconds."""
FLAT = Stairs(fixed_ps=10 * US, row_ps=0, slope_ps=0, width=10**9, rise_ps=0, token_ps=US)
SLOPED = Stairs(fixed_ps=10 * US, row_ps=US, slope_ps=1_700, width=16, rise_ps=300, token_ps=US)
ROUTER = Address("router")
INFO = InstanceInfo(PoolId(0), Address("pool0"), "mixed", 8, (64,))


@dataclass
class Core:
    """Notes what it is told, and when."""

    loop: Loop
    told: list[tuple[int, Event]] = field(default_factory=list[tuple[int, Event]])

    def handle(self, event: Event, now_ns: int) -> None:
        self.told.append((now_ns, event))

    def settle(self, now_ns: int) -> list[Any]:
        return []

    def observe(self, now_ns: int) -> None:
        return None

    @property
    def results(self) -> list[tuple[int, int, int]]:
        """(When, repetitions told of, left) of each result."""
        return [(at, e.result.repeats, e.result.left) for at, e in self.told if isinstance(e, StepDone)]


def key(n: int) -> SequenceKey:
    return SequenceKey(RequestId(n))


def start(n: int, total: int = 8, *, hashes: tuple[BlockHash, ...] = ()) -> Start:
    return Start(key(n), Role.WHOLE, total, 0, 1000, hashes, 0, NEVER_NS)


def worker_of(
    loop: Loop, costs: Stairs = FLAT, *, depth: int = 2, host: Host | None = None, index: int = 0
) -> tuple[TimingWorker, Core]:
    core = Core(loop)
    worker = TimingWorker(
        index, Address(f"i{index}"), core, loop, INFO, costs=costs, depth=depth, block_size=4, host=host
    )
    return worker, core


def begin(
    worker: TimingWorker, *outputs: int, repeat_max: int = 100, stops: bool = False, first: int = 8
) -> None:
    """Sequences 1, 2, ... with `first` tokens computed and so many tokens to draw; a plan that draws one of each is given."""
    for n, output in enumerate(outputs, 1):
        worker.accept(start(n), (Script(output, stops, None), 0))
    give(worker, 1, len(outputs), repeat_max=repeat_max, first=first, starts=True)


def give(
    worker: TimingWorker, step: int, rows: int, *, repeat_max: int = 1, first: int = 8, starts: bool = False
) -> None:
    keys = [key(n) for n in range(1, rows + 1)]
    plan = StepPlan(
        step=StepId(step),
        base=StepId(step - 1),
        ends=(),
        starts=tuple(SequenceStart(k, first + 1, first, 0, ()) for k in keys) if starts else (),
        growth=(),
        work=tuple(Work(k, first, 1, True) for k in keys),
        repeat_max=repeat_max,
    )
    worker.execute(plan, worker.loop.now_ns)


def poke(worker: TimingWorker, message: Any = None) -> None:
    worker.receive(Received(ROUTER, message or Drain()), worker.loop.now_ns)


def play(loop: Loop) -> None:
    while loop.instant():
        pass


def ends_of(costs: Stairs, rows: int, context: int, count: int, begin_ps: int = 0) -> list[int]:
    """When each of so many steps ends, by adding them up, nanoseconds. `context` is the first step's."""
    ends: list[int] = []
    for _ in range(count):
        cost = costs.decode(rows, context)
        begin_ps += cost.fixed_ps + cost.slope_ps * context
        context += rows
        ends.append(-(-begin_ps // 1000))
    return ends


# The closed forms


@settings(max_examples=200)
@given(
    begun=st.integers(0, 5),
    begun_ps=st.integers(0, 10**6),
    first_ps=st.integers(1, 5000),
    growth_ps=st.integers(0, 700),
    length=st.integers(1, 60),
    at=st.integers(0, 400_000),
)
def test_ends_in_closed_form_are_those_of_adding_up(begun, begun_ps, first_ps, growth_ps, length, at):
    plan = StepPlan(StepId(1), StepId(0), (), (), (), ())
    running = Running(plan, [], [], 0, begun=begun, begun_ps=begun_ps, until=begun + length)
    running.first_ps, running.growth_ps = first_ps, growth_ps
    ends = [begun_ps]
    for n in range(length):
        ends.append(ends[-1] + first_ps + n * growth_ps)
    assert [running.end_ps(begun + n) for n in range(length + 1)] == ends
    for at_ps in (begun_ps + at, *ends, *(end - 1 for end in ends[1:])):
        assert running.ended_by(at_ps) == begun + sum(end <= at_ps for end in ends[1:])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("costs", [FLAT, SLOPED])
def test_it_tells_when_the_core_must_decide(costs: Stairs, depth: int):
    """At its limit less the plans that would be behind it, and then at each end. Buckets and slopes are crossed on the way."""
    loop = Loop()
    worker, core = worker_of(loop, costs, depth=depth)
    begin(worker, 1000, 1000, repeat_max=50)
    play(loop)
    ends = ends_of(costs, 2, 18, 50)
    wanted = [(ends[49], 50, 0)] if depth == 1 else [(ends[48], 49, 1), (ends[49], 1, 0)]
    assert core.results == wanted
    assert worker.steps == 50


def test_it_tells_when_a_sequence_ends_and_what_is_left_costs_less():
    """A stop that the core could not foresee: the run behind it goes on without that row, as a plan of its own would."""
    loop = Loop()
    worker, core = worker_of(loop, SLOPED)
    begin(worker, 7, 1000, stops=True)
    play(loop)
    end_ns = ends_of(SLOPED, 2, 18, 7)[-1]
    cost = SLOPED.decode(1, 9 + 7)
    exact_ps = sum(
        SLOPED.decode(2, 18 + 2 * n).fixed_ps + SLOPED.decode(2, 18 + 2 * n).slope_ps * (18 + 2 * n)
        for n in range(7)
    )
    last_ns = -(-(exact_ps + cost.fixed_ps + cost.slope_ps * 16) // 1000)
    assert core.results == [(end_ns, 7, 1), (last_ns, 1, 0)]
    first = core.told[0][1]
    assert isinstance(first, StepDone)
    assert [(o.key, o.finish) for o in first.result.outputs if o.finish] == [(key(1), FinishReason.STOP)]


def test_all_that_is_left_of_a_batch_that_ended_takes_no_time():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 3, stops=True)
    play(loop)
    assert [(repeats, left) for _, repeats, left in core.results] == [(3, 1), (1, 0)]
    assert core.results[0][0] == 30_000 and core.results[1][0] <= 30_001


# Interruptions


def test_an_event_in_mid_step_is_told_after_what_has_run():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(34_999, poke, worker)
    play(loop)
    # Three have ended, the fourth runs, and the fifth would be planned behind it.
    assert core.results == [(34_999, 3, 2), (40_000, 1, 1), (50_000, 1, 0)]
    assert [type(e) for at, e in core.told if at == 34_999] == [StepDone, Received]


def test_an_event_in_the_first_step_tells_that_nothing_has_ended():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(5_000, poke, worker)
    play(loop)
    assert core.results == [(5_000, 0, 2), (10_000, 1, 1), (20_000, 1, 0)]


def test_an_event_exactly_at_an_end_sees_that_end():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(30_000, poke, worker)
    play(loop)
    # What follows the fourth is decided in this very instant.
    assert core.results == [(30_000, 3, 1), (40_000, 1, 0)]


def test_two_events_in_one_instant_tell_once():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(25_000, poke, worker)
    loop.at(25_000, poke, worker)
    play(loop)
    assert core.results == [(25_000, 2, 2), (30_000, 1, 1), (40_000, 1, 0)]


def test_at_depth_one_only_the_running_step_is_left():
    loop = Loop()
    worker, core = worker_of(loop, depth=1)
    begin(worker, 1000)
    loop.at(25_000, poke, worker)
    play(loop)
    assert core.results == [(25_000, 2, 1), (30_000, 1, 0)]


def test_a_start_that_only_queues_is_not_told_at_once():
    """But the plan is open no more: at the end of the step that runs the core decides."""
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(25_000, poke, worker, start(2))
    play(loop)
    assert core.results == [(30_000, 3, 1), (40_000, 1, 0)]
    assert [at for at, e in core.told if isinstance(e, Received)] == [25_000]


def test_what_was_kept_silent_is_told_with_the_next_event():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(25_000, poke, worker, start(2))
    loop.at(28_000, poke, worker)
    play(loop)
    assert core.results == [(28_000, 2, 2), (30_000, 1, 1), (40_000, 1, 0)]


def test_a_start_with_hashes_is_told_at_once():
    """It asks the pool: what has filled meanwhile must be there before it."""
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(25_000, poke, worker, start(2, hashes=(BlockHash(bytes(16)),)))
    play(loop)
    assert core.results[0] == (25_000, 2, 2)


def test_a_plan_behind_an_open_one_makes_it_run_once():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    worker.once(StepId(1))
    give(worker, 2, 1, first=9)
    play(loop)
    assert core.results == [(10_000, 1, 0), (20_000, 1, 0)]


def test_a_death_in_mid_repeat_tells_what_had_ended_and_no_more():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000)
    loop.at(37_000, worker.die, 37_000, 99_000)
    loop.at(38_000, poke, worker)
    play(loop)
    assert core.results == [(37_000, 3, 2)]
    assert len(core.told) == 1 and not worker.alive


@settings(max_examples=60, deadline=None)
@given(
    depth=st.sampled_from([1, 2]),
    rows=st.integers(1, 3),
    pokes=st.lists(st.integers(1, 400_000), max_size=6),
    grid=st.booleans(),
)
def test_whatever_interrupts_ends_are_those_of_steps(depth: int, rows: int, pokes: list[int], grid: bool):
    """Whenever it tells, it tells of exactly the steps that have ended, and a result of what is left comes at its end."""
    costs = FLAT if grid else SLOPED
    loop = Loop()
    worker, core = worker_of(loop, costs, depth=depth)
    begin(worker, *[1000] * rows, repeat_max=30)
    for at_ns in pokes:
        loop.at(at_ns - at_ns % 10_000 + 10_000 if grid else at_ns, poke, worker)
    play(loop)
    ends = ends_of(costs, rows, 9 * rows, 31)
    told = 0
    for at_ns, repeats, left in core.results:
        told += repeats
        assert told == sum(end <= at_ns for end in ends[: told + left])
        assert at_ns in ends or at_ns in pokes
        assert left <= depth
    assert told == worker.steps


# Names of blocks


def test_names_are_told_once_each_as_blocks_fill():
    loop = Loop()
    worker, core = worker_of(loop)
    name = {i: BlockHash(bytes([i] * 16)) for i in range(20)}
    worker.accept(start(1), (Script(12, False, name.__getitem__), 0))
    give(worker, 1, 1, repeat_max=12, first=8, starts=True)
    loop.at(45_000, poke, worker)
    play(loop)
    results = [e.result for _, e in core.told if isinstance(e, StepDone)]
    hashes = [h for result in results for output in result.outputs for h in output.hashes]
    assert hashes == [name[i] for i in range((8 + sum(r.repeats for r in results)) // 4)]


# Neighbours


def crowd(kind: str, beside: tuple[str, ...]) -> float:
    return 1 + 0.5 * len(beside)


def test_neighbours_slow_each_other_from_the_next_step_on():
    loop, host = Loop(), Host(crowd)
    one, one_core = worker_of(loop, host=host, index=0)
    two, two_core = worker_of(loop, host=host, index=1)
    begin(one, 1000, repeat_max=5)
    loop.at(25_000, lambda: begin(two, 1000, repeat_max=2))
    play(loop)
    # One is in its third step: from the fourth on it goes at 3/2, two from its first; when two's plan has ended one is alone again.
    assert one_core.results == [(45_000, 4, 1), (60_000, 1, 0)]
    assert two_core.results == [(40_000, 1, 1), (55_000, 1, 0)]


def test_what_begins_in_the_same_instant_does_not_count_yet():
    loop, host = Loop(), Host(crowd)
    pairs = [worker_of(loop, host=host, index=i) for i in range(2)]
    for worker, _ in pairs:
        loop.at(10_000, begin, worker, 1000)
    loop.at(1_000_000, lambda: [worker.die(loop.now_ns, loop.now_ns) for worker, _ in pairs])
    for at_ns in (15_000, 25_000):
        for worker, _ in pairs:
            loop.at(at_ns, poke, worker)
    play(loop)
    for _, core in pairs:
        # The first step alone, the second beside the other.
        assert core.results[:2] == [(15_000, 0, 2), (20_000, 1, 1)]
        assert core.results[2] == (35_000, 1, 0)


def test_a_neighbour_that_begins_as_a_step_ends_does_not_delay_what_is_told():
    """Both happen in one instant; whoever is handled first, the end is told then."""
    loop, host = Loop(), Host(crowd)
    one, one_core = worker_of(loop, host=host, index=0, depth=1)
    two, two_core = worker_of(loop, host=host, index=1, depth=1)
    begin(two, 1000, repeat_max=1)
    begin(one, 1000, repeat_max=1)
    loop.at(10_000, lambda: give(two, 2, 1, first=9))
    play(loop)
    assert one_core.results[0][0] == two_core.results[0][0] == 10_000


def test_results_name_their_plan():
    loop = Loop()
    worker, core = worker_of(loop)
    begin(worker, 1000, repeat_max=3)
    play(loop)
    results: list[StepResult] = [e.result for _, e in core.told if isinstance(e, StepDone)]
    assert {r.step for r in results} == {StepId(1)}
    assert sum(r.repeats for r in results) == 3
