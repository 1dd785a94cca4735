"""Engines over any transport, in this process: each with memory of its own, on one loop."""

import asyncio
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace import registry
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Descriptor, Region
from headrace.live.transports import Settings, Transport, loop, open_transports
from headrace.types.errors import ConfigError, TransferError
from headrace.types.ids import Address

NAMES = registry.names("live.transports")
SECRET = "tell nobody"
SLOW = {"nixl": 6}
"""How much longer may it take until links are made? An agent of NIXL is made in a tenth of a second by a machine that does nothing else."""
LAYOUT = "bytes"


class Turns:
    """A loop without time: what is asked for happens in order, timers when `ring` says so."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self.timers: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        self._calls.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        self.timers.append((delay, callback, args))

    def run(self, steps: int = 1 << 30) -> int:
        """How many things happened."""
        for count in range(steps):
            if not self._calls:
                return count
            callback, args = self._calls.popleft()
            callback(*args)
        return steps

    def ring(self) -> None:
        timers, self.timers = self.timers, []
        for _, callback, args in timers:
            callback(*args)
        self.run()


@dataclass(eq=False)
class End:
    """One engine, its memory, and what became of its transfers."""

    engine: TransferEngine
    memory: NDArray[np.uint8]
    region: Region
    ended: list[TransferError | None] = field(default_factory=list)
    mail: list[tuple[Address, bytes]] = field(default_factory=list)

    @property
    def descriptor(self) -> Descriptor:
        return self.engine.describe(self.region)

    def write(self, target: "End | Descriptor", pieces: Pieces, imm: int = 0, **more: Any) -> Any:
        descriptor = target.descriptor if isinstance(target, End) else target
        return self.engine.write(self.region, descriptor, pieces, self.ended.append, imm=imm, **more)


def memory_file(nbytes: int) -> tuple[int, memoryview]:
    """A sealed one, as pools are."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd, memoryview(mmap.mmap(fd, nbytes))


@contextmanager
def ends(
    name: str,
    *addresses: Address,
    turns: Any = None,
    nbytes: int = 1 << 16,
    lanes: int = 1,
    seed: int = 0,
    stall_ns: int = 5_000_000_000,
    stall_name: str = "",
    file: bool = True,
    switch: loop.Switch | None = None,
    secret: str = SECRET,
    **settings: Any,
) -> Iterator[list[End]]:
    """Engines with random bytes in their memory; on the running loop unless `turns` is given."""
    turns = turns or asyncio.get_running_loop()
    switch = switch or loop.Switch(turns, seed)
    made: list[End] = []
    fds: list[int] = []
    try:
        for number, address in enumerate(addresses):
            engine = TransferEngine(
                address,
                {name: transport_of(name, Settings(address, secret, lanes, **settings), switch)},
                turns,
                lanes=lanes,
                stall_ns=stall_ns * SLOW.get(name, 1),
                stall_name=stall_name,
            )
            fd, view = memory_file(nbytes) if file else (-1, memoryview(bytearray(nbytes)))
            fds += [fd] if file else []
            memory = np.frombuffer(view, np.uint8)
            memory[:] = np.random.default_rng((seed, number)).integers(0, 256, nbytes, np.uint8)
            end = End(engine, memory, engine.register(view, LAYOUT, fd))
            engine.received = lambda source, body, end=end: end.mail.append((source, body))
            made.append(end)
        yield made
    finally:
        for end in made:
            end.engine.close()
        for fd in fds:
            os.close(fd)


def transport_of(name: str, settings: Settings, switch: loop.Switch) -> Transport:
    """Skips the test where what it is built on is absent."""
    if name == "loop":
        return loop.Transport(settings, switch)
    try:
        return open_transports(name, settings)[name]
    except (ModuleNotFoundError, ConfigError) as error:
        pytest.skip(f"{name}: {error}")


async def until(condition: Callable[[], bool]) -> None:
    """Within the test's own time limit."""
    while not condition():
        await asyncio.sleep(0.001)


def run(test: Any, timeout_s: float = 120.0) -> None:
    async def within() -> None:
        async with asyncio.timeout(timeout_s):
            await test

    asyncio.run(within())
