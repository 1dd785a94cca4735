from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.compute.memory.pages import Unmappable
from headrace.compute.memory.ranges import Ranges
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout, TableRun, table_runs
from tests.compute.harness import key

PAGE = 64
FULL = KVGroup(GroupKind.FULL, (0,), kv_heads=1, head_dim=1)
WINDOW = KVGroup(GroupKind.WINDOW, (1, 2), kv_heads=1, head_dim=1, window=20)
SPEC = KVSpec((FULL, WINDOW), 16, "bfloat16", Layout.TOKEN_MAJOR)
LENGTH = 16 * 8
OFFSETS = (0, 100 * PAGE)


@dataclass
class FakePages:
    """Says which byte of the pool each page of its ranges shows."""

    pieces_max: int = 10_000
    page_bytes: int = PAGE
    reserved: int = 1 << 20
    shown: dict[int, int] = field(default_factory=dict)
    calls: int = 0

    def reserve(self, nbytes: int) -> int:
        address, self.reserved = self.reserved, self.reserved + nbytes
        return address

    def show(self, address: int, offset: int, nbytes: int) -> None:
        assert not address % PAGE and not offset % PAGE and nbytes and not nbytes % PAGE
        self.calls += 1
        for at in range(0, nbytes, PAGE):
            self.shown[address + at] = offset + at

    def hide(self, address: int, nbytes: int) -> None:
        for at in range(0, nbytes, PAGE):
            self.shown.pop(address + at, None)

    def bytes_at(self, address: int, nbytes: int) -> Tensor:
        return torch.empty(0)

    def resident_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


def reserve(pages: FakePages, count: int = 4) -> Ranges:
    return Ranges.reserve(pages, SPEC, OFFSETS, LENGTH, count)


def told(table: list[int], at: int = 0) -> list[TableRun]:
    """The same blocks in both groups."""
    return [run for group in range(2) for run in table_runs(group, at, table)]


def fill(ranges: Ranges, number: int, until: int = 8) -> None:
    for group in range(2):
        ranges.fill(key(number), group, until)


def seen(ranges: Ranges, pages: FakePages, number: int, group: int = 0) -> list[int]:
    """The block that each place of a sequence's range shows, as its pages say; -1: none."""
    g, index = ranges.groups[group], ranges.held[key(number)].range
    found = []
    for at in range(LENGTH // 16):
        first = pages.shown.get(g.place(index, at))
        block = -1 if first is None else (first - g.offset) // g.block_bytes
        for nbyte in range(0, g.block_bytes, PAGE):
            shown = pages.shown.get(g.place(index, at) + nbyte)
            assert shown == (None if first is None else g.offset + block * g.block_bytes + nbyte)
        found.append(block)
    return found


def test_blocks_are_seen_in_the_order_of_the_table():
    pages = FakePages()
    ranges = reserve(pages)
    ranges.claim(key(1), told([7, 8, 2]))
    assert seen(ranges, pages, 1) == [-1] * 8
    fill(ranges, 1, until=1)
    assert seen(ranges, pages, 1)[:3] == [7, -1, -1] and not ranges.full(key(1))
    ranges.extend(key(1), told([9], at=3))
    fill(ranges, 1)
    assert [seen(ranges, pages, 1, g)[:5] for g in range(2)] == [[7, 8, 2, 9, -1]] * 2
    assert ranges.full(key(1)) and pages.calls == ranges.tally.calls == 2 * 4
    assert ranges.mapped_bytes == ranges.held_bytes == 4 * sum(SPEC.block_bytes(g) for g in range(2))


def test_a_shared_prefix_is_seen_from_both_ranges():
    pages = FakePages()
    ranges = reserve(pages)
    ranges.claim(key(1), told([3, 4, 5]))
    ranges.claim(key(2), told([3, 4, 6]))
    fill(ranges, 1)
    fill(ranges, 2)
    assert (seen(ranges, pages, 1)[:3], seen(ranges, pages, 2)[:3]) == ([3, 4, 5], [3, 4, 6])
    assert ranges.held[key(1)].range != ranges.held[key(2)].range


def test_what_a_past_sequence_left_mapped_is_reused_only_where_it_is_the_same_block():
    pages = FakePages()
    ranges = reserve(pages, count=2)
    ranges.claim(key(1), told([1, 2, 3, 4]))
    fill(ranges, 1)
    ranges.release(key(1))
    calls = pages.calls
    ranges.claim(key(2), told([1, 2, 8]))
    assert ranges.tally.in_place == 4 and ranges.held[key(2)].filled == [2, 2]
    fill(ranges, 2)
    assert pages.calls == calls + 2
    assert seen(ranges, pages, 2)[:4] == [1, 2, 8, 4], "block 4 is beyond its table"
    ranges.extend(key(2), told([5], at=3))
    fill(ranges, 2)
    assert seen(ranges, pages, 2)[:4] == [1, 2, 8, 5]


def test_the_best_fit():
    """Most blocks in place; then the fewest others; then idle for longest."""
    pages = FakePages()
    ranges = reserve(pages, count=4)
    tables = {1: [1, 2, 3, 4, 5], 2: [1, 2, 9], 3: [6], 4: [7]}
    place = {}
    for number, table in tables.items():
        ranges.claim(key(number), told(table))
        fill(ranges, number)
        place[number] = ranges.held[key(number)].range
    for number in (4, 1, 2, 3):
        ranges.release(key(number))
    wanted = {11: ([1, 2, 3], 1), 12: ([1, 2, 3], 2), 13: ([8, 8, 8], 4), 14: ([7], 3)}
    for number, (table, expected) in wanted.items():
        ranges.claim(key(number), told(table))
        assert ranges.held[key(number)].range == place[expected], number
    with pytest.raises(Unmappable, match="all 4 virtual KV ranges"):
        ranges.claim(key(15), told([1]))


def test_a_window_begins_where_its_table_does():
    pages = FakePages()
    ranges = reserve(pages)
    ranges.claim(key(1), [*table_runs(0, 0, [1, 2, 3, 4]), *table_runs(1, 2, [5, 6])])
    fill(ranges, 1)
    assert seen(ranges, pages, 1, 1)[:5] == [-1, -1, 5, 6, -1]
    ranges.claim(key(2), table_runs(0, 0, [1]))
    ranges.extend(key(2), table_runs(1, 3, [7]))
    fill(ranges, 2)
    assert seen(ranges, pages, 2, 1)[2:5] == [-1, 7, -1]


@pytest.mark.parametrize("wrong", [[TableRun(0, 3, 5, 1)], [TableRun(0, 1, 5, 1)], [TableRun(0, 2, 5, 7)]])
def test_a_table_with_a_hole_or_too_long_is_refused(wrong: list[TableRun]):
    ranges = reserve(FakePages())
    ranges.claim(key(1), told([1, 2]))
    with pytest.raises(ValueError, match=r"does not follow the 2|outside a range of 8"):
        ranges.extend(key(1), wrong)


def test_idle_ranges_are_trimmed_from_the_end_the_longest_idle_first():
    pages = FakePages()
    ranges = reserve(pages)
    for number, table in {1: [1, 2], 2: [3]}.items():
        ranges.claim(key(number), told(table))
        fill(ranges, number)
    assert not ranges.stale and not ranges.trim()
    ranges.release(key(2))
    ranges.release(key(1))
    left = []
    while ranges.trim():
        left.append(len(pages.shown))
    assert left == sorted(left, reverse=True) and len(left) == 6 and not pages.shown
    assert ranges.mapped_bytes == ranges.pieces == 0 and not ranges.stale


def test_idle_ranges_make_room_and_the_rest_is_refused():
    pages = FakePages(pieces_max=2 * 8)
    ranges = reserve(pages)
    scattered = [1, 3, 5]
    ranges.claim(key(1), told(scattered))
    fill(ranges, 1)
    ranges.release(key(1))
    ranges.claim(key(2), told([20, 22, 24, 26]))
    fill(ranges, 2)
    ranges.claim(key(3), told([40, 42, 44, 46, 48]))
    with pytest.raises(Unmappable, match="max_map_count"):
        fill(ranges, 3)
    assert seen(ranges, pages, 2)[:4] == [20, 22, 24, 26], "nobody else was harmed"
    ranges.release(key(2))
    fill(ranges, 3)
    assert seen(ranges, pages, 3)[:5] == [40, 42, 44, 46, 48]


def test_blocks_must_be_whole_pages_and_one_sequence_must_fit():
    with pytest.raises(ValueError, match="multiples of 1024 tokens"):
        Ranges.reserve(FakePages(page_bytes=4096), SPEC, (0, 4096), LENGTH, 1)
    with pytest.raises(ValueError, match="from byte 32 on"):
        Ranges.reserve(FakePages(), SPEC, (0, 32), LENGTH, 1)
    with pytest.raises(Unmappable, match="may take 16 mappings, but there are 15"):
        reserve(FakePages(pieces_max=15))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_table_is_seen_whatever_happens(data: st.DataObject):
    pages = FakePages(pieces_max=60)
    ranges = reserve(pages, count=5)
    tables: dict[int, list[int]] = {}
    block = st.integers(0, 12)
    for number in range(data.draw(st.integers(1, 25))):
        act = data.draw(st.sampled_from(["claim", "extend", "fill", "release", "trim"]))
        some = data.draw(st.sampled_from(sorted(tables))) if tables else None
        if act == "claim" and len(tables) < 5:
            tables[number] = data.draw(st.lists(block, max_size=5))
            ranges.claim(key(number), told(tables[number]))
        elif act == "extend" and some is not None and len(tables[some]) < 8:
            more = data.draw(st.lists(block, min_size=1, max_size=8 - len(tables[some])))
            ranges.extend(key(some), told(more, at=len(tables[some])))
            tables[some] = tables[some] + more
        elif act == "fill" and some is not None:
            until = data.draw(st.integers(1, 8))
            try:
                fill(ranges, some, until)
            except Unmappable:
                continue
            for group in range(2):
                assert (
                    seen(ranges, pages, some, group)[: min(until, len(tables[some]))] == tables[some][:until]
                )
        elif act == "release" and some is not None:
            ranges.release(key(some))
            del tables[some]
        elif act == "trim":
            ranges.trim()
        check(ranges, pages, tables)


def check(ranges: Ranges, pages: FakePages, tables: dict[int, list[int]]) -> None:
    """Counts are right, and what counts as in place is."""
    assert ranges.mapped_bytes == len(pages.shown) * PAGE
    for number, table in tables.items():
        for group in range(2):
            filled = ranges.held[key(number)].filled[group]
            assert seen(ranges, pages, number, group)[:filled] == table[:filled]
    pieces = 0
    for g in ranges.groups:
        for index in range(len(ranges.shown_bytes)):
            row = g.shown[index].tolist()
            pieces += len(table_runs(0, 0, row))
    assert ranges.pieces == pieces <= pages.pieces_max
