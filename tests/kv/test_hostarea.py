"""Host memory: runs with room behind them, reuse of what is valid, and who loses blocks to whom."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.kv.hostarea import HostArea
from headrace.types.ids import RequestId, SequenceKey


def key(n: int) -> SequenceKey:
    return SequenceKey(RequestId(n))


def blocks(area: HostArea, n: int, group: int = 0) -> list[int]:
    return area.copies[key(n)][group].blocks


def test_a_copy_grows_into_the_room_behind_it():
    area = HostArea((64,), 8)
    assert area.hold(key(1), [(0, 3)], []) and area.hold(key(2), [(0, 3)], [])
    assert (blocks(area, 1), blocks(area, 2)) == ([0, 1, 2], [8, 9, 10])
    assert area.hold(key(1), [(0, 7)], [])
    assert blocks(area, 1) == list(range(7)), "one run still"
    area.audit()


def test_without_groups_nothing_is_kept_behind():
    area = HostArea((64,), 0)
    assert area.hold(key(1), [(0, 3)], []) and area.hold(key(2), [(0, 3)], [])
    assert area.hold(key(1), [(0, 5)], [])
    assert blocks(area, 1) == [0, 1, 2, 6, 7]


def test_room_is_taken_before_copies_and_those_from_their_end():
    area = HostArea((16,), 8)
    area.hold(key(1), [(0, 3)], [])
    area.hold(key(2), [(0, 8)], [])
    area.commit(key(1), 3), area.commit(key(2), 8)
    assert area.hold(key(3), [(0, 5)], [key(2)])
    assert blocks(area, 3) == [3, 4, 5, 6, 7] and area.contaminated == 0, "the room of 1"
    assert area.hold(key(4), [(0, 3)], [key(2)])
    assert blocks(area, 4) == [13, 14, 15] and area.contaminated == 3
    assert [area.valid(key(n)) for n in (1, 2)] == [3, 5]
    assert not area.hold(key(5), [(0, 3)], []), "nobody gives"
    area.audit()


def test_valid_shrinks_and_only_a_new_copy_makes_it_grow():
    area = HostArea((8,), 0)
    area.hold(key(1), [(0, 6)], [])
    assert area.valid(key(1)) == 0, "held is not copied"
    area.commit(key(1), 5)
    area.hold(key(2), [(0, 4)], [key(1)])
    assert area.valid(key(1)) == 4
    area.drop(key(2))
    assert area.hold(key(1), [(0, 6)], []) and area.valid(key(1)) == 4
    area.commit(key(1), 6)
    assert area.valid(key(1)) == 6


def test_what_a_window_has_passed_is_given_back():
    area = HostArea((16, 16), 4)
    area.hold(key(1), [(0, 4), (0, 4)], [])
    area.commit(key(1), 4)
    assert area.hold(key(1), [(0, 6), (3, 6)], [])
    copy = area.copies[key(1)][1]
    assert (copy.at, copy.end, copy.valid) == (3, 6, 4)
    assert area.valid(key(1)) == 0, "no prefix can be had without what the window has passed"
    assert area.hold(key(1), [(0, 9), (8, 9)], []) and (copy.at, copy.valid) == (8, 8)
    area.audit()


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 12), st.integers(0, 12), st.booleans()), max_size=40
    ),
    unit=st.sampled_from((0, 1, 3, 60)),
)
def test_every_block_has_one_owner_whatever_happens(steps: list[tuple[int, int, int, bool]], unit: int):
    area = HostArea((20, 12), unit)
    for n, first, count, drops in steps:
        if drops:
            area.drop(key(n))
        else:
            donors = [other for other in area.copies if other.request % 2]
            spans = [(0, first + count), (first, first + count)]
            if area.hold(key(n), spans, donors):
                assert [c.end for c in area.copies[key(n)]] == [first + count] * 2
                area.commit(key(n), first + count)
        area.audit()
