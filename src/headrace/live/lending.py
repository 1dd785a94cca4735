"""Questions about KV that lies with a peer, between the executors of two workers of one host: no hub, no loop, no core in between.

A worker that lends answers at a local socket with an abstract name, which its peers know from its address: so a question to an
incarnation that has ended reaches nobody. Each connection has a thread of its own that waits, computes with the interpreter's lock
released, and sends. Frames, both ways: 8 bytes of length, then so many bytes. A connection begins with the service's secret; users other
than this one are not heard.
"""

import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from threading import Thread

from headrace.ports import Answer, HolderLost
from headrace.types.ids import Address

log = logging.getLogger(__name__)

LENGTH = struct.Struct("<Q")
BYTES_MAX = 2**33
"""A longer frame is none."""


def socket_name(secret: str, address: Address) -> str:
    """Where this incarnation answers. Nobody who does not know the secret can guess it, or take it first."""
    digest = blake2b(f"{secret} {address}".encode(), digest_size=16).hexdigest()
    return f"\0headrace-lend-{digest}"


class Desk:
    """Answers what peers ask about this worker's pool, until the process ends."""

    def __init__(
        self, secret: str, address: Address, answer: Callable[[memoryview], memoryview], backlog: int = 64
    ) -> None:
        """`answer` is called on several threads. Raises OSError if the name is taken."""
        self._secret = secret.encode()
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(socket_name(secret, address))
        self._socket.listen(backlog)
        Thread(target=self._accept, name="headrace-lend", daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        # A mere close would leave the thread in accept().
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            Thread(target=self._serve, args=(connection,), name="headrace-lend", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                if not _is_ours(connection) or bytes(_read(connection, len(self._secret))) != self._secret:
                    log.warning("somebody who is none of ours asked for KV: not answered")
                    return
                while True:
                    _send(connection, [self._answer(_receive(connection))])
            except (OSError, EOFError):
                return
            except Exception:
                # The asker sees the connection end, and takes this worker for lost.
                log.exception("a question about lent KV could not be answered")


@dataclass(slots=True)
class Waiting:
    """Implements `ports.Answer`."""

    desk: "Connections"
    holder: Address
    connection: socket.socket

    def wait(self) -> memoryview:
        try:
            return _receive(self.connection)
        except (OSError, EOFError) as error:
            self.desk.drop(self.holder)
            raise HolderLost(f"{self.holder}: {error}") from error


class Connections:
    """Implements `ports.Partials`: one connection a holder, made when it is first asked. Used by the executor's thread only."""

    def __init__(self, secret: str, timeout_s: float) -> None:
        """`timeout_s`: for each piece of an answer."""
        self._secret = secret
        self._timeout_s = timeout_s
        self._open: dict[Address, socket.socket] = {}

    def ask(self, holder: Address, query: Sequence[memoryview]) -> Answer:
        try:
            connection = self._connection(holder)
            _send(connection, query)
        except OSError as error:
            self.drop(holder)
            raise HolderLost(f"{holder}: {error}") from error
        return Waiting(self, holder, connection)

    def drop(self, holder: Address) -> None:
        """What comes late on this connection is never heard."""
        connection = self._open.pop(holder, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for holder in list(self._open):
            self.drop(holder)

    def _connection(self, holder: Address) -> socket.socket:
        connection = self._open.get(holder)
        if connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._open[holder] = connection
            connection.settimeout(self._timeout_s)
            connection.connect(socket_name(self._secret, holder))
            connection.sendall(self._secret.encode())
        return connection


def _is_ours(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()


def _send(connection: socket.socket, parts: Sequence[memoryview]) -> None:
    connection.sendall(LENGTH.pack(sum(part.nbytes for part in parts)))
    for part in parts:
        connection.sendall(part)


def _receive(connection: socket.socket) -> memoryview:
    """A frame."""
    (count,) = LENGTH.unpack(_read(connection, LENGTH.size))
    if count > BYTES_MAX:
        raise EOFError(f"a frame of {count} bytes")
    return _read(connection, count)


def _read(connection: socket.socket, count: int) -> memoryview:
    """So many bytes. Raises EOFError if the other end closes before."""
    buffer = memoryview(bytearray(count))
    at = 0
    while at < count:
        got = connection.recv_into(buffer[at:])
        if not got:
            raise EOFError("the connection was closed")
        at += got
    return buffer
