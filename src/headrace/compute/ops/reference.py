"""Plain-torch versions of the operations: the reference that the native kernels are tested against, and the fallback.

They promise correctness to tolerance; a row's bits may depend on the batch that it is in.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compute.ops.variants import LOG2_E, Standard
from headrace.compute.plans import PARTITION, Plan

TAIL = 17
"""Floats of a partial state beside its output: 16 lanes of the sum of weights, and the greatest score."""


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
    out = torch.empty(tokens, heads, floats - TAIL, dtype=dtype)
    for i, count in enumerate(counts.tolist()):
        merged = merge_states(states[i, :count])
        out[i] = (merged[:, :-TAIL] / merged[:, -TAIL:-1].sum(-1, keepdim=True)).to(dtype)
    return out.view(tokens, -1)


def planned_attention(
    q: Tensor, kv: Tensor, layer: int, plan: Plan, positions: Tensor, scale: float, variant: Standard
) -> Tensor:
    """`ops.planned_attention`: the plan's items, then its merges, as its arrays say, in f32."""
    tokens, heads, dim = q.shape
    out = torch.zeros(tokens, heads, dim)
    states = torch.full((plan.states, heads, dim + TAIL), float("nan"))
    for item in range(len(plan.item_tile)):
        tile = int(plan.item_tile[item])
        at = int(plan.item_state[item])
        parts = range(int(plan.item_begin[item]), int(plan.item_end[item]))
        found = [_state(q, kv, layer, plan, tile, p, positions, scale, variant) for p in parts]
        token, head, _ = found[0]
        if not at:  # a leading chunk: one state
            found = [(token, head, merge_states(torch.stack([state for _, _, state in found])))]
        for i, (_, _, state) in enumerate(found):
            if plan.slots[token[0]] == plan.slots[token[0] + 1]:
                out[token, head] = _finish(state, head, variant)
            else:
                states[torch.from_numpy(plan.slots)[token].long() + at + i, head] = state
    for token in range(tokens):
        begin, end = int(plan.slots[token]), int(plan.slots[token + 1])
        if begin < end:
            every = torch.arange(heads)
            out[token] = _finish(merge_states(states[begin:end]), every, variant)
    return out.to(q.dtype).view(tokens, heads * dim)


def _state(
    q: Tensor,
    kv: Tensor,
    layer: int,
    plan: Plan,
    tile: int,
    partition: int,
    positions: Tensor,
    scale: float,
    variant: Standard,
) -> tuple[Tensor, Tensor, Tensor]:
    """One partition of a tile, all KV heads: token and head of each vector, and its state [dim + TAIL]."""
    group, dim = plan.shape.group, q.shape[2]
    vectors = torch.arange(int(plan.tile_begin[tile]), int(plan.tile_end[tile]))
    token = torch.from_numpy(plan.order)[vectors // group].long()
    head = (vectors % group)[:, None] + torch.arange(plan.shape.kv_heads) * group  # [vectors, KV heads]
    low = max(int(plan.tile_low[tile]), partition * PARTITION)
    high = min(int(plan.tile_high[tile]), (partition + 1) * PARTITION - 1)
    keys = torch.arange(low, high + 1)
    distance = keys - positions[token].long()[:, None]
    seen = (distance <= 0) & (distance > -(plan.shape.window or 1 << 31))
    keys, seen, distance = keys[seen.any(0)], seen[:, seen.any(0)], distance[:, seen.any(0)]
    size = plan.sparse.block_size
    indices = torch.from_numpy(plan.sparse.indices)[int(plan.tile_blocks[tile]) :].long()
    k, v = kv[indices[keys // size], layer, :, :, keys % size].float().unbind(1)  # [keys, KV heads, dim]
    s = torch.einsum("vhd,khd->vhk", q[token[:, None], head].float(), k) * scale
    s = variant.score(s, head, distance)
    hidden = variant.seen(token, keys)
    seen = (seen if hidden is None else seen & hidden)[:, None]
    state = torch.zeros(*head.shape, dim + TAIL)
    if variant.softmax:
        s = (s * LOG2_E).masked_fill(~seen, float("-inf"))
        greatest = s.amax(-1) if len(keys) else torch.full(head.shape, float("-inf"))
        weights = (s - greatest[..., None]).exp2().where(seen, 0)  # NaN where a vector attends nothing here
    else:
        greatest, weights = torch.zeros(head.shape), variant.weight(s).where(seen, 0)
    v = v.where(seen.any(0).any(0)[:, None, None], 0)
    state[..., :dim] = torch.einsum("vhk,khd->vhd", weights, v)
    state[..., dim] = weights.sum(-1)
    state[..., -1] = greatest
    return token[:, None].expand(head.shape).flatten(), head.flatten(), state.flatten(0, 1)


def _finish(state: Tensor, heads: Tensor, variant: Standard) -> Tensor:
    """Outputs [n, dim] of states [n, dim + TAIL]."""
    total = state[:, -TAIL:-1].sum(-1)
    return state[:, :-TAIL] * variant.share(total, state[:, -1], heads)[:, None]


def merge_states(states: Tensor) -> Tensor:
    """Merge states [count, n, dim + TAIL] of vectors into one each. One in which nothing was attended changes nothing."""
    greatest = states[..., -1].amax(0)
    share = (states[..., -1] - greatest.clamp(min=torch.finfo(torch.float32).min)).exp2()
    merged = (states * share[..., None]).where(share[..., None] > 0, 0).sum(0)
    merged[..., -1] = greatest
    return merged


def write_kv(k: Tensor, v: Tensor, kv: Tensor, layer: int, blocks: Tensor, offsets: Tensor) -> None:
    """`ops.write_kv` by advanced indexing."""
    bad = (blocks < 0) | (blocks >= kv.shape[0]) | (offsets < 0) | (offsets >= kv.shape[4])
    if bool(bad.any()):
        raise ValueError(f"token {int(bad.nonzero()[0])} has no slot in the pool")
    at = (blocks.long(), offsets.long())
    kv[:, layer, 0].transpose(1, 2)[at] = k
    kv[:, layer, 1].transpose(1, 2)[at] = v


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_pytorch_tanh": _gelu_tanh}
"""By the name in config.json, `hidden_act`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` over the last axis, without a delta; weight of any shape that broadcasts to x."""
    wide = x.float()
    scale = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype) * weight


def gated(x: Tensor, activation: str) -> Tensor:
    """`ops.gated`."""
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[activation](gate).mul_(up)


def turn_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    layer: int,
    blocks: Tensor,
    offsets: Tensor,
    *,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """`ops.turn_and_write`, one operation after the other."""
    kv_heads = kv.shape[3]
    heads = qkv.shape[1] - 2 * kv_heads
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if weight is not None:
        qk = rms_norm(qk, weight, eps)
    cosines, sines = torch.cat([cos, cos], -1).unsqueeze(1), torch.cat([-sin, sin], -1).unsqueeze(1)
    turned = (qk * cosines).add_(qk.roll(qk.shape[-1] // 2, -1).mul_(sines))
    qkv[:, :heads] = turned[:, :heads]
    write_kv(turned[:, heads:], v, kv, layer, blocks, offsets)
    return qkv[:, :heads]


def fixed_linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`ops.fixed_linear` on the f32 copy that `ops.pack` made."""
    return F.linear(x.float(), weight).to(out_dtype)
