"""Attention over KV that lies on several instances: bytes of a step, its time with a share of the KV elsewhere, and the longest context.

    make bench NAME=dist_attention [ARGS="--tokens 8192 --rounds 9"]

The layers of the 0.6B-shaped model (16 heads over 8 KV heads of dim 128, bf16), random KV. Holders are processes of their own, asked over
local sockets as workers ask each other. Bytes are counted, not estimated: what a decode step sends and receives for all layers, against the
KV of the same partitions, which fetching them would move (once, if there were room for them; a step that must fetch them anew, each step).
"""

import argparse
import multiprocessing
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _report import target, write

from headrace.compute.distant import Distant, Span
from headrace.compute.holding import Holding
from headrace.compute.ops import paged_attention
from headrace.compute.plans import PARTITION
from headrace.compute.pool import pool_tensors
from headrace.live.lending import Connections, Desk
from headrace.types.ids import Address
from headrace.types.kv import GroupKind, KVGroup, KVSpec

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 28, 16, 8, 128, 32
EACH = PARTITION // BLOCK
SPEC = KVSpec((KVGroup(GroupKind.FULL, tuple(range(LAYERS)), KV_HEADS, DIM),), BLOCK, "bfloat16")


def hold(secret: str, address: Address, blocks: int, ready: Any) -> None:
    """A holder's process: random KV, and answers until it is ended."""
    torch.set_num_threads(1)
    pool = pool_tensors(SPEC, [blocks])
    pool[0].normal_()
    Desk(secret, address, Holding(pool, SPEC.dtype, threads=1).answer)
    ready.set()
    multiprocessing.Event().wait()


class Step:
    """The attention of one decode step of one sequence, all layers, with its first `away` partitions at `holders`."""

    def __init__(self, pool: torch.Tensor, tokens: int, away: int, holders: list[Address], secret: str):
        self._pool = pool
        self._position = torch.tensor([tokens - 1], dtype=torch.int32)
        self._row = torch.zeros(1, dtype=torch.int32)
        self._table = torch.arange(tokens // BLOCK, dtype=torch.int32)[None]
        self._q = torch.randn(1, HEADS, DIM).bfloat16()
        tables = {}
        for number, holder in enumerate(holders):
            mine = range(number, away, len(holders))
            if len(mine):
                tables[holder] = [{p: list(range(i * EACH, (i + 1) * EACH)) for i, p in enumerate(mine)}]
        self._spans: Sequence[Span] = (Span(0, 0, 1, tables, away),) if away else ()
        self._asking = Connections(secret, 30)
        self.bytes = 0

    def __call__(self) -> None:
        distant = Distant(self._spans, self._asking) if self._spans else None
        for layer in range(LAYERS):
            args = (self._table, self._row, self._position)
            if distant is None:
                paged_attention(self._q, self._pool, layer, *args, scale=DIM**-0.5, threads=1)
            else:
                distant.attend(self._q, self._pool, 0, layer, *args, scale=DIM**-0.5, threads=1)
        if distant is not None:
            assert not distant.lost
            self.bytes = distant.bytes


def longest(workers: int, pool_tokens: int) -> int:
    """Tokens that `workers` pools hold of one sequence, if all of each is lent (`--lend-kv 1`)."""
    return pool_tokens + (workers - 1) * (pool_tokens // PARTITION * PARTITION)


def interleaved(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn, after a warm-up."""
    from _report import seconds

    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="context of the sequence")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    partitions = options.tokens // PARTITION
    pool = pool_tensors(SPEC, [options.tokens // BLOCK])[0]
    pool.normal_()
    secret, holders = secrets.token_hex(8), [Address("a"), Address("b")]
    context = multiprocessing.get_context("spawn")
    processes = []
    for holder in holders:
        ready = context.Event()
        process = context.Process(target=hold, args=(secret, holder, pool.shape[0], ready), daemon=True)
        process.start()
        processes.append(process)
        ready.wait()
    try:
        shares = {0: 0, 25: partitions // 4, 50: partitions // 2, 75: 3 * partitions // 4}
        steps = {f"{s}%": Step(pool, options.tokens, away, holders, secret) for s, away in shares.items()}
        times = interleaved(dict(steps.items()), options.rounds)
    finally:
        for process in processes:
            process.kill()
    shipped = {name: shares[int(name[:-1])] * EACH * SPEC.block_bytes(0) for name in steps}
    local = sorted(times["0%"])[options.rounds // 2]
    targets = [
        target(
            f"bytes of a decode step with {name} elsewhere, of the KV there",
            [step.bytes / shipped[name]],
            "share",
            "< 0.05",
            met=step.bytes < 0.05 * shipped[name],
        )
        for name, step in steps.items()
        if step.bytes
    ]
    targets += [
        target(
            f"attention of a decode step with {name} elsewhere, of all here",
            [t / local for t in times[name]],
            "ratio",
            "<= 1.5",
            met=sorted(times[name])[options.rounds // 2] <= 1.5 * local,
        )
        for name in list(steps)[1:]
    ]
    figures = {
        "tokens": options.tokens,
        "bytes per step": {name: step.bytes for name, step in steps.items()},
        "bytes of that KV": shipped,
        "attention of a step, ms": times,
        "longest context with pools of 4,096 tokens": {str(k): longest(k, 4096) for k in (1, 2, 4, 8)},
    }
    notes = (
        "Holders on the same cores as the owner. A state is the output, 16 lanes of weights and a maximum in f32, as equal bits need: "
        "(dim + 17) * 4 bytes a head and partition."
    )
    write("dist_attention", figures, targets, {}, notes)


if __name__ == "__main__":
    main()
