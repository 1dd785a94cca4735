"""`headrace serve` as a user runs it: a process of its own, found by its port, ended by a signal."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

START_S = 120.0
PAUSE_S = 0.02


class Server:
    """One running server, of the bundled model."""

    def __init__(self, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli.main", "serve", "--port", str(self.port), *flags],
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """What `/ready` says, whether ready or not; empty while nobody answers."""
        try:
            with urlopen(f"{self.url}/ready", timeout=10) as answer:
                return json.load(answer)
        except HTTPError as error:
            return json.load(error)
        except (URLError, OSError):
            return {}

    def wait_until(self, what: str, condition: Any, seconds: float = START_S) -> None:
        """Raises AssertionError when `condition()` does not come true in time."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None or what == "ended", self._words(what)
            assert time.monotonic() < end, f"not {what} within {seconds} s: {self.ready()}"
            pause()

    def wait_ready(self) -> None:
        self.wait_until(
            "ready",
            lambda: self.ready().get("ready") and all(i["state"] == "ready" for i in self.instances()),
        )

    def instances(self) -> list[dict[str, Any]]:
        return self.ready().get("instances", [])

    def kill(self, leaning: str) -> None:
        """SIGKILL one worker that leans so."""
        os.kill(next(i["pid"] for i in self.instances() if i["leaning"] == leaning), signal.SIGKILL)

    def _words(self, what: str) -> str:
        assert self.process.stderr is not None
        return f"the server ended before it was {what}:\n{self.process.stderr.read()}"


def pause() -> None:
    """Between looks at another process."""
    asyncio.run(asyncio.sleep(PAUSE_S))


@contextmanager
def started(*flags: str) -> Iterator[Server]:
    """A ready server; what is left of it at the end is killed."""
    server = Server(*flags)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        if server.process.stderr is not None:
            server.process.stderr.close()


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """A ready server; ended by SIGTERM, and found to have left nothing."""
    with started(*flags) as server:
        yield server
        children = children_of(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert not [pid for pid in children if alive(pid)]


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
