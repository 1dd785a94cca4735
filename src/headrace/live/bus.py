"""The bus: one hub in `serve`, one link in each worker, over local sockets.

A worker is known by its incarnation. Nothing is taken from one that was not admitted, and nothing is sent to or taken from one that was
dismissed, so what a dead worker said last is never heard after its death was announced. The hub passes messages between workers on in the
order they came, so order per pair holds.
The socket has an abstract name (nothing to leave behind in a file system) and takes connections of this user only; a secret that workers
inherit proves which processes `serve` started.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from headrace.live import wire
from headrace.live.wire import Control
from headrace.types.ids import Address
from headrace.types.messages import AnyMessage

log = logging.getLogger(__name__)

HUB = Address("hub")

BURST = 256
"""Messages taken at once before others on the loop have their turn."""

Fail = Callable[[Exception], None]
Greet = Callable[[Address, wire.Hello], None]
"""Somebody says hello: `admit` or `refuse` it."""


class Receive(Protocol):
    """Called on the loop's thread."""

    def __call__(
        self, source: Address, target: Address, message: AnyMessage | Control, payload: bytes
    ) -> None: ...


class Socket:
    """A ZeroMQ socket on an asyncio loop, unbounded. An error of `receive` is fatal: `failed` gets it, and nothing is heard any more."""

    def __init__(self, kind: int, receive: Callable[[list[bytes]], None], failed: Fail) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._receive = receive
        self._failed = failed
        self.zmq = self._context.socket(kind)
        self.zmq.set(zmq.LINGER, 0)
        self.zmq.set(zmq.SNDHWM, 0)
        self.zmq.set(zmq.RCVHWM, 0)
        self._fd = int(self.zmq.get(zmq.FD))
        self._again: asyncio.Handle | None = None

    def listen(self) -> None:
        """Start to receive; after bind or connect."""
        self._loop.add_reader(self._fd, self._readable)
        self._readable()

    def send(self, frames: list[bytes]) -> None:
        self.zmq.send_multipart(frames, zmq.NOBLOCK, copy=True)
        # Sending may eat the edge that the descriptor would have shown for something that arrived.
        if self._again is None and int(self.zmq.get(zmq.EVENTS)) & zmq.POLLIN:
            self._again = self._loop.call_soon(self._readable)

    def close(self, linger_ms: int = 0) -> None:
        """What was sent last has so long to leave."""
        if self.zmq.closed:
            return
        self._loop.remove_reader(self._fd)
        if self._again is not None:
            self._again.cancel()
        self.zmq.close(linger_ms)
        self._context.term()

    def _readable(self) -> None:
        self._again = None
        for _ in range(BURST):
            try:
                frames = self.zmq.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._receive(frames)
            except msgspec.MsgspecError as error:
                log.warning("dropped a message that cannot be read: %s", error)
            except Exception as error:
                self._failed(error)
                return
            if self.zmq.closed:
                return
        # The descriptor shows edges: what is not read now would wait for the next one.
        self._again = self._loop.call_soon(self._readable)


class Hub:
    """The serve process's end. `receive` gets what is for no member: for the process's own nodes, or for nobody."""

    def __init__(self, greet: Greet, receive: Receive, failed: Fail) -> None:
        self.endpoint = f"ipc://@headrace-{os.getpid()}-{secrets.token_hex(8)}"
        self._greet = greet
        self._receive = receive
        self._members: dict[bytes, Address] = {}
        self._socket = Socket(zmq.ROUTER, self._frames, failed)
        self._socket.zmq.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.zmq.set(zmq.IPC_FILTER_UID, os.getuid())
        self._socket.zmq.bind(self.endpoint)
        self._socket.listen()

    def __contains__(self, address: Address) -> bool:
        return _identity(address) in self._members

    def admit(self, address: Address) -> None:
        """From now on it is a member."""
        self._members[_identity(address)] = address

    def refuse(self, address: Address, reason: str) -> None:
        self._send(_identity(address), wire.encode(HUB, address, wire.NotWelcome(reason)))

    def dismiss(self, address: Address) -> None:
        """It has ended: drop whatever it says or is told from now on."""
        self._members.pop(_identity(address), None)

    def send(
        self, source: Address, target: Address, message: AnyMessage | Control, payload: bytes = b""
    ) -> None:
        """To a member; dropped if it is none."""
        if target in self:
            self._send(_identity(target), wire.encode(source, target, message, payload))

    def close(self) -> None:
        self._socket.close()

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self._socket.send([identity, *frames])
        except zmq.ZMQError as error:
            # It has just died; whoever watches processes will say so.
            log.debug("not sent to %s: %s", identity.decode(errors="replace"), error)

    def _frames(self, frames: list[bytes]) -> None:
        if len(frames) != 4:
            log.warning("dropped a message of %d frames", len(frames))
            return
        identity, header, body, payload = frames
        member = self._members.get(identity)
        if member is None:
            self._stranger(identity, body)
            return
        source, target = wire.decode_header(header)
        if source != member:
            log.warning("%s speaks as %s: dropped", member, source)
        elif _identity(target) in self._members:
            self._send(_identity(target), [header, body, payload])
        else:
            self._receive(source, target, wire.decode_message(body), payload)

    def _stranger(self, identity: bytes, body: bytes) -> None:
        """Only `Hello` is heard from somebody who has not said it."""
        name, _, epoch = identity.decode(errors="replace").rpartition("#")
        if not epoch.isdigit():
            return
        source = Address(name, int(epoch))
        try:
            hello = wire.decode_message(body)
        except msgspec.MsgspecError:
            self.refuse(source, "the protocol version differs: its greeting cannot be read")
            return
        if isinstance(hello, wire.Hello):
            self._greet(source, hello)


class Link:
    """A worker's end."""

    def __init__(self, address: Address, endpoint: str, receive: Receive, failed: Fail) -> None:
        self.address = address
        self._receive = receive
        self._socket = Socket(zmq.DEALER, self._frames, failed)
        self._socket.zmq.set(zmq.IDENTITY, _identity(address))
        self._socket.zmq.connect(endpoint)
        self._socket.listen()

    def send(self, target: Address, message: AnyMessage | Control, payload: bytes = b"") -> None:
        self._socket.send(wire.encode(self.address, target, message, payload))

    def close(self) -> None:
        self._socket.close()

    def _frames(self, frames: list[bytes]) -> None:
        header, body, payload = frames
        source, target = wire.decode_header(header)
        self._receive(source, target, wire.decode_message(body), payload)


def _identity(address: Address) -> bytes:
    return str(address).encode()
