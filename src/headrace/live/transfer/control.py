"""The control connection of a one-sided link, after its handshake: frames both ways, on a socket that never blocks.

It says nothing of the order of what is written by the rail beside it. That it ends is how a death is seen.
"""

import socket
import struct
from collections import deque
from collections.abc import Iterator

import msgspec

from headrace.types.errors import TransferError

HEAD = struct.Struct("<I")
FRAME_BYTES_MAX = 1 << 25
UNSENT_BYTES_MAX = 1 << 26
READ_BYTES = 1 << 16


class Accept(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The target's rail is here."""

    rail: bytes


class Grant(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """With this key the source's rail may write into the region."""

    region: int
    key: bytes


class Said(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An engine's message, either way."""

    message: bytes


class Noted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The note of a shard without bytes."""

    note: int


class Bye(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The target closes the link: stop writing, then close the connection."""


Frame = Accept | Grant | Said | Noted | Bye

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode


class Connection:
    """Not thread-safe: its driver's thread owns it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._in = bytearray()
        self._out: deque[memoryview] = deque()
        self._unsent = 0

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def send(self, frame: Frame) -> None:
        """Raises TransferError if the other end does not read, OSError if it is gone."""
        body = _encode(frame)
        self._out.append(memoryview(HEAD.pack(len(body)) + body))
        self._unsent += HEAD.size + len(body)
        if self._unsent > UNSENT_BYTES_MAX:
            raise TransferError("the peer does not read what it is sent")
        self.flush()

    def flush(self) -> None:
        while self._out:
            try:
                sent = self.sock.send(self._out[0])
            except (BlockingIOError, InterruptedError):
                return
            self._unsent -= sent
            if sent < len(self._out[0]):
                self._out[0] = self._out[0][sent:]
                return
            self._out.popleft()

    def receive(self) -> Iterator[Frame]:
        """What has come. Raises TransferError at the connection's end and for what cannot be read, OSError."""
        try:
            read = self.sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        if not read:
            raise TransferError("the peer has ended, or closed the connection")
        self._in += read
        while len(self._in) >= HEAD.size:
            (size,) = HEAD.unpack_from(self._in)
            if size > FRAME_BYTES_MAX:
                raise TransferError(f"a frame of {size} bytes is too long")
            if len(self._in) < HEAD.size + size:
                return
            body = bytes(self._in[HEAD.size : HEAD.size + size])
            del self._in[: HEAD.size + size]
            try:
                yield _decode(body)
            except msgspec.MsgspecError as error:
                raise TransferError(f"a frame cannot be read: {error}") from None

    def close(self) -> None:
        self.sock.close()
