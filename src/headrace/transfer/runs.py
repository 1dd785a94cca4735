"""Lockstep merging of block tables: one write for a run that is contiguous on both sides (FlowKV, section 3.2)."""

import msgspec

WEIGHT_MAX = 2**16 - 1
"""A write's weight travels in 16 bits."""


class Move(msgspec.Struct, frozen=True, array_like=True):
    """`count` blocks from block id `source` to block id `target`."""

    source: int
    target: int
    count: int


def merge(sources: list[int], targets: list[int], layers: int) -> list[Move]:
    """The fewest moves that take `sources[i]` to `targets[i]`, each of at most WEIGHT_MAX block-layers."""
    assert len(sources) == len(targets)
    count_max = WEIGHT_MAX // layers
    moves: list[Move] = []
    start = 0
    for i in range(1, len(sources) + 1):
        if i < len(sources):
            contiguous = sources[i] == sources[i - 1] + 1 and targets[i] == targets[i - 1] + 1
            if contiguous and i - start < count_max:
                continue
        if start < len(sources):
            moves.append(Move(sources[start], targets[start], i - start))
        start = i
    return moves


def expected_weight(blocks: list[int], layers: list[int]) -> int:
    """What the target's counter reaches: block-layers over all groups, and one for the tail."""
    return sum(b * n for b, n in zip(blocks, layers, strict=True)) + 1
