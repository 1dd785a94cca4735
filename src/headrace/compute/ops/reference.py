"""Plain-torch versions of the operations: the reference that the native kernels are tested against, and the fallback.

They promise correctness to tolerance; a row's bits may depend on the batch that it is in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    tables: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int,
) -> Tensor:
    """`ops.paged_attention`, one sequence at a time, in f32."""
    tokens, heads, dim = q.shape
    _, _, _, kv_heads, block_size, _ = kv.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype)
    for row in rows.unique().tolist():
        mine = (rows == row).nonzero().flatten()
        last = positions[mine].long()
        first = (last - window + 1).clamp(min=0) if window else torch.zeros_like(last)
        low, high = int(first.min()), int(last.max()) + 1
        keys = torch.arange(low, high)
        seen = (keys >= first[:, None]) & (keys <= last[:, None])
        # A slot that nobody attends may hold anything, NaN too, and 0 * NaN is NaN.
        keys, seen = keys[seen.any(0)], seen[:, seen.any(0)]
        blocks = tables[row].long()[keys // block_size]
        if bool(((blocks < 0) | (blocks >= kv.shape[0])).any()):
            raise ValueError(f"table row {row} names no block for a position it attends")
        k, v = kv[blocks, layer, :, :, keys % block_size].float().unbind(1)
        grouped = q[mine].float().view(len(mine), kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("qhgd,khd->qhgk", grouped, k) * scale
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        out[mine] = torch.einsum("qhgk,khd->qhgd", weights, v).reshape(len(mine), heads, dim).to(q.dtype)
    return out.view(tokens, heads * dim)


def write_kv(k: Tensor, v: Tensor, kv: Tensor, layer: int, blocks: Tensor, offsets: Tensor) -> None:
    """`ops.write_kv` by advanced indexing."""
    at = (blocks.long(), offsets.long())
    kv[:, layer, 0].transpose(1, 2)[at] = k
    kv[:, layer, 1].transpose(1, 2)[at] = v


def fixed_linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`ops.fixed_linear` on the f32 copy that `ops.pack` made."""
    return F.linear(x.float(), weight).to(out_dtype)
