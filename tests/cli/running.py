"""`headrace serve` as a user runs it: a process of its own, found by what it says, ended by a signal."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
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
        self.url = ""
        """Empty until it says where it listens."""
        # A file, not a pipe that nobody empties: it would stop a server that has much to say.
        self._log = tempfile.NamedTemporaryFile(prefix="headrace-serve-")  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli.main", "serve", "--port", "0", *flags], stderr=self._log
        )

    def words(self) -> str:
        """All that it has said."""
        return Path(self._log.name).read_text()

    def close(self) -> None:
        """Kill what is left of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def ready(self) -> dict[str, Any]:
        """What `/ready` says, whether ready or not; empty while nobody answers."""
        if not self.url:
            said = re.search(r"ready: (http://\S+)/v1\n", self.words())
            if said is None:
                return {}
            self.url = said[1]
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
            assert self.process.poll() is None or what == "ended", f"ended before {what}:\n{self.words()}"
            assert time.monotonic() < end, f"not {what} within {seconds} s: {self.ready()}\n{self.words()}"
            pause()

    def wait_ready(self) -> None:
        self.wait_until(
            "ready",
            lambda: self.ready().get("ready") and all(i["state"] == "ready" for i in self.instances()),
        )

    def instances(self) -> list[dict[str, Any]]:
        return self.ready().get("instances", [])

    def pid(self, leaning: str) -> int:
        """Of one worker that leans so."""
        return next(i["pid"] for i in self.instances() if i["leaning"] == leaning)

    def kill(self, leaning: str) -> None:
        """SIGKILL it."""
        os.kill(self.pid(leaning), signal.SIGKILL)


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
        server.close()


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
