"""The layout map, by brute force: every byte arrives where the target looks for it, once, and nothing else is touched."""

import random
from itertools import pairwise, product

import numpy as np
import pytest

from headrace.transfer.layout import (
    GroupLayout,
    check_mappable,
    expected_weights,
    feeds,
    layout_of,
    merge_pieces,
    remap,
    split_heads,
)
from headrace.transfer.runs import WEIGHT_MAX, expected_weight
from headrace.types.errors import ConfigError, IncompatiblePeer
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout


def layout(
    ranks: int,
    block_size: int,
    order: Layout = Layout.HEAD_MAJOR,
    *,
    layers: int = 2,
    planes: int = 2,
    kv_heads: int = 4,
    dim: int = 3,
) -> GroupLayout:
    group = KVGroup(GroupKind.FULL, tuple(range(layers)), kv_heads, dim, planes)
    return layout_of(KVSpec((group,), block_size, "bfloat16", order), 0, ranks)


def table(draw: random.Random, blocks: int, count: int) -> list[int]:
    """Block ids: runs here, single blocks there."""
    if draw.random() < 0.3:
        first = draw.randrange(blocks - count + 1)
        return list(range(first, first + count))
    return draw.sample(range(blocks), count)


def pools(side: GroupLayout, blocks: int) -> list[np.ndarray]:
    """Memory of each rank, 2 bytes an element."""
    return [np.zeros(blocks * side.block_bytes(rank) // 2, np.uint16) for rank in range(len(side.held))]


def seen(side: GroupLayout, memory: list[np.ndarray], rank: int) -> np.ndarray:
    """It as `[block, layer, plane, head, token, element]`, whatever its order."""
    layers, heads = (len(side.layers), side.planes), side.heads(rank)
    if side.order is Layout.TOKEN_MAJOR:
        by_token = memory[rank].reshape(-1, side.block_size, *layers, heads, side.head_dim)
        return by_token.transpose(0, 2, 3, 4, 1, 5)
    return memory[rank].reshape(-1, *layers, heads, side.block_size, side.head_dim)


def value(token: int, layer: int, plane: int, head: int, dim: int) -> np.ndarray:
    """What an element of the KV is: no two have the same."""
    return (((token * 3 + layer) * 2 + plane) * 8 + head) * 4 + np.arange(dim, dtype=np.uint16) + 1


def fill(side: GroupLayout, memory: list[np.ndarray], blocks: list[int], first: int, end: int) -> None:
    for rank, (low, high) in enumerate(side.held):
        axes = (range(first, end), range(len(side.layers)), range(side.planes), range(low, high))
        for token, layer, plane, head in product(*axes):
            at = (blocks[token // side.block_size], layer, plane, head - low, token % side.block_size)
            seen(side, memory, rank)[at] = value(token, layer, plane, head, side.head_dim)


def carry_out(parts, sources: list[np.ndarray], targets: list[np.ndarray]) -> list[np.ndarray]:
    """Copy the pieces; how often each byte of each target rank was written."""
    written = [np.zeros(t.nbytes, np.uint8) for t in targets]
    for part in parts:
        origin, goal = (a.view(np.uint8) for a in (sources[part.source], targets[part.target]))
        for source, target, nbytes in part.pieces.tolist():
            assert source >= 0 and target >= 0 and nbytes > 0
            goal[target : target + nbytes] = origin[source : source + nbytes]
            assert len(origin[source : source + nbytes]) == nbytes
            written[part.target][target : target + nbytes] += 1
    return written


@pytest.mark.parametrize("seed", range(200))
def test_every_byte_arrives_once_where_the_target_looks_for_it(seed: int):
    draw = random.Random(seed)
    shape = dict(
        layers=draw.randint(1, 3),
        planes=draw.randint(1, 2),
        kv_heads=draw.choice((1, 2, 4, 8)),
        dim=draw.randint(1, 3),
    )
    source, target = (
        layout(draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 3, 4, 6)), draw.choice(list(Layout)), **shape)
        for _ in "st"
    )
    first = target.block_size * draw.randint(0, 2)
    end = first + draw.randint(1, 13)
    blocks = 30
    source_table, target_table = (
        table(draw, blocks, -(-end // side.block_size)) for side in (source, target)
    )
    sources, targets, wanted = pools(source, blocks), pools(target, blocks), pools(target, blocks)
    fill(source, sources, source_table, first, end)
    fill(target, wanted, target_table, first, end)

    parts = remap(source, target, source_table, target_table, first, end)
    written = carry_out(parts, sources, targets)

    for rank, expected in enumerate(wanted):
        assert np.array_equal(targets[rank], expected)
        assert written[rank].max() == 1
        if (source.block_size, source.order) != (target.block_size, target.order):
            assert written[rank].sum() == np.count_nonzero(expected) * 2
    counted = [sum(p.weight for p in parts if p.target == rank) for rank in range(len(target.held))]
    new_blocks = -(-end // target.block_size) - first // target.block_size
    assert counted == expected_weights(source, target, new_blocks)
    for part in parts:
        assert len(merge_pieces(part.pieces)) == len(part.pieces), "neighbours are not merged"


@pytest.mark.parametrize("seed", range(40))
def test_chunks_count_what_the_whole_counts(seed: int):
    draw = random.Random(seed)
    source, target = (layout(draw.choice((1, 2, 4, 8)), draw.choice((2, 3, 4))) for _ in "st")
    end = draw.randint(20, 30)
    tables = [table(draw, 40, -(-end // side.block_size)) for side in (source, target)]
    edges = [0, *sorted(draw.sample(range(1, 20 // target.block_size), 3)), 0]
    edges = [e * target.block_size for e in edges[:-1]] + [end]
    counted = [0] * len(target.held)
    for first, last in pairwise(edges):
        for part in remap(source, target, *tables, first, last):
            counted[part.target] += part.weight
    assert counted == expected_weights(source, target, -(-end // target.block_size))


def test_equal_layouts_move_whole_runs_and_weigh_what_a_transfer_expects():
    side = layout(1, 4, layers=3)
    parts = remap(side, side, [5, 6, 7, 2, 3], [1, 2, 3, 8, 9], 0, 18)
    size = side.block_bytes(0)
    assert [p.pieces.tolist() for p in parts] == [
        [[5 * size, 1 * size, 3 * size], [2 * size, 8 * size, 2 * size]]
    ]
    assert parts[0].weight + 1 == expected_weight([5], [3])


def test_parts_weigh_no_more_than_an_immediate_holds():
    side = layout(1, 1, layers=2, planes=1, kv_heads=1, dim=1)
    blocks = WEIGHT_MAX + 1
    parts = remap(side, side, range(blocks), range(blocks), 0, blocks)
    assert max(p.weight for p in parts) <= WEIGHT_MAX
    assert sum(p.weight for p in parts) == expected_weights(side, side, blocks)[0] == 2 * blocks


def test_heads_are_split_and_replicated():
    assert split_heads(8, 4) == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert split_heads(2, 4) == ((0, 1), (0, 1), (1, 2), (1, 2))
    for kv_heads, ranks in ((8, 3), (3, 2), (4, 6), (4, 0)):
        with pytest.raises(ConfigError, match="evenly"):
            split_heads(kv_heads, ranks)


def test_copies_of_a_head_share_the_load():
    held = [(f.source, f.target) for f in feeds(layout(8, 4), layout(8, 4))]
    assert held == [(r, r) for r in range(8)]
    senders = {f.source for f in feeds(layout(8, 4, kv_heads=2), layout(4, 4, kv_heads=2))}
    assert senders == {0, 1, 4, 5}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": 3}, "set of layers"),
        ({"planes": 1}, "number of planes"),
        ({"kv_heads": 8}, "number of KV heads"),
        ({"dim": 4}, "head size"),
    ],
)
def test_what_cannot_be_mapped_is_refused_with_its_field(change: dict[str, int], named: str):
    with pytest.raises(IncompatiblePeer, match=named):
        check_mappable(layout(2, 4), layout(2, 4, **change))


def test_element_types_and_missing_heads_are_refused():
    group = KVGroup(GroupKind.FULL, (0, 1), 4, 3)
    half = layout_of(KVSpec((group,), 4, "float16"), 0, 2)
    with pytest.raises(IncompatiblePeer, match="dtype"):
        remap(layout(2, 4), half, [0], [0], 0, 4)
    whole = layout(1, 4)
    part = GroupLayout(**{f: getattr(whole, f) for f in whole.__struct_fields__} | {"held": ((0, 2),)})
    check_mappable(whole, part)
    with pytest.raises(IncompatiblePeer, match="no rank of the source holds head 2"):
        check_mappable(part, whole)
