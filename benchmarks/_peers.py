"""Peers of the transfer benchmarks: other systems' libraries, in an environment of their own, each in two processes of this host.

    make bench-peers        # once: builds .peers
    with opened(shapes) as peers:
        for peer in peers:
            if peer.absent: ...      # why; never counted as beaten
            else: peer.seconds(2048, 32768)

A peer stays open, so that its rounds can stand between those of Headrace. Shapes are (pieces, bytes of a piece); where the pieces lie is
said by `peers/places.py`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from peers.places import memory_bytes

FOLDER = Path(__file__).parent / "peers"
ENVIRONMENT = Path(__file__).parents[1] / ".peers"
PYTHON = ENVIRONMENT / "bin/python"
ABSENT = "no .peers environment: make bench-peers"
PEERS = {
    "nixl": ("nixl_transfer.py", {}),
    "nixl_tcp": ("nixl_transfer.py", {"UCX_TLS": "tcp"}),
    "mooncake_tcp": ("mooncake_transfer.py", {}),
}


class Peer:
    """One peer, its two processes running; or why it is absent."""

    def __init__(self, name: str, nbytes: int) -> None:
        self.name = name
        self.absent = ""
        self.versions: dict[str, str] = {}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        if not PYTHON.exists():
            self.absent = ABSENT
            return
        script, environment = PEERS[name]
        self._process = subprocess.Popen(
            [PYTHON, FOLDER / script, str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | environment | {"UCX_LOG_LEVEL": "error", "LD_LIBRARY_PATH": _libraries()},
        )
        self.versions = self._answer().get("ready", {})

    def seconds(self, pieces: int, piece_bytes: int) -> float | None:
        """One round. None if the peer is absent, or has failed: `absent` says why."""
        if self.absent or self._process is None:
            return None
        shape = json.dumps({"pieces": pieces, "piece_bytes": piece_bytes})
        try:
            _pipe(self._process.stdin).write(shape.encode() + b"\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError:
            pass  # its end is found by the answer that does not come
        return self._answer().get("seconds")

    def close(self) -> None:
        if self._process is not None:
            _pipe(self._process.stdin).close()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            _pipe(self._process.stdout).close()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        line = _pipe(self._process.stdout).readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()
        self.absent = f"ended with status {self._process.returncode}: {last[-1] if last else 'said nothing'}"
        return {}


@contextmanager
def opened(shapes: list[tuple[int, int]]) -> Iterator[list[Peer]]:
    """All peers, ready to move these shapes."""
    peers = [Peer(name, memory_bytes(shapes)) for name in PEERS]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def measure(shapes: dict[str, tuple[int, int]], rounds: int) -> dict[str, Any]:
    """Per peer {"versions", shape: {"seconds": [...], "gb_per_s": median}}, or {"absent": why}. Rounds go in turn over peers and shapes."""
    with opened(list(shapes.values())) as peers:
        times = {(peer.name, shape): [] for peer in peers for shape in shapes}
        for _ in range(rounds):
            for peer in peers:
                for shape, (pieces, size) in shapes.items():
                    if (taken := peer.seconds(pieces, size)) is not None:
                        times[peer.name, shape].append(taken)
        return {peer.name: _table(peer, shapes, times) for peer in peers}


def _table(
    peer: Peer, shapes: dict[str, tuple[int, int]], times: dict[tuple[str, str], list[float]]
) -> dict[str, Any]:
    if peer.absent:
        return {"absent": peer.absent}
    table: dict[str, Any] = {"versions": peer.versions}
    for shape, (pieces, size) in shapes.items():
        taken = times[peer.name, shape]
        table[shape] = {"seconds": taken, "gb_per_s": pieces * size / statistics.median(taken) / 1e9}
    return table


def _libraries() -> str:
    """Where system libraries lie that the machine has not and `make bench-peers` has fetched."""
    found = sorted({str(file.parent) for file in ENVIRONMENT.glob("system/**/*.so.*")})
    return ":".join([*found, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(json.dumps(measure({"one run": (1, 2**26), "scattered": (2048, 2**15)}, rounds), indent=1))
