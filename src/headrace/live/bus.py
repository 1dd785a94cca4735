"""The bus: one hub in `serve`, one link in each worker.

A worker is known by its incarnation. Nothing is taken from one that was not admitted, and nothing is sent to or taken from one that was
dismissed, so what a dead worker said last is never heard after its death was announced. The hub passes messages between workers on in the
order they came, so order per pair holds.
Workers that `serve` started use a local socket. It has an abstract name (nothing to leave behind in a file system) and takes connections of
this user only; a secret that workers inherit proves which processes `serve` started.
Workers of other hosts come through a *door*: TCP, encrypted, closed to who does not know the secret (`live.keys`). There an address belongs
to one connection and ends with it, so a break is a death, and what was lost in it is never missed: a worker that comes back is another
incarnation. ZeroMQ's own heartbeats, which its I/O thread answers, find a connection that is silently dead.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from headrace.live import wire
from headrace.live.keys import Keys
from headrace.live.wire import Control
from headrace.types.ids import Address
from headrace.types.messages import AnyMessage

log = logging.getLogger(__name__)

HUB = Address("hub")

BURST = 256
"""Messages taken at once before others on the loop have their turn."""

BEAT_MS = 1000
"""Each end of a connection to another host asks so often whether the other one is there."""
LINGER_MS = 500
"""What is said last to workers of other hosts has so long to leave."""
HANDSHAKE_MS = 5000
"""A stranger has so long to prove that he is none."""
MESSAGE_BYTES_MAX = 2**26
"""Of what comes from another host; a prompt of ten million tokens is smaller."""
ENDS_MS = (0, 20, 200)
"""After a connection has ended somewhere, all are looked after: the news may come before its address is free."""

Fail = Callable[[Exception], None]
Greet = Callable[[Address, wire.Hello], None]
"""Somebody says hello: `admit` or `refuse` it."""
Knock = Callable[[bytes, wire.Apply], None]
"""Somebody at the door would join: `offer` this visitor a place, or `turn_away`."""
Gone = Callable[[Address], None]
"""The connection of one who came through the door has ended."""


class Receive(Protocol):
    """Called on the loop's thread."""

    def __call__(
        self, source: Address, target: Address, message: AnyMessage | Control, payload: bytes
    ) -> None: ...


class Reader:
    """Reads a ZeroMQ socket on an asyncio loop. An error of `receive` is fatal: `failed` gets it, and nothing is heard any more."""

    def __init__(
        self, socket: zmq.Socket[bytes], receive: Callable[[list[bytes]], None], failed: Fail
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._failed = failed
        self._zmq = socket
        self._fd = int(socket.get(zmq.FD))
        self._again: asyncio.Handle | None = None

    def listen(self) -> None:
        """Start to receive; after bind or connect."""
        self._loop.add_reader(self._fd, self._readable)
        self._readable()

    def look(self) -> None:
        """After sending, which may eat the edge that the descriptor would have shown for something that arrived."""
        if self._again is None and int(self._zmq.get(zmq.EVENTS)) & zmq.POLLIN:
            self._again = self._loop.call_soon(self._readable)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._again is not None:
            self._again.cancel()

    def _readable(self) -> None:
        self._again = None
        for _ in range(BURST):
            try:
                frames = self._zmq.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._receive(frames)
            except msgspec.MsgspecError as error:
                log.warning("dropped a message that cannot be read: %s", error)
            except Exception as error:
                self._failed(error)
                return
            if self._zmq.closed:
                return
        # The descriptor shows edges: what is not read now would wait for the next one.
        self._again = self._loop.call_soon(self._readable)


class Socket:
    """A ZeroMQ socket on an asyncio loop, unbounded. An error of `receive` is fatal: `failed` gets it, and nothing is heard any more."""

    def __init__(self, kind: int, receive: Callable[[list[bytes]], None], failed: Fail) -> None:
        self._context = zmq.Context()
        self._failed = failed
        self.zmq = self._context.socket(kind)
        self.zmq.set(zmq.LINGER, 0)
        self.zmq.set(zmq.SNDHWM, 0)
        self.zmq.set(zmq.RCVHWM, 0)
        self._reader = Reader(self.zmq, receive, failed)
        self._monitor: tuple[zmq.Socket[bytes], Reader] | None = None

    def across_hosts(self, silence_ms: int) -> None:
        """Before bind or connect: notice a connection that is silently dead, and take no message that is too large."""
        self.zmq.set(zmq.IPV6, 1)
        self.zmq.set(zmq.HEARTBEAT_IVL, min(BEAT_MS, max(1, silence_ms // 3)))
        self.zmq.set(zmq.HEARTBEAT_TIMEOUT, silence_ms)
        self.zmq.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self.zmq.set(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)

    def watch(self, told: Callable[[int], None]) -> None:
        """`told` gets the events of its connections (`zmq.EVENT_...`). Before bind or connect."""
        pair = self.zmq.get_monitor_socket()
        reader = Reader(pair, lambda frames: told(int(parse_monitor_message(frames)["event"])), self._failed)
        self._monitor = pair, reader
        reader.listen()

    def listen(self) -> None:
        """Start to receive; after bind or connect."""
        self._reader.listen()

    def send(self, frames: list[bytes]) -> None:
        try:
            self.zmq.send_multipart(frames, zmq.NOBLOCK, copy=True)
        finally:
            # One that fails eats the edge, too.
            self._reader.look()

    def close(self, linger_ms: int = 0) -> None:
        """What was sent last has so long to leave."""
        if self.zmq.closed:
            return
        self._reader.close()
        if self._monitor is not None:
            pair, reader = self._monitor
            reader.close()
            self.zmq.disable_monitor()
            pair.close(0)
        self.zmq.close(linger_ms)
        self._context.term()


class Hub:
    """The serve process's end. `receive` gets what is for no member: for the process's own nodes, or for nobody."""

    def __init__(self, greet: Greet, receive: Receive, failed: Fail) -> None:
        self.endpoint = f"ipc://@headrace-{os.getpid()}-{secrets.token_hex(8)}"
        self._greet = greet
        self._receive = receive
        self._failed = failed
        self._members: dict[Address, None] = {}
        self._routes: dict[Address, tuple[Socket, bytes]] = {}
        """Where those are who may be told something, and by which identity their socket knows them."""
        self._callers: dict[bytes, Address] = {}
        """Who speaks under an identity. Those of the door begin with a zero byte, local ones are text."""
        self._local = self._router(self._frames)
        self._local.zmq.set(zmq.IPC_FILTER_UID, os.getuid())
        self._local.zmq.bind(self.endpoint)
        self._local.listen()
        self._door: Socket | None = None
        self._knock: Knock
        self._gone: Gone

    def __contains__(self, address: Address) -> bool:
        return address in self._members

    def open_door(self, endpoint: str, keys: Keys, silence_ms: int, knock: Knock, gone: Gone) -> str:
        """Listen for workers of other hosts, too; gives the endpoint with its port. Raises zmq.ZMQError if that is taken."""
        self._knock, self._gone = knock, gone
        door = self._router(self._frames_at_door)
        door.across_hosts(silence_ms)
        door.zmq.set(zmq.CURVE_SERVER, 1)
        door.zmq.set(zmq.CURVE_SECRETKEY, keys.hub_secret)
        door.watch(self._connection)
        self._door = door
        door.zmq.bind(endpoint)
        door.listen()
        return bytes(door.zmq.get(zmq.LAST_ENDPOINT)).decode().rstrip("\0")

    def admit(self, address: Address) -> None:
        """From now on it is a member; one that nobody has heard of will be a local one."""
        self._members[address] = None
        if address not in self._routes:
            self._routes[address] = self._local, _identity(address)
            self._callers[_identity(address)] = address

    def refuse(self, address: Address, reason: str) -> None:
        self._tell(address, wire.NotWelcome(reason))

    def offer(self, visitor: bytes, offer: wire.Invitation) -> None:
        """The visitor is this address from now on; it may say `Hello`."""
        address = offer.config.address
        assert self._door is not None
        self._routes[address] = self._door, visitor
        self._callers[visitor] = address
        self._tell(address, offer)

    def turn_away(self, visitor: bytes, reason: str, *, again: bool) -> None:
        """`again`: it may ask once more, later."""
        self._turn(visitor, wire.NotWelcome(reason, again))

    def _turn(self, visitor: bytes, message: Control) -> None:
        assert self._door is not None
        nobody = Address("")
        self._send(nobody, (self._door, visitor), wire.encode(HUB, nobody, message))

    def dismiss(self, address: Address, reason: str = "") -> None:
        """It has ended: drop whatever it says or is told from now on. With a reason: it lives, and is told."""
        if reason:
            self._tell(address, wire.Dismissed(reason))
        self._members.pop(address, None)
        _, identity = self._routes.pop(address, (None, None))
        if identity is not None:
            self._callers.pop(identity, None)

    def send(
        self, source: Address, target: Address, message: AnyMessage | Control, payload: bytes = b""
    ) -> None:
        """To a member; dropped if it is none."""
        if target in self._members:
            self._send(target, self._routes[target], wire.encode(source, target, message, payload))

    def close(self) -> None:
        self._local.close()
        if self._door is not None:
            self._door.close(LINGER_MS)

    def _router(self, receive: Callable[[list[bytes]], None]) -> Socket:
        socket = Socket(zmq.ROUTER, receive, self._failed)
        socket.zmq.set(zmq.ROUTER_MANDATORY, 1)
        return socket

    def _tell(self, address: Address, message: Control) -> None:
        route = self._routes.get(address)
        if route is not None:
            self._send(address, route, wire.encode(HUB, address, message))

    def _send(self, target: Address, route: tuple[Socket, bytes], frames: list[bytes]) -> None:
        socket, identity = route
        try:
            socket.send([identity, *frames])
        except zmq.ZMQError as error:
            # It has just died. Of a local process the parent will hear; of another host nobody but us.
            log.debug("not sent to %s: %s", target, error)
            if socket is self._door and target in self._routes:
                asyncio.get_running_loop().call_soon(self._lost, target, identity)

    def _lost(self, address: Address, identity: bytes) -> None:
        if self._callers.get(identity) == address:
            self._gone(address)

    def _connection(self, event: int) -> None:
        if event == zmq.EVENT_DISCONNECTED:
            for delay_ms in ENDS_MS:
                asyncio.get_running_loop().call_later(delay_ms / 1e3, self._look_after_all)

    def _look_after_all(self) -> None:
        """A message to an identity whose connection has ended cannot be sent."""
        for address, (socket, _) in list(self._routes.items()):
            if socket is self._door and not socket.zmq.closed:
                self._tell(address, wire.Pulse())

    def _frames(self, frames: list[bytes]) -> None:
        if len(frames) != 4:
            log.warning("dropped a message of %d frames", len(frames))
            return
        identity, header, body, payload = frames
        member = self._callers.get(identity)
        if member not in self._members:
            self._stranger(identity, body)
        else:
            self._pass_on(member, header, body, payload)

    def _pass_on(self, member: Address, header: bytes, body: bytes, payload: bytes) -> None:
        source, target = wire.decode_header(header)
        if source != member:
            log.warning("%s speaks as %s: dropped", member, source)
        elif target in self._members:
            self._send(target, self._routes[target], [header, body, payload])
        else:
            self._receive(source, target, wire.decode_message(body), payload)

    def _stranger(self, identity: bytes, body: bytes) -> None:
        """Only `Hello` is heard from a local process that has not said it."""
        name, _, epoch = identity.decode(errors="replace").rpartition("#")
        if not epoch.isdigit():
            return
        source = Address(name, int(epoch))
        if self._routes.setdefault(source, (self._local, identity)) != (self._local, identity):
            return
        self._callers[identity] = source
        try:
            hello = wire.decode_message(body)
        except msgspec.MsgspecError:
            self.refuse(source, "the protocol version differs: its greeting cannot be read")
            return
        if isinstance(hello, wire.Hello):
            self._greet(source, hello)

    def _frames_at_door(self, frames: list[bytes]) -> None:
        if len(frames) != 4:
            log.warning("dropped a message of %d frames from another host", len(frames))
            return
        identity, header, body, payload = frames
        caller = self._callers.get(identity)
        if caller in self._members:
            self._pass_on(caller, header, body, payload)
            return
        try:
            message = wire.decode_message(body)
        except msgspec.MsgspecError:
            reason = f"the protocol version differs: what it says cannot be read by version {wire.PROTOCOL}"
            self.turn_away(identity, reason, again=False)
            return
        if caller is None and isinstance(message, wire.Apply):
            self._knock(identity, message)
        elif caller is not None and isinstance(message, wire.Hello):
            self._greet(caller, message)
        elif caller is None:
            # It was dismissed, and has perhaps not heard it.
            self._turn(identity, wire.Dismissed("the service does not know it (any more)"))


class Link:
    """A worker's end."""

    def __init__(
        self,
        address: Address,
        endpoint: str,
        receive: Receive,
        failed: Fail,
        *,
        keys: Keys | None = None,
        silence_ms: int = 0,
        connection: Callable[[int], None] = lambda event: None,
    ) -> None:
        """With `keys`: to the door of another host, by one connection that is not made again; `connection` gets its events."""
        self.address = address
        self.receive = receive
        self._socket = Socket(zmq.DEALER, self._frames, failed)
        socket = self._socket.zmq
        if keys is None:
            socket.set(zmq.IDENTITY, _identity(address))
        else:
            self._socket.across_hosts(silence_ms)
            public, secret = zmq.curve_keypair()
            socket.set(zmq.CURVE_SERVERKEY, keys.hub_public)
            socket.set(zmq.CURVE_PUBLICKEY, public)
            socket.set(zmq.CURVE_SECRETKEY, secret)
            socket.set(zmq.RECONNECT_IVL, -1)
            socket.set(zmq.CONNECT_TIMEOUT, HANDSHAKE_MS)
            self._socket.watch(connection)
        socket.connect(endpoint)
        self._socket.listen()

    def send(self, target: Address, message: AnyMessage | Control, payload: bytes = b"") -> None:
        self._socket.send(wire.encode(self.address, target, message, payload))

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger_ms)

    def _frames(self, frames: list[bytes]) -> None:
        header, body, payload = frames
        source, target = wire.decode_header(header)
        self.receive(source, target, wire.decode_message(body), payload)


def _identity(address: Address) -> bytes:
    return str(address).encode()
