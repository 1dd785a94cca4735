"""Which range of addresses a sequence has, and which blocks are mapped into it.

vAttention (Prabhu et al., ASPLOS 2025, arXiv:2405.04437, sections 5 and 6): ranges are reserved once, for sequences of full length; pages
are mapped as sequences grow; a finished sequence's pages stay mapped until its range is needed (deferred reclamation), and a new sequence
takes the range that fits best.

One thing is otherwise. There, pages belong to ranges, and any mapped page serves any sequence. Here pages are the blocks of a pool, whose
core says which blocks a sequence has, shared prefixes among them. So a page that is mapped already serves a new sequence only if it is the
very block that its table names at that place: else it is mapped anew. Beyond its table a range may still show a past sequence's blocks,
which nothing reads.

Life of a range:
1. idle, and showing nothing.
2. `claim`: a sequence takes the idle range that shows the most of its blocks where they are needed; of these the one that shows the fewest
   others; of these the one that has been idle for longest.
3. `extend` enters blocks into its table; `fill` maps what is not in place.
4. `release`: idle again, and still showing what it did, until `claim`, `trim` or want of mappings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic_ns

import numpy as np
from numpy.typing import NDArray

from headrace.compute.memory.pages import Pages, Unmappable
from headrace.types.ids import SequenceKey
from headrace.types.kv import KVSpec, TableRun

Table = NDArray[np.int32]


@dataclass(slots=True)
class Held:
    """One sequence's range. Lists are per group."""

    range: int
    known: list[int]
    """Leading entries of its table that are known, absent ones included."""
    first: list[int]
    """Where its table begins: what is before that is absent."""
    filled: list[int]
    """Leading entries whose block is in place."""


@dataclass(slots=True)
class Tally:
    """See `types.ranges.RangeCounts`."""

    mapped: int = 0
    in_place: int = 0
    unmapped: int = 0
    calls: int = 0
    map_ns: int = 0


@dataclass(slots=True)
class GroupRanges:
    """The ranges of one KV group, one after the other."""

    address: int
    offset: int
    """Of the group's block 0 in the pool."""
    block_bytes: int
    shown: Table
    """[ranges, blocks of a range]: the block that is mapped there; -1: none."""
    wanted: Table
    """[ranges, blocks of a range]: the table of the range's sequence."""

    def place(self, index: int, at: int) -> int:
        """Address of logical block `at` of a range."""
        return self.address + (index * self.shown.shape[1] + at) * self.block_bytes


@dataclass(slots=True)
class Ranges:
    """All ranges of a worker. Not thread-safe."""

    pages: Pages
    groups: list[GroupRanges]
    shown_bytes: NDArray[np.int64]
    """Of each range."""
    held: dict[SequenceKey, Held] = field(default_factory=dict)
    idle: dict[int, None] = field(default_factory=dict)
    """The longest idle first."""
    tally: Tally = field(default_factory=Tally)
    pieces: int = 0
    """Mapped pieces of successive blocks, of all ranges."""

    @classmethod
    def reserve(cls, pages: Pages, spec: KVSpec, offsets: Sequence[int], length: int, count: int) -> "Ranges":
        """So many ranges for sequences of at most `length` tokens. `offsets`: of each group's first block in the pool, bytes.

        Raises ValueError if blocks or offsets are not whole pages, Unmappable if the addresses are not to be had.
        """
        blocks = spec.blocks_for(length)
        for g, offset in enumerate(offsets):
            if spec.block_bytes(g) % pages.page_bytes or offset % pages.page_bytes:
                raise ValueError(
                    f"group {g}: blocks of {spec.block_bytes(g)} bytes from byte {offset} on are not whole pages of "
                    f"{pages.page_bytes} bytes; block sizes must be multiples of {spec.block_size_step(pages.page_bytes)} tokens"
                )
        if blocks * len(offsets) > pages.pieces_max:
            raise Unmappable(
                f"a sequence of {length} tokens may take {blocks * len(offsets)} mappings, but there are "
                f"{pages.pieces_max} (see vm.max_map_count): use a larger --block-size"
            )
        groups = [
            GroupRanges(
                address=pages.reserve(count * blocks * spec.block_bytes(g)),
                offset=offset,
                block_bytes=spec.block_bytes(g),
                shown=np.full((count, blocks), -1, dtype=np.int32),
                wanted=np.full((count, blocks), -1, dtype=np.int32),
            )
            for g, offset in enumerate(offsets)
        ]
        shown_bytes = np.zeros(count, dtype=np.int64)
        return cls(pages, groups, shown_bytes, idle=dict.fromkeys(range(count)))

    def claim(self, key: SequenceKey, runs: Iterable[TableRun]) -> None:
        """Give a sequence a range for the table that it begins with. Raises Unmappable if none is idle."""
        runs = list(runs)
        if not self.idle:
            raise Unmappable(f"all {len(self.shown_bytes)} virtual KV ranges are in use")
        index = self._best(runs)
        del self.idle[index]
        for group in self.groups:
            group.wanted[index] = -1
        count = len(self.groups)
        held = self.held[key] = Held(index, [0] * count, [-1] * count, [0] * count)
        self._enter(held, runs)
        for g, group in enumerate(self.groups):
            begin, end = held.filled[g], held.known[g]
            there = group.wanted[index, begin:end] == group.shown[index, begin:end]
            self.tally.in_place += int(there.sum())
            held.filled[g] = end if there.all() else begin + int(there.argmin())

    def extend(self, key: SequenceKey, runs: Iterable[TableRun]) -> None:
        """Enter further blocks into a sequence's table. Raises ValueError for one that is not the next."""
        self._enter(self.held[key], runs)

    def fill(self, key: SequenceKey, group: int, until: int, most: int | None = None) -> bool:
        """Map the blocks before logical block `until` (or the end of the table) that are not in place, `most` at most.

        True if there was something to map. Raises Unmappable.
        """
        held, g = self.held[key], self.groups[group]
        begin, end = held.filled[group], min(until, held.known[group])
        if most is not None:
            end = min(end, begin + most)
        if begin >= end:
            return False
        wanted = g.wanted[held.range, begin:end]
        lacking = np.flatnonzero(wanted != g.shown[held.range, begin:end])
        for at, first, count in pieces(lacking, wanted):
            self._show(held.range, g, begin + at, first, count)
        held.filled[group] = end
        return bool(lacking.size)

    def full(self, key: SequenceKey) -> bool:
        """Is all of the sequence's table in place?"""
        held = self.held[key]
        return held.filled == held.known

    def release(self, key: SequenceKey) -> None:
        """The sequence is over; what its range shows stays. Unknown ones are ignored."""
        if held := self.held.pop(key, None):
            self.idle[held.range] = None

    def trim(self) -> bool:
        """Unmap the last block of the range that has been idle for longest. False if no idle range shows any."""
        for index in self.idle:
            if self.shown_bytes[index]:
                shown = [(np.flatnonzero(group.shown[index] >= 0), group) for group in self.groups]
                at, group = next((at, group) for at, group in reversed(shown) if at.size)
                self._hide(index, group, int(at[-1]), 1)
                return True
        return False

    @property
    def mapped_bytes(self) -> int:
        """Of all ranges."""
        return int(self.shown_bytes.sum())

    @property
    def stale(self) -> bool:
        """Does any idle range show anything?"""
        return bool(self.shown_bytes[list(self.idle)].any())

    @property
    def held_bytes(self) -> int:
        """Of the blocks in present tables."""
        return sum(
            (held.known[g] - max(0, held.first[g])) * group.block_bytes
            for held in list(self.held.values())
            for g, group in enumerate(self.groups)
        )

    def _enter(self, held: Held, runs: Iterable[TableRun]) -> None:
        for run in runs:
            end, blocks = run.at + run.count, self.groups[run.group].wanted.shape[1]
            known = held.known[run.group]
            if end > blocks:
                raise ValueError(f"{run} lies outside a range of {blocks} blocks")
            if held.first[run.group] < 0:
                held.first[run.group] = held.filled[run.group] = run.at
            elif run.at != known:
                raise ValueError(f"{run} does not follow the {known} blocks that are known")
            held.known[run.group] = end
            self.groups[run.group].wanted[held.range, run.at : end] = np.arange(
                run.first, run.first + run.count
            )

    def _best(self, runs: list[TableRun]) -> int:
        idle = np.fromiter(self.idle, dtype=np.intp)
        fit = np.zeros(len(idle), dtype=np.int64)
        some = np.flatnonzero(self.shown_bytes[idle])
        for run in runs if some.size else ():
            group = self.groups[run.group]
            shown = group.shown[idle[some], run.at : run.at + run.count]
            blocks = np.arange(run.first, run.first + run.count, dtype=np.int32)
            fit[some] += (shown == blocks).sum(1) * group.block_bytes
        return int(idle[np.lexsort((self.shown_bytes[idle] - fit, -fit))[0]])

    def _show(self, index: int, group: GroupRanges, at: int, first: int, count: int) -> None:
        # It may split what is mapped there, and adds a piece.
        self._make_room(2)
        started_ns = monotonic_ns()
        self._enter_shown(index, group, at, np.full(count, -1, dtype=np.int32))
        offset = group.offset + first * group.block_bytes
        self.pages.show(group.place(index, at), offset, count * group.block_bytes)
        self._enter_shown(index, group, at, np.arange(first, first + count, dtype=np.int32))
        self.tally.mapped += count
        self.tally.calls += 1
        self.tally.map_ns += monotonic_ns() - started_ns

    def _hide(self, index: int, group: GroupRanges, at: int, count: int) -> None:
        self.tally.unmapped += int((group.shown[index, at : at + count] >= 0).sum())
        self.pages.hide(group.place(index, at), count * group.block_bytes)
        self._enter_shown(index, group, at, np.full(count, -1, dtype=np.int32))

    def _enter_shown(self, index: int, group: GroupRanges, at: int, blocks: Table) -> None:
        shown = group.shown[index]
        before = pieces_in(shown), int((shown[at : at + len(blocks)] >= 0).sum())
        shown[at : at + len(blocks)] = blocks
        self.pieces += pieces_in(shown) - before[0]
        self.shown_bytes[index] += (int((blocks >= 0).sum()) - before[1]) * group.block_bytes

    def _make_room(self, more: int) -> None:
        """Keep below what the system can map: idle ranges give up what they show, the longest idle first."""
        for index in list(self.idle):
            if self.pieces + more <= self.pages.pieces_max:
                return
            for group in self.groups if self.shown_bytes[index] else ():
                self._hide(index, group, 0, group.shown.shape[1])
        if self.pieces + more > self.pages.pieces_max:
            raise Unmappable(
                f"its KV would take more than {self.pages.pieces_max} mappings with that of {len(self.held)} others (see "
                "vm.max_map_count): use a larger --block-size, a smaller --max-num-seqs, or --memory paged"
            )


def pieces_in(shown: Table) -> int:
    """Of successive blocks."""
    there = shown >= 0
    return int(there[0]) + int((there[1:] & (shown[1:] != shown[:-1] + 1)).sum())


def pieces(at: NDArray[np.intp], blocks: Table) -> Iterable[tuple[int, int, int]]:
    """(place, first block, count) of the longest runs in which place and block rise together, of the places `at`, ascending."""
    if not at.size:
        return
    chosen = blocks[at]
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(chosen) != 1)) + 1
    for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(at)], strict=True):
        yield int(at[begin]), int(chosen[begin]), end - begin
