import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.transfer.runs import WEIGHT_MAX, expected_weight, merge

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(pairs=PAIRS, layers=st.sampled_from([1, 2, 30_000, WEIGHT_MAX]))
def test_moves_cover_exactly_what_is_asked_in_the_fewest_writes(pairs: list[tuple[int, int]], layers: int):
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    moves = merge(sources, targets, layers)
    assert [(m.source + i, m.target + i) for m in moves for i in range(m.count)] == pairs
    assert all(0 < m.count * layers <= WEIGHT_MAX for m in moves)
    assert len(moves) == fewest(pairs, WEIGHT_MAX // layers)


def fewest(pairs: list[tuple[int, int]], count_max: int) -> int:
    """By trying all: the fewest pieces, each contiguous on both sides and not longer than `count_max`."""
    best = [0] + [len(pairs)] * len(pairs)
    for end in range(1, len(pairs) + 1):
        for start in range(max(0, end - count_max), end):
            s, t = pairs[start]
            if pairs[start:end] == [(s + i, t + i) for i in range(end - start)]:
                best[end] = min(best[end], best[start] + 1)
    return best[-1]


def test_a_long_run_is_split_where_its_weight_would_not_fit():
    blocks = list(range(5000))
    moves = merge(blocks, blocks, 32)
    assert [m.count for m in moves] == [2047, 2047, 906]
    assert sum(m.count * 32 for m in moves) + 1 == expected_weight([5000], [32])


def test_both_sides_have_as_many_blocks():
    with pytest.raises(AssertionError):
        merge([1], [1, 2], 1)
    assert merge([], [], 4) == []


def test_the_target_counts_block_layers_and_the_tail():
    assert expected_weight([3, 2], [4, 1]) == 3 * 4 + 2 + 1
    assert expected_weight([0], [4]) == 1
