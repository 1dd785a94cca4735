"""The host memory of one instance: copies of its sequences' KV, by block groups (FastSwitch, arXiv 2411.18424, block groups and reuse).

A copy holds the logical blocks of a sequence from `at` on. Behind its last run it keeps `room`, so that the blocks of the next copy
continue it; room is taken away when anybody lacks blocks. Blocks before `valid` are full on the device and not written again: their copies
are good for ever. When free blocks and room are not enough, copies of sequences that still have their KV on the device are cut from the end
(the paper's contamination): `valid` shrinks, and never grows but by a new copy.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from headrace.kv.segments import Segments
from headrace.types.ids import SequenceKey
from headrace.types.kv import id_runs


@dataclass(slots=True)
class HostCopy:
    """Of one sequence, in one group."""

    at: int = 0
    blocks: list[int] = field(default_factory=list[int])
    """Host blocks of logical blocks `at`, `at + 1`, ..."""
    room: list[int] = field(default_factory=list[int])
    """Host blocks for what comes behind, in order."""
    valid: int = 0

    @property
    def end(self) -> int:
        return self.at + len(self.blocks)

    def cut(self, blocks: int) -> list[int]:
        """Give up the last ones."""
        kept = max(0, len(self.blocks) - blocks)
        gone, self.blocks = self.blocks[kept:], self.blocks[:kept]
        self.valid = min(self.valid, self.end)
        return gone


class HostArea:
    """Blocks are counted per group. `group_blocks`: a copy is given room in units of so many; 0: none."""

    def __init__(self, blocks: tuple[int, ...], group_blocks: int) -> None:
        self.blocks = blocks
        self.free = [Segments() for _ in blocks]
        for segments, count in zip(self.free, blocks, strict=True):
            if count:
                segments.add(0, count)
        self.copies: dict[SequenceKey, list[HostCopy]] = {}
        self.contaminated = 0
        """Blocks that copies have lost to others."""
        self._unit = max(1, group_blocks)

    def hold(self, key: SequenceKey, spans: list[tuple[int, int]], donors: Iterable[SequenceKey]) -> bool:
        """Let the copy have blocks for these logical blocks, (first, end) by group, and no earlier ones. False: there is no room.

        `donors` may lose blocks, the first one first.
        """
        copies = self.copies.setdefault(key, [HostCopy() for _ in self.blocks])
        for group, (copy, (first, end)) in enumerate(zip(copies, spans, strict=True)):
            if not copy.at <= first < copy.end:
                gone, copy.blocks, copy.at, copy.valid = copy.blocks, [], first, first
            else:
                gone, copy.blocks, copy.at = (
                    copy.blocks[: first - copy.at],
                    copy.blocks[first - copy.at :],
                    first,
                )
            gone = gone + copy.cut(max(0, copy.end - end))
            self._put(group, gone)
        lacking = [end - copy.end for copy, (_, end) in zip(copies, spans, strict=True)]
        if not self._make_room(key, lacking, donors):
            return False
        for group, (copy, count) in enumerate(zip(copies, lacking, strict=True)):
            self._extend(group, copy, count)
        return True

    def commit(self, key: SequenceKey, full: int) -> None:
        """What was held is copied; of it the logical blocks before `full` are full."""
        for copy in self.copies[key]:
            copy.valid = max(copy.at, min(full, copy.end))

    def valid(self, key: SequenceKey) -> int:
        """Logical blocks from the first on of which every group has a copy for good."""
        copies = self.copies.get(key, [])
        return min((0 if copy.at else copy.valid for copy in copies), default=0)

    def drop(self, key: SequenceKey) -> None:
        for group, copy in enumerate(self.copies.pop(key, [])):
            self._put(group, copy.blocks + copy.room)

    def audit(self) -> None:
        """Every block has exactly one owner; else AssertionError."""
        for group, count in enumerate(self.blocks):
            owners = [
                block for first, size in self.free[group].runs() for block in range(first, first + size)
            ]
            for copies in self.copies.values():
                owners += copies[group].blocks + copies[group].room
            assert sorted(owners) == list(range(count)), (
                f"host blocks of group {group} are lost or owned twice"
            )

    def _extend(self, group: int, copy: HostCopy, count: int) -> None:
        own = copy.room[:count]
        del copy.room[: len(own)]
        copy.blocks += own
        count -= len(own)
        if not count:
            return
        free = self.free[group]
        ahead = -(len(copy.blocks) + count) % self._unit
        near = copy.blocks[-1] + 1 if copy.blocks else -1
        runs = free.take(min(count + ahead, free.total), near)
        taken = [block for first, size in runs for block in range(first, first + size)]
        copy.blocks += taken[:count]
        copy.room = taken[count:]

    def _make_room(self, key: SequenceKey, lacking: list[int], donors: Iterable[SequenceKey]) -> bool:
        """Free blocks until the copy's own room and they are enough in each group."""
        own = self.copies[key]

        def short() -> bool:
            return any(n > len(c.room) + f.total for n, c, f in zip(lacking, own, self.free, strict=True))

        if not short():
            return True
        for other, copies in self.copies.items():
            if other != key:
                for group, copy in enumerate(copies):
                    self._put(group, copy.room)
                    copy.room = []
        for donor in donors:
            if not short():
                break
            if donor in self.copies and donor != key:
                self._contaminate(donor, own, lacking)
        return not short()

    def _contaminate(self, donor: SequenceKey, own: list[HostCopy], lacking: list[int]) -> None:
        copies = self.copies[donor]
        for group, copy in enumerate(copies):
            missing = lacking[group] - len(own[group].room) - self.free[group].total
            if missing > 0:
                gone = copy.cut(missing)
                self.contaminated += len(gone)
                self._put(group, gone)

    def _put(self, group: int, blocks: list[int]) -> None:
        for first, count in id_runs(blocks):
            self.free[group].add(first, count)
