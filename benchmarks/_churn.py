"""What many allocations and frees do to contiguity: the segment allocator beside a free list, both fed the same requests.

A request takes 1 to 512 blocks (log-uniform: most are short, most blocks are in long ones) and keeps them for a random while, up to 80% of
the pool. Growing requests take further blocks one by one, among all the others, as decoding does. The free list is the usual one: freed
blocks go on a stack, and the next request takes them from its top.
"""

import math
import random
from typing import Protocol

from headrace.kv.segments import Segments
from headrace.transfer.runs import merge

FULL = 0.8
LONGEST = 512


class Allocator(Protocol):
    def take(self, count: int, near: int) -> list[int]: ...

    def give(self, blocks: list[int]) -> None: ...


class FreeList:
    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))

    def take(self, count: int, near: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]

    def give(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))


class SegmentList:
    """`kv.segments`, one block table a request."""

    def __init__(self, blocks: int) -> None:
        self._free = Segments()
        self._free.add(0, blocks)

    def take(self, count: int, near: int) -> list[int]:
        return [first + i for first, size in self._free.take(count, near) for i in range(size)]

    def give(self, blocks: list[int]) -> None:
        for first, count in runs_of(blocks):
            self._free.add(first, count)


def runs_of(blocks: list[int]) -> list[tuple[int, int]]:
    """(first, count) of the consecutive ids in a table, in its order."""
    return [(m.source, m.count) for m in merge(blocks, list(range(len(blocks))), 1)]


def churn(allocator: Allocator, blocks: int, operations: int, seed: int, *, growing: bool) -> list[list[int]]:
    """Tables of the requests that ended in the last tenth of so many allocations and frees."""
    draw = random.Random(seed)
    held: list[list[int]] = []
    wants: list[list[int]] = []
    used, late = 0, []
    for operation in range(operations):
        if growing and wants and draw.random() < 0.8:
            at = draw.randrange(len(wants))
            table = wants[at]
            if used < FULL * blocks:
                table += allocator.take(1, table[-1] + 1)
                used += 1
                if draw.random() < 2 / len(table):
                    wants[at], wants[-1] = wants[-1], wants[at]
                    wants.pop()
                continue
        count = round(math.exp(draw.uniform(0, math.log(LONGEST))))
        if used + count <= FULL * blocks:
            held.append(allocator.take(count, -1))
            used += count
            if growing:
                wants.append(held[-1])
        else:
            at = draw.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            table = held.pop()
            used -= len(table)
            wants = [w for w in wants if w is not table]
            allocator.give(table)
            if operation >= 0.9 * operations:
                late.append(table)
    return late


def measure(blocks: int, operations: int, seeds: int, *, growing: bool) -> dict[str, dict[str, list[float]]]:
    """Per allocator and seed: mean runs a request in one pool; mean writes a request between two pools that know nothing of each other."""
    figures: dict[str, dict[str, list[float]]] = {}
    for name, make in (("segments", SegmentList), ("free_list", FreeList)):
        runs, writes = [], []
        for seed in range(seeds):
            source = churn(make(blocks), blocks, operations, 2 * seed, growing=growing)
            target = churn(make(blocks), blocks, operations, 2 * seed + 1, growing=growing)
            runs.append(sum(len(runs_of(table)) for table in source) / len(source))
            pairs = zip(sorted(source, key=len), sorted(target, key=len), strict=False)
            calls = [len(merge(s[: len(t)], t[: len(s)], 1)) for s, t in pairs]
            writes.append(sum(calls) / len(calls))
        figures[name] = {"runs_per_request": runs, "writes_per_request": writes}
    return figures
