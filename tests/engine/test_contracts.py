"""Contracts of the engine's axes, on whatever policies there are."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.policies import AdmissionView, Fate, Moment, StepView
from headrace.engine.sequence import Sequence, Status
from headrace.engine.shares import share_of
from tests.contract import policies
from tests.engine.build import (
    SIZE,
    matched,
    memory_of,
    numbers,
    policies_of,
    reap,
    retire,
    scheduler_of,
    sequence_of,
)

BATCHING = pytest.mark.parametrize("policy", policies("engine.batching"))
ADMISSION = pytest.mark.parametrize("policy", policies("engine.admission"))
ORDERING = pytest.mark.parametrize("policy", policies("engine.ordering"))
PREEMPTION = pytest.mark.parametrize("policy", policies("engine.preemption"))


def running(n: int, todo: int, done: int = 0, **settings: Any) -> Sequence:
    """A running sequence that has `todo` tokens to compute (1: it decodes)."""
    sequence = sequence_of(n, todo + done + (todo == 1), **settings)
    sequence.status = Status.RUNNING
    sequence.emitted = todo == 1
    sequence.scheduled = sequence.computed = sequence.total - todo
    sequence.tables = [list(range(sequence.total))]
    return sequence


def seen(sequences: list[Sequence]) -> list[Any]:
    return [deepcopy({name: getattr(s, name) for name in s.__slots__}) for s in sequences]


@st.composite
def views(draw: st.DrawFn) -> StepView:
    todo = draw(st.lists(st.integers(1, 30), max_size=8))
    sequences = [running(n, t) for n, t in enumerate(todo)]
    return StepView(
        now_ns=draw(st.integers(0, 9)),
        decodes=[s for s in sequences if not s.prefilling],
        prefills=[s for s in sequences if s.prefilling],
        waiting=[sequence_of(100 + n, 9) for n in range(draw(st.integers(0, 2)))],
        tokens_max=draw(st.integers(1, 40)),
        sequences_max=draw(st.integers(1, 9)),
    )


@BATCHING
@given(view=views())
def test_a_batch_keeps_to_its_budgets_and_to_what_is_given(policy: Any, view: StepView):
    given_to = view.decodes + view.prefills
    before = seen(given_to + view.waiting)
    work = policy.plan(view)
    assert work == policy.plan(view) and before == seen(given_to + view.waiting)
    assert len({s.key for s, _ in work}) == len(work) <= view.sequences_max
    assert sum(count for _, count in work) <= view.tokens_max
    assert all(any(s is other for other in given_to) and 0 < count <= s.remaining for s, count in work)
    assert bool(work) == bool(given_to), "where there is work, a step does some"
    assert policy.horizon(view) >= 1


@BATCHING
def test_a_batch_repeats_only_while_asking_would_change_nothing(policy: Any):
    decodes = [running(n, 1) for n in range(3)]
    view = StepView(0, decodes, [], [], 8, 8)
    if policy.horizon(view) > 1:
        first = policy.plan(view)
        for sequence in decodes:
            sequence.scheduled += 1
            sequence.total += 1
            sequence.emitted += 1
        assert policy.plan(view) == first


@BATCHING
@pytest.mark.parametrize("depth", [1, 2])
def test_whatever_the_batches_everybody_finishes(policy: Any, depth: int):
    scheduler = scheduler_of(memory_of(64), depth=depth, policies=policies_of(batching=policy))
    sequences = [sequence_of(n, 3 + 11 * n, emits_max=3) for n in range(5)]
    matched(scheduler, *sequences)
    for _ in range(60):
        while scheduler.plan(0) is not None:
            pass
        if scheduler.inflight:
            retire(scheduler, sequences)
    assert [(s.emitted, s.pending) for s in sequences] == [(3, 0)] * 5


@ADMISSION
@given(needed=st.integers(0, 20), free=st.integers(0, 20), others=st.integers(0, 4))
def test_admission_is_pure(policy: Any, needed: int, free: int, others: int):
    fleet = [running(n, 1, done=n) for n in range(others)]
    candidate = sequence_of(9, 12)
    view = AdmissionView(fleet, [free], (20,), [needed], SIZE, [], [], 0)
    before = seen([*fleet, candidate])
    answer = policy.admit(view, candidate)
    assert isinstance(answer, bool) and answer == policy.admit(view, candidate)
    assert before == seen([*fleet, candidate])
    assert policy.horizon(StepView(0, fleet, [], [candidate], 8, 8)) >= 1


@ADMISSION
def test_an_empty_instance_admits_whatever_fits(policy: Any):
    """Else the first in order would wait for ever."""
    assert policy.admit(
        AdmissionView([], [20], (20,), [20], SIZE, [], [], 0), sequence_of(1, 20 * SIZE - 1, emits_max=1)
    )


@ADMISSION
@given(
    todo=st.lists(st.tuples(st.integers(1, 30), st.integers(2, 30)), max_size=5),
    prompt=st.integers(1, 30),
    spare=st.integers(0, 40),
    steps=st.integers(1, 29),
)
def test_a_refusal_lasts_while_it_need_not_be_asked(
    policy: Any, todo: list[tuple[int, int]], prompt: int, spare: int, steps: int
):
    candidate = sequence_of(99, prompt, emits_max=9)
    horizon = policy.horizon(StepView(0, [], [], [candidate], 8, 8))
    steps = min([steps, horizon - 1, *(emits - 1 for _, emits in todo)])

    def view_after(emitted: int) -> AdmissionView:
        fleet = [sequence_of(n, size, emits_max=emits) for n, (size, emits) in enumerate(todo)]
        held = 0
        for sequence in fleet:
            sequence.emitted = emitted
            sequence.total += emitted
            sequence.tables = [list(range(-(-sequence.total // SIZE)))]
            held += len(sequence.tables[0])
        total = sum(-(-size // SIZE) for size, _ in todo) + spare
        return AdmissionView(
            fleet, [total - held], (total,), [-(-prompt // SIZE)], SIZE, [], [5] * 9, emitted
        )

    if not policy.admit(view_after(0), candidate):
        assert not policy.admit(view_after(steps), candidate)


@ADMISSION
@pytest.mark.parametrize("depth", [1, 2])
def test_whoever_is_admitted_everybody_finishes(policy: Any, depth: int):
    """In a memory that does not hold them all, where what ends makes room for the next."""
    memory = memory_of(24, total=24)
    memory.pool_free = [0]
    policies = replace(policies_of(), admission=policy)
    scheduler = scheduler_of(memory, depth=depth, policies=policies)
    sequences = [sequence_of(n, 3 + 11 * n, emits_max=3) for n in range(5)]
    matched(scheduler, *sequences)
    for _ in range(60):
        while scheduler.plan(0) is not None:
            pass
        if scheduler.inflight:
            retire(scheduler, sequences)
        for sequence in list(scheduler.running):
            if sequence.emitted == sequence.emits_max:
                scheduler.finished.append(sequence.emitted)
                scheduler.stop(sequence, ends=True)
        reap(scheduler)
    assert [s.emitted for s in sequences] == [3] * 5 and memory.spare[0].total == 24


@ORDERING
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8),
    now_ns=st.integers(0, 9),
    steps=st.integers(0, 99),
)
def test_an_order_is_total_and_pure(policy: Any, rows: list[tuple[int, int]], now_ns: int, steps: int):
    sequences = [sequence_of(n, 5, priority=p, arrival_ns=a) for n, (p, a) in enumerate(rows)]
    moment = Moment(now_ns, steps, {"request 1": 700})
    before = seen(sequences)
    ranks = [policy.rank(s, moment) for s in sequences]
    assert ranks == [policy.rank(s, moment) for s in sequences] and before == seen(sequences)
    assert len(set(ranks)) == len(ranks) and sorted(ranks)
    assert policy.horizon(StepView(now_ns, [], [], sequences, 8, 8, moment)) >= 1


@ORDERING
@given(steps=st.integers(0, 99), served=st.lists(st.integers(0, 2000), min_size=4, max_size=4))
def test_an_order_lasts_while_it_need_not_be_asked(policy: Any, steps: int, served: list[int]):
    """Steps in which every running sequence draws a token."""
    sequences = [running(n, 1) for n in range(4)]
    shares = [share_of(s) for s in sequences]

    def ranks(step: int) -> list[Any]:
        moment = Moment(0, steps + step, {s: n + step for s, n in zip(shares, served, strict=True)})
        return [policy.rank(s, moment) for s in sequences]

    moment = Moment(0, steps, dict(zip(shares, served, strict=True)))
    horizon = policy.horizon(StepView(0, sequences, [], [], 8, 8, moment))
    assert ranks(min(horizon, 10_000) - 1) == ranks(0)


@PREEMPTION
@given(count=st.integers(0, 6), other=st.booleans())
def test_the_victim_is_one_of_the_candidates(policy: Any, count: int, other: bool):
    candidates = [running(n, 1, done=3 * n) for n in range(1, count + 1)]
    needy = None if other else running(0, 1)
    before = seen(candidates)
    victim = policy.victim(needy, candidates)
    assert victim is policy.victim(needy, candidates) and before == seen(candidates)
    assert victim is None if not candidates else victim in candidates
    assert numbers(candidates) == list(range(1, count + 1))
    fates = [policy.fate(s) for s in candidates]
    assert fates == [policy.fate(s) for s in candidates] and before == seen(candidates)
    assert policy.swapping is not None or Fate.SWAP not in fates
    assert policy.horizon(StepView(0, candidates, [], [], 8, 8)) >= 1
