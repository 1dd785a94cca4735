"""What a core's `Write` copies, byte by byte, against the layouts as `types.kv` words them."""

import numpy as np
import pytest

from headrace.live.pools import layout_of
from headrace.live.transfer.kv import pieces_of
from headrace.types.errors import TransferError
from headrace.types.events import Write
from headrace.types.ids import Address, Slot, WriteId
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout

GROUPS = (
    KVGroup(GroupKind.FULL, (0, 2, 3), kv_heads=2, head_dim=4),
    KVGroup(GroupKind.WINDOW, (1,), kv_heads=1, head_dim=4, window=6),
)
SOURCE, TARGET = (7, 5), (6, 9)
"""Blocks of each group."""


def write(group: int, source: int, target: int, count: int, layer: int = 0, layers: int = 0) -> Write:
    return Write(WriteId(1), Address("d"), Slot(0), group, source, target, count, 1, layer, layers)


def layers_of(spec: KVSpec, group: int, memory: np.ndarray, offset: int, blocks: int) -> np.ndarray:
    """A view [blocks, layers, rest] or [blocks, tokens, layers, rest] of one group's memory, layers moved to axis 1."""
    g = spec.groups[group]
    nbytes = blocks * spec.block_bytes(group)
    flat = memory[offset : offset + nbytes]
    if spec.layout is Layout.TOKEN_MAJOR:
        return np.moveaxis(flat.reshape(blocks, spec.block_size, len(g.layers), -1), 2, 1)
    return flat.reshape(blocks, len(g.layers), -1)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(
    "written",
    [
        write(0, 2, 1, 4),
        write(0, 2, 1, 4, 0, 1),
        write(0, 0, 3, 3, 1, 2),
        write(0, 6, 5, 1, 2, 1),
        write(1, 1, 4, 4),
        write(1, 0, 8, 1, 0, 1),
    ],
)
def test_exactly_the_blocks_and_layers_that_are_named_are_copied(layout: Layout, written: Write) -> None:
    spec = KVSpec(GROUPS, block_size=4, dtype="float32", layout=layout)
    source, target = layout_of(spec, SOURCE), layout_of(spec, TARGET)
    memory = np.random.default_rng(1).integers(0, 255, source.total, np.uint8)
    into = np.full(target.total, 255, np.uint8)
    wanted = into.copy()
    group, count = written.group, written.count
    there = layers_of(spec, group, wanted, target.offsets[group], TARGET[group])
    here = layers_of(spec, group, memory, source.offsets[group], SOURCE[group])
    chosen = slice(written.layer, written.layer + written.layers) if written.layers else slice(None)
    there[written.target_first : written.target_first + count, chosen] = here[
        written.source_first : written.source_first + count, chosen
    ]
    for start, to, nbytes in pieces_of(written, spec, source, target).tolist():
        into[to : to + nbytes] = memory[start : start + nbytes]
    assert np.array_equal(into, wanted) and (into != 255).any()


@pytest.mark.parametrize("written", [write(0, 5, 0, 3), write(1, 0, 7, 3), write(0, -1, 0, 1)])
def test_blocks_that_are_not_there_are_refused(written: Write) -> None:
    spec = KVSpec(GROUPS, block_size=4, dtype="float32")
    with pytest.raises(TransferError, match="pool has"):
        pieces_of(written, spec, layout_of(spec, SOURCE), layout_of(spec, TARGET))
