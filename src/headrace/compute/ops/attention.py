"""Attention over a paged KV pool, with the same bits for a query row whatever else is in the batch.

The order of every sum is fixed by absolute positions alone: keys are walked from position 0, 64 to an update of the
running maximum (FlashAttention, Dao et al. 2022); every 1,024 positions a new accumulator begins, and the partitions'
partial (output, maximum, sum of weights) are merged left to right (Flash-Decoding, Dao et al. 2023). So threads may
split at partition borders, and prefill in any chunks, decode and recomputation agree to the bit.

In bf16 with AVX512-BF16 the weights of the values are rounded to bf16, as flash attention does on GPUs; their sum is
that of the rounded weights.
"""

import torch
from torch import Tensor

from headrace.compute.ops import reference
from headrace.compute.ops.backend import isa_of, native


def paged_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    tables: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int = 0,
    threads: int,
    backend: str | None = None,
) -> Tensor:
    """Attend each query token to the keys of its sequence up to and including its own position.

    The KV of every attended position, the queries' own tokens included, must have been written (`write_kv`) before.
    Nothing else in the pool matters: unwritten slots may hold NaN.

    Args:
        q: [tokens, heads, dim], f32, bf16 or f16; each token's [heads, dim] contiguous.
        kv: [blocks, layers, 2 (K, V), kv_heads, block_size, dim], one KV group's pool in q's dtype, in any order but
            for dim (`types.kv.Layout`); heads a multiple of kv_heads. A sequence in one piece is one large block.
        layer: index of the layer inside the group.
        tables: int32 [sequences, blocks_max], contiguous: block ids; -1 where unused or freed by the window.
        rows: int32 [tokens], contiguous: the row of `tables` of each query token.
        positions: int32 [tokens], contiguous: absolute position of each query token. Neighbours at successive
            positions of one row share the reading of its K and V.
        scale: factor on q.k, usually dim**-0.5.
        window: attend positions max(0, position - window + 1)..position; 0 attends all.
        threads: how many threads may run; the result does not depend on it.
        backend: see `ops.backend`; the native kernels take dims and block sizes in multiples of 16, dims up to 256.

    Returns:
        [tokens, heads * dim] in q's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or a table names no block for an attended position.
    """
    tokens, heads, dim = q.shape
    blocks, _, _, kv_heads, block_size, _ = kv.shape
    check_attention(q, kv, layer, tables, rows, positions, window)
    isa = isa_of(backend, q.dtype)
    fits = isa is not None and not dim % 16 and not block_size % 16 and dim <= native.DIM_MAX
    if not fits and backend not in (None, "torch"):
        raise ValueError(f"the native kernels have no dim {dim} with blocks of {block_size}")
    if not fits:
        return reference.paged_attention(q, kv, layer, tables, rows, positions, scale=scale, window=window)
    out = torch.empty(tokens, heads * dim, dtype=q.dtype)
    native.paged_attention(
        isa,
        q.dtype == torch.bfloat16,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        *place_of(kv, layer, 1),
        tables.data_ptr(),
        *tables.shape,
        rows.data_ptr(),
        positions.data_ptr(),
        tokens,
        blocks,
        block_size,
        kv_heads,
        heads // kv_heads,
        dim,
        window,
        scale,
        threads,
    )
    return out


def write_kv(
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int,
    blocks: Tensor,
    offsets: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write the K and V of some tokens into the pool, in place.

    Args:
        k, v: [tokens, kv_heads, dim] in kv's dtype; each token's [kv_heads, dim] contiguous.
        kv: the pool tensor, as for `paged_attention`.
        layer: index of the layer inside the group.
        blocks: int32 [tokens], contiguous: block id of each token.
        offsets: int32 [tokens], contiguous: slot of each token inside its block.
        backend: see `ops.backend`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or a block or slot does not exist.
    """
    tokens, kv_heads, dim = k.shape
    check_pool(kv, layer, k.dtype, dim)
    if k.shape != v.shape or kv_heads != kv.shape[3] or v.dtype != k.dtype:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} do not fit kv {list(kv.shape)}")
    for name, index in (("blocks", blocks), ("offsets", offsets)):
        check_index(name, index, (tokens,))
    check_rows("k", k)
    check_rows("v", v)
    if backend == "torch" or native is None:
        isa_of(backend, k.dtype)
        reference.write_kv(k, v, kv, layer, blocks, offsets)
        return
    size = kv.element_size()
    native.write_kv(
        k.data_ptr(),
        k.stride(0) * size,
        v.data_ptr(),
        v.stride(0) * size,
        *place_of(kv, layer, size),
        dim * size,
        blocks.data_ptr(),
        offsets.data_ptr(),
        tokens,
        kv_heads,
        kv.shape[0],
        kv.shape[4],
    )


def place_of(kv: Tensor, layer: int, unit: int) -> tuple[int, ...]:
    """Address of the layer's first K; strides of blocks, planes, heads and tokens, times `unit`."""
    block, layers, *others, _ = kv.stride()
    return kv.data_ptr() + layer * layers * kv.element_size(), *(stride * unit for stride in (block, *others))


def check_attention(
    q: Tensor, kv: Tensor, layer: int, tables: Tensor, rows: Tensor, positions: Tensor, window: int
) -> None:
    """Raises ValueError if these cannot be the arguments of one call."""
    tokens, heads, dim = q.shape
    check_pool(kv, layer, q.dtype, dim)
    if heads % kv.shape[3] or window < 0:
        raise ValueError(f"{heads} heads over {kv.shape[3]} KV heads, window {window}")
    check_rows("q", q)
    check_index("rows", rows, (tokens,))
    check_index("positions", positions, (tokens,))
    check_index("tables", tables, (tables.shape[0], tables.shape[-1]))


def check_pool(kv: Tensor, layer: int, dtype: torch.dtype, dim: int) -> None:
    """Raises ValueError if this cannot be a pool for heads of `dim`, or has no such layer."""
    _, layers, planes, _, _, kv_dim = kv.shape
    if kv.dtype != dtype or kv_dim != dim or planes != 2:
        raise ValueError(f"kv {kv.dtype}{list(kv.shape)} does not fit {dtype} of dim {dim}")
    if kv.stride(5) != 1 or kv.stride(4) % 2:
        raise ValueError("each [dim] of kv must be contiguous, and tokens an even number of elements apart")
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer} of {layers}")


def check_rows(name: str, x: Tensor) -> None:
    """Raises ValueError unless each token of [tokens, heads, dim] is contiguous."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"each token's [heads, dim] of {name} must be contiguous")


def check_index(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless this is contiguous int32 of that shape."""
    if x.dtype != torch.int32 or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 {list(shape)}, not {x.dtype}{list(x.shape)}")
