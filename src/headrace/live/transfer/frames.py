"""Frames on a transport's stream sockets, and what differs between transports over such (`Wire`).

Frames from the source: a header, the target's runs, the bytes; or a message. If the target's region is mapped at the source, the lane's
thread copies instead, and the frame holds the note only. Back come answers, on the first lane.
"""

import socket
import struct
from collections.abc import Callable
from typing import Protocol

from headrace.live.transfer.channels import Channel

WRITE, MESSAGE = 1, 2
HEADER = struct.Struct("<BIQIQ")
"""Kind, runs, note, region, bytes that follow (the runs apart)."""
REPLY = struct.Struct("<IB")
"""Bytes, descriptors."""
RUNS_MAX = 1 << 20
VERDICT_S = 60.0
"""A handshake may take so long, once its source has proved itself."""


class Wire(Protocol):
    """What differs between transports over streams."""

    name: str
    maps: bool
    """Regions that are memory files are mapped by their writers."""

    def listen(self) -> list[tuple[socket.socket, str]]:
        """Listening sockets, and their addresses for peers. Raises ConfigError."""
        ...

    def connect(self, address: str, made: Callable[[socket.socket], None]) -> Channel:
        """`made` gets the socket before it connects, so that it can be shut. Raises OSError, TransferError."""
        ...

    def accept(self, sock: socket.socket) -> Channel:
        """On a thread of its own. Raises OSError, TransferError for whom it does not let in."""
        ...
