"""A worker that was started by hand, on any host, and joins a service that listens there.

Life cycle:
 1. It connects, and tries again until `timeout_ns` has passed: the service may start later. A door that drops it in the handshake has
    another secret; after a few times that is final.
 2. `Apply`: what it would load is compared before it is loaded. `NotWelcome` is final, unless only its name is taken (perhaps by its own
    former life, whose end the service has not seen yet).
 3. `Offer`: it makes its pool's memory, and is a worker as any other (`live.worker`).
 4. It ends in order (a signal, or the service's own end); or it loses its connection, or is dismissed: then nothing that it does counts any
    more, and it starts over, as a new process with a higher epoch.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import SOCK_DGRAM, SOCK_STREAM, getaddrinfo, socket
from time import monotonic
from typing import Any, NoReturn

import uvloop
import zmq
from msgspec.structs import replace

from headrace.live import wire
from headrace.live.bus import HANDSHAKE_MS, HUB, LINGER_MS, Link
from headrace.live.clock import Clock
from headrace.live.keys import Keys
from headrace.live.pools import Pool, check_memory
from headrace.live.settings import PoolLayout, SharedPool, WorkerConfig
from headrace.live.worker import Dismissal, MakeExecutor, Worker, leave
from headrace.types.errors import ConfigError, HeadraceError, IncompatiblePeer
from headrace.types.ids import Address
from headrace.types.messages import AnyMessage

log = logging.getLogger(__name__)

HANDSHAKES_MAX = 3
"""So often a handshake may fail in a row: a service that is just ending drops connections, too."""
PAUSE_S, PAUSE_MAX_S = 0.1, 2.0
PROGRESS_S = 10.0
"""While it waits it says so this often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """What a worker brings along."""

    host: str
    port: int
    keys: Keys
    apply: wire.Apply
    layout: PoolLayout
    threads: int
    timeout_ns: int
    """How long to try to be taken in."""
    retire_ns: int
    """What is at hand may take so long after a signal."""
    silence_ns: int
    """A connection on which nothing comes for so long has ended."""
    transfer_hosts: tuple[str, ...] = ()
    """Addresses of this host for transfers; empty: the one that leads to the service."""
    transfer_tls: tuple[str, str, str] | None = None
    """This host's files, as `TransferSettings.tls`."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """For `make_executor`."""


class Unreachable(HeadraceError):
    """Nobody is there, or not yet."""


class Stranger(HeadraceError):
    """Dropped in the handshake."""


class Lost(HeadraceError):
    """The connection to the service has ended."""


class Approach:
    """One connection, from knocking on. `offer` is done when the service has answered."""

    def __init__(self, joining: Joining, endpoint: str, clock: Clock) -> None:
        self.offer: asyncio.Future[wire.Invitation] = asyncio.get_running_loop().create_future()
        self._lost: Callable[[Exception], None] = self._failed
        self._ended: HeadraceError | None = None
        self._joining = joining
        self._where = f"{joining.host}:{joining.port}"
        self._connected = self._welcome = False
        self.link = Link(
            Address(joining.apply.name),
            endpoint,
            self._receive,
            self._failed,
            keys=joining.keys,
            silence_ms=max(1, joining.silence_ns // 1_000_000),
            connection=self._connection,
        )

    def _connection(self, event: int) -> None:
        match event:
            case zmq.EVENT_CONNECTED:
                self._connected = True
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._welcome = True
                self.link.send(HUB, self._joining.apply)
            case zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED:
                self._ended = self._end()
                self._lost(self._ended)
            case _:
                pass

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """`lost` hears of the connection's end, from now on."""
        self._lost = lost
        if self._ended is not None:
            lost(self._ended)

    def _end(self) -> HeadraceError:
        if self._welcome:
            return Lost(f"the connection to the service at {self._where} has ended")
        if self._connected:
            return Stranger(
                f"{self._where} drops us in the handshake: its secret is another one (--secret-file), or it is no headrace service"
            )
        return Unreachable(f"nobody listens at {self._where}")

    def _failed(self, error: Exception) -> None:
        if not self.offer.done():
            self.offer.set_exception(error)

    def _receive(
        self, source: Address, target: Address, message: AnyMessage | wire.Control, payload: bytes
    ) -> None:
        match message:
            case wire.Invitation(config):
                self.link.address = config.address
                if not self.offer.done():
                    self.offer.set_result(message)
            case wire.NotWelcome(reason, again):
                words = f"the service at {self._where} does not take this worker: {reason}"
                self._failed(Unreachable(words) if again else IncompatiblePeer(words))
            case _:
                log.debug("not heard yet: %s", type(message).__name__)


async def approach(joining: Joining, clock: Clock) -> tuple[Approach, wire.Invitation]:
    """Knock until there is an answer. Raises IncompatiblePeer, or ConfigError when it takes too long or the secrets differ."""
    end = monotonic() + joining.timeout_ns / 1e9
    pause_s, spoken, strangers = PAUSE_S, monotonic() - PROGRESS_S, 0
    while True:
        try:
            return await _knock(joining, clock)
        except (Unreachable, Stranger, Lost) as error:
            strangers = strangers + 1 if isinstance(error, Stranger) else 0
            if strangers >= HANDSHAKES_MAX:
                raise ConfigError(str(error)) from error
            left_s = end - monotonic()
            if left_s <= 0:
                waited_s = joining.timeout_ns / 1e9
                raise ConfigError(f"{error}; given up after {waited_s:.0f} s (--join-timeout)") from error
            if monotonic() - spoken >= PROGRESS_S:
                spoken = monotonic()
                log.info("%s; trying for %.0f s more", error, left_s)
        await asyncio.sleep(min(pause_s, max(0.0, end - monotonic())))
        pause_s = min(pause_s * 2, PAUSE_MAX_S)


async def _knock(joining: Joining, clock: Clock) -> tuple[Approach, wire.Invitation]:
    where = f"{joining.host}:{joining.port}"
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(joining.host, joining.port, type=SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"{joining.host} is not known: {error.strerror}") from error
    address = found[0][4][0]
    endpoint = (
        f"tcp://[{address}]:{joining.port}" if ":" in str(address) else f"tcp://{address}:{joining.port}"
    )
    trying = Approach(joining, endpoint, clock)
    try:
        async with asyncio.timeout(2 * HANDSHAKE_MS / 1e3):
            return trying, await trying.offer
    except TimeoutError as error:
        trying.link.close()
        raise Unreachable(f"{where} does not answer") from error
    except BaseException:
        trying.link.close()
        raise


async def serve_joined(joining: Joining, make_executor: MakeExecutor) -> None:
    """Until the worker has ended in order. Raises ConfigError, IncompatiblePeer; Lost and Dismissal when it may try again."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    clock = Clock()
    knocking = asyncio.ensure_future(approach(joining, clock))
    stopping = asyncio.ensure_future(stopped.wait())
    await asyncio.wait((knocking, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not knocking.done():
        knocking.cancel()
        await asyncio.gather(knocking, return_exceptions=True)
        return
    stopping.cancel()
    at, offer = knocking.result()
    pool = Pool.create("joined", joining.layout)
    pool.fill()
    try:
        worker = Worker(configured(joining, offer, pool), make_executor, at.link, clock)
        at.watch(worker.fail)
        loop.set_exception_handler(worker.lost)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.retire, joining.retire_ns)
        log.info("%s joins the service at %s:%d", offer.config.address, joining.host, joining.port)
        await worker.ended
    finally:
        at.link.close(LINGER_MS)
        pool.close()


def configured(joining: Joining, offer: wire.Invitation, pool: Pool) -> WorkerConfig:
    """The offer, completed by what only this host knows."""
    own = SharedPool(offer.config.info.pool, os.dup(pool.fd), pool.layout)
    return replace(
        offer.config,
        parent=os.getpid(),
        pool=own,
        transfer=replace(
            offer.config.transfer,
            hosts=joining.transfer_hosts or (address_towards(joining.host, joining.port),),
            tls=joining.transfer_tls,
        ),
        threads=joining.threads,
        options=joining.options,
    )


def address_towards(host: str, port: int) -> str:
    """By which of this host's addresses others know it, on the way to that one. Raises Unreachable."""
    try:
        family, kind, _, _, there = getaddrinfo(host, port, type=SOCK_DGRAM)[0]
        with socket(family, kind) as probe:
            # Of a datagram socket it sends nothing, and chooses the route.
            probe.connect(there)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"no way leads to {host}: {error.strerror or error}") from error


def run_joined(joining: Joining, make_executor: MakeExecutor, again: Callable[[], NoReturn]) -> NoReturn:
    """Ends the process: 0 in order, 2 for what the user can mend, 1 for anything else. `again` starts it over."""
    status = 0
    try:
        check_memory(joining.layout.total, 1)
        uvloop.run(serve_joined(joining, make_executor))
    except (Lost, Dismissal) as error:
        log.warning("%s; starting over", error)
        again()
    except HeadraceError as error:
        log.error("%s", error)
        status = 2
    except Exception:
        log.exception("the worker failed")
        status = 1
    leave(status)
