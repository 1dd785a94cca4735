"""Perplexity of a text under a model, computed as it is served: the same kernels, chunks and KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp

import torch
import torch.nn.functional as F

from headrace.compute.layers.decoder import Decoder
from headrace.compute.pool import pool_tensors
from headrace.compute.rows import Rows
from headrace.types.kv import KVSpec, TableRun

CHUNK = 256
"""Tokens of a forward pass: all their logits are in memory at once."""


Progress = Callable[[int, int], None]
"""(tokens done, tokens)."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    tokens: int
    """Predicted."""
    loss: float
    """Mean, nats a token."""

    @property
    def value(self) -> float:
        return exp(min(self.loss, 700.0))


@torch.inference_mode()
def measure(
    model: Decoder,
    spec: KVSpec,
    ids: Sequence[int],
    *,
    window: int,
    threads: int,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """Each window of `window` tokens predicts, from nothing before it, the token after each of its own; the last may be shorter.

    Raises ValueError if there are not two tokens.
    """
    if len(ids) < 2:
        raise ValueError("a perplexity takes at least two tokens")
    blocks = spec.blocks_for(window)
    pool = pool_tensors(spec, [blocks] * len(spec.groups))
    rows = Rows(spec, window, 1)
    total, loss = len(ids) - 1, 0.0
    for begin in range(0, total, window):
        row = rows.acquire(ids[begin : begin + window])
        rows.extend(row, (TableRun(g, 0, 0, blocks) for g in range(len(spec.groups))))
        count = min(window, total - begin)
        for first in range(0, count, CHUNK):
            size = min(CHUNK, count - first)
            batch = rows.batch([(row, first, size)], [True], pool, threads)
            batch = replace(batch, wanted=torch.arange(size, dtype=torch.int32))
            after = begin + first + 1
            wanted = torch.tensor(ids[after : after + size])
            loss += float(F.cross_entropy(model.forward(batch).double(), wanted, reduction="sum"))
            progress(begin + first + size, total)
        rows.release(row)
    return Perplexity(total, loss / total)
