"""Runs the application: sockets, uvicorn, signals.

Shutdown drains: on the first SIGTERM or SIGINT readiness goes off and new requests get 503, streams at hand go on to their end, then the
process's server ends. A second signal, or the drain's timeout, ends them at once.
"""

import asyncio
import logging
import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.api.app import Api
from headrace.api.respond import ABORT
from headrace.types.errors import ConfigError

KEEP_ALIVE_S = 75
"""Idle connections are kept longer than the pools of usual clients and proxies keep them, so that these close them first."""
CANCEL_TIMEOUT_S = 1
"""After a drain that took too long."""

log = logging.getLogger("headrace.api")


class Protocol(HttpToolsProtocol):
    """uvicorn's, and: late request heads end the connection, and the application can drop it at once."""

    def __init__(self, head_timeout_s: float, **connection: Any) -> None:
        super().__init__(**connection)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_timeout_s, self.transport.abort)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class ApiServer(uvicorn.Server):
    """uvicorn's server on sockets bound earlier, with a drain in place of its sudden end."""

    def __init__(
        self,
        app: Starlette,
        listener: socket.socket,
        drain_timeout_s: float = 60.0,
        access_log: bool = False,
        listening: Callable[[str], None] = lambda address: None,
    ) -> None:
        self._api: Api = app.state.api
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Protocol, self._api.settings.head_timeout_s),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="info" if access_log else "warning",
                access_log=access_log,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CANCEL_TIMEOUT_S,
                server_header=False,
                proxy_headers=False,
            )
        )
        self._listener = listener
        self._drain_timeout_s = drain_timeout_s
        self._listening = listening
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_until_drained(self) -> None:
        """Serve until `drain` has been called, or a signal has, and all streams have ended."""
        self._loop = asyncio.get_running_loop()
        try:
            await self.serve(sockets=[self._listener])
        finally:
            if self._drain is not None:
                self._drain.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Also when a port is taken only now: sockets that do not listen yet may share one."""
        address = address_of(self._listener)
        try:
            await super().startup(sockets)
        except OSError as error:
            raise ConfigError(f"{address} cannot be used: {error.strerror}; choose another --port") from error
        self._listening(address)

    def drain(self) -> None:
        """Begin to end; again: end now. To be called on the loop's thread."""
        if self._drain is None:
            log.info("draining: %d requests are under way", self._api.active)
            self._api.drain()
            self._drain = asyncio.get_running_loop().create_task(self._drained())
        else:
            log.info("ending at once")
            self.should_exit = self.force_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; uvicorn installs this as the handler. It may interrupt anything, so it only leaves word."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.drain)

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await self._api.idle.wait()
        except TimeoutError:
            log.warning("%d requests are cut: the drain's time is over", self._api.active)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any free one. Until it is served, clients are refused and need not wait. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit these: a client that vanished without a word is noticed within about two minutes.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--port {port} cannot be used on {host}: {error.strerror}; choose another one"
        ) from error
    listener.setblocking(False)
    return listener


def listen_unix(path: Path) -> socket.socket:
    """A bound Unix socket, for this user only. A socket left over from an earlier run is replaced. Raises ConfigError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not answers(path):
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--uds {path} cannot be used: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def close(listener: socket.socket) -> None:
    """Stop listening; a Unix socket's file goes too."""
    name = listener.getsockname() if listener.fileno() >= 0 else ""
    listener.close()
    if isinstance(name, str) and name:
        Path(name).unlink(missing_ok=True)


def answers(path: Path) -> bool:
    """Somebody listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def address_of(listener: socket.socket) -> str:
    """Where clients find it."""
    name = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"


async def serve_api(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    uds: Path | None = None,
    listener: socket.socket | None = None,
    drain_timeout_s: float = 60.0,
    access_log: bool = False,
    listening: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve `app` until SIGTERM or SIGINT has drained it. Raises ConfigError if it cannot listen.

    `listener` is a socket that was bound earlier (see `listen`), so that a port in use is known before a model is loaded.
    `listening` is told the address once connections are accepted.
    """
    bound = listener or (listen_unix(uds) if uds is not None else listen(host, port))
    try:
        await ApiServer(app, bound, drain_timeout_s, access_log, listening).run_until_drained()
    finally:
        close(bound)
