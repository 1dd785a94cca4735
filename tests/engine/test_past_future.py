"""Past-Future admission: the closed form of the peak, the sampling, and what follows from them."""

from collections import deque
from collections.abc import Sequence as Row

import numpy as np
import pytest

from headrace import registry
from headrace.engine.admission.past_future import length_of_new, lengths_given, peak_tokens
from headrace.engine.policies import FINISHED_MAX, AdmissionView
from headrace.engine.sequence import Sequence, Status
from headrace.types.draws import bits, uniform
from headrace.types.errors import ConfigError
from headrace.types.messages import Role
from tests.engine.build import SIZE, sequence_of
from tests.engine.test_conservative import blocks, running

POOL = 1000


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def view_of(
    others: list[Sequence], candidate: Sequence, finished: Row[int], total: int = POOL, steps: int = 7
) -> AdmissionView:
    held = sum(len(s.tables[0]) for s in others)
    need = blocks(candidate.total)
    return AdmissionView(others, [total - held], (total,), [need], SIZE, [], finished, steps)


def admits(others: list[Sequence], candidate: Sequence, finished: Row[int], **settings: int) -> bool:
    policy = registry.load("engine.admission", "past_future", {"reserve": 0})
    return policy.admit(view_of(others, candidate, finished, **settings), candidate)


def most_at_any_step(current: np.ndarray, remaining: np.ndarray) -> int:
    """Step by step: each gains one token a step and goes once its last is there."""
    steps = range(int(remaining.max()) + 1)
    return max(int((current + step)[remaining >= step].sum()) for step in steps)


def test_the_peak_is_that_of_going_step_by_step():
    for case in range(3000):
        n = 1 + bits(1, "peak", case) % 8
        # Few distinct values, so that many go at the same step.
        current = ints(*(bits(2, "peak", case, i) % 20 for i in range(n)))
        remaining = ints(*(bits(3, "peak", case, i) % (3 + case % 30) for i in range(n)))
        assert peak_tokens(current, remaining) == most_at_any_step(current, remaining), (current, remaining)
    assert peak_tokens(ints(), ints()) == 0


def test_an_output_is_drawn_between_the_lengths_that_are_longer():
    """By hand: lengths 10 and 30 exceed 5; the line runs 5, 10, 30, 100."""
    history, at = ints(2, 5, 10, 30), [0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6]
    drawn = [int(lengths_given(history, 0, ints(5), ints(100), np.array([u]))[0]) for u in at]
    assert drawn == [5, 8, 10, 20, 30, 65]


def test_a_limit_cuts_the_history_and_copies_of_it_stand_in():
    history, ends = ints(10, 200, 300), np.array([0.999999])
    assert lengths_given(history, 0, ints(5), ints(100), ends)[0] == 100
    # 5, 10, 100, 100 and one copy: three quarters of the line lie beyond 10.
    assert lengths_given(history, 1, ints(5), ints(100), np.array([0.25]))[0] == 10
    assert lengths_given(history, 1, ints(5), ints(100), np.array([0.5]))[0] == 100
    assert lengths_given(ints(), 0, ints(20), ints(100), np.array([0.5]))[0] == 60
    assert lengths_given(ints(), 7, ints(20), ints(100), np.array([0.9]))[0] == 100


def test_no_draw_is_below_what_is_generated_or_above_the_limit():
    for case in range(300):
        history = np.sort(ints(*(bits(1, "draw", case, i) % 60 for i in range(case % 12))))
        decoded = ints(*(bits(2, "draw", case, i) % 40 for i in range(5)))
        limit = decoded + ints(*(bits(3, "draw", case, i) % 40 for i in range(5)))
        u = np.array([uniform(4, "draw", case, i) for i in range(5)])
        drawn = lengths_given(history, case % 3, decoded, limit, u)
        assert (decoded <= drawn).all() and (drawn <= limit).all()


def test_what_has_not_begun_is_drawn_from_all_lengths_alike():
    history = ints(3, 9, 9, 40)
    drawn = [length_of_new(history, 4, 20, i / 8) for i in range(8)]
    assert drawn == [3, 9, 9, 20, 20, 20, 20, 20]
    assert length_of_new(ints(), 0, 20, 0.5) == 20


def test_draws_follow_the_distribution_given_what_is_generated():
    """Half ended at 100, half at 900: from token 100 on all are long."""
    history = np.sort(ints(*([100] * 500 + [900] * 500)))
    u = np.array([uniform(1, "spread", i) for i in range(4000)])
    many = np.zeros(4000, dtype=np.int64)
    fresh = lengths_given(history, 0, many + 1, many + 1000, u)
    assert abs((fresh <= 100).mean() - 0.5) < 0.03 and abs((fresh >= 900).mean() - 0.5) < 0.03
    assert (lengths_given(history, 0, many + 100, many + 1000, u) >= 890).mean() > 0.99


def test_short_histories_admit_what_a_cautious_rule_refuses():
    others = [running(n, 40, 800, 1) for n in range(20)]
    candidate = sequence_of(99, 40, emits_max=800)
    short, long = [40] * FINISHED_MAX, [790] * FINISHED_MAX
    conservative = registry.load("engine.admission", "conservative")
    assert admits(others, candidate, short) and not admits(others, candidate, long)
    assert not conservative.admit(view_of(others, candidate, short), candidate)


def test_who_goes_soon_makes_room_for_who_comes():
    """Two hold most of the pool: that they end in three tokens, or only later, decides."""
    candidate = sequence_of(99, 40, emits_max=900)
    ending = [running(n, 1000, 900, 297) for n in range(2)]
    lasting = [running(n, 1000, 900, 2) for n in range(2)]
    finished = [300] * FINISHED_MAX
    assert admits(ending, candidate, finished, total=700)
    assert not admits(lasting, candidate, finished, total=700)


def test_a_cold_start_takes_the_limit_for_half_of_its_window():
    others = [running(n, 40, 800, 1) for n in range(20)]
    candidate = sequence_of(99, 40, emits_max=800)
    few = deque([40] * 10)
    assert not admits(others, candidate, few)
    warm = registry.load("engine.admission", "past_future", {"window": 10, "reserve": 0})
    assert warm.admit(view_of(others, candidate, few), candidate)
    drifted = deque([790] * 990 + [40] * 10, maxlen=FINISHED_MAX)
    assert not admits(others, candidate, drifted)
    assert warm.admit(view_of(others, candidate, drifted), candidate), "only the newest count"


def test_the_reserve_stays_free():
    other, candidate = running(1, 39, 1), sequence_of(9, 40, emits_max=1)
    other.history = 1
    other.emits_max = 0
    need = blocks(40) + blocks(41)
    tight = registry.load("engine.admission", "past_future", {"reserve": 0})
    loose = registry.load("engine.admission", "past_future", {"reserve": 0.2})
    view = view_of([other], candidate, [1] * 9, total=need + 2)
    assert tight.admit(view, candidate) and not loose.admit(view, candidate)


def test_a_prefilled_sequence_is_not_expected_to_go():
    """It keeps its blocks until somebody fetches them."""
    candidate = sequence_of(9, 40, emits_max=1, role=Role.PREFILL)
    others = [running(n, 40, 800, role=Role.PREFILL) for n in range(4)]
    assert not admits(others, candidate, [40] * 9, total=50)
    assert admits(others, candidate, [40] * 9, total=51)


def test_what_another_holder_has_is_not_room():
    other, candidate = running(1, 40, 100, 1), sequence_of(9, 40, emits_max=100)
    policy = registry.load("engine.admission", "past_future")
    view = view_of([other], candidate, [100] * FINISHED_MAX)
    assert policy.admit(view, candidate)
    view.blocks_free = [blocks(40) + 5]
    assert not policy.admit(view, candidate)


def test_each_step_draws_anew_and_the_same_step_the_same():
    others = [running(n, 40, 800, 1) for n in range(20)]
    candidate = sequence_of(99, 40, emits_max=800)
    spread = [int(800 * i / FINISHED_MAX) + 1 for i in range(FINISHED_MAX)]
    first = [admits(others, candidate, spread, total=1700, steps=n) for n in range(60)]
    again = [admits(others, candidate, spread, total=1700, steps=n) for n in reversed(range(60))]
    assert first == again[::-1] and set(first) == {True, False}


def test_a_handover_within_the_pool_takes_its_blocks_along():
    coming, candidate = running(1, 80, 1), sequence_of(9, 4, emits_max=1)
    coming.status, coming.tables = Status.RECEIVING, [[]]
    policy = registry.load("engine.admission", "past_future", {"reserve": 0})
    view = view_of([], candidate, [1] * FINISHED_MAX)
    view.receiving, view.blocks_free = [coming], [3]
    assert policy.admit(view, candidate)


@pytest.mark.parametrize(("setting", "value"), [("window", 0), ("window", 1001), ("reserve", 1.0)])
def test_settings_have_bounds(setting: str, value: float):
    with pytest.raises(ConfigError, match=setting):
        registry.load("engine.admission", "past_future", {setting: value})
