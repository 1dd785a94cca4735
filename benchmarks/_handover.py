"""One prompt's KV from one process's pool to another's, by the engine and in four ways; calls, bytes, CPU time of both and milliseconds.

The bytes are synthetic: each layer of each block is filled with its own number, so that the target can tell whether all is in its place.
Block tables are runs of 4 to 32 blocks on either side, cut in different places: what a pool gives that has been in use for long.
"""

import asyncio
import multiprocessing as mp
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import uvloop

from headrace.live.pools import Pool, layout_of
from headrace.live.transfer import gather
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.gather import GatherPath
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Card, Descriptor
from headrace.live.transports import Settings, open_transports
from headrace.transfer.layout import layout_of as group_layout
from headrace.transfer.layout import merge_pieces, remap
from headrace.types.errors import TransferError
from headrace.types.ids import Address
from headrace.types.kv import GroupKind, KVGroup, KVSpec

SOURCE, TARGET = Address("source", 1), Address("target", 1)
SPEC = KVSpec((KVGroup(GroupKind.FULL, tuple(range(28)), kv_heads=8, head_dim=128),), 32, "bfloat16")
"""Of the 0.6B-shaped model."""
LAYERS = len(SPEC.groups[0].layers)
BLOCK = SPEC.block_bytes(0)
GATHERING = gather.Settings(slot_bytes=64 << 20, slots=4, answer_ns=60_000_000_000)
WAYS = ("per layer per block", "per block", "run-merged", "gather-scatter")
MODES = ("pipelined", "one call per round trip")


def table(blocks: int, pool: int, seed: int) -> list[int]:
    """Runs of 4 to 32 blocks that do not touch, in random order."""
    draw = random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < blocks:
        sizes.append(min(draw.randint(4, 32), blocks - sum(sizes)))
    spare = pool - blocks - len(sizes)
    assert spare >= 0
    gaps = [draw.randint(0, spare // len(sizes)) + 1 for _ in sizes]
    runs, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        runs.append(range(at, at + size))
        at += size + gap
    draw.shuffle(runs)
    return [block for run in runs for block in run]


def tables(tokens: int) -> tuple[list[int], list[int], int]:
    """Of source and target, and the blocks of a pool."""
    blocks = SPEC.blocks_for(tokens)
    pool = 2 * blocks
    return table(blocks, pool, 1), table(blocks, pool, 2), pool


class Side:
    """One process's engine and pool."""

    def __init__(self, address: Address, transport: str, blocks: int) -> None:
        loop = asyncio.get_running_loop()
        self.layout = layout_of(SPEC, (blocks,))
        self.pool = Pool.create(str(address.name), self.layout)
        (buffer,) = self.pool.buffers()
        self.memory = np.frombuffer(buffer, np.uint16).reshape(blocks, LAYERS, -1)
        transports = open_transports(transport, Settings(address, "benchmark"))
        self.engine = TransferEngine(address, transports, loop)
        region = self.engine.register(self.pool.memory, "benchmark", self.pool.fd)
        self.region = region
        self.landed = 0
        self.engine.counter(0).generic = self._count
        self.path = GatherPath(self.engine, region, loop, self._count, GATHERING)
        self.peer: Card | None = None
        self.engine.received = self._heard

    def _heard(self, _: Address, body: bytes) -> None:
        assert self.peer is not None and self.path.heard(self.peer, body)

    def _count(self, _source: Address, _slot: int, weight: int) -> None:
        self.landed += weight

    def close(self) -> None:
        self.path.close()
        self.engine.close()
        self.pool.close()


def numbers(logical: int) -> np.ndarray:
    """What the layers of a block are filled with."""
    return (logical * LAYERS + np.arange(LAYERS) + 1).astype(np.uint16)


def receive(transport: str, tokens: int, connection: Connection) -> None:
    """The target's process: answers commands until `end`."""
    _, mine, pool = tables(tokens)

    async def serve() -> None:
        side = Side(TARGET, transport, pool)
        side.memory[:] = 0
        commands: asyncio.Queue[Any] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(
            connection.fileno(), lambda: commands.put_nowait(connection.recv())
        )
        connection.send(side.engine.describe(side.region))
        side.peer = await commands.get()
        while (command := await commands.get()) != "end":
            if command == "state":
                connection.send((side.landed, time.process_time()))
            elif command == "check":
                right = all((side.memory[b] == numbers(i)[:, None]).all() for i, b in enumerate(mine))
                side.memory[:] = 0
                connection.send(right)
        asyncio.get_running_loop().remove_reader(connection.fileno())
        side.close()

    uvloop.run(serve())


@dataclass
class Call:
    """One of a way's transfers."""

    pieces: Pieces
    weight: int


def calls_of(way: str, sources: list[int], targets: list[int]) -> list[Call]:
    layout = group_layout(SPEC, 0)
    tokens = len(sources) * SPEC.block_size
    (part,) = remap(layout, layout, sources, targets, 0, tokens)
    runs = part.pieces
    if way == "gather-scatter":
        return batches(runs)
    step = {"per layer per block": BLOCK // LAYERS, "per block": BLOCK, "run-merged": 0}[way]
    if step:
        runs = np.array(
            [(s + at, t + at, step) for s, t, n in runs.tolist() for at in range(0, n, step)], np.int64
        )
    layer = BLOCK // LAYERS
    return [Call(run[None], int(run[2]) // layer) for run in runs]


def batches(runs: Pieces) -> list[Call]:
    """As many blocks as a slot holds, each."""
    blocks = np.array(
        [(s + at, t + at, BLOCK) for s, t, n in runs.tolist() for at in range(0, n, BLOCK)], np.int64
    )
    most = GATHERING.slot_bytes // BLOCK
    parts = [blocks[at : at + most] for at in range(0, len(blocks), most)]
    return [Call(merge_pieces(part), len(part) * LAYERS) for part in parts]


class Sender:
    """The source's side of a measurement."""

    def __init__(self, side: Side, target: Descriptor, connection: Connection) -> None:
        self._side = side
        self._target = target
        self._connection = connection

    async def send(self, way: str, mode: str, calls: list[Call]) -> dict[str, float]:
        """Milliseconds until all is acknowledged, and CPU seconds of both processes."""
        start = self._direct if way != "gather-scatter" else self._gathered
        at_once = {"pipelined": len(calls), "one call per round trip": 1}[mode]
        if way == "gather-scatter":
            at_once = min(at_once, GATHERING.slots)
        landed, theirs = self._ask("state")
        ours, began = time.process_time(), time.perf_counter()
        await windowed(start, calls, at_once)
        wall = time.perf_counter() - began
        cpu = time.process_time() - ours
        after, ended = self._ask("state")
        assert after - landed == sum(c.weight for c in calls), "what was acknowledged was not counted"
        return {"ms": wall * 1e3, "cpu_s": cpu + ended - theirs}

    def check(self) -> None:
        assert self._ask("check"), "bytes are not in their place"

    def _ask(self, command: str) -> Any:
        self._connection.send(command)
        return self._connection.recv()

    def _direct(self, call: Call, done: Callable[[TransferError | None], None]) -> None:
        side = self._side
        side.engine.write(side.region, self._target, call.pieces, done, imm=immediate(1, call.weight))

    def _gathered(self, call: Call, done: Callable[[TransferError | None], None]) -> None:
        def runs() -> None:
            done(TransferError("no slot was free"))

        self._side.path.write(self._target.card, call.pieces, [(1, call.weight)], done, runs)


async def windowed(
    start: Callable[[Call, Callable[[TransferError | None], None]], None], calls: list[Call], at_once: int
) -> None:
    """All of them, so many under way at a time."""
    ended: Awaitable[None] = asyncio.get_running_loop().create_future()
    rest, left = iter(calls), len(calls)

    def done(error: TransferError | None) -> None:
        nonlocal left
        if error is not None:
            raise error
        left -= 1
        if (call := next(rest, None)) is not None:
            start(call, done)
        elif not left:
            ended.set_result(None)  # type: ignore[attr-defined]

    for _ in range(at_once):
        if (call := next(rest, None)) is not None:
            start(call, done)
    await ended


def measure(transport: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Per way: calls, bytes, and per mode milliseconds and CPU seconds of each round. Ways and modes take turns."""
    sources, targets, pool = tables(tokens)
    connection, theirs = mp.Pipe()
    child = mp.get_context("spawn").Process(target=receive, args=(transport, tokens, theirs), daemon=True)
    child.start()
    theirs.close()
    figures: dict[str, Any] = {}

    async def run() -> None:
        side = Side(SOURCE, transport, pool)
        for logical, block in enumerate(sources):
            side.memory[block] = numbers(logical)[:, None]
        target = connection.recv()
        side.peer = target.card
        connection.send(side.engine.card)
        sender = Sender(side, target, connection)
        every = {way: calls_of(way, sources, targets) for way in WAYS}
        for way, calls in every.items():
            moved = sum(int(c.pieces[:, 2].sum()) for c in calls)
            figures[way] = {"calls": len(calls), "bytes": moved, **{mode: [] for mode in MODES}}
            await sender.send(way, "pipelined", calls)
            sender.check()
        for _ in range(rounds):
            for mode in MODES:
                for way, calls in every.items():
                    figures[way][mode].append(await sender.send(way, mode, calls))
        connection.send("end")
        side.close()

    try:
        uvloop.run(run())
        child.join(30)
    finally:
        child.kill()
    return figures
