"""What a worker's virtual KV ranges did and hold (`memory: virtual`)."""

import msgspec


class RangeCounts(msgspec.Struct, frozen=True, array_like=True):
    """Counts since the worker's start; the last five are of now."""

    blocks_mapped: int = 0
    """Blocks put into a range."""
    blocks_in_place: int = 0
    """Blocks that a new sequence found where it needs them: its range had them from an earlier one."""
    blocks_unmapped: int = 0
    map_calls: int = 0
    """Pieces of successive blocks that they were mapped in."""
    map_ns: int = 0
    """Spent on mapping, on whatever thread."""
    stalls: int = 0
    """Steps that waited for a mapping."""
    stall_ns: int = 0
    """How long they did, together."""
    in_use: int = 0
    """Ranges that a sequence has."""
    mapped_bytes: int = 0
    """Of all ranges, those of past sequences included; a block that two of them show counts twice."""
    held_bytes: int = 0
    """Blocks that the tables of present sequences name, shared ones counted for each."""
    used_bytes: int = 0
    """Tokens in them: the rest of `held_bytes` is waste inside blocks, and what is reserved ahead."""
    resident_bytes: int = 0
    """Of the pool's memory, as the system counts it."""
