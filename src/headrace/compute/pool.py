"""The memory of a KV pool as tensors, one a group."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from headrace.compute.checkpoint import DTYPES
from headrace.types.kv import KVSpec, Layout


def pool_tensors(
    spec: KVSpec, blocks: Sequence[int], buffers: Sequence[memoryview] | None = None
) -> tuple[Tensor, ...]:
    """Tensor [blocks, layers in group, planes, kv_heads, block_size, head_dim] of every group, in memory as `spec.layout` says.

    Args:
        spec: the model's groups, block size, element type and layout.
        blocks: how many blocks each group has.
        buffers: writable memory of each group (shared with other processes, say), at least
            `blocks[g] * spec.block_bytes(g)` bytes; the tensors are views of it. None: fresh zeros.

    Raises:
        ValueError: a buffer is too small, or the counts do not fit the groups.
    """
    if len(blocks) != len(spec.groups) or (buffers is not None and len(buffers) != len(spec.groups)):
        raise ValueError(f"expected blocks and buffers for {len(spec.groups)} groups")
    dtype = DTYPES[spec.dtype]
    tensors = []
    for g, count in enumerate(blocks):
        shape = stored_shape(spec, g, count, spec.block_size)
        if buffers is None:
            tensors.append(ordered(torch.zeros(shape, dtype=dtype), spec.layout))
            continue
        if len(buffers[g]) < count * spec.block_bytes(g):
            raise ValueError(
                f"group {g}: {len(buffers[g])} bytes for {count} blocks of {spec.block_bytes(g)} bytes"
            )
        stored = torch.frombuffer(buffers[g], dtype=dtype, count=prod(shape)).view(shape)
        tensors.append(ordered(stored, spec.layout))
    return tuple(tensors)


def stored_shape(spec: KVSpec, group: int, blocks: int, block_size: int) -> tuple[int, ...]:
    """Shape of a group's memory, outermost first."""
    g = spec.groups[group]
    if spec.layout is Layout.TOKEN_MAJOR:
        return blocks, block_size, len(g.layers), g.planes, g.kv_heads, g.head_dim
    return blocks, len(g.layers), g.planes, g.kv_heads, block_size, g.head_dim


def ordered(stored: Tensor, layout: Layout) -> Tensor:
    """Memory of that shape as [blocks, layers, planes, kv_heads, block_size, head_dim]."""
    return stored.permute(0, 2, 3, 4, 1, 5) if layout is Layout.TOKEN_MAJOR else stored
