"""Plain-torch versions of the operations: the reference that the native kernels are tested against, and the fallback.

They promise correctness to tolerance; a row's bits may depend on the batch that it is in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1.44269504


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
    partition: int,
) -> None:
    """`ops.partial_attention`, one token and partition at a time, in f32. The sum of weights is all in the first lane."""
    _, heads, dim = q.shape
    _, _, _, kv_heads, block_size, _ = kv.shape
    for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        begin, end, base = int(begins[i]), int(ends[i]), int(bases[i])
        if not 0 <= base <= begin < end <= position // partition + 1 or end - base > out.shape[1]:
            raise ValueError(f"token {i} has no such partitions")
        for p in range(begin, end):
            keys = torch.arange(p * partition, min((p + 1) * partition, position + 1))
            blocks = tables[row].long()[keys // block_size]
            if bool(((blocks < 0) | (blocks >= kv.shape[0])).any()):
                raise ValueError(f"table row {row} names no block for a position it attends")
            k, v = kv[blocks, layer, :, :, keys % block_size].float().unbind(1)
            grouped = q[i].float().view(kv_heads, heads // kv_heads, dim)
            scores = torch.einsum("hgd,khd->hgk", grouped, k) * (scale * LOG2_E)
            greatest = scores.amax(-1, keepdim=True)
            weights = (scores - greatest).exp2()
            state = out[i, p - base].zero_()
            state[:, :dim] = torch.einsum("hgk,khd->hgd", weights, v).reshape(heads, dim)
            state[:, dim] = weights.sum(-1).flatten()
            state[:, -1] = greatest.flatten()


def combine_partials(states: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """`ops.combine_partials`."""
    tokens, _, heads, floats = states.shape
    dim = floats - 17
    out = torch.empty(tokens, heads, dim, dtype=dtype)
    for i, count in enumerate(counts.tolist()):
        mine = states[i, :count]
        share = (mine[..., -1] - mine[..., -1].amax(0)).exp2()
        total = (mine[..., dim:-1].sum(-1) * share).sum(0)
        out[i] = ((mine[..., :dim] * share[..., None]).sum(0) / total[:, None]).to(dtype)
    return out.view(tokens, heads * dim)


def write_kv(k: Tensor, v: Tensor, kv: Tensor, layer: int, blocks: Tensor, offsets: Tensor) -> None:
    """`ops.write_kv` by advanced indexing."""
    at = (blocks.long(), offsets.long())
    kv[:, layer, 0].transpose(1, 2)[at] = k
    kv[:, layer, 1].transpose(1, 2)[at] = v


def fixed_linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`ops.fixed_linear` on the f32 copy that `ops.pack` made."""
    return F.linear(x.float(), weight).to(out_dtype)
