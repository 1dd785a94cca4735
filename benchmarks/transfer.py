"""Moving 64 MiB between two processes of this host, as one run and as 2,048 scattered pieces of 32 KiB (scattered on both sides).

`shm` against one thread's memcpy from the same memory into the same memory (where pages lie physically is worth a tenth and more), `tcp`
against a bare socket between the same memories, and both against NIXL (its default, and over TCP) and Mooncake (TCP) in an environment of
their own. A round of ours is from `write` until the target has counted and acknowledged it.
Rounds go in turn over all of them, every second one backwards; processes and memory are made anew for each sitting.
"""

import argparse
import asyncio
import fcntl
import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable
from threading import Thread
from time import perf_counter
from typing import Any

import _peers
import _report
import msgspec
import numpy as np
from peers.places import memory_bytes, places

from headrace.live.transfer import pieces
from headrace.live.transfer.copying import native
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.regions import Descriptor, Region
from headrace.live.transports import Settings, open_transports
from headrace.live.transports.tcp import UNPACED
from headrace.types.errors import TransferError
from headrace.types.ids import Address

MIB = 2**20
SHAPES = {"run": (1, 64 * MIB), "scattered": (2048, 32768)}
SECRET = "of this benchmark"
OURS = ("shm", "tcp")


def pieces_of(count: int, nbytes: int) -> pieces.Pieces:
    sources, targets = (places(count, nbytes, target=t) for t in (False, True))
    return pieces.scatter([(s, t, nbytes) for s, t in zip(sources, targets, strict=True)])


def memory() -> tuple[int, memoryview]:
    """A sealed memory file, touched."""
    nbytes = memory_bytes(list(SHAPES.values()))
    fd = os.memfd_create("transfer", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    view = memoryview(mmap.mmap(fd, nbytes))
    np.frombuffer(view, np.uint8)[:] = 1
    return fd, view


def engine_of(name: str, address: Address, lanes: int) -> tuple[TransferEngine, Region]:
    fd, view = memory()
    transports = open_transports(name, Settings(address, SECRET, lanes))
    engine = TransferEngine(address, transports, asyncio.get_running_loop(), lanes=lanes)
    return engine, engine.register(view, "bytes", fd)


# The other process


async def serve(name: str, lanes: int) -> None:
    """A target that says its descriptor, its memory file, and the port of bare sockets' ends for the same memory; it takes what comes."""
    engine, region = engine_of(name, Address("target"), lanes)
    door = socket.create_server(("127.0.0.1", 0))
    Thread(target=open_bare, args=(door, region.memory[: 64 * MIB]), daemon=True).start()
    said = (engine.describe(region), region.fd, door.getsockname()[1])
    print(msgspec.json.encode(said).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    engine.close()


def open_bare(door: socket.socket, into: memoryview) -> None:
    while True:
        Thread(target=serve_bare, args=(door.accept()[0], into), daemon=True).start()


def serve_bare(sock: socket.socket, into: memoryview) -> None:
    """Receive each round's bytes into one run, then answer one byte."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        done = 0
        while done < len(into):
            count = sock.recv_into(into[done:])
            if not count:
                return
            done += count
        sock.sendall(b"!")


# This process


class Ours:
    """One of our transports, a link to its target up."""

    def __init__(self, name: str, lanes: int) -> None:
        self._engine, self.region = engine_of(name, Address(f"source-{name}"), lanes)
        command = [sys.executable, __file__, "--serve", name, "--lanes", str(lanes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self._target, self._fd, self.port = msgspec.json.decode(said, type=tuple[Descriptor, int, int])
        self._shapes = {shape: pieces_of(*of) for shape, of in SHAPES.items()}

    async def seconds(self, shape: str) -> float:
        """Raises TransferError."""
        done: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()
        began = perf_counter()
        self._engine.write(
            self.region, self._target, self._shapes[shape], done.set_result, imm=immediate(1, 2048)
        )
        error = await done
        if error is not None:
            raise error
        return perf_counter() - began

    def map_target(self) -> memoryview:
        """The very memory that is written into."""
        fd = os.open(f"/proc/{self.process.pid}/fd/{self._fd}", os.O_RDWR)
        try:
            return memoryview(mmap.mmap(fd, self._target.nbytes))
        finally:
            os.close(fd)

    def close(self) -> None:
        self._engine.close()
        self.process.kill()
        self.process.wait()


class Bare:
    """A socket and nothing else, between the memories of `beside`. One run only: it has no way to say where pieces go.

    `unpaced`: with the congestion control that `tcp` chooses within a host, not the system's.
    """

    def __init__(self, beside: Ours, *, unpaced: bool) -> None:
        self._socket = socket.create_connection(("127.0.0.1", beside.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if unpaced:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
        self._memory = beside.region.memory[: 64 * MIB]

    def seconds(self, shape: str) -> float | None:
        if shape != "run":
            return None
        began = perf_counter()
        self._socket.sendall(self._memory)
        self._socket.recv(1)
        return perf_counter() - began

    def close(self) -> None:
        self._socket.close()


class Memcpy:
    """One thread, within this process, between the memories of `beside`: what the C library copies, piece by piece."""

    def __init__(self, beside: Ours) -> None:
        self._source, self._target = (
            np.frombuffer(memory, np.uint8) for memory in (beside.region.memory, beside.map_target())
        )
        self._shapes = {shape: pieces_of(*of) for shape, of in SHAPES.items()}

    def seconds(self, shape: str) -> float:
        moved = self._shapes[shape]
        began = perf_counter()
        if native is not None:
            # No piece is long enough to be stored past the caches: plain memcpy.
            source, target = self._source.ctypes.data, self._target.ctypes.data
            native.copy(source, target, moved.ctypes.data, len(moved), 1 << 62)
        else:
            for start, to, nbytes in moved.tolist():
                self._target[to : to + nbytes] = self._source[start : start + nbytes]
        return perf_counter() - began


Times = dict[str, list[float]]
Round = Callable[[str], Awaitable[float | None]]


def waiting(call: Callable[[str], float | None]) -> Round:
    """The same, for those that have to be waited for."""

    async def seconds(shape: str) -> float | None:
        return call(shape)

    return seconds


async def sitting(rounds: int, lanes: dict[str, int]) -> tuple[Times, dict[str, str]]:
    """Seconds of every round by "name shape", and which peers are absent and why."""
    times: Times = {}
    ours = {name: Ours(name.split("_")[0], count) for name, count in lanes.items()}
    bare = {f"bare{'_unpaced' * unpaced}": Bare(ours["tcp"], unpaced=unpaced) for unpaced in (False, True)}
    memcpy = Memcpy(ours["shm"])
    with _peers.opened(list(SHAPES.values())) as others:
        runs: list[tuple[str, Round]] = [("memcpy", waiting(memcpy.seconds))]
        runs += [(name, one.seconds) for name, one in ours.items()]
        runs += [(name, waiting(one.seconds)) for name, one in bare.items()]
        for peer in others:
            runs.append((peer.name, waiting(lambda shape, peer=peer: peer.seconds(*SHAPES[shape]))))
        for number in range(rounds + 2):
            for shape in SHAPES:
                for name, seconds in runs:
                    taken = await seconds(shape)
                    if number >= 2 and taken is not None:  # after warm-up
                        times.setdefault(f"{name} {shape}", []).append(taken)
            runs.reverse()
        absent = {peer.name: peer.absent for peer in others if peer.absent}
    for end in (*ours.values(), *bare.values()):
        end.close()
    return times, absent


def measure(sittings: int, rounds: int, lanes: dict[str, int]) -> tuple[Times, dict[str, str]]:
    times: Times = {}
    absent: dict[str, str] = {}
    for _ in range(sittings):
        found, absent = asyncio.run(sitting(rounds, lanes))
        for name, seconds in found.items():
            times.setdefault(name, []).extend(seconds)
    return times, absent


def system_control() -> str:
    """The congestion control of a new socket."""
    with socket.socket() as sock:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def interval(ratios: list[float]) -> list[float]:
    """Of the median, 95%: drawn again from its rounds a thousand times."""
    rng = random.Random(0)
    drawn = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return [round(drawn[25], 3), round(drawn[974], 3)]


GOALS = (
    ("shm run", "memcpy run", 0.95),
    ("shm scattered", "memcpy scattered", 0.95),
    ("tcp run", "bare run", 0.95),
    ("shm run", "nixl run", 1.0),
    ("shm scattered", "nixl scattered", 2.0),
    ("tcp run", "nixl_tcp run", 1.0),
    ("tcp scattered", "nixl_tcp scattered", 2.0),
    ("tcp run", "mooncake_tcp run", 1.0),
    ("tcp scattered", "mooncake_tcp scattered", 2.0),
)
BESIDE = (
    ("shm_2lanes run", "memcpy run"),
    ("shm_2lanes scattered", "memcpy scattered"),
    ("tcp run", "bare_unpaced run"),
)
"""Said, with no goal."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sittings", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10, help="of each sitting")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--serve", help="of this benchmark's own processes")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.lanes))
        return
    lanes = {"shm": options.lanes, "shm_2lanes": 2, "tcp": options.lanes}
    times, absent = measure(options.sittings, options.rounds, lanes)
    rates = {name: round(64 * MIB / statistics.median(seconds) / 1e9, 3) for name, seconds in times.items()}
    for name, rate in sorted(rates.items()):
        print(f"{name}: {rate:.2f} GB/s")
    targets: list[dict[str, Any]] = []
    intervals: dict[str, list[float]] = {}
    for ours, theirs, goal in (*GOALS, *((*names, None) for names in BESIDE)):
        if len(times.get(theirs, ())) != len(times[ours]):
            print(f"{ours} against {theirs}: absent ({absent.get(theirs.split()[0], 'no figure')})")
            continue
        ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
        what = f"{ours} against {theirs}"
        intervals[what] = [round(statistics.median(ratios), 3), *interval(ratios)]
        print(f"{what}: {intervals[what]}")
        if goal is not None:
            met = statistics.median(ratios) >= goal
            targets.append(_report.target(what, ratios, "times as fast", f">= {goal:g}", met=met))
    figures = {
        "gb_per_s": dict(sorted(rates.items())),
        "median of paired ratios and its 95% interval": intervals,
        "lanes": lanes,
        "rounds": {"of each sitting": options.rounds, "sittings": options.sittings},
    }
    peers = {name: rate for name, rate in figures["gb_per_s"].items() if name.split()[0] in _peers.PEERS}
    notes = (
        "Ratios are of the same round. memcpy copies within one process, from and into the memory of shm; "
        "the bare sockets move from and into that of tcp: one as the system makes them, one unpaced, with the congestion control "
        f"that tcp chooses within a host ({UNPACED.decode()}; the system's is {system_control()}). "
        "New processes and memory for each sitting."
    )
    _report.write(
        "transfer", figures, targets, peers | {f"{n}: absent": why for n, why in absent.items()}, notes
    )


if __name__ == "__main__":
    main()
