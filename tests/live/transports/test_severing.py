"""Sources that end, stop or lie in the midst of a write: what they wrote into is free again when they are out of it, and nobody waits."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from types import TracebackType

import msgspec
import pytest

from headrace.live.transfer import pieces
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.regions import Descriptor
from headrace.types.ids import Address
from tests.live.transports.harness import NAMES, End, ends, run, until
from tests.live.transports.source import BYTE

A, B, C = Address("a", 3), Address("b", 1), Address("c")
REPOSITORY = Path(__file__).parents[3]
NBYTES = 8 << 20
OFTEN = 1000
"""A write that takes seconds."""
streams = pytest.mark.parametrize("name", ["shm", "tcp"])


class source:
    """An engine that writes, in a process of its own, for as long as this lasts."""

    def __init__(self, name: str, address: Address) -> None:
        path = f"{REPOSITORY}:{REPOSITORY / 'src'}"
        arguments = [name, address.name, str(address.epoch), str(NBYTES)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.transports.source", *arguments],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def write(self, target: Descriptor, times: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode((target, times)) + b"\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()


async def begun(end: End) -> None:
    """Until a write has touched its memory."""
    await until(lambda: end.memory[0] == BYTE)


@streams
def test_memory_that_a_killed_source_was_writing_is_free_after_its_fence_and_its_next_life_works(
    name: str,
) -> None:
    async def scenario() -> None:
        with ends(name, B, nbytes=NBYTES) as (b,):
            b.memory[:] = 0
            fired: list[int] = []
            b.engine.counter().expect(1, 1, lambda: fired.append(1))
            with source(name, A) as process:
                process.write(b.descriptor, OFTEN)
                await begun(b)
                process.kill()
            free = asyncio.Event()
            b.engine.forget(A, free.set)
            await free.wait()
            b.memory[:] = 7
            with source(name, Address("a", 4)) as again:
                # It comes after all that the earlier life could still do.
                part = b.engine.register(memoryview(bytearray(100)), "bytes")
                again.write(b.engine.describe(part), 1)
                await until(lambda: bool(part.bytes[0] == BYTE))
                assert (part.bytes == BYTE).all() and (b.memory == 7).all()
                await until(lambda: fired == [1])

    run(scenario())


@streams
def test_nobody_waits_for_a_source_that_is_stopped_in_the_midst_of_a_write(name: str) -> None:
    async def scenario() -> None:
        with ends(name, C, B, nbytes=NBYTES) as (c, b), source(name, A) as process:
            b.memory[:] = 0
            process.write(b.descriptor, OFTEN)
            await begun(b)
            process.signal(signal.SIGSTOP)
            free = asyncio.Event()
            began = monotonic()
            b.engine.forget(A, free.set)
            other = b.engine.register(memoryview(bytearray(100)), "bytes")
            c.write(b.engine.describe(other), pieces.single(0, 0, 100), immediate(2, 1))
            await until(lambda: bool(c.ended))
            assert c.ended == [None] and monotonic() - began < 5
            # Whoever maps our memory may go on with its copy: it is not free yet.
            assert free.is_set() == (name == "tcp")
            process.signal(signal.SIGCONT)
            await free.wait()
            b.memory[:] = 7
            c.write(b.engine.describe(other), pieces.single(0, 0, 100), immediate(2, 1))
            await until(lambda: len(c.ended) == 2)
            assert (b.memory == 7).all() and not b.engine.counter().vacant(1)

    run(scenario())


def test_a_source_that_is_stopped_is_named_when_it_does_not_let_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headrace.live.transfer.inbound.SEVER_S", 0.05)

    async def scenario() -> None:
        with ends("shm", B, nbytes=NBYTES) as (b,), source("shm", A) as process:
            b.memory[:] = 0
            process.write(b.descriptor, OFTEN)
            await begun(b)
            process.signal(signal.SIGSTOP)
            gone: list[int] = []
            b.engine.unregister(b.region, lambda: gone.append(1))
            await until(lambda: "a#3 does not let go of memory of b#1 that it maps" in caplog.text)
            assert not gone
            process.kill()
            await until(lambda: gone == [1])

    run(scenario())


@pytest.mark.parametrize("name", NAMES)
def test_whoever_counts_what_cannot_be_is_refused_by_name_and_all_others_go_on(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        with ends(name, A, B, C) as (a, b, c):
            fired: list[int] = []
            b.engine.counter().expect(1, 3, lambda: fired.append(1))
            a.write(b, pieces.single(0, 0, 10), immediate(1, 9))
            await until(lambda: len(a.ended) == 1)
            assert "b#1 takes nothing of a#3 any more: slot 1 counted 9 of 3" in caplog.text
            a.write(b, pieces.single(0, 0, 10), immediate(2, 1))
            await until(lambda: len(a.ended) == 2)
            assert all("b#1 takes nothing of a#3 any more" in str(error) for error in a.ended), a.ended
            c.write(b, pieces.single(0, 0, 10), immediate(2, 1))
            await until(lambda: bool(c.ended))
            assert c.ended == [None] and b.engine.counter().vacant(2) == 1 and not fired
            c.write(b, pieces.single(0, 0, 10), immediate(1, 3))
            await until(lambda: len(c.ended) == 2)
            assert fired == [1], "what the other counted is not kept"

    run(scenario())
