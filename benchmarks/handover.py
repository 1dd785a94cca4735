"""Handover of a long prompt from a prefill to a decode worker of one host: one shared pool, and a pool each, beside a plain memcpy.

    make bench NAME=handover [ARGS="--rounds 7"]

The time is from the first token drawn (prefill worker's clock) until the decode worker holds all KV (its own clock, the same on one host).
With a shared pool no byte moves; with separate pools chunks are sent while later ones are computed, so only the rest is waited for.
Then, without a model: the KV of a longer prompt from one process's pool to another's in four ways (`_handover`), and what many allocations
and frees do to the number of runs (`_churn`).
"""

import argparse
import asyncio
import statistics
from typing import Any

import numpy as np
from _churn import measure as measure_churn
from _handover import MODES, WAYS
from _handover import measure as measure_ways
from _model import prompt, qwen3_shape
from _report import seconds, target, write
from _service import complete, service

from headrace.types.request import Timeline

NOTES = (
    "Qwen3-0.6B's shape, bf16, 32 tokens a block; one thread a worker. Ways: two processes, one lane, tables of runs of 4 to 32 blocks on "
    "either side. Churn: 16,384 blocks, 80% full, requests of 1 to 512 blocks; growing ones take blocks one by one, too."
)


async def measure(tokens: int, rounds: int, *, separate: bool, chunk: int) -> list[Timeline]:
    """Timelines of `rounds` prompts that share nothing."""
    options = {
        "prefill": 1,
        "decode": 1,
        "threads": 1,
        "separate_pools": separate,
        "max_num_batched_tokens": chunk,
    }
    async with service(model=qwen3_shape(), max_model_len=4096, kv_memory="2GiB", **options) as running:
        await complete(running, prompt(99, 64), 2, "warm-up")
        return [(await complete(running, prompt(i, tokens), 2, f"round {i}"))[1] for i in range(rounds)]


def memcpy_ms(nbytes: int, rounds: int) -> float:
    """Median of copying so many bytes within one process, one thread, memory touched before."""
    source, goal = np.ones(nbytes, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
    return statistics.median(seconds(lambda: np.copyto(goal, source)) for _ in range(rounds)) * 1e3


def waits_ms(timelines: list[Timeline]) -> list[float]:
    return [(t.joined_ns - t.prefilled_ns) / 1e6 for t in timelines]


def ways_targets(transport: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs merged on both sides beside each other way, of the same rounds."""
    merged = figures["run-merged"]
    found: list[dict[str, Any]] = []
    for mode in MODES:
        for way in WAYS:
            if way == "run-merged":
                continue
            ratios = [m["ms"] / o["ms"] for m, o in zip(merged[mode], figures[way][mode], strict=True)]
            what = f"{transport}, {mode}: time of run-merged / {way}"
            found.append(target(what, ratios, "", "<= 1", met=statistics.median(ratios) <= 1))
    return found


def churn_targets(figures: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind, allocators in figures.items():
        segments, free_list = (allocators[name]["runs_per_request"] for name in ("segments", "free_list"))
        ratios = [a / b for a, b in zip(segments, free_list, strict=True)]
        what = f"runs a request after many allocations and frees, {kind}: segments / free list"
        found.append(target(what, ratios, "", "< 1", met=max(ratios) < 1))
    return found


def live(o: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Handovers within a service."""
    shared = asyncio.run(measure(o.tokens, o.rounds, separate=False, chunk=o.chunk))
    chunked = asyncio.run(measure(o.tokens, o.rounds, separate=True, chunk=o.chunk))
    whole = asyncio.run(measure(o.tokens, o.rounds, separate=True, chunk=o.tokens))
    moved = whole[0].bytes_moved
    copy_ms = memcpy_ms(moved, o.rounds)
    figures = {
        "shared_pool": {
            "wait_ms": waits_ms(shared),
            "bytes": shared[0].bytes_moved,
            "calls": shared[0].writes,
        },
        "separate_chunked": {
            "wait_ms": waits_ms(chunked),
            "bytes": chunked[0].bytes_moved,
            "calls": chunked[0].writes,
        },
        "separate_at_once": {"wait_ms": waits_ms(whole), "bytes": moved, "calls": whole[0].writes},
        "memcpy_ms": round(copy_ms, 2),
    }
    figures["separate_at_once_wait_per_memcpy"] = statistics.median(waits_ms(whole)) / copy_ms
    chunks = -(-o.tokens // o.chunk)
    moved_shared = [float(t.bytes_moved) for t in shared]
    calls = [t.writes / chunks for t in chunked]
    hidden = [w / statistics.median(waits_ms(whole)) for w in waits_ms(chunked)]
    targets = [
        target("shared pool: bytes moved", moved_shared, "B", "0", met=not any(moved_shared)),
        target(
            "separate pools: calls per chunk",
            calls,
            "",
            "<= 1 (one run, contiguous on both sides)",
            met=max(calls) <= 1,
        ),
        target(
            "wait when sent in chunks / sent at once", hidden, "", "< 1", met=statistics.median(hidden) < 1
        ),
    ]
    return figures, targets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"tokens": 2048, "rounds": 5, "chunk": 512, "ways-tokens": 8192, "operations": 100_000}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--without-model", action="store_true", help="the last two parts only")
    o = parser.parse_args()
    figures, targets = ({}, []) if o.without_model else live(o)
    for transport in ("shm", "tcp"):
        ways = measure_ways(transport, o.ways_tokens, o.rounds)
        figures[f"ways over {transport}"] = ways
        targets += ways_targets(transport, ways)
    churned = {
        kind: measure_churn(16384, o.operations, 3, growing=growing)
        for kind, growing in (("whole requests", False), ("growing requests", True))
    }
    figures["churn"] = churned
    targets += churn_targets(churned)
    write("handover", figures | {"sizes": vars(o)}, targets, {}, NOTES)


if __name__ == "__main__":
    main()
