"""The start-up self-test: does a row of this model, on this CPU and build, have the same bits in every batch?

Kernels that promise it can be tested one by one; whether the whole (libraries, threads, paths chosen by shape) keeps it
shows here only. The digest of what came out names the arithmetic: workers may continue each other's KV, bit for bit,
if their digests are equal.
"""

from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.compute.layers.decoder import Decoder
from headrace.compute.ops import describe
from headrace.compute.pool import pool_tensors
from headrace.compute.rows import Rows
from headrace.types.kv import KVSpec, TableRun

TOKENS = 128
"""Of the test sequence: several 16-token chunks, several blocks of any usual size."""

LAST = (16, 4, 2, 1)
"""How many of the last tokens each further pass computes again: the row counts at which libraries change their path."""


class Numerics(NamedTuple):
    id: str
    """Hex digest of the logits and KV of the test sequence."""
    invariant: bool
    """Whether they had the same bits in every pass, by kernels that promise it and not by luck."""


def prepare(threads: int) -> None:
    """Settings of torch for this process, before a model is loaded: `threads` for its operations, and no gradients."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def torch_inference() -> AbstractContextManager[object]:
    """No gradients within, on the thread that enters it (`prepare` speaks for its own thread only)."""
    return torch.inference_mode()


def self_test(model: Decoder, spec: KVSpec, threads: int) -> Numerics:
    """Prefill one sequence at once, then compute its last tokens again in smaller batches, on a pool of its own."""
    length = min(TOKENS, model.length)
    blocks = spec.blocks_for(length)
    pool = pool_tensors(spec, [blocks] * len(spec.groups))
    rows = Rows(spec, length, 1)
    row = rows.acquire([(1 + 7919 * i) % model.vocab for i in range(length)])
    rows.extend(row, (TableRun(g, 0, 0, blocks) for g in range(len(spec.groups))))

    def run(first: int) -> tuple[Tensor, ...]:
        batch = rows.batch([(row, first, length - first)], [True], pool, threads)
        return model.forward(batch).clone(), *(kv.clone() for kv in pool)

    whole = run(0)
    again = [run(length - last) for last in LAST if last < length]
    digest = blake2b(digest_size=8)
    for tensor in whole:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    same = all(_same_bits(a, b) for passed in again for a, b in zip(whole, passed, strict=True))
    return Numerics(digest.hexdigest(), same and bool(describe(model.dtype)["invariant"]))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # As bytes: 0.0 and -0.0 differ, equal NaNs do not.
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
