"""A scattered, poisoned KV pool and the naive attention that the tests compare with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.compute import ops
from headrace.compute.pool import pool_tensors
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout


@dataclass
class Case:
    """Sequences whose K and V lie in a pool; everything outside the written slots is NaN, and unused table entries -1."""

    k: list[Tensor]  # per sequence [length, kv_heads, dim]
    v: list[Tensor]
    q: list[Tensor]  # per sequence [length, heads, dim]: a query for every position
    kv: Tensor
    tables: Tensor
    layer: int

    def batch(self, wanted: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """(q, rows, positions) of a batch of (sequence, position)."""
        q = torch.stack([self.q[s][p] for s, p in wanted])
        rows, positions = torch.tensor(wanted, dtype=torch.int32).T.contiguous()
        return q, rows, positions

    def every(self) -> list[tuple[int, int]]:
        return [(s, p) for s, q in enumerate(self.q) for p in range(len(q))]

    def naive(self, wanted: list[tuple[int, int]], scale: float, window: int) -> Tensor:
        """In f64, with the keys of every position and a mask."""
        out = torch.empty(len(wanted), self.q[0][0].numel(), dtype=torch.float64)
        for sequence in {s for s, _ in wanted}:
            index = [i for i, (s, _) in enumerate(wanted) if s == sequence]
            at = torch.tensor([wanted[i][1] for i in index])
            q, k, v = self.q[sequence][at], self.k[sequence], self.v[sequence]
            heads = q.shape[1]
            q, k, v = (
                x.double().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in (q, k, v)
            )
            distance = at[:, None] - torch.arange(k.shape[1])
            hidden = (distance < 0) | (distance >= (window or k.shape[1]))
            weights = (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1)
            out[index] = (weights @ v).transpose(0, 1).flatten(1)
        return out


def make(
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    seed: int = 0,
    place_seed: int = 0,
    shared: int = 0,
    layout: Layout = Layout.HEAD_MAJOR,
    backend: str | None = None,
) -> Case:
    """Random q, k, v from `seed`; block ids from `place_seed`, so that one content can lie in many places.

    All sequences have the first one's whole blocks of `shared` leading tokens, as far as they are that long.

    With a window, blocks that the last position no longer attends are freed: NaN, and -1 in the table.
    """
    draw = torch.Generator().manual_seed(seed)
    k, v, q = [], [], []
    for length in lengths:
        k.append(torch.randn(length, kv_heads, dim, generator=draw).to(dtype))
        v.append(torch.randn(length, kv_heads, dim, generator=draw).to(dtype))
        q.append(torch.randn(length, heads, dim, generator=draw).mul(2).to(dtype))
    counts = [-(-length // block_size) for length in lengths]
    blocks = sum(counts) + 3
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(place_seed)).int()
    group = KVGroup(GroupKind.FULL, (0, 1, 2), kv_heads, dim)
    spec = KVSpec((group,), block_size, str(dtype).removeprefix("torch."), layout)
    [kv] = pool_tensors(spec, [blocks])
    kv.fill_(float("nan"))
    tables = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        same = min(shared, length, lengths[0]) // block_size if s else 0
        k[s][: same * block_size], v[s][: same * block_size] = (
            k[0][: same * block_size],
            v[0][: same * block_size],
        )
        tables[s, :same] = tables[0, :same]
        tables[s, same:count], order = order[same:count], order[count:]
        at = torch.arange(length)
        where = tables[s][at // block_size].contiguous(), (at % block_size).int()
        ops.write_kv(k[s], v[s], kv, 1, *where, backend=backend)
        freed = max(0, length - window) // block_size if window else 0
        kv[tables[s, :freed].long()] = float("nan")
        tables[s, :freed] = -1
    return Case(k, v, q, kv, tables, 1)
