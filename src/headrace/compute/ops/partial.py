"""Attention by partitions: what one call of `paged_attention` computes, in pieces that may come from several pools.

The sum over a query's keys is cut at every 1,024 positions, always; each partition has a partial state (output, sum of weights, maximum),
and the states are merged left to right (Infinite-LLM, arXiv 2401.02669, section 4; Flash-Decoding). Here the states can be had, and put
together, by themselves: a holder computes those of the partitions that lie in its pool, the owner of the sequence the others, and merges.
On the native backend the result has the bits of one call over all keys, as the very same states are merged in the very same order. The sum
of weights is kept in its 16 lanes for that.
"""

import torch
from torch import Tensor

from headrace.compute.ops import reference
from headrace.compute.ops.attention import check_attention, place_of
from headrace.compute.ops.backend import isa_of, native
from headrace.compute.ops.reference import TAIL
from headrace.compute.plans import PARTITION


def partial_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    tables: Tensor,
    rows: Tensor,
    positions: Tensor,
    begins: Tensor,
    ends: Tensor,
    bases: Tensor,
    out: Tensor,
    *,
    scale: float,
    threads: int,
    backend: str | None = None,
) -> None:
    """Compute the states of partitions `begins[i]` to `ends[i] - 1` of each query token, without a window.

    Of a token's own partition the keys up to its position are attended. Only the blocks of these partitions need be in `tables`.

    Args:
        q, kv, layer, tables, rows, positions, scale, threads, backend: as for `paged_attention`.
        begins, ends, bases: int32 [tokens], contiguous. Partition p goes into slot p - bases[i].
        out: f32 [tokens, slots, heads, dim + TAIL], contiguous. Slots that nothing goes into are left as they are.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, a token has no such partition, or a table names no block of one.
    """
    tokens, heads, dim = q.shape
    blocks, _, _, kv_heads, block_size, _ = kv.shape
    check_attention(q, kv, layer, tables, rows, positions, 0)
    _check_states(out, heads, dim)
    for name, index in (("begins", begins), ("ends", ends), ("bases", bases)):
        _check_counts(name, index, tokens)
    isa = isa_of(backend, q.dtype)
    if isa is None or dim % 16 or block_size % 16 or dim > native.DIM_MAX:
        reference.partial_attention(
            q, kv, layer, tables, rows, positions, begins, ends, bases, out, scale=scale, partition=PARTITION
        )
        return
    native.partial_attention(
        isa,
        q.dtype == torch.bfloat16,
        q.data_ptr(),
        q.stride(0),
        *place_of(kv, layer, 1),
        tables.data_ptr(),
        *tables.shape,
        rows.data_ptr(),
        positions.data_ptr(),
        begins.data_ptr(),
        ends.data_ptr(),
        bases.data_ptr(),
        tokens,
        blocks,
        block_size,
        kv_heads,
        heads // kv_heads,
        dim,
        scale,
        out.data_ptr(),
        out.shape[1],
        threads,
    )


def combine_partials(
    states: Tensor,
    counts: Tensor,
    positions: Tensor,
    kv_heads: int,
    dtype: torch.dtype,
    *,
    threads: int,
    backend: str | None = None,
) -> Tensor:
    """Merge the first `counts[i]` states of each token, left to right.

    Args:
        states: f32 [tokens, slots, heads, dim + TAIL], contiguous, as `partial_attention` makes them.
        counts: int32 [tokens], contiguous; at least 1.
        positions: int32 [tokens], contiguous: of the tokens.
        kv_heads: that share the heads.
        dtype: of q, and of the result.

    Returns:
        [tokens, heads * dim], contiguous: what `paged_attention` over all those partitions returns.
    """
    tokens, slots, heads, floats = states.shape
    dim = floats - TAIL
    _check_states(states, heads, dim)
    _check_counts("counts", counts, tokens)
    isa = isa_of(backend, dtype)
    if isa is None or dim % 16 or dim > native.DIM_MAX:
        return reference.combine_partials(states, counts, dtype)
    out = torch.empty(tokens, heads * dim, dtype=dtype)
    native.combine_partials(
        isa,
        dtype == torch.bfloat16,
        states.data_ptr(),
        counts.data_ptr(),
        positions.data_ptr(),
        tokens,
        slots,
        kv_heads,
        heads // kv_heads,
        dim,
        out.data_ptr(),
        threads,
    )
    return out


def _check_states(states: Tensor, heads: int, dim: int) -> None:
    shape = (*states.shape[:2], heads, dim + TAIL)
    if states.dtype != torch.float32 or states.shape != shape or not states.is_contiguous():
        raise ValueError(
            f"states must be contiguous float32 {list(shape)}, not {states.dtype}{list(states.shape)}"
        )


def _check_counts(name: str, x: Tensor, tokens: int) -> None:
    if x.dtype != torch.int32 or x.shape != (tokens,) or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 [{tokens}], not {x.dtype}{list(x.shape)}")
