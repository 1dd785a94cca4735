"""Moving 64 MiB between two processes of this host, as one run and as 2,048 scattered pieces of 32 KiB (scattered on both sides).

`shm` against one thread's memcpy of the same bytes, `tcp` against a bare socket that moves them (both without an engine, in two processes),
and both against NIXL (its default, and over TCP) and Mooncake (TCP) in an environment of their own. Rounds go in turn over all of them.
A round of ours is from `write` until the target has counted and acknowledged it.
"""

import argparse
import asyncio
import fcntl
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
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
    """A target that says its descriptor and takes what comes; or the end of a bare socket."""
    if name == "bare":
        await asyncio.to_thread(serve_bare)
        return
    engine, region = engine_of(name, Address("target"), lanes)
    print(msgspec.json.encode(engine.describe(region)).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    engine.close()


def serve_bare() -> None:
    """Receive each round's bytes into one run, then answer one byte."""
    into = memory()[1][: 64 * MIB]
    with socket.create_server(("127.0.0.1", 0)) as door:
        print(json.dumps(door.getsockname()[1]), flush=True)
        sock, _ = door.accept()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                done = 0
                while done < len(into):
                    count = sock.recv_into(into[done:])
                    if not count:
                        return
                    done += count
                sock.sendall(b"!")


def other(name: str, lanes: int) -> tuple[subprocess.Popen[bytes], bytes]:
    command = [sys.executable, __file__, "--serve", name, "--lanes", str(lanes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, process.stdout.readline()


# This process


class Ours:
    """One of our transports, a link to its target up."""

    def __init__(self, name: str, lanes: int) -> None:
        self._engine, self._region = engine_of(name, Address(f"source-{name}"), lanes)
        self.process, said = other(name, lanes)
        self._target = msgspec.json.decode(said, type=Descriptor)
        self._shapes = {shape: pieces_of(*of) for shape, of in SHAPES.items()}

    async def seconds(self, shape: str) -> float:
        """Raises TransferError."""
        done: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()
        began = perf_counter()
        self._engine.write(
            self._region, self._target, self._shapes[shape], done.set_result, imm=immediate(1, 2048)
        )
        error = await done
        if error is not None:
            raise error
        return perf_counter() - began

    def close(self) -> None:
        self._engine.close()


class Bare:
    """A socket and nothing else. One run only: it has no way to say where pieces go."""

    def __init__(self) -> None:
        self.process, said = other("bare", 1)
        self._socket = socket.create_connection(("127.0.0.1", int(said)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = memory()[1][: 64 * MIB]

    def seconds(self) -> float:
        began = perf_counter()
        self._socket.sendall(self._memory)
        self._socket.recv(1)
        return perf_counter() - began

    def close(self) -> None:
        self._socket.close()


class Memcpy:
    """One thread, within this process: what the C library copies, piece by piece."""

    def __init__(self) -> None:
        self._source, self._target = (np.frombuffer(memory()[1], np.uint8) for _ in range(2))
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


async def measure(rounds: int, lanes: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every round by "name shape", and which peers are absent and why."""
    times: dict[str, list[float]] = {}
    ours, bare, memcpy = {name: Ours(name, lanes) for name in OURS}, Bare(), Memcpy()
    with _peers.opened(list(SHAPES.values())) as others:
        for number in range(rounds + 2):
            for shape, (count, nbytes) in SHAPES.items():
                taken: dict[str, float | None] = {"memcpy": memcpy.seconds(shape)}
                for name, transport in ours.items():
                    taken[name] = await transport.seconds(shape)
                if shape == "run":
                    taken["bare"] = bare.seconds()
                for peer in others:
                    taken[peer.name] = peer.seconds(count, nbytes)
                if number >= 2:  # after warm-up
                    for name, seconds in taken.items():
                        if seconds is not None:
                            times.setdefault(f"{name} {shape}", []).append(seconds)
        absent = {peer.name: peer.absent for peer in others if peer.absent}
    for end in (*ours.values(), bare):
        end.close()
        end.process.kill()
        end.process.wait()
    return times, absent


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--serve", help="of this benchmark's own processes")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.lanes))
        return
    times, absent = asyncio.run(measure(options.rounds, options.lanes))
    rates = {name: 64 * MIB / statistics.median(seconds) / 1e9 for name, seconds in times.items()}
    for name, rate in sorted(rates.items()):
        print(f"{name}: {rate:.2f} GB/s")
    targets: list[dict[str, Any]] = []
    for ours, theirs, goal in GOALS:
        if theirs not in times:
            print(f"{ours} against {theirs}: absent ({absent.get(theirs.split()[0], 'no figure')})")
            continue
        ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
        met = statistics.median(ratios) >= goal
        targets.append(
            _report.target(f"{ours} against {theirs}", ratios, "times as fast", f">= {goal:g}", met=met)
        )
    figures = {"gb_per_s": {name: round(rate, 3) for name, rate in sorted(rates.items())}}
    figures["lanes"] = {"of each link": options.lanes}
    peers = {name: rate for name, rate in figures["gb_per_s"].items() if name.split()[0] in _peers.PEERS}
    notes = (
        "Ratios are of pairs next to each other in time. memcpy copies within one process, both sides mapped."
    )
    _report.write(
        "transfer", figures, targets, peers | {f"{n}: absent": why for n, why in absent.items()}, notes
    )


if __name__ == "__main__":
    main()
