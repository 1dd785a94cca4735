"""Transformations: nothing is lost that was not meant to be, and turns stay turns."""

import numpy as np
import pytest

from headrace.types.errors import ConfigError
from headrace.types.request import Slo
from headrace.types.trace import Trace, make_trace
from headrace.workload import transform
from headrace.workload.generators import generate

S = 1_000_000_000


def small() -> Trace:
    """Two conversations of two turns, one request alone; blocks of 4."""
    chains = [[1, 2], [5], [1, 2, 3, 4], [9], [5, 6, 7]]
    return make_trace(
        "small",
        np.array([0, 1, 2, 3, 10]) * S,
        np.array([9, 5, 17, 4, 14]),
        np.array([4, 4, 2, 1, 3]),
        block_size=4,
        hash_ids=np.concatenate(chains),
        hash_starts=np.cumsum([0, *map(len, chains)]),
        follows=np.array([-1, -1, 0, -1, 1]),
        session=np.array([0, 1, 0, -1, 1]),
        category=np.array([0, 1, 0, 1, 1]),
        categories=("a", "b"),
    )


def same_requests(first: Trace, second: Trace, but: tuple[str, ...] = ()) -> None:
    for name in (*transform.ROW_COLUMNS, "hash_ids", "hash_starts", "follows"):
        if name not in but:
            assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_take_moves_whole_rows():
    part = transform.take(small(), [2, 0, 4])
    assert part.prompt.tolist() == [17, 9, 14]
    assert [part.hashes(i).tolist() for i in range(3)] == [[1, 2, 3, 4], [1, 2], [5, 6, 7]]
    assert part.follows.tolist() == [-1, -1, -1]  # one stands after its turn now, one is gone
    assert transform.take(small(), [0, 2]).follows.tolist() == [-1, 0]
    assert len(transform.take(small(), [])) == 0


def test_rates():
    trace = small()
    assert transform.faster(trace, 2).arrival_ns.tolist() == [0, S // 2, S, 3 * S // 2, 5 * S]
    same_requests(trace, transform.faster(trace, 4), but=("arrival_ns",))
    scaled = transform.at_rate(trace, 8)
    assert (len(scaled) - 1) * S / scaled.duration_ns == pytest.approx(8)
    assert "at 8 requests/s" in scaled.name
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="number above 0"):
            transform.faster(trace, wrong)
        with pytest.raises(ConfigError, match="number above 0"):
            transform.at_rate(trace, wrong)
    with pytest.raises(ConfigError, match="at one instant"):
        transform.at_rate(transform.take(trace, [0]), 1)


def test_parts():
    part = transform.between(small(), 1 * S, 3 * S)
    assert part.arrival_ns.tolist() == [0, S] and part.prompt.tolist() == [5, 17]
    part = transform.rows_between(small(), 2, 99)
    assert part.arrival_ns.tolist() == [0, S, 8 * S] and part.prompt.tolist() == [17, 4, 14]
    with pytest.raises(ConfigError, match="nothing arrives in 4 s to 9 s"):
        transform.between(small(), 4 * S, 9 * S)
    with pytest.raises(ConfigError, match="has 5 rows, so none in 5 to 9"):
        transform.rows_between(small(), 5, 9)


def test_first_turns():
    assert transform.first_turns(small()).tolist() == [0, 1, 0, 3, 1]
    chain = make_trace("c", np.arange(6), np.ones(6), np.ones(6), follows=np.array([-1, 0, 1, 2, -1, 3]))
    assert transform.first_turns(chain).tolist() == [0, 0, 0, 0, 4, 0]


def test_a_sample_keeps_conversations_whole():
    trace = generate("conversations", {"conversations": 2000}, 1)
    part = transform.sample(trace, 0.3, seed=7)
    kept = np.unique(part.session)
    assert len(kept) / 2000 == pytest.approx(0.3, abs=0.03)
    assert len(part) == np.isin(trace.session, kept).sum()
    assert (part.follows < 0).sum() == len(kept)
    same_requests(part, transform.sample(trace, 0.3, seed=7))
    more = transform.sample(trace, 0.6, seed=7)
    assert np.isin(kept, more.session).all()  # a larger share adds to the smaller one
    same_requests(trace, transform.sample(trace, 1.0, seed=7))
    with pytest.raises(ConfigError, match="a sample of 0"):
        transform.sample(trace, 0.0, seed=7)


def test_merge_goes_by_arrival_and_shares_nothing():
    first, second = small(), transform.with_goal(small(), Slo(ttft_ns=5))
    both = transform.merge([first, second])
    assert both.arrival_ns.tolist() == sorted([*first.arrival_ns, *second.arrival_ns])
    assert both.prompt.tolist()[:4] == [9, 9, 5, 5] and both.categories == ("a", "b")
    assert [both.goals[i] for i in both.goal][:2] == [Slo(), Slo(ttft_ns=5)]
    one, other = (both.hash_ids[np.repeat(both.goal, np.diff(both.hash_starts)) == i] for i in (0, 1))
    assert not np.isin(one, other).any() and len(np.unique(one)) == 8
    assert both.session.tolist() == [0, 2, 1, 3, 0, 2, -1, -1, 1, 3]
    assert both.follows.tolist() == [-1, -1, -1, -1, 0, 1, -1, -1, 2, 3]
    for row in np.flatnonzero(both.follows >= 0).tolist():
        before = both.hashes(int(both.follows[row]))
        assert np.array_equal(both.hashes(row)[: len(before)], before)


def test_merge_needs_one_block_size():
    plain = make_trace("plain", np.array([5]), np.array([3]), np.array([1]))
    assert transform.merge([small(), plain]).block_size == 4
    other = generate("conversations", {"conversations": 2}, 1)
    with pytest.raises(ConfigError, match="these have 4, 32"):
        transform.merge([small(), other])
    with pytest.raises(ConfigError, match="merge needs traces"):
        transform.merge([])


def test_tile_repeats_with_or_without_the_same_blocks():
    again = transform.tile(small(), 12, fresh=False)
    assert len(again) == 12 and again.arrival_ns[5] == 10 * S + 10 * S // 4
    assert np.array_equal(np.diff(again.arrival_ns[5:10]), np.diff(small().arrival_ns))
    assert again.hashes(7).tolist() == [1, 2, 3, 4] and again.follows[7] == 5 and again.session[7] == 2
    fresh = transform.tile(small(), 12, fresh=True)
    assert not np.isin(fresh.hashes(7), fresh.hashes(2)).any()
    assert len(np.unique(fresh.hash_ids[: fresh.hash_starts[10]])) == 2 * 8
    assert np.array_equal(fresh.hashes(7)[:2], fresh.hashes(5))
    assert len(transform.tile(small(), 3, fresh=True)) == 3
    with pytest.raises(ConfigError, match="cannot be tiled to 0"):
        transform.tile(small(), 0, fresh=True)


def test_clip_cuts_chains_and_turns():
    cut = transform.clip(small(), prompt_max=12, output_max=3)
    assert cut.prompt.tolist() == [9, 5, 12, 4, 12] and cut.output.tolist() == [3, 3, 2, 1, 3]
    assert cut.hashes(2).tolist() == [1, 2, 3] and cut.hashes(4).tolist() == [5, 6, 7]
    assert cut.follows.tolist() == [-1] * 5  # the earlier answers were cut
    assert transform.clip(small(), prompt_max=13).follows.tolist() == [-1, -1, 0, -1, 1]
    assert transform.clip(small(), prompt_max=12).follows.tolist() == [-1, -1, -1, -1, 1]
    same_requests(small(), transform.clip(small()))
    with pytest.raises(ConfigError, match="at least 1 token"):
        transform.clip(small(), prompt_max=0)


def test_goals_and_priorities_by_category():
    goal = Slo(tpot_ns=9)
    trace = transform.with_goal(transform.with_priority(small(), 3, "b"), goal, "b")
    assert trace.priority.tolist() == [0, 3, 0, 3, 3]
    assert [trace.goals[i] == goal for i in trace.goal] == [False, True, False, True, True]
    assert transform.with_priority(small(), -1).priority.tolist() == [-1] * 5
    with pytest.raises(ConfigError, match="has no category 'c'"):
        transform.with_goal(small(), goal, "c")
