"""What transports with one-sided writes share: per link a control connection, and a *rail* that moves the bytes.

Life cycle of a link:
 1. The source connects to the target's control address; both prove that they know the secret (`handshake`).
 2. The target's engine accepts it: the target makes a rail for this link alone, and says where it is. The source's rail connects: it is
    up.
 3. A region that is granted is registered with this link's rail; the key goes ahead of the engine's answer.
 4. The source's rail writes pieces, then the shard's note shows up at the target's rail: never before all of its bytes are there.
 5. It ends. At the source: nothing more is begun, the rail is closed, then the connection. At the target (`sever`): `Bye`, then wait, at
    most `SEVER_S`, until the source has closed the connection, or has died; then the rail is closed, with all that was registered.
Closing a target's rail is the fence: what is written later finds neither endpoint nor registered memory. So each link has its own rail.
One thread drives all of a transport's connections and rails; a handshake has one of its own while it lasts.
"""

import logging
import selectors
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Event, Lock, Thread, current_thread, get_ident
from time import monotonic
from typing import Any

from headrace.live.transfer.channels import Channel, Plain
from headrace.live.transfer.control import Connection
from headrace.live.transfer.ends import GREETING_S, End, Inbound, Link, Rail
from headrace.live.transfer.handshake import hear
from headrace.live.transfer.regions import Card, Region
from headrace.live.transports import Settings, Site, Upward
from headrace.types.errors import ConfigError, TransferError

log = logging.getLogger(__name__)

STRANGERS_MAX = 64
"""Handshakes at once."""
BUSY_S, IDLE_MAX_S = 5e-5, 2e-3
"""Between two looks at the rails: while something moves, and at most, when nothing has for long."""


class Prompt(Plain):
    """For a handshake: all that is received must come within `limit_s` from now on, be it byte by byte."""

    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        super().__init__(sock)
        self._until_s = monotonic() + limit_s

    def receive(self, view: memoryview) -> None:
        for at in range(len(view)):
            self._socket.settimeout(max(1e-3, self._until_s - monotonic()))
            super().receive(view[at : at + 1])


class Driver:
    """The thread of one transport, and all of `transports.Transport` but its name and its rails."""

    one_host = False

    def __init__(self, name: str, settings: Settings, make_rail: Callable[[], Rail]) -> None:
        """`make_rail` is called on the driver's thread. Raises ConfigError for settings that it has nothing for."""
        if settings.pace or settings.tls is not None:
            raise ConfigError(f"--transport {name} can neither be paced nor encrypted: use tcp for that")
        self.name = name
        self.settings = settings
        self.make_rail = make_rail
        self.site: Site
        self._listener: socket.socket | None = None
        self._strangers = 0
        self._greeters: dict[Thread, socket.socket | None] = {}
        """Who waits for a handshake, and at which socket."""
        self._ends: dict[End, None] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._open = True
        self._posting = Lock()
        self._driven = True
        """What is posted is called by the thread."""
        self._thread = Thread(target=self._run, name=f"headrace-{name}", daemon=True)
        self._thread.start()

    # transports.Transport

    def listen(self, site: Site) -> tuple[str, ...]:
        self.site = site
        host = self.settings.hosts[0]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=STRANGERS_MAX)
        except OSError as error:
            raise ConfigError(f"--transport {self.name} cannot listen on {host}: {error}") from None
        self._listener.setblocking(False)
        self.post(self._selector.register, self._listener, selectors.EVENT_READ, self._called)
        port = self._listener.getsockname()[1]
        address = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        return (address,) * self.settings.lanes

    def register(self, region: Region) -> None:
        """Each rail registers what it needs."""

    def unregister(self, region: Region) -> None:
        def forget() -> None:
            for end in list(self._ends):
                if isinstance(end, Link) and end.rail is not None:
                    self.within(end, partial(end.rail.forget, region))

        self.ask(forget)

    def link(self, peer: Card, generation: int, upward: Upward) -> Link:
        link = Link(self, peer, generation, upward)
        self.post(self._ends.setdefault, link, None)
        self._meet(link.greet)
        return link

    def close(self) -> None:
        self.post(self._stop)
        self._thread.join()
        for thread, sock in list(self._greeters.items()):
            with suppress(OSError):
                # It may have ended by itself.
                if sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join()
        self._waker.close()

    # For its ends

    def post(self, call: Callable[..., Any], *arguments: Any) -> None:
        with self._posting:
            driven = self._driven
            if driven:
                self._posted.append(partial(call, *arguments))
        if not driven:
            # The thread has ended, or failed: nobody else would call it.
            call(*arguments)
            return
        with suppress(OSError):
            # It is awake already.
            self._waker.send(b"x")

    def ask(self, call: Callable[[], None]) -> None:
        if get_ident() == self._thread.ident or not self._thread.is_alive():
            call()
            return
        done = Event()

        def answer() -> None:
            try:
                call()
            finally:
                done.set()

        self.post(answer)
        while not done.wait(0.1):
            if not self._thread.is_alive():
                # It has failed, and will not answer.
                call()
                return

    def within(self, end: End, call: Callable[[], Any]) -> None:
        try:
            call()
        except (OSError, TransferError) as error:
            end.fail(str(error))

    def channel(self, sock: socket.socket) -> Channel:
        self._greeters[current_thread()] = sock
        return Prompt(sock, GREETING_S)

    def watch(self, connection: Connection, end: End) -> None:
        if not self._driven:
            raise TransferError(f"the transport {self.name} has ended")
        ready = partial(self._ready, connection, end)
        self._ends[end] = None
        self._selector.register(connection.sock, selectors.EVENT_READ, ready)

    def unwatch(self, connection: Connection) -> None:
        if self._watched(connection):
            self._selector.unregister(connection.sock)

    def drop(self, end: End) -> None:
        self._ends.pop(end, None)

    # Its thread

    def _run(self) -> None:
        reason = "the transport was closed"
        try:
            self._drive()
        except Exception as error:
            log.exception("the thread of transport %s failed: all its links are broken", self.name)
            reason = f"the transport failed: {error}"
        for end in list(self._ends):
            end.finish(reason)
        with self._posting:
            self._driven = False
            left = list(self._posted)
            self._posted.clear()
        for call in left:
            # What they still have to say closes their sockets, or says that they are gone.
            call()
        self._selector.close()
        self._wake.close()

    def _drive(self) -> None:
        pause_s = IDLE_MAX_S
        while self._open:
            rails = any(end.rail is not None for end in list(self._ends))
            for key, _ in self._selector.select(pause_s if rails else None):
                key.data()
            moved = bool(self._posted)
            while self._posted:
                self._posted.popleft()()
            for end in list(self._ends):
                moved = self._look(end) or moved
            pause_s = BUSY_S if moved else min(2 * pause_s, IDLE_MAX_S)

    def _look(self, end: End) -> bool:
        try:
            return end.poll()
        except TransferError as error:
            end.fail(str(error))
            return True

    def _woken(self) -> None:
        self._wake.recv(4096)

    def _called(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.debug("a connection ended before it was taken: %s", error)
            return
        if self._strangers >= STRANGERS_MAX:
            sock.close()
            return
        self._strangers += 1
        self._meet(partial(self._hear, sock))

    def _meet(self, greet: Callable[[], None]) -> None:
        """On a thread of its own, as a handshake waits for the other end."""

        def meet() -> None:
            greet()
            self.post(self._greeters.pop, thread, None)

        thread = Thread(target=meet, name=f"headrace-{self.name}-greet", daemon=True)
        self._greeters[thread] = None
        thread.start()

    def _hear(self, sock: socket.socket) -> None:
        """On a thread of its own: who is it?"""
        try:
            claim, answer = hear(self.channel(sock), self.settings.secret, self.settings.address)
        except (OSError, TransferError) as error:
            log.warning("a stranger is turned away: %s", error)
            sock.close()
            self.post(self._heard, None)
            return
        self.post(self._heard, Inbound(self, sock, claim, answer))

    def _heard(self, inbound: Inbound | None) -> None:
        self._strangers -= 1
        if inbound is None:
            return
        if self._open:
            self._ends[inbound] = None
            self.site.opened(inbound)
        else:
            inbound.refuse("the transport was closed")

    def _ready(self, connection: Connection, end: End) -> None:
        def move() -> None:
            connection.flush()
            end.ready()

        self.within(end, move)
        if self._watched(connection):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
            self._selector.modify(connection.sock, events, partial(self._ready, connection, end))

    def _watched(self, connection: Connection) -> bool:
        fd = connection.sock.fileno()
        return self._driven and fd >= 0 and fd in self._selector.get_map()

    def _stop(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
        self._open = False
