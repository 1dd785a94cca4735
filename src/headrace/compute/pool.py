"""The memory of a KV pool as tensors, one a group."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from headrace.compute.checkpoint import DTYPES
from headrace.types.kv import KVSpec


def pool_tensors(
    spec: KVSpec, blocks: Sequence[int], buffers: Sequence[memoryview] | None = None
) -> tuple[Tensor, ...]:
    """Tensor [blocks, layers in group, planes, kv_heads, block_size, head_dim] of every group.

    Args:
        spec: the model's groups, block size and element type.
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
    for g, (group, count) in enumerate(zip(spec.groups, blocks, strict=True)):
        shape = (count, len(group.layers), group.planes, group.kv_heads, spec.block_size, group.head_dim)
        if buffers is None:
            tensors.append(torch.zeros(shape, dtype=dtype))
            continue
        if len(buffers[g]) < count * spec.block_bytes(g):
            raise ValueError(
                f"group {g}: {len(buffers[g])} bytes for {count} blocks of {spec.block_bytes(g)} bytes"
            )
        tensors.append(torch.frombuffer(buffers[g], dtype=dtype, count=prod(shape)).view(shape))
    return tuple(tensors)
