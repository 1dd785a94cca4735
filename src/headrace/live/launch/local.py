"""Workers as child processes of this one.

A death is seen at once, by the process's own descriptor (pidfd): it is readable when all of its threads have ended, so from then on it
writes to no memory. What a worker says on standard output and error goes to this process's log, line by line.
"""

import asyncio
import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from headrace.live.settings import WorkerConfig
from headrace.types.ids import Address

log = logging.getLogger(__name__)

LINES_KEPT = 20
LINE_MAX = 65536
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PASSIVE: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Workers share cores: an idle thread of torch's that spins takes one from a step that is at work."""


def worker_environment(threads: int) -> dict[str, str]:
    """Added to the environment of a worker that computes with so many threads."""
    return {**dict.fromkeys(THREAD_VARIABLES, str(threads)), **PASSIVE}


@dataclass(slots=True)
class Child:
    process: subprocess.Popen[bytes]
    pidfd: int
    output: int
    """Descriptor of what it says."""
    lines: deque[str] = field(default_factory=lambda: deque[str](maxlen=LINES_KEPT))
    partial: bytes = b""


class Launcher:
    """Implements `ports.Launcher`. `ended(address, status, last lines)` is called once for each start, on the loop's thread."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        configure: Callable[[Address], WorkerConfig],
        ended: Callable[[Address, int, list[str]], None],
    ) -> None:
        """`command` starts a process that calls `live.worker.read_config`."""
        self._command = list(command)
        self._environment = {**os.environ, **environment}
        self._configure = configure
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._children: dict[Address, Child] = {}
        self.empty = asyncio.Event()
        """Set while no child lives."""
        self.empty.set()

    def start(self, name: str, epoch: int) -> None:
        """Raises OSError if the command cannot be run."""
        address = Address(name, epoch)
        config = self._configure(address)
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[config.pool.fd],
            env=self._environment,
        )
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(msgspec.json.encode(config))
        child = Child(process, os.pidfd_open(process.pid), process.stdout.fileno())
        os.set_blocking(child.output, False)
        self._children[address] = child
        self.empty.clear()
        self._loop.add_reader(child.output, self._read, address, child)
        self._loop.add_reader(child.pidfd, self._reap, address, child)

    def kill(self, address: Address) -> None:
        """At once; `ended` follows. Unknown ones have ended already."""
        child = self._children.get(address)
        if child is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def kill_all(self) -> None:
        for address in list(self._children):
            self.kill(address)

    def pid(self, address: Address) -> int | None:
        """Of a worker that has not ended."""
        child = self._children.get(address)
        return child.process.pid if child is not None else None

    def _read(self, address: Address, child: Child) -> bool:
        """Log what it said. False when there is no more now."""
        try:
            raw = os.read(child.output, LINE_MAX)
        except BlockingIOError:
            return False
        if not raw:
            self._loop.remove_reader(child.output)
            return False
        *lines, child.partial = (child.partial + raw).split(b"\n")
        if len(child.partial) > LINE_MAX:
            lines, child.partial = [*lines, child.partial], b""
        for line in lines:
            text = line.decode(errors="replace")
            child.lines.append(text)
            log.info("[%s] %s", address.name, text)
        return True

    def _reap(self, address: Address, child: Child) -> None:
        self._loop.remove_reader(child.pidfd)
        status = child.process.wait()
        while self._read(address, child):
            pass
        self._loop.remove_reader(child.output)
        assert child.process.stdout is not None
        child.process.stdout.close()
        os.close(child.pidfd)
        del self._children[address]
        if not self._children:
            self.empty.set()
        self._ended(address, status, list(child.lines))
