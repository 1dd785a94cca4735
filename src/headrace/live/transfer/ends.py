"""Both ends of a one-sided link, as the engine sees them; `onesided` says how a link lives."""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from headrace.live.transfer.channels import Channel
from headrace.live.transfer.control import Accept, Bye, Connection, Frame, Grant, Noted, Said
from headrace.live.transfer.handshake import Claim, Refusal, greet
from headrace.live.transfer.regions import Card, Descriptor, Region
from headrace.live.transports import Settings, Shard, Site, Upward
from headrace.types.errors import TransferError

log = logging.getLogger(__name__)

GREETING_S = 10.0
"""What a handshake may take."""
SEVER_S = 1.0


class Rail(Protocol):
    """One end of the data path of one link. All calls come from one thread. Any may raise TransferError: the link is broken then."""

    def address(self) -> bytes:
        """At the target: what the source's `connect` needs."""
        ...

    def connect(self, address: bytes) -> None: ...

    def grant(self, region: Region) -> bytes:
        """At the target: let the source write into it. What its `attach` needs."""
        ...

    def attach(self, region: int, key: bytes) -> None: ...

    def write(self, shard: Shard) -> None:
        """Begin: bytes, of which there are some, then its note."""
        ...

    def poll(self) -> tuple[list[Shard], list[int]]:
        """Shards that have left (source); notes that have come (target)."""
        ...

    def forget(self, region: Region) -> None:
        """At the source, with nothing of it under way: its memory may go."""
        ...

    def close(self) -> None:
        """On return nothing is moved by it, and nothing can be moved into it."""
        ...


class Drive(Protocol):
    """What an end needs of its transport (`onesided.Driver`)."""

    name: str
    settings: Settings
    site: Site
    make_rail: Callable[[], Rail]

    def post(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have it called on the driver's thread; from any thread."""
        ...

    def ask(self, call: Callable[[], None]) -> None:
        """Have it called, and wait until it was."""
        ...

    def within(self, end: "End", call: Callable[[], Any]) -> None:
        """Call it. An error breaks this link, and no other."""
        ...

    def channel(self, sock: socket.socket) -> Channel:
        """For a handshake, which may take GREETING_S."""
        ...

    def watch(self, connection: Connection, end: "End") -> None:
        """From now on the end is `ready` when something has come, and its rail is looked at. Raises TransferError when it is too late."""
        ...

    def unwatch(self, connection: Connection) -> None: ...

    def drop(self, end: "End") -> None:
        """It is over."""
        ...


class Link:
    """`transports.Link`: the source's end."""

    def __init__(self, driver: Drive, peer: Card, generation: int, upward: Upward) -> None:
        self.rail: Rail | None = None
        self._driver = driver
        self._peer = peer
        self._generation = generation
        self._upward = upward
        self._connection: Connection | None = None
        self._moved: dict[int, int] = {}
        self._grants: dict[int, TransferError | None] = {}
        self._ended = False

    # From the engine

    def write(self, shard: Shard) -> None:
        self._driver.post(self._write, shard)

    def send(self, message: bytes) -> None:
        self._driver.post(self._send, message)

    def attach(self, descriptor: Descriptor, fds: Sequence[int]) -> None:
        error = self._grants.get(descriptor.region, TransferError("the region's key has not come"))
        if error is not None:
            raise error

    def moved(self, lane: int) -> int:
        return self._moved.get(lane, 0)

    def close(self, closed: Callable[[], None]) -> None:
        def close() -> None:
            self._end()
            closed()

        self._driver.post(close)

    # On a thread of its own

    def greet(self) -> None:
        """Connect, and prove who we are."""
        driver = self._driver
        way = self._peer.way(driver.name)
        assert way is not None
        sock = None
        try:
            host, _, port = way.lanes[0].rpartition(":")
            sock = socket.create_connection((host.strip("[]"), int(port)), GREETING_S)
            claim = Claim(driver.settings.address, self._peer.owner, self._generation, 0, 1)
            greet(driver.channel(sock), driver.settings.secret, claim)
        except (OSError, ValueError, TransferError) as error:
            if sock is not None:
                sock.close()
            final = isinstance(error, Refusal) and error.final
            driver.post(partial(self.fail, str(error), final=final))
            return
        driver.post(self._greeted, sock)

    # On the driver's thread

    def ready(self) -> None:
        assert self._connection is not None
        for frame in self._connection.receive():
            self._hear(frame)
            if self._ended:
                return

    def poll(self) -> bool:
        """Look at the rail. True: something moves."""
        if self.rail is None:
            return False
        left, _ = self.rail.poll()
        for shard in left:
            self._moved[shard.lane] = self._moved.get(shard.lane, 0) + int(shard.pieces[:, 2].sum()) + 1
        return bool(left)

    def fail(self, reason: str, *, final: bool = False) -> None:
        """It is broken: nothing of it moves any more, then the engine is told."""
        if not self._ended:
            self._end()
            self._upward.broken(reason, -1, final=final)

    def finish(self, reason: str) -> None:
        """The transport ends."""
        self.fail(reason)

    def _greeted(self, sock: socket.socket) -> None:
        if self._ended:
            sock.close()
            return
        self._connection = Connection(sock)
        self._driver.within(self, partial(self._driver.watch, self._connection, self))

    def _hear(self, frame: Frame) -> None:
        match frame:
            case Accept(address) if self.rail is None:
                self.rail = self._driver.make_rail()
                self.rail.connect(address)
                self._upward.up()
            case Grant(region, key) if self.rail is not None:
                try:
                    self.rail.attach(region, key)
                    self._grants[region] = None
                except TransferError as error:
                    self._grants[region] = error
            case Said(message) if self.rail is not None:
                self._upward.replied(message, ())
            case Bye():
                self.fail("its target closed it")
            case _:
                self.fail(f"the peer said {type(frame).__name__} out of turn")

    def _write(self, shard: Shard) -> None:
        if self._ended:
            return
        if shard.dropped:
            self._upward.dropped(shard)
            return
        assert self.rail is not None and self._connection is not None, (
            "nothing is written by a link that is not up"
        )
        if len(shard.pieces):
            self._driver.within(self, partial(self.rail.write, shard))
        else:
            self._driver.within(self, partial(self._connection.send, Noted(shard.note)))

    def _send(self, message: bytes) -> None:
        if not self._ended:
            assert self._connection is not None, "nothing is sent by a link that is not up"
            self._driver.within(self, partial(self._connection.send, Said(message)))

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self.rail is not None:
            self.rail.close()
            self.rail = None
        if self._connection is not None:
            self._driver.unwatch(self._connection)
            self._connection.close()
        self._driver.drop(self)


class Inbound:
    """`transports.Inbound`: the target's end, from the moment when its source has proved itself."""

    def __init__(
        self, driver: Drive, sock: socket.socket, claim: Claim, answer: Callable[[str, bool], None]
    ) -> None:
        self.rail: Rail | None = None
        self.source = claim.source
        self.generation = claim.generation
        self._driver = driver
        self._sock = sock
        self._answer = answer
        self._connection: Connection | None = None
        self._ended = False

    # From the engine

    def accept(self) -> None:
        self._driver.post(self._driver.within, self, self._accept)

    def refuse(self, reason: str) -> None:
        self._driver.post(self._refuse, reason)

    def grant(self, region: Region) -> Sequence[int]:
        self._driver.post(self._driver.within, self, partial(self._grant, region))
        return ()

    def reply(self, message: bytes, fds: Sequence[int] = ()) -> None:
        assert not fds
        self._driver.post(self._driver.within, self, partial(self._send, Said(message)))

    def sever(self, gone: Callable[[], None]) -> None:
        def sever() -> None:
            self._sever()
            gone()

        self._driver.post(sever)

    # On the driver's thread

    def ready(self) -> None:
        assert self._connection is not None
        for frame in self._connection.receive():
            match frame:
                case Said(message):
                    self._driver.site.mailed(self, message)
                case Noted(note):
                    self._driver.site.landed(self, note)
                case _:
                    raise TransferError(f"the peer said {type(frame).__name__} out of turn")

    def poll(self) -> bool:
        if self.rail is None:
            return False
        _, notes = self.rail.poll()
        for note in notes:
            self._driver.site.landed(self, note)
        return bool(notes)

    def fail(self, reason: str) -> None:
        """The engine severs it. Until then its rail stays as it is, but is not looked at."""
        if not self._ended:
            self._driver.drop(self)
            if self._connection is not None:
                self._driver.unwatch(self._connection)
            self._driver.site.broken(self, reason)

    def finish(self, reason: str) -> None:
        """The transport ends; nobody severs it any more."""
        self.fail(reason)
        self._end()

    def _accept(self) -> None:
        if self._ended:
            return
        self.rail = self._driver.make_rail()
        self._answer("", False)
        self._connection = Connection(self._sock)
        self._driver.watch(self._connection, self)
        self._send(Accept(self.rail.address()))

    def _refuse(self, reason: str) -> None:
        self._driver.within(self, partial(self._answer, reason, True))
        self._end()

    def _grant(self, region: Region) -> None:
        if self.rail is not None:
            self._send(Grant(region.number, self.rail.grant(region)))

    def _send(self, frame: Frame) -> None:
        if not self._ended and self._connection is not None:
            self._connection.send(frame)

    def _sever(self) -> None:
        if self._connection is not None and not self._ended:
            self._wait_for_source(self._connection)
        self._end()

    def _wait_for_source(self, connection: Connection) -> None:
        """Until it has closed its end, which it does when nothing of it moves."""
        until_s = time.monotonic() + SEVER_S
        try:
            connection.send(Bye())
            while (left_s := until_s - time.monotonic()) > 0:
                connection.sock.settimeout(left_s)
                if not connection.sock.recv(1 << 16):
                    return
        except (OSError, TransferError) as error:
            log.debug("the link from %s has ended: %s", self.source, error)

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self.rail is not None:
            self.rail.close()
            self.rail = None
        if self._connection is not None:
            self._driver.unwatch(self._connection)
        self._sock.close()
        self._driver.drop(self)


End = Link | Inbound
