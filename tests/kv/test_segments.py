import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.kv.segments import Segments

TOTAL = 24


def segments_of(blocks: set[int]) -> Segments:
    segments = Segments()
    for block in sorted(blocks, key=lambda b: (b % 3, b)):
        segments.add(block, 1)
    return segments


def blocks_of(runs: list[tuple[int, int]]) -> list[int]:
    return [block for first, count in runs for block in range(first, first + count)]


SETS = st.sets(st.integers(0, TOTAL - 1))


@given(blocks=SETS)
def test_segments_never_touch_and_hold_the_set(blocks: set[int]):
    segments = segments_of(blocks)
    runs = segments.runs()
    assert blocks_of(runs) == sorted(blocks) and segments.total == len(blocks)
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(runs))


@given(
    blocks=SETS, script=st.lists(st.tuples(st.integers(0, 2), st.integers(0, TOTAL), st.integers(-1, TOTAL)))
)
def test_whatever_is_done_the_set_is_what_a_set_would_be(
    blocks: set[int], script: list[tuple[int, int, int]]
):
    segments, model, out = segments_of(blocks), set(blocks), set(range(TOTAL)) - blocks
    for verb, count, near in script:
        match verb:
            case 0:
                taken = blocks_of(segments.take(min(count, len(model)), near))
                assert len(taken) == len(set(taken)) == min(count, len(model)) and model.issuperset(taken)
                model -= set(taken)
                out |= set(taken)
            case 1:
                run = [b for b in range(near, near + max(count, 1)) if b in out]
                for block in run:
                    segments.add(block, 1)
                model |= set(run)
                out -= set(run)
            case _:
                end = near
                while end in model and end - near < count:
                    end += 1
                if end > near:
                    segments.remove(near, end - near)
                    model -= set(range(near, end))
                    out |= set(range(near, end))
        assert blocks_of(segments.runs()) == sorted(model) and segments.total == len(model)
    assert blocks_of(segments.take_all()) == sorted(model)
    assert segments.total == 0 and segments.runs() == []


@given(blocks=SETS, count=st.integers(1, TOTAL))
def test_the_smallest_segment_that_fits_is_taken_lowest_first(blocks: set[int], count: int):
    segments = segments_of(blocks)
    fitting = [(size, first) for first, size in segments.runs() if size >= count]
    if fitting:
        assert segments.take(count) == [(min(fitting)[1], count)]


@given(blocks=SETS, count=st.integers(0, TOTAL))
def test_it_is_taken_in_as_few_runs_as_may_be(blocks: set[int], count: int):
    segments = segments_of(blocks)
    count = min(count, len(blocks))
    sizes = sorted((size for _, size in segments.runs()), reverse=True)
    fewest = next((n for n in range(len(sizes) + 1) if sum(sizes[:n]) >= count), 0)
    assert len(segments.take(count)) == fewest


def test_a_table_goes_on_where_it_ends_if_it_can():
    segments = Segments()
    segments.add(0, 2)
    segments.add(5, 6)
    assert segments.take(3, near=5) == [(5, 3)]
    assert segments.take(5, near=8) == [(8, 3), (0, 2)]
    assert segments.total == 0


def test_near_inside_a_segment_is_no_continuation():
    segments = Segments()
    segments.add(0, 8)
    assert segments.take(2, near=4) == [(0, 2)]


@pytest.mark.parametrize(("first", "count"), [(4, 1), (3, 2), (6, 3), (2, 8), (5, 1)])
def test_a_double_free_is_seen(first: int, count: int):
    segments = Segments()
    segments.add(4, 3)
    with pytest.raises(AssertionError, match="free twice"):
        segments.add(first, count)


@pytest.mark.parametrize(("first", "count"), [(3, 1), (4, 4), (7, 1), (0, 1)])
def test_what_is_not_in_cannot_be_removed(first: int, count: int):
    segments = Segments()
    segments.add(4, 3)
    with pytest.raises(AssertionError, match="in the set"):
        segments.remove(first, count)


def test_more_than_there_is_cannot_be_taken():
    segments = Segments()
    segments.add(0, 2)
    with pytest.raises(AssertionError):
        segments.take(3)
