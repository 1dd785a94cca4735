"""Shared memory between processes of one host: the source maps the target's memory file, and copies.

Descriptors of memory files pass over the Unix socket by which the peers know each other, and notes and answers go there directly, from
process to process. Each lane is a thread that copies. Memory that is no file goes through the socket, as by `tcp`.
A target cannot keep a source that maps its memory from writing there, only ask: it ends its side of the sockets. The source's side ends
when its threads are out of that memory, or with its process; until then the target waits. A peer's end leaves its memory to whoever else
maps it: a copy that was under way ends harmlessly there.
Leaves out: huge pages (refused for memory files on most hosts).
"""

import os
import secrets
import socket
import struct
from collections.abc import Callable

from headrace.live.transfer.channels import Channel, Plain
from headrace.live.transfer.streams import Streams
from headrace.live.transports import Settings
from headrace.types.errors import TransferError


class Transport(Streams):
    one_host = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Unix())


class Unix:
    """Abstract sockets: no file to leave behind. This user's processes only."""

    name = "shm"
    maps = True

    def listen(self) -> list[tuple[socket.socket, str]]:
        name = f"headrace-{os.getpid()}-{secrets.token_hex(8)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{name}")
        listener.listen(128)
        return [(listener, name)]

    def connect(self, address: str, made: Callable[[socket.socket], None]) -> Channel:
        sock = socket.socket(socket.AF_UNIX)
        made(sock)
        try:
            sock.connect(f"\0{address}")
        except BaseException:
            sock.close()
            raise
        return Plain(sock, socket.SHUT_RD)

    def accept(self, sock: socket.socket) -> Channel:
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", peer)
        if uid != os.getuid():
            raise TransferError(f"process {pid} is of user {uid}")
        return Plain(sock, socket.SHUT_WR)
