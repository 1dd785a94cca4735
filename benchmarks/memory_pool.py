"""A pool's index and its tiers: microseconds to match and insert a prompt, and bytes per second down and up.

    make bench NAME=memory_pool [ARGS="--rounds 9"]

4,096 tokens in blocks of 16 and of 32, in an index that holds 64 other prompts: match and lock them, and publish them (MemServe, section 4,
reports under 700 us). Tiers: 256 MiB in blocks of 3.5 MiB (0.6B-shaped, 32 tokens) into and out of host memory against `memmove` of the
same bytes into one piece, in interleaved pairs; written to disk and read back with the checksum, from the page cache.
"""

import argparse
import ctypes
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

from _report import pairs, target, write

from headrace.kv.evict import lru
from headrace.kv.pool import BlockPool
from headrace.live.stores.disk import DiskStore
from headrace.live.stores.memory import MemoryStore
from headrace.types.hashing import block_hashes, chain_root
from headrace.types.ids import Address, BlockHash, PoolId, RequestId, SequenceKey
from headrace.types.kv import BlockRun, GroupKind, KVGroup, KVSpec, TableRun

TOKENS, OTHERS = 4096, 64
HOLDER = Address("worker")
BLOCK_BYTES = 28 * 2 * 8 * 32 * 128 * 2
BLOCKS = 256 * 2**20 // BLOCK_BYTES
GOAL_US = 700.0


def spec(block_size: int) -> KVSpec:
    return KVSpec((KVGroup(GroupKind.FULL, tuple(range(28)), 8, 128),), block_size, "bfloat16")


def names(number: int, block_size: int) -> tuple[BlockHash, ...]:
    return tuple(block_hashes(chain_root("bench"), [number] * TOKENS, block_size))


def insert(pool: BlockPool, runs: list[BlockRun], chain: tuple[BlockHash, ...], number: int) -> None:
    at, table = 0, list[TableRun]()
    for run in runs:
        table.append(TableRun(0, at, run.first, run.count))
        at += run.count
    pool.publish(HOLDER, SequenceKey(RequestId(number)), tuple(table), chain)


def index_us(block_size: int, rounds: int) -> tuple[list[float], list[float]]:
    """Of a match with its locks, and of an insert."""
    blocks = TOKENS // block_size
    pool = BlockPool(PoolId(0), spec(block_size), (blocks * (OTHERS + 2),), lru.Policy(lru.Config()))
    pool.join(HOLDER)
    for number in range(OTHERS):
        insert(pool, pool.grant(HOLDER, 0, blocks), names(number, block_size), number)
        pool.release(HOLDER, SequenceKey(RequestId(number)), number)
    matches, inserts = list[float](), list[float]()
    for turn in range(rounds + 1):
        chain, number = names(1000 + turn, block_size), 1000 + turn
        key = SequenceKey(RequestId(number))
        runs = pool.grant(HOLDER, 0, blocks)
        begun = perf_counter()
        insert(pool, runs, chain, number)
        inserted = perf_counter()
        pool.release(HOLDER, key, number)
        again = SequenceKey(RequestId(number), 1)
        began = perf_counter()
        tokens, _ = pool.match(HOLDER, again, chain, TOKENS, number)
        matched = perf_counter()
        assert tokens == TOKENS
        pool.release(HOLDER, again, number)
        inserts.append((inserted - begun) * 1e6)
        matches.append((matched - began) * 1e6)
    return matches[1:], inserts[1:]


def tiers(rounds: int) -> dict[str, float]:
    """GB/s, medians."""
    pool = memoryview(bytearray(BLOCKS * BLOCK_BYTES))
    plain = memoryview(bytearray(BLOCKS * BLOCK_BYTES))
    keys = [BlockHash(number.to_bytes(16, "big")) for number in range(BLOCKS)]
    # Every second block, then the others: nothing lies in one piece.
    order = [*range(0, BLOCKS, 2), *range(1, BLOCKS, 2)]
    views = [pool[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] for block in order]
    memory = MemoryStore(BLOCKS, BLOCK_BYTES)
    whole = (ctypes.c_char * len(pool)).from_buffer(pool), (ctypes.c_char * len(plain)).from_buffer(plain)

    def down() -> None:
        for key, view in zip(keys, views, strict=True):
            memory.put(key, view)

    def up() -> None:
        assert all(memory.get(key, view) for key, view in zip(keys, views, strict=True))

    def memcpy() -> None:
        ctypes.memmove(whole[1], whole[0], len(pool))

    demote, copied = pairs(down, memcpy, rounds)
    promote, copied_too = pairs(up, memcpy, rounds)
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskStore(Path(folder), bytes(16), "pool0", BLOCK_BYTES)

        def save() -> None:
            for key, view in zip(keys, views, strict=True):
                disk.put(key, view)

        def load() -> None:
            assert all(disk.get(key, view) for key, view in zip(keys, views, strict=True))

        saved, loaded = pairs(save, load, max(1, rounds // 3))
        disk.close()
    size = len(pool) / 1e9
    took = {"demote": demote, "promote": promote, "memcpy": copied + copied_too, "disk write": saved}
    took["disk read, checked"] = loaded
    return {what: round(size / statistics.median(seconds), 3) for what, seconds in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    targets = []
    for block_size in (16, 32):
        for what, us in zip(("match", "insert"), index_us(block_size, rounds * 5), strict=True):
            goal = f"below {GOAL_US:.0f}"
            met = statistics.median(us) < GOAL_US
            targets.append(target(f"{what} {TOKENS} tokens, blocks of {block_size}", us, "us", goal, met=met))
    speeds = tiers(rounds)
    for way in ("demote", "promote"):
        ratio = speeds[way] / speeds["memcpy"]
        targets.append(target(f"{way} against memcpy", [ratio], "x", "at least 0.9", met=ratio >= 0.9))
    notes = "MemServe's figure is its own, on its own machine. Disk is read from the page cache."
    write("memory_pool", {"GB/s": speeds}, targets, {"MemServe (as published), us": GOAL_US}, notes)


if __name__ == "__main__":
    main()
