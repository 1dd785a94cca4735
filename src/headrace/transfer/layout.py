"""The layout map: from KV pools of one tensor-parallel degree and block size to pools of another.

A rank's memory of a KV group is as `types.kv.Layout` says, with the heads that the rank holds. Ranks share the KV heads out in order;
where there are more ranks than heads, several ranks hold a copy of the same head. Every target rank takes each of its heads from one source
rank that holds it (so that copies share the load): all layers, planes and tokens, as pieces that are merged where both sides go on.
Equal layouts are the common case and fall out as whole runs of blocks. What cannot be mapped is refused with the field's name.
Leaves out: conversion of element types; groups that keep other layers than their peer's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.transfer.runs import WEIGHT_MAX
from headrace.types.errors import ConfigError, IncompatiblePeer
from headrace.types.kv import KVSpec, Layout

Pieces = npt.NDArray[np.int64]
"""[n, 3]: source offset, target offset, nbytes; bytes from the first block of the group in either rank's pool."""


class GroupLayout(msgspec.Struct, frozen=True):
    """How one KV group lies in the pools of all ranks of one instance."""

    layers: tuple[int, ...]
    """Indices of the model's layers."""
    planes: int
    kv_heads: int
    """Of the model."""
    head_dim: int
    dtype: str
    dtype_bytes: int
    block_size: int
    """Tokens."""
    held: tuple[tuple[int, int], ...]
    """Per rank: the first head that it holds, and the one after its last."""
    order: Layout = Layout.HEAD_MAJOR

    def heads(self, rank: int) -> int:
        return self.held[rank][1] - self.held[rank][0]

    def block_bytes(self, rank: int) -> int:
        rows = len(self.layers) * self.planes * self.heads(rank) * self.block_size
        return rows * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class Feed:
    """Heads `first .. end - 1` of a target rank come from this source rank."""

    source: int
    target: int
    first: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one source rank writes to one target rank, counted there as one."""

    source: int
    target: int
    pieces: Pieces
    weight: int
    """Block-layers of the target, at most WEIGHT_MAX."""


def split_heads(kv_heads: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Which heads each rank holds. Raises ConfigError if they cannot be shared out evenly."""
    if ranks < 1 or kv_heads < 1 or (kv_heads % ranks and ranks % kv_heads):
        raise ConfigError(
            f"{kv_heads} KV heads cannot be shared out evenly over {ranks} ranks: one must divide the other"
        )
    if ranks <= kv_heads:
        each = kv_heads // ranks
        return tuple((rank * each, (rank + 1) * each) for rank in range(ranks))
    copies = ranks // kv_heads
    return tuple((rank // copies, rank // copies + 1) for rank in range(ranks))


def layout_of(spec: KVSpec, group: int, ranks: int = 1) -> GroupLayout:
    """Of one group of a model that runs on so many tensor-parallel ranks. Raises ConfigError."""
    g = spec.groups[group]
    return GroupLayout(
        layers=g.layers,
        planes=g.planes,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        dtype=spec.dtype,
        dtype_bytes=spec.dtype_bytes,
        block_size=spec.block_size,
        held=split_heads(g.kv_heads, ranks),
        order=spec.layout,
    )


def check_mappable(source: GroupLayout, target: GroupLayout) -> None:
    """Raises IncompatiblePeer naming the first field that no map can make up for."""
    for field, name in (
        ("layers", "set of layers"),
        ("planes", "number of planes"),
        ("kv_heads", "number of KV heads"),
        ("head_dim", "head size"),
        ("dtype", "dtype"),
        ("dtype_bytes", "size of an element"),
    ):
        theirs, ours = getattr(source, field), getattr(target, field)
        if theirs != ours:
            raise IncompatiblePeer(
                f"the {name} differs: the source has {theirs}, the target has {ours}: run the same model"
            )
    absent = [h for first, end in target.held for h in range(first, end) if not _holders(source, h)]
    if absent:
        raise IncompatiblePeer(f"the heads held differ: no rank of the source holds head {absent[0]}")


def check_whole(source: GroupLayout, target: GroupLayout) -> None:
    """Raises IncompatiblePeer naming what keeps whole blocks from going as they are.

    Live instances ask for that: hashes chain over a block's tokens, so none of the target's finds KV of another block size.
    """
    check_mappable(source, target)
    for field, name in (
        ("block_size", "block size"),
        ("held", "share of heads"),
        ("order", "order in memory"),
    ):
        theirs, ours = getattr(source, field), getattr(target, field)
        if theirs != ours:
            raise IncompatiblePeer(f"the {name} differs: the source has {theirs}, the target has {ours}")


def feeds(source: GroupLayout, target: GroupLayout) -> list[Feed]:
    """Who writes which heads to whom: each head of each target rank once. Ascending by target rank, then head."""
    found: list[Feed] = []
    for rank, (first, end) in enumerate(target.held):
        for head in range(first, end):
            holders = _holders(source, head)
            chosen = holders[_holders(target, head).index(rank) % len(holders)]
            last = found[-1] if found else None
            if last and (last.source, last.target, last.end) == (chosen, rank, head):
                found[-1] = Feed(chosen, rank, last.first, head + 1)
            else:
                found.append(Feed(chosen, rank, head, head + 1))
    return found


def expected_weights(source: GroupLayout, target: GroupLayout, blocks: int) -> list[int]:
    """What the counter of each target rank reaches for so many of its blocks, without the tail: block-layers, once for each feed."""
    weights = [0] * len(target.held)
    for feed in feeds(source, target):
        weights[feed.target] += blocks * len(target.layers)
    return weights


def remap(
    source: GroupLayout,
    target: GroupLayout,
    source_table: Sequence[int],
    target_table: Sequence[int],
    first: int,
    end: int,
) -> list[Part]:
    """Parts that take the KV of tokens `first .. end - 1` from the source's ranks to the target's.

    The tables give the block id of each logical block; all ranks of a side share one. `first` is the edge of a target block, and so is
    `end`, but for a sequence's last: so every target block-layer is counted by one call. A block partly filled goes whole if the block
    sizes are equal. Raises IncompatiblePeer.
    """
    check_mappable(source, target)
    assert first % target.block_size == 0 and first <= end
    step = WEIGHT_MAX // len(target.layers) * target.block_size
    tables = np.asarray(source_table, np.int64), np.asarray(target_table, np.int64)
    parts: list[Part] = []
    for start in range(first, end, step):
        stop = min(start + step, end)
        weight = -(-(stop - start) // target.block_size) * len(target.layers)
        for feed in feeds(source, target):
            pieces = _pieces(source, target, feed, tables, start, stop)
            parts.append(Part(feed.source, feed.target, pieces, weight))
    return parts


def merge_pieces(pieces: Pieces) -> Pieces:
    """Neighbours that go on on both sides become one."""
    if len(pieces) < 2:
        return pieces
    ends = pieces[:-1, :2] + pieces[:-1, 2:]
    begins = np.concatenate(([True], (ends != pieces[1:, :2]).any(axis=1)))
    merged = pieces[begins]
    merged[:, 2] = np.add.reduceat(pieces[:, 2], np.flatnonzero(begins))
    return merged


def _holders(layout: GroupLayout, head: int) -> list[int]:
    return [rank for rank, (first, end) in enumerate(layout.held) if first <= head < end]


def _pieces(
    source: GroupLayout, target: GroupLayout, feed: Feed, tables: tuple[Pieces, Pieces], first: int, end: int
) -> Pieces:
    heads = (feed.first, feed.end)
    whole = source.held[feed.source] == target.held[feed.target] == heads
    if whole and (source.block_size, source.order) == (target.block_size, target.order):
        size = source.block_bytes(feed.source)
        at = slice(first // source.block_size, -(-end // source.block_size))
        ids = tables[0][at], tables[1][at]
        assert ids[0].min() >= 0 and ids[1].min() >= 0, "a block to be sent is absent"
        return merge_pieces(np.stack((ids[0] * size, ids[1] * size, np.full_like(ids[0], size)), axis=1))
    cuts = _cuts(source, target, first, end)
    row = target.head_dim * target.dtype_bytes
    from_ = _offsets(source, feed.source, heads, tables[0], cuts[:-1])
    to = _offsets(target, feed.target, heads, tables[1], cuts[:-1])
    nbytes = np.broadcast_to((np.diff(cuts) * row)[:, None, None, None], from_.shape)
    return merge_pieces(np.stack((from_.ravel(), to.ravel(), nbytes.ravel()), axis=1))


def _cuts(source: GroupLayout, target: GroupLayout, first: int, end: int) -> Pieces:
    """Tokens between which a head's rows are one run on both sides: edges of either side's blocks, or every token."""
    if Layout.TOKEN_MAJOR in (source.order, target.order):
        return np.arange(first, end + 1, dtype=np.int64)
    edges = {first, end}
    for layout in (source, target):
        edges.update(range(-(-first // layout.block_size) * layout.block_size, end, layout.block_size))
    return np.array(sorted(edges), np.int64)


def _offsets(layout: GroupLayout, rank: int, heads: tuple[int, int], table: Pieces, tokens: Pieces) -> Pieces:
    """[token, layer, plane, head]: where a head's row of each of these tokens lies, in bytes."""
    ids = table[tokens // layout.block_size]
    assert ids.min() >= 0, "a block to be sent is absent"
    row = layout.head_dim * layout.dtype_bytes
    by_token = layout.order is Layout.TOKEN_MAJOR
    head = row if by_token else layout.block_size * row
    plane = layout.heads(rank) * head
    layer = layout.planes * plane
    token = len(layout.layers) * layer if by_token else row
    blocks = ids * layout.block_bytes(rank) + tokens % layout.block_size * token
    layers = np.arange(len(layout.layers), dtype=np.int64) * layer
    planes = np.arange(layout.planes, dtype=np.int64) * plane
    held = (np.arange(*heads, dtype=np.int64) - layout.held[rank][0]) * head
    offsets: Pieces = blocks[:, None, None, None] + layers[:, None, None] + planes[:, None] + held
    return offsets
