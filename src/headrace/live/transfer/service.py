"""One thread that waits on sockets for a transport: connections to take, answers to read, frames that did not leave at once, deadlines."""

import heapq
import logging
import os
import selectors
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from threading import Lock, Thread
from time import monotonic

log = logging.getLogger(__name__)

Ready = Callable[[], None]


class Service:
    """Its methods may be called from any thread; what it calls, it calls on its own."""

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._readers: dict[int, Ready] = {}
        self._writers: dict[int, Ready] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._lock = Lock()
        self._open = True
        self._thread = Thread(target=self._run, name=f"headrace-{name}", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> bool:
        """False if it will not be called: the thread has ended."""
        with self._lock:
            if self._open:
                self._calls.append(function)
                os.eventfd_write(self._wake, 1)
            return self._open

    def read(self, fd: int, ready: Ready) -> None:
        """Call it whenever the descriptor is readable, until `leave`."""
        self.call(lambda: self._set(fd, self._readers, ready))

    def write(self, fd: int, ready: Ready) -> None:
        """Call it once, when the descriptor takes something."""
        self.call(lambda: self._set(fd, self._writers, ready))

    def forget(self, fd: int) -> None:
        """It is readable for good: call nobody for it any more."""
        self._readers.pop(fd, None)
        self._register(fd)

    def leave(self, fd: int, then: Callable[[], None]) -> None:
        """Wait for it no more; `then` it may be closed."""

        def gone() -> None:
            self._readers.pop(fd, None)
            self._writers.pop(fd, None)
            self._register(fd)
            then()

        if not self.call(gone):
            then()

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        due = monotonic() + delay_s
        self.call(lambda: heapq.heappush(self._alarms, (due, next(self._numbers), function)))

    def close(self) -> None:
        """Carry out what was asked for, then end the thread."""

        def stop() -> None:
            with self._lock:
                self._open = False

        self.call(stop)
        self._thread.join()
        with self._lock:
            os.close(self._wake)

    def _run(self) -> None:
        while self._open or self._calls:
            wait_s = None
            if self._alarms:
                wait_s = max(0.0, self._alarms[0][0] - monotonic())
            for key, events in self._selector.select(wait_s):
                if key.fd == self._wake:
                    with suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                    continue
                if events & selectors.EVENT_READ and key.fd in self._readers:
                    self._readers[key.fd]()
                if events & selectors.EVENT_WRITE and key.fd in self._writers:
                    ready = self._writers.pop(key.fd)
                    self._register(key.fd)
                    ready()
            while self._calls:
                self._calls.popleft()()
            while self._alarms and self._alarms[0][0] <= monotonic():
                heapq.heappop(self._alarms)[2]()
        self._selector.close()

    def _set(self, fd: int, table: dict[int, Ready], ready: Ready) -> None:
        table[fd] = ready
        self._register(fd)

    def _register(self, fd: int) -> None:
        if fd < 0:
            # Closed since it was asked for.
            return
        events = selectors.EVENT_READ * (fd in self._readers) | selectors.EVENT_WRITE * (fd in self._writers)
        known = fd in self._selector.get_map()
        try:
            if events and known:
                self._selector.modify(fd, events)
            elif events:
                self._selector.register(fd, events)
            elif known:
                self._selector.unregister(fd)
        except OSError as error:
            log.debug("descriptor %d has been closed: %s", fd, error)
