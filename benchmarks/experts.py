"""Expert dispatch and combine: scatter writes with counts against a padded all-to-all, over the same transfer engine.

    make bench NAME=experts [ARGS="--steps 200 --transport shm"]

N processes, one expert rank each; a step is dispatch, a cheap expert, combine. Padded: every rank sends every other one as many rows as it
could have at most, in one piece, and gets as many back. Steps alternate between the two, so both meet the same machine. Routing is skewed
as Zipf's law has it, or even.
"""

import argparse
import asyncio
import fcntl
import json
import mmap
import os
import statistics
import subprocess
import sys
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
from _report import target, write

from headrace.live.pools import SEALS
from headrace.live.transfer import pieces as forms
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.experts import Experts, Shape
from headrace.live.transfer.regions import Descriptor
from headrace.live.transports import Settings, open_transports
from headrace.types.ids import Address

CHANNEL = 2


class Padded:
    """The plain way: fixed shapes, one piece a peer, whatever is in it. One byte a row says whether it counts."""

    def __init__(self, engine: TransferEngine, rank: int, shape: Shape) -> None:
        self.rank, self.shape, self.engine = rank, shape, engine
        self.row = shape.row_bytes + shape.chosen * 8
        """A row travels with its choices (expert, weight)."""
        self.piece = shape.tokens_max * self.row
        self.back = shape.tokens_max * shape.hidden * 4
        ranks = shape.ranks
        size = 2 * ranks * (self.piece + self.back)
        fd = os.memfd_create("padded", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        self.memory = mmap.mmap(fd, size)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.region = engine.register(memoryview(self.memory), "padded", fd)
        self.counter = engine.counter(CHANNEL)
        self.step = 0
        self.sent = 0

    def at(self, kind: int, rank: int, *, out: bool) -> int:
        """Where a peer's piece (0) or its results (1) lie."""
        base = (self.piece + self.back) * self.shape.ranks * out
        return base + kind * self.piece * self.shape.ranks + rank * (self.back if kind else self.piece)

    async def run(
        self, tokens: np.ndarray, experts: np.ndarray, weights: np.ndarray, work: Any
    ) -> np.ndarray:
        shape, ranks = self.shape, range(self.shape.ranks)
        parity, self.step = self.step % 2, self.step + 1
        chosen: list[np.ndarray] = []
        gone = [self.expect(2 * kind + parity) for kind in (0, 1)]
        for rank in ranks:
            at = np.flatnonzero((experts // shape.local == rank).any(axis=1))
            chosen.append(at)
            begin = self.at(0, rank, out=rank != self.rank)
            block = self.bytes[begin : begin + self.piece].reshape(shape.tokens_max, self.row)
            block[: len(at), : shape.row_bytes] = tokens[at].view(np.uint8)
            choices = block[:, shape.row_bytes :]
            choices[:, : shape.chosen * 4] = 0xFF
            mine = np.where(experts[at] // shape.local == rank, experts[at], -1).astype(np.int32)
            choices[: len(at), : shape.chosen * 4] = mine.view(np.uint8).reshape(len(at), -1)
            choices[: len(at), shape.chosen * 4 :] = weights[at].view(np.uint8).reshape(len(at), -1)
        await self.exchange(0, parity, gone[0])
        for rank in ranks:
            begin = self.at(0, rank, out=False)
            block = self.bytes[begin : begin + self.piece].reshape(shape.tokens_max, self.row)
            wanted = np.ascontiguousarray(
                block[:, shape.row_bytes : shape.row_bytes + shape.chosen * 4]
            ).view(np.int32)
            share = np.ascontiguousarray(block[:, shape.row_bytes + shape.chosen * 4 :]).view(np.float32)
            begin = self.at(1, rank, out=rank != self.rank)
            out = (
                self.bytes[begin : begin + self.back].view(np.float32).reshape(shape.tokens_max, shape.hidden)
            )
            out[:] = 0
            for number in range(self.rank * shape.local, (self.rank + 1) * shape.local):
                at, column = np.nonzero(wanted == number)
                if len(at):
                    rows = np.ascontiguousarray(block[at, : shape.row_bytes])
                    out[at] += share[at, column][:, None] * work(number, rows)
        await self.exchange(1, parity, gone[1])
        mixed = np.zeros((len(tokens), shape.hidden), np.float32)
        for rank in ranks:
            begin = self.at(1, rank, out=False)
            part = (
                self.bytes[begin : begin + self.back].view(np.float32).reshape(shape.tokens_max, shape.hidden)
            )
            mixed[chosen[rank]] += part[: len(chosen[rank])]
        return mixed

    def expect(self, slot: int) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.counter.expect(slot, self.shape.ranks - 1, lambda: done.set_result(None))
        return done

    async def exchange(self, kind: int, parity: int, here: asyncio.Future[None]) -> None:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        nbytes = self.back if kind else self.piece
        parts = [
            (
                peer,
                forms.single(self.at(kind, rank, out=True), self.at(kind, self.rank, out=False), nbytes),
                immediate(2 * kind + parity, 1),
            )
            for rank, peer in self.peers.items()
        ]
        self.sent += nbytes * len(parts)
        self.engine.write_scatter(self.region, parts, lambda error: gone.set_result(None), channel=CHANNEL)
        await asyncio.gather(here, gone)


def routing(o: argparse.Namespace, shape: Shape, step: int, rank: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng((step, rank))
    odds = 1 / np.arange(1, shape.experts + 1) ** (1.0 if o.skew else 0.0)
    odds = np.random.default_rng(7).permutation(odds / odds.sum())
    keys = rng.random((o.tokens, shape.experts)) ** (1 / odds)
    experts = np.argsort(-keys, axis=1)[:, : shape.chosen].astype(np.int32)
    tokens = rng.standard_normal((o.tokens, shape.hidden), np.float32)
    return tokens, experts, rng.random((o.tokens, shape.chosen), np.float32)


def work(number: int, rows: np.ndarray) -> np.ndarray:
    return rows.view(np.float32) * np.float32(number + 1)


async def rank_main(o: argparse.Namespace) -> None:
    loop, address = asyncio.get_running_loop(), Address(f"rank{o.rank}")
    engine = TransferEngine(address, open_transports(o.transport, Settings(address, "secret")), loop)
    shape = Shape(
        ranks=o.ranks,
        experts=o.experts,
        chosen=o.chosen,
        tokens_max=o.tokens,
        row_bytes=o.hidden * 4,
        hidden=o.hidden,
    )
    scatter, padded = Experts(engine, o.rank, shape), Padded(engine, o.rank, shape)
    both = (scatter.descriptor, engine.describe(padded.region))
    print(msgspec.json.encode(both).decode(), flush=True)
    line = await loop.run_in_executor(None, sys.stdin.readline)
    known = msgspec.json.decode(line, type=list[tuple[Descriptor, Descriptor]])
    scatter.join([one for one, _ in known])
    padded.peers = {rank: two for rank, (_, two) in enumerate(known) if rank != o.rank}
    times: dict[str, list[float]] = {"scatter": [], "padded": []}
    for step in range(o.steps + o.warm):
        tokens, experts, weights = routing(o, shape, step, o.rank)
        begun = perf_counter()
        got = await scatter.dispatch(tokens, experts, weights)
        ours = await scatter.combine(got.compute(work, shape.hidden), got.counts)
        middle = perf_counter()
        plain = await padded.run(tokens, experts, weights, work)
        ended = perf_counter()
        assert ours.tobytes() == plain.tobytes(), "the two ways differ"
        if step >= o.warm:
            times["scatter"].append((middle - begun) * 1e6)
            times["padded"].append((ended - middle) * 1e6)
    steps = o.steps + o.warm
    sent = {"scatter": scatter.bytes_sent / steps, "padded": padded.sent / steps}
    print(json.dumps({"times": times, "sent": sent}), flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    engine.close()


def run_ranks(o: argparse.Namespace, ranks: int, *, skew: bool) -> dict[str, Any]:
    """Medians over steps of the slowest rank, and bytes a rank sends in a step."""
    flags = [
        f"--{name}={getattr(o, name)}"
        for name in ("tokens", "hidden", "experts", "chosen", "steps", "warm", "transport")
    ]
    command = [sys.executable, __file__, *flags, f"--ranks={ranks}", *(["--skew"] if skew else [])]
    pipe = subprocess.PIPE
    team = [
        subprocess.Popen([*command, f"--rank={rank}"], stdin=pipe, stdout=pipe, text=True)
        for rank in range(ranks)
    ]
    try:
        known = [json.loads(p.stdout.readline()) for p in team]
        for p in team:
            p.stdin.write(json.dumps(known) + "\n")
            p.stdin.flush()
        said = [json.loads(p.stdout.readline()) for p in team]
        for p in team:
            p.communicate("\n", timeout=30)
    finally:
        for p in team:
            p.kill()
    slowest = {
        way: [max(step) for step in zip(*(s["times"][way] for s in said), strict=True)]
        for way in ("scatter", "padded")
    }
    return {
        "us": {way: statistics.median(steps) for way, steps in slowest.items()},
        "bytes": {way: statistics.mean(s["sent"][way] for s in said) for way in ("scatter", "padded")},
        "ratios": [p / s for s, p in zip(slowest["scatter"], slowest["padded"], strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {
        "tokens": 128,
        "hidden": 1024,
        "experts": 32,
        "chosen": 4,
        "steps": 200,
        "warm": 20,
        "ranks": 0,
        "rank": -1,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--skew", action="store_true")
    o = parser.parse_args()
    if o.rank >= 0:
        asyncio.run(rank_main(o))
        return
    figures: dict[str, Any] = {}
    targets: list[dict[str, Any]] = []
    for ranks in [o.ranks] if o.ranks else [2, 4]:
        for skew in (False, True):
            name = f"{ranks} ranks, {'skewed' if skew else 'even'} routing"
            found = run_ranks(o, ranks, skew=skew)
            ratios = found.pop("ratios")
            figures[name] = found
            less = found["bytes"]["padded"] / found["bytes"]["scatter"]
            middle = statistics.median(ratios)
            print(f"{name}: {found}")
            targets.append(
                target(f"{name}: padded / scatter, time of a step", ratios, "x", ">= 1", met=middle >= 1)
            )
            targets.append(
                target(f"{name}: padded / scatter, bytes sent", [less], "x", ">= 1", met=less >= 1)
            )
    notes = f"{o.tokens} tokens a rank, {o.chosen} of {o.experts} experts, {o.hidden} f32 a row, transport {o.transport}; both bit-equal."
    write("experts", figures, targets, {}, notes)


if __name__ == "__main__":
    main()
