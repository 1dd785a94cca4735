"""The target's end of a link over stream sockets: one thread a lane, which reads a write's bytes straight into their place.

Severing ends our side of the sockets; the link is gone when those threads are. Where the source maps our memory they leave only when its
side has ended, too: then its threads are out (`lanes`).
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import Event, Lock

import numpy as np

from headrace.live.transfer.channels import Channel, Outlet
from headrace.live.transfer.frames import HEADER, MESSAGE, REPLY, RUNS_MAX, VERDICT_S, WRITE
from headrace.live.transfer.handshake import Claim
from headrace.live.transfer.messages import MAIL_BYTES_MAX
from headrace.live.transfer.pieces import check_side
from headrace.live.transfer.regions import Region
from headrace.live.transfer.service import Service
from headrace.live.transports import Site
from headrace.types.errors import TransferError
from headrace.types.ids import Address

log = logging.getLogger(__name__)

SEVER_S = 10.0
"""After so long it is said that a source that lives has not let go of our memory."""


class Inbound:
    """`transports.Inbound`: the lanes of one link, at the target."""

    def __init__(self, own: Address, site: Site, service: Service, claim: Claim, *, maps: bool) -> None:
        """`maps`: sources map what is a memory file."""
        self.source = claim.source
        self.generation = claim.generation
        self._own = own
        self._site = site
        self._service = service
        self._mappable = maps
        self._stop = np.zeros(1, np.uint8)
        self._lock = Lock()
        self._decided = Event()
        self._over = Event()
        self._reason = ""
        self._granted: dict[int, Region] = {}
        self._channels: list[Channel] = []
        self._threads = 0
        """Lanes that have not left."""
        self._gone: Callable[[], None] | None = None
        self._outlet: Outlet | None = None
        self._said = False
        self._maps = False

    # On the engine's thread

    def accept(self) -> None:
        self._decided.set()

    def refuse(self, reason: str) -> None:
        self._reason = reason
        self._decided.set()

    def grant(self, region: Region) -> Sequence[int]:
        self._granted[region.number] = region
        if not self._mappable or region.fd < 0:
            return ()
        self._maps = True
        return (region.fd,)

    def reply(self, message: bytes, fds: Sequence[int] = ()) -> None:
        if self._outlet is not None:
            self._outlet.put(REPLY.pack(len(message), len(fds)) + message, fds)

    def sever(self, gone: Callable[[], None]) -> None:
        with self._lock:
            self._stop[0] = 1
            self._gone = gone
            channels, empty = list(self._channels), not self._threads
        self.refuse("the link has been severed")
        for channel in channels:
            channel.shut()
        if empty:
            gone()
        elif self._maps:
            self._service.later(SEVER_S, partial(_complain, self.source, self._own, self._over))

    # On the lanes' threads

    def decided(self) -> tuple[str, bool]:
        """Wait until the engine has said yes (empty) or no, and whether that is for good."""
        if not self._decided.wait(VERDICT_S):
            # An earlier link may still be open here.
            return "nobody decided about the link", False
        return self._reason, bool(self._reason)

    def join(self, lane: int, channel: Channel) -> None:
        """Raises TransferError if the link is over."""
        with self._lock:
            if self._stop[0]:
                raise TransferError(f"the link of {self.source} is over")
            self._channels.append(channel)
            self._threads += 1
            if lane == 0:
                service = self._service
                self._outlet = outlet = Outlet(
                    channel,
                    lambda: service.write(channel.fileno(), lambda: self._flush(service, channel, outlet)),
                    channel.shut,
                )

    def serve(self, channel: Channel) -> None:
        """Receive until the connection ends. Raises OSError, TransferError."""
        site = self._site
        header = bytearray(HEADER.size)
        while True:
            channel.receive(memoryview(header))
            kind, count, note, number, nbytes = HEADER.unpack(header)
            if kind == WRITE:
                if count:
                    self._receive(channel, count, number, nbytes)
                site.landed(self, note)
            elif kind == MESSAGE and nbytes <= MAIL_BYTES_MAX + 1024:
                body = bytearray(nbytes)
                channel.receive(memoryview(body))
                site.mailed(self, bytes(body))
            else:
                raise TransferError(f"frame of unknown kind {kind} or of {nbytes} bytes")

    def outlast(self, channel: Channel) -> None:
        """Whoever maps our memory is out of it when its side of the connection has ended."""
        if self._maps:
            channel.shut()
            byte = memoryview(bytearray(1))
            with suppress(OSError):
                while True:
                    channel.receive(byte)

    def left(self) -> None:
        """A lane's thread touches nothing here any more."""
        with self._lock:
            self._threads -= 1
            last, gone = not self._threads, self._gone
        if last:
            self._over.set()
            if gone is not None:
                gone()

    def ended(self, reason: str) -> None:
        """A lane is gone, and the link with it."""
        with self._lock:
            said, self._said = self._said or bool(self._stop[0]), True
        if not said:
            self._site.broken(self, reason)

    def _receive(self, channel: Channel, count: int, number: int, nbytes: int) -> None:
        region = self._granted.get(number)
        if region is None:
            raise TransferError(f"it writes into region {number}, which was not granted")
        if count > RUNS_MAX:
            raise TransferError(f"a write of {count} pieces is too long")
        runs = np.empty((count, 2), np.int64)
        channel.receive(runs.data.cast("B"))
        check_side(runs[:, 0], runs[:, 1], region.nbytes, "target")
        if int(runs[:, 1].sum()) != nbytes:
            raise TransferError(f"a write of {nbytes} bytes has runs of {int(runs[:, 1].sum())}")
        channel.receive_runs(region, runs, self._stop)

    @staticmethod
    def _flush(service: Service, channel: Channel, outlet: Outlet) -> None:
        if not outlet.flush():
            service.write(channel.fileno(), lambda: Inbound._flush(service, channel, outlet))


def _complain(source: Address, own: Address, over: Event) -> None:
    if not over.is_set():
        log.error(
            "%s does not let go of memory of %s that it maps: it stays unused until it does, or ends",
            source,
            own,
        )
