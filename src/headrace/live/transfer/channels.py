"""One connected stream socket of a transport: whole buffers, and runs of memory without a copy on our side.

A thread of its own receives from a channel; several may send, each whole frames. Sockets block, but for `send_now`.
"""

import contextlib
import errno
import os
import select
import socket
import ssl
import struct
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.live.transfer.copying import native
from headrace.live.transfer.regions import Region

Runs = NDArray[np.int64]
"""[n, 2] C-contiguous: offset, nbytes."""

FDS_MAX = 16
SEND_S = 0.1
VECTORS = 512
CALL_BYTES = 1 << 20
TLS_BYTES = 1 << 16
PENDING_MAX = 1 << 26


class Ended(ConnectionError):
    """The other end has closed the connection, or we have."""


class Channel(Protocol):
    def fileno(self) -> int: ...

    def receive(self, view: memoryview) -> None:
        """Fill it. Raises OSError, Ended."""
        ...

    def receive_now(self, nbytes: int) -> tuple[bytes, list[int]]:
        """What is there, and descriptors that came along; b"" at the end. Raises BlockingIOError if there is nothing yet."""
        ...

    def send(self, data: bytes, *, more: bool = False) -> None:
        """All of it; with `more`, it may leave together with what follows."""
        ...

    def send_now(self, data: bytes, fds: Sequence[int] = ()) -> int:
        """What goes without waiting, bytes. Raises BlockingIOError if nothing does."""
        ...

    def send_runs(self, region: Region, runs: Runs, moved: Callable[[int], None], step: int) -> None:
        """From the region; `moved(nbytes)` is told every `step` bytes at least."""
        ...

    def receive_runs(self, region: Region, runs: Runs, stop: NDArray[np.uint8]) -> None:
        """Into the region. Once `stop[0]` is set it ends within one call into the system."""
        ...

    def shut(self) -> None:
        """End it: whoever uses it is woken with an error, or soon. From any thread, and again."""
        ...

    def abort(self) -> None:
        """The same for a channel by which nothing has been granted: at once."""
        ...

    def close(self) -> None:
        """When nobody uses it any more."""
        ...


class Plain:
    """A channel over a TCP or Unix socket.

    `shuts`: the directions that `shut` ends. Where the other end takes the end of what it receives to mean that our threads are out of its
    memory, it must not be both: then who is sending looks up every SEND_S.
    """

    def __init__(self, sock: socket.socket, shuts: int = socket.SHUT_RDWR) -> None:
        sock.settimeout(None)
        if shuts != socket.SHUT_RDWR:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, int(SEND_S * 1e6)))
        self._socket = sock
        self._shuts = shuts
        self._closing = Lock()
        self._open = True
        self._shut = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise Ended("the connection has ended")
            view = view[count:]

    def receive_now(self, nbytes: int) -> tuple[bytes, list[int]]:
        if self._socket.family != socket.AF_UNIX:
            return self._socket.recv(nbytes, socket.MSG_DONTWAIT), []
        # socket.recv_fds and send_fds drop the flags that they are given (Python 3.11).
        fds = array("i")
        room = socket.CMSG_LEN(FDS_MAX * fds.itemsize)
        data, extras, _, _ = self._socket.recvmsg(nbytes, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in extras:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        return data, fds.tolist()

    def send(self, data: bytes, *, more: bool = False) -> None:
        view = memoryview(data)
        while view:
            try:
                count = self._socket.send(view, socket.MSG_MORE if more else 0)
            except BlockingIOError:
                self._go_on()
                continue
            view = view[count:]

    def send_now(self, data: bytes, fds: Sequence[int] = ()) -> int:
        if fds:
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
            return self._socket.sendmsg([data], passed, socket.MSG_DONTWAIT)
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def send_runs(self, region: Region, runs: Runs, moved: Callable[[int], None], step: int) -> None:
        if native is None:
            for views in vectors(region, runs, step):
                left = views
                while left:
                    try:
                        count = self._socket.sendmsg(left)
                    except BlockingIOError:
                        self._go_on()
                        continue
                    moved(count)
                    left = rest_of(left, count)
            return
        cursor = np.zeros(2, np.int64)
        base, at, count = region.address, runs.ctypes.data, len(runs)
        while cursor[0] < count:
            sent = native.send(self.fileno(), base, at, count, cursor.ctypes.data, step)
            if sent == -errno.EAGAIN:
                self._go_on()
            else:
                moved(_checked(sent))

    def receive_runs(self, region: Region, runs: Runs, stop: NDArray[np.uint8]) -> None:
        if native is None:
            for views in vectors(region, runs, CALL_BYTES):
                left = views
                while left:
                    count = 0 if stop[0] else self._socket.recvmsg_into(left)[0]
                    if not count:
                        raise Ended("the connection has ended in the middle of a write")
                    left = rest_of(left, count)
            return
        cursor = np.zeros(2, np.int64)
        base, at, count, flag = region.address, runs.ctypes.data, len(runs), stop.ctypes.data
        _checked(native.receive(self.fileno(), base, at, count, cursor.ctypes.data, 1 << 62, flag))

    def shut(self) -> None:
        self._shutdown(self._shuts)

    def abort(self) -> None:
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, directions: int) -> None:
        self._shut = True
        with self._closing:
            if self._open:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(directions)

    def _go_on(self) -> None:
        if self._shut:
            raise Ended("the connection has been shut")

    def close(self) -> None:
        with self._closing:
            self._open = False
            self._socket.close()


class Tls:
    """A channel within TLS. OpenSSL allows one call at a time, so the socket does not block and waits happen outside of the lock.

    Leaves out: descriptors; memory without a copy (every byte goes through the cipher).
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._lock = Lock()
        self._open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self, view: memoryview) -> None:
        while view:
            try:
                with self._lock:
                    count = self._socket.recv_into(view)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
                continue
            if not count:
                raise Ended("the connection has ended")
            view = view[count:]

    def receive_now(self, nbytes: int) -> tuple[bytes, list[int]]:
        try:
            with self._lock:
                return self._socket.recv(nbytes), []
        except ssl.SSLWantReadError:
            raise BlockingIOError from None

    def send(self, data: bytes, *, more: bool = False) -> None:
        self._send(memoryview(data))

    def send_now(self, data: bytes, fds: Sequence[int] = ()) -> int:
        assert not fds
        try:
            with self._lock:
                return self._socket.send(data)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            raise BlockingIOError from None

    def send_runs(self, region: Region, runs: Runs, moved: Callable[[int], None], step: int) -> None:
        for views in vectors(region, runs, step):
            for view in views:
                self._send(view)
                moved(len(view))

    def receive_runs(self, region: Region, runs: Runs, stop: NDArray[np.uint8]) -> None:
        for views in vectors(region, runs, CALL_BYTES):
            for view in views:
                for at in range(0, len(view), TLS_BYTES):
                    if stop[0]:
                        raise Ended("the connection has ended in the middle of a write")
                    self.receive(view[at : at + TLS_BYTES])

    def shut(self) -> None:
        with self._lock:
            if self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def abort(self) -> None:
        self.shut()

    def close(self) -> None:
        with self._lock:
            self._open = False
            self._socket.close()

    def _send(self, view: memoryview) -> None:
        while view:
            try:
                with self._lock:
                    count = self._socket.send(view)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait(select.POLLOUT)
                continue
            view = view[count:]

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), events)
        poll.poll(1000)


class Outlet:
    """Small frames that must not hold up their sender. What does not leave at once leaves when the socket takes it (`flush`).

    `full` is called when the other end does not read; `wait` when `flush` is wanted.
    """

    def __init__(self, channel: Channel, wait: Callable[[], None], full: Callable[[], None]) -> None:
        self._channel = channel
        self._wait = wait
        self._full = full
        self._lock = Lock()
        self._pending: deque[tuple[bytes, Sequence[int]]] = deque()
        self._bytes = 0

    def put(self, data: bytes, fds: Sequence[int] = ()) -> None:
        with self._lock:
            first = not self._pending
            self._pending.append((data, fds))
            self._bytes += len(data)
            left = self._flush() if first else 0
            full = self._bytes > PENDING_MAX
        if full:
            self._full()
        elif left:
            self._wait()

    def flush(self) -> bool:
        """Send what can be sent. True if nothing is left."""
        with self._lock:
            return not self._flush()

    def _flush(self) -> int:
        while self._pending:
            data, fds = self._pending[0]
            try:
                count = self._channel.send_now(data, fds)
            except BlockingIOError:
                break
            except OSError:
                # Whoever receives from it says so.
                self._pending.clear()
                break
            self._bytes -= count
            if count == len(data):
                self._pending.popleft()
            else:
                self._pending[0] = (data[count:], ())
        return len(self._pending)


def close_all(fds: Sequence[int]) -> None:
    """Descriptors that came and are of no use any more: each would keep a peer's memory."""
    for fd in fds:
        os.close(fd)


def vectors(region: Region, runs: Runs, nbytes_max: int):
    """The runs as memory, at most so many bytes and pieces at a time."""
    views: list[memoryview] = []
    filled = 0
    for offset, nbytes in runs.tolist():
        at, end = offset, offset + nbytes
        while at < end:
            take = min(end - at, nbytes_max - filled)
            views.append(region.memory[at : at + take])
            at, filled = at + take, filled + take
            if filled == nbytes_max or len(views) == VECTORS:
                yield views
                views, filled = [], 0
    if views:
        yield views


def rest_of(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left after its first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def _checked(count: int) -> int:
    if count == native.ENDED:
        raise Ended("the connection has ended in the middle of a write")
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return count
