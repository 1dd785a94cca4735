"""`--memory virtual` (vAttention's KV memory) against the paged pool: mapping, stalls, waste, resident memory, attention.

    make bench NAME=virtual_memory [ARGS="--rounds 20 --steps 200"]

KV of Qwen3-0.6B's shape (28 layers, 8 KV heads, dim 128, bf16: 112 KiB a token), blocks of 32 tokens unless it says otherwise. The pools
are memory files, as in `serve`.
"""

import argparse
import mmap
import os
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from _report import pairs, seconds, target, write
from torch import Tensor

from headrace.compute import ops
from headrace.compute.memory.pages.cuda import CudaPages
from headrace.compute.memory.pages.memfd import MemfdPages
from headrace.compute.memory.virtual import VirtualMemory
from headrace.compute.pool import pool_tensors
from headrace.types.ids import RequestId, SequenceKey, StepId
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout, TableRun
from headrace.types.plan import Growth, SequenceStart, StepPlan, Work

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 28, 16, 8, 128, 32
SCALE = DIM**-0.5
SPEC = KVSpec(
    (KVGroup(GroupKind.FULL, tuple(range(LAYERS)), KV_HEADS, DIM),), BLOCK, "bfloat16", Layout.TOKEN_MAJOR
)
TOKEN = SPEC.block_bytes(0) // BLOCK
CHUNK = 512
DECODE_S, PREFILL_S = 0.01, 0.1
"""Of arithmetic on one thread, in place of a model's steps (of this shape they take longer on CPUs)."""


@dataclass
class PoolFile:
    spec: KVSpec
    blocks: int
    fd: int
    view: memoryview

    @property
    def pages(self) -> MemfdPages:
        return MemfdPages(self.fd)


@contextmanager
def pool_file(spec: KVSpec, blocks: int, *, filled: bool) -> Iterator[PoolFile]:
    nbytes = blocks * spec.block_bytes(0)
    fd = os.memfd_create("benchmark")
    os.ftruncate(fd, nbytes)
    mapped = mmap.mmap(fd, nbytes)
    if filled:
        mapped.madvise(23)  # MADV_POPULATE_WRITE
    yield PoolFile(spec, blocks, fd, memoryview(mapped))
    os.close(fd)


@contextmanager
def ranges_on(pool: PoolFile, length: int, count: int, *, look_ahead: bool) -> Iterator[VirtualMemory]:
    memory = VirtualMemory(
        pool.spec,
        [pool.blocks],
        [pool.view],
        pages=pool.pages,
        offsets=[0],
        length=length,
        ranges=count,
        look_ahead=look_ahead,
    )
    yield memory
    memory.close()


def key(number: int) -> SequenceKey:
    return SequenceKey(RequestId(number))


# Mapping


def mapping(rounds: int) -> dict[str, Any]:
    """Microseconds of a block, by block size and by how many lie side by side; the pool is there already, or is touched first."""
    found: dict[str, Any] = {}
    for tokens in (16, 32, 64, 128):
        spec = msgspec.structs.replace(SPEC, block_size=tokens)
        size, count = spec.block_bytes(0), 2048 // tokens
        with pool_file(spec, count, filled=True) as pool:
            for name, populate in (("mapped", False), ("mapped_and_faulted_in", True)):
                pages = MemfdPages(pool.fd, populate=populate)
                address = pages.reserve(size * count)
                for piece in (1, 4):
                    times = [show(pages, address, size, count, piece) for _ in range(rounds)]
                    found[f"{name}, {tokens} tokens ({size / 2**20:.2f} MiB), {piece} at a time"] = {
                        "us_a_block": statistics.median(t[0] for t in times) / count * 1e6,
                        "unmap_us_a_block": statistics.median(t[1] for t in times) / count * 1e6,
                    }
                pages.close()
    with pool_file(SPEC, 64, filled=False) as pool:
        pages = pool.pages
        address, size = pages.reserve(64 * SPEC.block_bytes(0)), SPEC.block_bytes(0)
        found["first touch of the pool, 32 tokens"] = {
            "us_a_block": show(pages, address, size, 64, 1)[0] / 64 * 1e6
        }
        pages.close()
    return found


def show(pages: MemfdPages, address: int, size: int, count: int, piece: int) -> tuple[float, float]:
    """Seconds of mapping and of unmapping `count` blocks in pieces, last first, so that no two merge."""
    places = [i * size for i in range(0, count, piece)]

    def put() -> None:
        for at, offset in zip(places, reversed(places), strict=True):
            pages.show(address + at, offset, piece * size)

    def take() -> None:
        for at in places:
            pages.hide(address + at, piece * size)

    return seconds(put), seconds(take)


# Stalls


def work(step_s: float) -> None:
    """Arithmetic for the length of a step, without the interpreter's lock, as a model's."""
    x = torch.ones(256, 256)
    end = perf_counter() + step_s
    while perf_counter() < end:
        x = x @ x * 0


def decode_plans(sequences: int, steps: int) -> Iterator[StepPlan]:
    """All start with one block and draw a token a step; each grows by a block every 32 steps, one after the other. Scattered blocks."""
    free = random.Random(0).sample(range(sequences * (steps // BLOCK + 3)), sequences * (steps // BLOCK + 3))
    tables = dict.fromkeys(range(sequences), 1)
    starts = tuple(
        SequenceStart(key(n), 1 + n % BLOCK, 0, 0, (TableRun(0, 0, free.pop(), 1),)) for n in tables
    )
    for step in range(steps):
        growth = []
        items = []
        for n in tables:
            at = step + n % BLOCK
            if at // BLOCK >= tables[n]:
                growth.append(Growth(key(n), (TableRun(0, tables[n], free.pop(), 1),)))
                tables[n] += 1
            items.append(Work(key(n), at, 1, True))
        yield StepPlan(
            StepId(step + 1), StepId(step), (), starts if step == 0 else (), tuple(growth), tuple(items)
        )


def prefill_plans(tokens: int) -> Iterator[StepPlan]:
    """A prompt whose blocks are all there at its start, in chunks."""
    table = tuple(TableRun(0, i, (i * 7) % 263, 1) for i in range(tokens // BLOCK))
    start = SequenceStart(key(0), tokens, 0, 0, table)
    for step in range(tokens // CHUNK):
        item = Work(key(0), step * CHUNK, CHUNK, False)
        yield StepPlan(StepId(step + 1), StepId(step), (), (start,) if step == 0 else (), (), (item,))


def stalls(
    plans: list[StepPlan], pool: PoolFile, length: int, step_s: float, *, look_ahead: bool
) -> list[float]:
    """Milliseconds that each step waits before it can run. Each plan is named while the one before it runs, as `serve` does."""
    found = []
    with ranges_on(pool, length, 32, look_ahead=look_ahead) as memory:
        memory.ahead(plans[0])
        for at, plan in enumerate(plans):
            found.append(seconds(lambda plan=plan: memory.prepare(plan)) * 1e3)
            if at + 1 < len(plans):
                memory.ahead(plans[at + 1])
            work(step_s)
    return found


def stall_figures(steps: int, rounds: int) -> tuple[dict[str, Any], list[float]]:
    """By kind of step; and with look-ahead's share of the stalls without, of growing decode steps, by round."""
    found: dict[str, Any] = {}
    shares: list[float] = []
    kinds = (
        ("decode, 16 sequences", list(decode_plans(16, steps)), steps + 2 * BLOCK, DECODE_S),
        ("prompt of 8,192 tokens, first chunk", list(prefill_plans(8192))[:1], 8192, PREFILL_S),
        ("prompt of 8,192 tokens, later chunks", list(prefill_plans(8192)), 8192, PREFILL_S),
    )
    with pool_file(SPEC, max(263, 16 * (steps // BLOCK + 3)), filled=True) as pool:
        for name, plans, length, step_s in kinds:
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                sums = {}
                for ahead in (False, True):
                    one = stalls(plans, pool, length, step_s, look_ahead=ahead)
                    one = one[len(plans) > 1 :]  # the first step is in nobody's shadow
                    times[ahead] += one
                    sums[ahead] = sum(one)
                if name.startswith("decode"):
                    shares.append(sums[True] / sums[False])
            found[name] = {
                label: {
                    "mean_ms": statistics.fmean(times[ahead]),
                    "p99_ms": sorted(times[ahead])[int(len(times[ahead]) * 0.99)],
                    "max_ms": max(times[ahead]),
                }
                for ahead, label in ((False, "without look-ahead"), (True, "with look-ahead"))
            }
    return found, shares


# Memory


def waste() -> dict[str, float]:
    """Share of a sequence's blocks that holds no token, for lengths drawn log-normally (median 512, 8,192 at most)."""
    draw = random.Random(0)
    lengths = [min(8192, max(1, int(draw.lognormvariate(6.24, 1.1)))) for _ in range(10_000)]
    sizes = {f"{size} tokens ({size * TOKEN / 2**20:.2f} MiB)": size for size in (16, 32, 64, 128, 512)}
    sizes["one 2 MiB page a layer and plane (stock CUDA)"] = 2 * 2**20 // (TOKEN // (2 * LAYERS))
    return {
        name: 1 - sum(lengths) / sum(-(-n // size) * size for n in lengths) for name, size in sizes.items()
    }


def resident(sequences: int = 8, steps: int = 16, each: int = 64) -> dict[str, Any]:
    """Shared memory in this process's pages against bytes of used tokens, as sequences grow, end, and are trimmed."""
    rows = []
    with (
        pool_file(SPEC, sequences * steps * each // BLOCK, filled=False) as pool,
        ranges_on(pool, steps * each, 2 * sequences, look_ahead=True) as memory,
    ):
        before = shared_bytes()
        number = 0
        for step in range(steps):
            growth, items = [], []
            for n in range(sequences):
                first, count = step * each // BLOCK, each // BLOCK
                run = TableRun(0, first, (n * steps * each) // BLOCK + first, count)
                growth.append((n, run))
                items.append(Work(key(n), step * each, each, False))
            begun = tuple(SequenceStart(key(n), each, 0, 0, (run,)) for n, run in growth)
            grown = tuple(Growth(key(n), (run,)) for n, run in growth)
            number += 1
            memory.prepare(
                StepPlan(
                    StepId(number),
                    StepId(number - 1),
                    (),
                    begun if step == 0 else (),
                    grown if step else (),
                    tuple(items),
                )
            )
            used = sequences * (step + 1) * each * TOKEN
            rows.append((used, shared_bytes() - before))
        peak = shared_bytes() - before
        for n in range(sequences):
            memory.release(key(n))
        idle = shared_bytes() - before
        while memory.counts().mapped_bytes:
            number += 1
            memory.ahead(StepPlan(StepId(number), StepId(number - 1), (), (), (), ()))
            memory.settle()
        trimmed = shared_bytes() - before
    return {
        "reserved_addresses_gb": 2 * sequences * steps * each * TOKEN / 1e9,
        "resident_over_used": [rss / used for used, rss in rows],
        "peak_gb": peak / 1e9,
        "after_all_ended_gb": idle / 1e9,
        "after_trimming_gb": trimmed / 1e9,
    }


def shared_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem"))


# Attention


def views(sequences: int, length: int, pool: PoolFile, memory: VirtualMemory) -> tuple[Tensor, Tensor]:
    """The same random KV scattered in a head-major pool and in the ranges' pool; tables, the head-major pool."""
    per = -(-length // BLOCK)
    table = torch.randperm(sequences * per).int().view(sequences, per)
    head_major = msgspec.structs.replace(SPEC, layout=Layout.HEAD_MAJOR)
    [other] = pool_tensors(head_major, [sequences * per])
    some = torch.randn(LAYERS, 2, KV_HEADS, BLOCK, DIM).bfloat16()
    for block in range(sequences * per):
        other[block] = memory.pool[0][block] = some.roll(block, 3)
    starts = tuple(
        SequenceStart(
            key(n), length, 0, 0, tuple(TableRun(0, i, b, 1) for i, b in enumerate(table[n].tolist()))
        )
        for n in range(sequences)
    )
    items = tuple(Work(key(n), 0, length, False) for n in range(sequences))
    memory.prepare(StepPlan(StepId(1), StepId(0), (), starts, (), items))
    return table, other


def attention(sequences: int, length: int, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one decode step's attention in all layers: the same kernel on the paged pools and on the ranges, and torch's."""
    per = -(-length // BLOCK)
    with (
        pool_file(SPEC, sequences * per, filled=True) as pool,
        ranges_on(pool, length, sequences, look_ahead=False) as memory,
    ):
        table, head_major = views(sequences, length, pool, memory)
        q = torch.randn(sequences, HEADS, DIM).bfloat16()
        places = [memory.row(key(n)) or 0 for n in range(sequences)]
        whole = memory.contiguous_view(0)

        def ours(kv: Tensor, tables: Tensor, rows: Tensor) -> Callable[[], Tensor]:
            positions = torch.full((sequences,), length - 1).int()

            def run() -> Tensor:
                for layer in range(LAYERS):
                    out = ops.paged_attention(
                        q, kv, layer, tables, rows, positions, scale=SCALE, threads=threads
                    )
                return out

            return run

        def attend(layer: int, n: int, k: Tensor, v: Tensor) -> Tensor:
            # The query heads of a KV head as so many positions: then torch takes its flash kernel.
            x = q[n].view(1, KV_HEADS, -1, DIM)
            return F.scaled_dot_product_attention(x, k.transpose(0, 1)[None], v.transpose(0, 1)[None])

        def on_view() -> None:
            for layer in range(LAYERS):
                for n in range(sequences):
                    attend(layer, n, *memory.contiguous(key(n), 0, layer, length))

        def gathered() -> None:
            for layer in range(LAYERS):
                for n in range(sequences):
                    kv = head_major[table[n].long(), layer].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
                    attend(layer, n, kv[0], kv[1])

        in_order = torch.arange(sequences).int()
        paged = ours(head_major, table, in_order)
        paged_tokens = ours(memory.pool[0], table, in_order)
        contiguous = ours(whole, torch.arange(len(whole)).int().view(-1, 1), torch.tensor(places).int())
        assert torch.equal(paged(), contiguous()) and torch.equal(paged(), paged_tokens()), (
            "not the same bits"
        )
        found = {
            "contiguous / paged head-major": pairs(contiguous, paged, rounds),
            "contiguous / paged token-major": pairs(contiguous, paged_tokens, rounds),
            "SDPA on the view / SDPA after a gather": pairs(on_view, gathered, max(3, rounds // 4)),
        }
        del whole, contiguous
    return {
        name: {
            "ms": [statistics.median(first) * 1e3, statistics.median(second) * 1e3],
            "ratio": statistics.median(a / b for a, b in zip(first, second, strict=True)),
            "ratios": [a / b for a, b in zip(first, second, strict=True)],
        }
        for name, (first, second) in found.items()
    }


def on_device(rounds: int) -> str | dict[str, float]:
    """Microseconds of mapping one page of a GPU's memory, where there is one."""
    try:
        pages = CudaPages(64 * 2**21)
    except OSError as error:
        return f"skipped: {error}"
    address, size = pages.reserve(64 * pages.page_bytes), pages.page_bytes
    times = [seconds(lambda: pages.show(address, 0, 64 * size)) / 64 * 1e6 for _ in range(rounds)]
    pages.close()
    return {"page_bytes": size, "us_a_page": statistics.median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    mapped = mapping(given.rounds)
    torch.set_num_threads(1)
    waits, shares = stall_figures(given.steps, max(3, given.rounds // 4))
    torch.set_num_threads(given.threads)
    rss = resident()
    shapes = ((16, 550), (2, 4096))
    attended = {f"{n} x {length}": attention(n, length, given.threads, given.rounds) for n, length in shapes}
    over = rss["resident_over_used"]
    targets = [
        target(
            "decode stalls with look-ahead, of those without",
            shares,
            "",
            "< 0.1",
            met=statistics.median(shares) < 0.1,
        ),
        target(
            "resident bytes over bytes of used tokens",
            over,
            "",
            "0.95 to 1.05",
            met=max(over) <= 1.05 and min(over) >= 0.95,
        ),
    ]
    for shape, found in attended.items():
        for name, goal in (
            ("contiguous / paged head-major", 1.05),
            ("contiguous / paged token-major", 1.05),
            ("SDPA on the view / SDPA after a gather", 1.0),
        ):
            ratios = found[name].pop("ratios")
            met = statistics.median(ratios) <= goal
            targets.append(target(f"decode {shape}: {name}", ratios, "of the time", f"<= {goal}", met=met))
    write(
        "virtual_memory",
        {
            "mapping": mapped,
            "stall_of_a_step": waits,
            "internal_waste": waste(),
            "resident": rss,
            "decode_attention": attended,
            "cuda": on_device(given.rounds),
        },
        targets,
        {},
        NOTES,
    )


NOTES = (
    "Steps in the stalls are 10 ms (decode) and 100 ms (chunks) of arithmetic on one thread; prompts have all their blocks from the "
    "start, as the core grants them. A stall is the time from when a step could run to when its KV is mapped and faulted in. Waste is "
    "arithmetic over 10,000 drawn lengths. The gather that SDPA is compared with is what a kernel for contiguous KV needs on a paged pool; "
    "the fair peer of a paged pool is a paged kernel, which is the first ratio. Token-major keys of a layer and head lie 112 KiB apart, "
    "each on a page of its own; head-major ones lie side by side. Nothing here ran on a GPU unless `cuda` says so."
)

if __name__ == "__main__":
    with torch.inference_mode():
        main()
