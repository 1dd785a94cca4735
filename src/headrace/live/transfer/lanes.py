"""The source's end of a link over stream sockets: one connection a lane, each with a thread that sends, or copies into mapped memory.

A link ends by itself when any of its lanes fails. Its sockets are closed when all threads are out of the target's memory, and not before:
their end is what tells a target so.
"""

import fcntl
import logging
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic

import numpy as np

from headrace.live.transfer import handshake
from headrace.live.transfer.channels import PENDING_MAX, Channel, Ended, close_all
from headrace.live.transfer.copying import copy
from headrace.live.transfer.frames import HEADER, MESSAGE, REPLY, VERDICT_S, WRITE, Wire
from headrace.live.transfer.handshake import Claim, Refusal
from headrace.live.transfer.pieces import cut, total
from headrace.live.transfer.regions import Card, Descriptor, Region
from headrace.live.transfer.service import Service
from headrace.live.transports import Settings, Shard, Upward
from headrace.types.errors import TransferError

log = logging.getLogger(__name__)

STEP_BYTES = 1 << 23
"""Sent between two looks at the clock and the counters."""
COPY_BYTES = 1 << 26
"""Copied before a link that is to end lets go of the target's memory."""


class Lane:
    """One connection of a link, at the source, and its thread."""

    def __init__(self, link: "Link", number: int, address: str) -> None:
        self.number = number
        self.moved = 0
        self.queue: SimpleQueue[Shard | bytes | None] = SimpleQueue()
        self._link = link
        self._address = address
        self._socket: socket.socket | None = None
        self._channel: Channel | None = None
        self._due = 0.0
        """When the pace allows the next bytes."""
        self.thread = Thread(target=self._run, name=f"headrace-lane-{number}", daemon=True)

    def shut(self) -> None:
        self.queue.put(None)
        if self._channel is not None:
            self._channel.shut()
        elif self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                log.debug("a socket that was not connected: %s", error)

    def _run(self) -> None:
        link = self._link
        try:
            self._connect()
            while (item := self.queue.get()) is not None and not link.closing.is_set():
                if isinstance(item, bytes):
                    assert self._channel is not None
                    self._channel.send(HEADER.pack(MESSAGE, 0, 0, 0, len(item)) + item)
                elif item.dropped:
                    link.upward.dropped(item)
                else:
                    self._write(item)
        except Refusal as error:
            link.fail(str(error), self.number, final=error.final)
        except (OSError, TransferError, ValueError) as error:
            # The last one: an address that is none.
            link.fail(f"lane {self.number} to {link.peer}: {error}", self.number)
        finally:
            link.left(self._channel)

    def _connect(self) -> None:
        link = self._link
        channel = link.wire.connect(self._address, self._made)
        self._channel = channel
        if link.closing.is_set():
            channel.shut()
        overdue = partial(self._overdue, channel)
        link.service.later(VERDICT_S, overdue)
        handshake.greet(channel, link.secret, link.claim(self.number))
        self._welcome = True
        link.joined(self.number, channel)

    _welcome = False

    def _made(self, sock: socket.socket) -> None:
        self._socket = sock

    def _overdue(self, channel: Channel) -> None:
        if not self._welcome:
            channel.abort()

    def _write(self, shard: Shard) -> None:
        link = self._link
        assert self._channel is not None
        if not len(shard.pieces):
            self._channel.send(HEADER.pack(WRITE, 0, shard.note, 0, 0))
            return
        assert shard.source is not None and shard.target is not None
        mapped = link.mapped.get((shard.target.region, shard.target.token))
        nbytes = total(shard.pieces)
        if mapped is not None:
            borders = range(COPY_BYTES, nbytes, COPY_BYTES)
            for part in cut(shard.pieces, borders) if borders else [shard.pieces]:
                copy(shard.source, mapped, part)
                self.moved += total(part)
                if link.closing.is_set():
                    return
            self._channel.send(HEADER.pack(WRITE, 0, shard.note, 0, 0))
            return
        runs = np.ascontiguousarray(shard.pieces[:, 1:])
        header = HEADER.pack(WRITE, len(runs), shard.note, shard.target.region, nbytes)
        self._channel.send(header + runs.tobytes(), more=True)
        step = link.step
        self._pace(0)
        self._channel.send_runs(
            shard.source,
            np.ascontiguousarray(shard.pieces[:, ::2]),
            self._sent if step else self._count,
            step or STEP_BYTES,
        )

    def _count(self, nbytes: int) -> None:
        self.moved += nbytes

    def _sent(self, nbytes: int) -> None:
        self.moved += nbytes
        self._pace(nbytes)

    def _pace(self, nbytes: int) -> None:
        """Wait until so many bytes more were due at the pace."""
        pace = self._link.pace
        if not pace:
            return
        now = monotonic()
        self._due = max(self._due, now) + nbytes / pace
        self._link.closing.wait(self._due - now)


class Link:
    """`transports.Link`."""

    def __init__(
        self,
        wire: Wire,
        settings: Settings,
        service: Service,
        peer: Card,
        generation: int,
        upward: Upward,
    ) -> None:
        way = peer.way(wire.name)
        assert way is not None and way.lanes
        self.wire = wire
        self.peer = peer.owner
        self.secret = settings.secret
        self.service = service
        self.upward = upward
        self.closing = Event()
        self.over = Event()
        self.mapped: dict[tuple[int, str], Region] = {}
        self.pace = settings.pace / settings.lanes
        self.step = min(STEP_BYTES, max(4096, int(self.pace / 50))) if self.pace else 0
        self._own = settings.address
        self._generation = generation
        self._lock = Lock()
        self._joined = 0
        self._answers = b""
        self._fds: list[int] = []
        self._lanes = [Lane(self, i, way.lanes[i % len(way.lanes)]) for i in range(settings.lanes)]
        self._running = 1
        self._closed: Callable[[], None] | None = None
        self._channels: list[Channel] = []
        self._lanes[0].thread.start()

    def write(self, shard: Shard) -> None:
        self._lanes[shard.lane].queue.put(shard)

    def send(self, message: bytes) -> None:
        self._lanes[0].queue.put(message)

    def moved(self, lane: int) -> int:
        return self._lanes[lane].moved

    def attach(self, descriptor: Descriptor, fds: Sequence[int]) -> None:
        for fd in fds:
            try:
                memory = map_file(fd, descriptor.nbytes)
            except OSError as error:
                raise TransferError(f"memory of {self.peer} cannot be mapped: {error}") from error
            finally:
                os.close(fd)
            self.mapped[descriptor.region, descriptor.token] = Region(descriptor.region, memory, "")

    def close(self, closed: Callable[[], None]) -> None:
        with self._lock:
            self._closed = closed
            over = self.over.is_set()
        if over:
            closed()
        else:
            self._shut()

    def _shut(self) -> None:
        self.closing.set()
        for lane in self._lanes:
            lane.shut()

    # On the lanes' threads

    def claim(self, lane: int) -> Claim:
        return Claim(self._own, self.peer, self._generation, lane, len(self._lanes))

    def joined(self, lane: int, channel: Channel) -> None:
        """A lane is welcome. The first brings the others in; the last completes the link."""
        with self._lock:
            self._joined += 1
            complete = self._joined == len(self._lanes)
            others = [] if lane or self.closing.is_set() else self._lanes[1:]
            self._running += len(others)
        if lane == 0:
            self._first = channel
            self.service.read(channel.fileno(), self._readable)
        for other in others:
            other.thread.start()
        if complete:
            self.upward.up()

    _first: Channel | None = None

    def fail(self, reason: str, lane: int, *, final: bool = False) -> None:
        with self._lock:
            if self.closing.is_set():
                return
            self.closing.set()
        self._shut()
        self.upward.broken(reason, lane, final=final)

    def left(self, channel: Channel | None) -> None:
        """A lane's thread ends: it moves nothing any more."""
        with self._lock:
            self._running -= 1
            if channel is not None:
                self._channels.append(channel)
            last = not self._running
        if last:
            # All are out of the target's memory: the sockets' end tells it.
            self.closing.set()
            self.mapped.clear()
            if self._first is not None:
                self.service.leave(self._first.fileno(), self._released)
            else:
                self._released()

    def _released(self) -> None:
        # They came, and what they belong to did not.
        close_all(self._fds)
        for channel in self._channels:
            channel.close()
        with self._lock:
            self.over.set()
            closed = self._closed
        if closed is not None:
            closed()

    # Answers, on the service's thread

    def _readable(self) -> None:
        assert self._first is not None
        try:
            while True:
                data, fds = self._first.receive_now(1 << 16)
                if not data:
                    raise Ended("it closed the connection")
                self._fds += fds
                self._answers += data
                self._parse()
        except BlockingIOError:
            return
        except OSError as error:
            self.service.forget(self._first.fileno())
            self.fail(f"lane 0 to {self.peer}: {error}", 0)

    def _parse(self) -> None:
        while len(self._answers) >= REPLY.size:
            nbytes, count = REPLY.unpack_from(self._answers)
            if nbytes > PENDING_MAX:
                raise Ended(f"it announces an answer of {nbytes} bytes")
            end = REPLY.size + nbytes
            if len(self._answers) < end:
                return
            body, self._answers = self._answers[REPLY.size : end], self._answers[end:]
            fds, self._fds = self._fds[:count], self._fds[count:]
            self.upward.replied(body, fds)


def map_file(fd: int, nbytes: int) -> memoryview:
    """A peer's memory file, writable. Raises TransferError if it is not what the peer said, or could be shrunk under us."""
    size = os.fstat(fd).st_size
    if size < nbytes:
        raise TransferError(f"a memory file of {size} bytes was passed for a region of {nbytes}")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise TransferError("a memory file was passed that could be shrunk while we write: seal it")
    return memoryview(mmap.mmap(fd, nbytes))
