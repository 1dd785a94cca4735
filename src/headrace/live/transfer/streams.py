"""What transports over stream sockets share: links (`lanes`), their inbound ends (`inbound`), and the door where they come in."""

import logging
import socket
from functools import partial
from threading import Event, Lock, Thread

from headrace.live.transfer import handshake
from headrace.live.transfer.channels import Channel
from headrace.live.transfer.frames import Wire
from headrace.live.transfer.handshake import Claim
from headrace.live.transfer.inbound import Inbound
from headrace.live.transfer.lanes import Link
from headrace.live.transfer.regions import Card, Region
from headrace.live.transfer.service import Service
from headrace.live.transports import Settings, Site, Upward
from headrace.types.errors import TransferError
from headrace.types.ids import Address

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
GREETING_MAX = 64
"""Connections that may be greeting at a time. One more ends the oldest: a peer takes milliseconds, so who is old is a stranger."""


class Streams:
    """`transports.Transport` over a wire."""

    site: Site

    def __init__(self, settings: Settings, wire: Wire) -> None:
        self.wire = wire
        self.service = Service(f"{wire.name}-service")
        self._settings = settings
        self._listeners: list[socket.socket] = []
        self._links: list[Link] = []
        self._inbound: dict[Address, Inbound] = {}
        """Of each source, the latest."""
        self._lock = Lock()
        self._greeting: dict[socket.socket, None] = {}
        """Who has not proved himself yet, the oldest first."""

    def listen(self, site: Site) -> tuple[str, ...]:
        self.site = site
        made = self.wire.listen()
        for listener, _ in made:
            listener.setblocking(False)
            self._listeners.append(listener)
            self.service.read(listener.fileno(), partial(self._connected, listener))
        return tuple(made[i % len(made)][1] for i in range(self._settings.lanes))

    def register(self, region: Region) -> None:
        pass

    def unregister(self, region: Region) -> None:
        pass

    def link(self, peer: Card, generation: int, upward: Upward) -> Link:
        link = Link(self.wire, self._settings, self.service, peer, generation, upward)
        self._links = [known for known in self._links if not known.over.is_set()] + [link]
        return link

    def close(self) -> None:
        for link in self._links:
            link.over.wait()
        for listener in self._listeners:
            self.service.leave(listener.fileno(), listener.close)
        self.service.close()

    # Connections that come in

    def _connected(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            log.debug("nobody there any more: %s", error)
            return
        if not self._room():
            log.warning("%s: a connection dropped unheard, too many are greeting", self.wire.name)
            sock.close()
            return
        with self._lock:
            self._greeting[sock] = None
        Thread(target=self._serve, args=(sock,), name="headrace-receive", daemon=True).start()

    def _room(self) -> bool:
        """Let one more greet. False: not even the oldest can be ended (within TLS)."""
        with self._lock:
            if len(self._greeting) >= GREETING_MAX:
                oldest = next(iter(self._greeting))
                try:
                    oldest.shutdown(socket.SHUT_RDWR)
                except OSError:
                    return False
                del self._greeting[oldest]
        return True

    def _serve(self, sock: socket.socket) -> None:
        """A connection's whole life."""
        channel, inbound = None, None
        sock.settimeout(HANDSHAKE_S)
        try:
            try:
                channel = self.wire.accept(sock)
                inbound = self._greet(sock, channel)
            finally:
                self._known(sock)
            if inbound is not None:
                try:
                    inbound.serve(channel)
                finally:
                    inbound.outlast(channel)
        except (OSError, TransferError) as error:
            if inbound is None:
                log.warning("%s: dropped a stranger at %s: %s", self.wire.name, self._settings.address, error)
            else:
                inbound.ended(str(error))
        finally:
            if inbound is not None:
                self._forget(inbound)
            if channel is not None:
                self._leave(channel)
            else:
                sock.close()
            if inbound is not None:
                inbound.left()

    def _forget(self, inbound: Inbound) -> None:
        """A lane of it is gone: no other joins it any more."""
        with self._lock:
            if self._inbound.get(inbound.source) is inbound:
                del self._inbound[inbound.source]

    def _leave(self, channel: Channel) -> None:
        fd = channel.fileno()
        if fd >= 0:
            channel.shut()
            self.service.leave(fd, channel.close)

    def _known(self, sock: socket.socket) -> None:
        with self._lock:
            self._greeting.pop(sock, None)

    def _greet(self, sock: socket.socket, channel: Channel) -> Inbound | None:
        """Let it in as a lane of its link, or not (None: it has been told)."""
        done = Event()
        self.service.later(HANDSHAKE_S, lambda: None if done.is_set() else channel.abort())
        claim, answer = handshake.hear(channel, self._settings.secret, self._settings.address)
        done.set()
        self._known(sock)
        inbound = self._of(claim)
        if inbound is None:
            answer("no such link", False)
            return None
        inbound.join(claim.lane, channel)
        welcome = False
        try:
            reason, final = ("", False) if claim.lane else self._offer(inbound)
            answer(reason, final)
            welcome = not reason
        finally:
            if not welcome:
                inbound.left()
        return inbound if welcome else None

    def _of(self, claim: Claim) -> Inbound | None:
        """The link that this lane belongs to, which the first one makes."""
        if claim.lane == 0:
            return Inbound(self._settings.address, self.site, self.service, claim, maps=self.wire.maps)
        with self._lock:
            known = self._inbound.get(claim.source)
        return known if known is not None and known.generation == claim.generation else None

    def _offer(self, inbound: Inbound) -> tuple[str, bool]:
        """What the engine says to it, as `Inbound.decided`."""
        self.site.opened(inbound)
        reason, final = inbound.decided()
        if not reason:
            with self._lock:
                self._inbound[inbound.source] = inbound
        return reason, final
