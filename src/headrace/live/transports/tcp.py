"""TCP: several connections, scatter and gather straight from and into registered memory, between hosts (or on one).

One connection a lane, each with threads of its own; the bytes never pass through Python. Optionally paced, and within TLS, where peers must
show a certificate (every byte is copied through the cipher then).
A connection that stays on its host has no network to spare, but the host's congestion control may pace it as if it had (BBR was measured at
two thirds of Reno there): it gets the one that every Linux has and that does not pace.
Leaves out: congestion control of its own; zero-copy sends (measured on one host: page references are slower to receive than copies).
"""

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from headrace.live.transfer.channels import Channel, Plain, Tls
from headrace.live.transfer.streams import Streams
from headrace.live.transports import Settings
from headrace.types.errors import ConfigError, TransferError

CONNECT_S = 5.0
UNPACED = b"reno"


class Transport(Streams):
    one_host = False

    def __init__(self, settings: Settings) -> None:
        if not settings.secret:
            raise ConfigError("the tcp transport needs a secret that its peers share")
        super().__init__(settings, Tcp(settings))


class Tcp:
    name = "tcp"
    maps = False

    def __init__(self, settings: Settings) -> None:
        self._hosts = settings.hosts
        self._inward = self._outward = None
        if settings.tls is not None:
            self._inward = _context(ssl.PROTOCOL_TLS_SERVER, *settings.tls)
            self._outward = _context(ssl.PROTOCOL_TLS_CLIENT, *settings.tls)

    def listen(self) -> list[tuple[socket.socket, str]]:
        made: list[tuple[socket.socket, str]] = []
        for host in self._hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                listener = socket.create_server((host, 0), family=family, backlog=128)
            except OSError as error:
                raise ConfigError(f"cannot listen on {host!r} for transfers: {error}") from error
            if listener.getsockname()[0] in ("0.0.0.0", "::"):
                listener.close()
                raise ConfigError(f"peers cannot find us at {host!r}: name an address of this host")
            made.append((listener, f"{host}|{listener.getsockname()[1]}"))
        return made

    def connect(self, address: str, made: Callable[[socket.socket], None]) -> Channel:
        host, _, port = address.rpartition("|")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        made(sock)
        try:
            sock.settimeout(CONNECT_S)
            sock.connect((host, int(port)))
            return self._channel(sock, self._outward)
        except BaseException:
            sock.close()
            raise

    def accept(self, sock: socket.socket) -> Channel:
        return self._channel(sock, self._inward)

    def _channel(self, sock: socket.socket, context: ssl.SSLContext | None) -> Channel:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sock.getsockname()[0] == sock.getpeername()[0]:
            # The same address at both ends is one host's. A host that forbids the choice keeps its own.
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
        if context is None:
            return Plain(sock)
        try:
            return Tls(context.wrap_socket(sock, server_side=context is self._inward))
        except ssl.SSLError as error:
            raise TransferError(f"no TLS: {error.reason or error}") from error


def _context(side: int, certificate: str, key: str, authorities: str) -> ssl.SSLContext:
    """Raises ConfigError."""
    context = ssl.SSLContext(side)
    context.check_hostname = False  # a peer is known by its certificate's signer, and by the secret
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authorities)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"cannot use {certificate}, {key} and {authorities} for TLS between workers: {error}"
        ) from error
    return context
