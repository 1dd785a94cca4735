"""The contract of every transport: each write is answered once, and counted only if it is in memory."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

import pytest

from headrace import registry
from headrace.live.transports import Site, check_transport
from headrace.ports import Transport
from headrace.types.errors import ConfigError
from headrace.types.events import Write
from headrace.types.ids import Address, Slot, WriteId
from tests.live.serving import run

NAMES = registry.names("live.transports")
PEER = Address("peer", 3)
BLOCK = (64, 24)
BLOCKS = 50


@dataclass
class Pair:
    """A source and a target in one process."""

    source: list[memoryview]
    target: list[memoryview]
    alive: bool = True
    landed: list[tuple[Address, Slot, int]] = field(default_factory=list)
    written: dict[WriteId, bool] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    """Called whenever something landed."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def site(self) -> Site:
        return Site(
            source=self.source,
            target=lambda peer: self.target if peer == PEER and self.alive else None,
            block_bytes=BLOCK,
            layers=(1,) * len(BLOCK),
            landed=self._landed,
            written=self._written,
            call=asyncio.get_running_loop().call_soon_threadsafe,
        )

    async def answered(self, count: int) -> None:
        while len(self.written) < count:
            self.news.clear()
            await self.news.wait()

    def _landed(self, peer: Address, slot: Slot, weight: int) -> None:
        self.landed.append((peer, slot, weight))
        self.check()

    def _written(self, write: WriteId, ok: bool) -> None:
        assert write not in self.written, "a write is answered twice"
        self.written[write] = ok
        self.news.set()


def pair_of(seed: int) -> Pair:
    draw = random.Random(seed)
    source = [memoryview(bytearray(draw.randbytes(size * BLOCKS))) for size in BLOCK]
    return Pair(source, [memoryview(bytearray(size * BLOCKS)) for size in BLOCK])


def writes_of(seed: int, slots: int = 4) -> list[Write]:
    """Writes of random runs that cover both pools, from and to different places, shuffled."""
    draw = random.Random(seed)
    writes: list[Write] = []
    for group in range(len(BLOCK)):
        shift = draw.randrange(BLOCKS)
        at = 0
        while at < BLOCKS:
            count = min(draw.randint(1, 7), BLOCKS - at, BLOCKS - (at + shift) % BLOCKS)
            writes.append(
                Write(
                    write=WriteId(len(writes) + 1),
                    target=PEER,
                    slot=Slot(draw.randrange(slots)),
                    group=group,
                    source_first=at,
                    target_first=(at + shift) % BLOCKS,
                    count=count,
                    weight=count * (group + 2),
                )
            )
            at += count
    draw.shuffle(writes)
    return writes


def make(name: str, pair: Pair, seed: int) -> Transport:
    module = import_module(f"headrace.live.transports.{name}")
    return module.Transport(pair.site(), seed) if name == "loop" else module.Transport(pair.site())


def arrived(pair: Pair, write: Write) -> bool:
    size = BLOCK[write.group]
    source, target = pair.source[write.group], pair.target[write.group]
    moved = target[write.target_first * size : (write.target_first + write.count) * size]
    return moved == source[write.source_first * size : (write.source_first + write.count) * size]


@pytest.mark.parametrize("name", NAMES)
def test_a_slot_is_complete_exactly_when_all_of_it_is_in_memory(name: str) -> None:
    async def scenario() -> None:
        for seed in range(60):
            pair, writes = pair_of(seed), writes_of(seed)
            expected = {w.slot: sum(x.weight for x in writes if x.slot == w.slot) for w in writes}

            def check(
                pair: Pair = pair, writes: list[Write] = writes, expected: dict[Slot, int] = expected
            ) -> None:
                slot = pair.landed[-1][1]
                counted = sum(weight for _, s, weight in pair.landed if s == slot)
                assert counted <= expected[slot]
                if counted == expected[slot]:
                    assert all(arrived(pair, w) for w in writes if w.slot == slot)

            pair.check = check
            transport = make(name, pair, seed)
            for write in writes:
                transport.write(write)
            await pair.answered(len(writes))
            assert all(pair.written.values())
            assert sorted(pair.landed) == sorted((PEER, w.slot, w.weight) for w in writes)

    run(scenario())


@pytest.mark.parametrize("name", NAMES)
def test_the_immediate_comes_before_the_acknowledgement(name: str) -> None:
    async def scenario() -> None:
        pair, writes = pair_of(1), writes_of(1)

        def check() -> None:
            assert len(pair.landed) == len(pair.written) + 1

        pair.check = check
        transport = make(name, pair, 1)
        for write in writes:
            transport.write(write)
        await pair.answered(len(writes))

    run(scenario())


@pytest.mark.parametrize("name", NAMES)
def test_writes_to_a_lost_peer_fail_and_are_not_counted(name: str) -> None:
    async def scenario() -> None:
        pair, writes = pair_of(2), writes_of(2)
        transport = make(name, pair, 2)
        half = len(writes) // 2
        for write in writes[:half]:
            transport.write(write)
        transport.forget(PEER)
        pair.alive = False
        for write in writes[half:]:
            transport.write(write)
        await pair.answered(len(writes))
        assert not any(pair.written[w.write] for w in writes[half:])
        assert len(pair.landed) == sum(pair.written.values())

    run(scenario())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_are_not_there_fail_their_write_only(name: str) -> None:
    async def scenario() -> None:
        pair, writes = pair_of(3), writes_of(3)
        wrong = Write(WriteId(999), PEER, Slot(0), 0, BLOCKS - 1, 0, 2, 2)
        transport = make(name, pair, 3)
        for write in [*writes[:3], wrong, *writes[3:]]:
            transport.write(write)
        await pair.answered(len(writes) + 1)
        assert [w for w, ok in pair.written.items() if not ok] == [wrong.write]

    run(scenario())


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(ConfigError, match="'pigeon'; there are: loop, shm"):
        check_transport("pigeon")
