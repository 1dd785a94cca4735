"""The transfer engine of one process: writes into peers' registered memory, counts what peers write into its own.

Life cycle of a write:
 1. `write` checks it, deals it over lanes as shards, and gives them to the peer's link (`outgoing`).
 2. The transport moves a shard's bytes, then its note; the target's engine counts the immediate, then acknowledges.
 3. All shards acknowledged: `done(None)`. A failure ends it with an error, but only when nothing of it can land any more.
Peers come and go: an address is known from the first write to it until `forget`, after which nothing of it is heard. What it maps of our
memory is free again when it has let go of it (`severing`), which nobody else waits for.
Everything here runs on one thread, that of `turns`; transports have threads of their own.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import numpy as np

from headrace.live.transfer import messages
from headrace.live.transfer import pieces as forms
from headrace.live.transfer.counters import CHANNELS, NO_IMMEDIATE, WEIGHT_MAX, ImmCounter, Once, parts_of
from headrace.live.transfer.messages import MAIL_BYTES_MAX, Ack, Kind, Mail, Open, Opened, Refused
from headrace.live.transfer.outgoing import Outgoing, Parcel, Transfer, Turns
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Card, Descriptor, Region, Regions, Way
from headrace.live.transfer.severing import Severing
from headrace.live.transports import Inbound, Shard, Transport
from headrace.types.errors import TransferError
from headrace.types.ids import Address

log = logging.getLogger(__name__)

STALL_NS = 10_000_000_000
"""A lane that moves nothing for so long while it has something to move is broken."""

Done = Callable[[TransferError | None], None]
"""On the engine's thread, after the call that began it has returned."""


@dataclass(eq=False, slots=True)
class Arrivals:
    """What is known of one inbound link."""

    inbound: Inbound
    once: Once = field(default_factory=Once)
    granted: dict[int, Region] = field(default_factory=dict[int, Region])
    acks: list[int] = field(default_factory=list[int])


class TransferEngine:
    """See the module. `transports`: by name, the preferred one first. Listens at once; raises ConfigError if it cannot."""

    def __init__(
        self,
        address: Address,
        transports: Mapping[str, Transport],
        turns: Turns,
        *,
        lanes: int = 1,
        stall_ns: int = STALL_NS,
        stall_name: str = "",
        received: Callable[[Address, bytes], None] | None = None,
        host: str | None = None,
    ) -> None:
        """`received(source, body)` gets what peers `send`. `stall_name`: the flag that sets `stall_ns`, if there is one, for errors."""
        self.address = address
        self.received = received
        self._transports = dict(transports)
        self._turns = turns
        self._lanes = lanes
        self._stall_ns, self._stall_name = stall_ns, stall_name
        self._regions = Regions()
        self._counters: dict[int, ImmCounter] = {}
        self._peers: dict[Address, Outgoing] = {}
        self._forgotten: dict[str, int] = {}
        """Name -> highest epoch that has ended."""
        self._arrivals: dict[Address, Arrivals] = {}
        self._users: dict[Region, int] = {}
        self._numbers = 0
        self._barriers: dict[tuple[Address, bytes], int] = {}
        self._meetings: list[tuple[list[Address], bytes, Done]] = []
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._posting = Lock()
        self._scheduled = False
        self._to_acknowledge: dict[Arrivals, None] = {}
        self._closed = False
        self._severing = Severing(address, self._post)
        self._distrusted: dict[Address, str] = {}
        """Who is refused for good, and why."""
        ways = tuple(Way(name, t.listen(self)) for name, t in self._transports.items())
        self.card = Card(address, host_of() if host is None else host, ways)

    # Memory

    def register(self, memory: memoryview, layout: str = "", fd: int = -1) -> Region:
        """Writable memory that stays where it is. `fd`: of the memory file that it maps, so that peers of this host can map it too."""
        region = self._regions.add(memory, layout, fd)
        for transport in self._transports.values():
            transport.register(region)
        return region

    def unregister(self, region: Region, then: Callable[[], None] | None = None) -> None:
        """Nobody is let into it any more. `then`: nothing of a peer can land in it any more either; perhaps within this call.

        Raises TransferError while writes of ours are under way from it.
        """
        if self._users.get(region, 0):
            raise TransferError(f"region {region.number} of {self.address} is still being written from")
        self._regions.remove(region)
        for arrivals in list(self._arrivals.values()):
            if region.number in arrivals.granted:
                # Its source makes a new link, and is refused what is gone.
                self._sever(arrivals)
        for transport in self._transports.values():
            transport.unregister(region)
        if then is not None:
            # One that was severed before may have been let into it, too.
            self._severing.after(lambda _inbound: True, then)

    def describe(self, region: Region) -> Descriptor:
        """What peers need to write into it."""
        return Descriptor(self.card, region.number, region.nbytes, region.layout, region.token)

    def counter(self, channel: int = 0) -> ImmCounter:
        """What has arrived on one channel; each has slots of its own."""
        if not 0 <= channel < CHANNELS:
            raise TransferError(f"channel {channel} is none of 0 to {CHANNELS - 1}")
        return self._counters.setdefault(channel, ImmCounter())

    # Peers

    def connect(self, peer: Card) -> None:
        """Make a link now. Without this, the first write does."""
        self._outgoing(peer).connect()

    def forget(self, peer: Address, then: Callable[[], None] | None = None) -> None:
        """It has ended: nothing of it is heard any more from now on, and what is under way to it fails.

        `then`: nothing of it can land here any more either, so that memory it was let into may be used again; perhaps within this call.
        """
        self._forgotten[peer.name] = max(peer.epoch, self._forgotten.get(peer.name, -1))
        outgoing = self._peers.pop(peer, None)
        if outgoing is not None:
            outgoing.forget()
        if peer in self._arrivals:
            self._sever(self._arrivals[peer])
        for key in [key for key in self._barriers if key[0] == peer]:
            del self._barriers[key]
        for meeting in [m for m in self._meetings if peer in m[0]]:
            self._meetings.remove(meeting)
            error = TransferError(f"the barrier {meeting[1]!r} of {self.address} failed: {peer} has ended")
            self._post(meeting[2], error)
        if then is not None:
            self._severing.after(lambda inbound: inbound.source == peer, then)

    def distrust(self, peer: Address, why: str) -> None:
        """It said what cannot be: it is heard no more, and has no link to here any more."""
        if peer not in self._distrusted:
            log.error("%s takes nothing of %s any more: %s", self.address, peer, why)
            self._distrusted[peer] = why
        if peer in self._arrivals:
            self._sever(self._arrivals[peer])

    # Writing

    def write(
        self,
        region: Region | None,
        target: Descriptor,
        pieces: Pieces,
        done: Done,
        *,
        imm: int = NO_IMMEDIATE,
        channel: int = 0,
    ) -> Transfer:
        """Copy `pieces` from `region` into the target's; then the target counts the immediate.

        Without pieces it only carries the immediate, and `region` may be None. Raises TransferError for what is wrong at first sight.
        """
        return self.write_scatter(region, [(target, pieces, imm)], done, channel=channel)

    def write_scatter(
        self,
        region: Region | None,
        parts: Sequence[tuple[Descriptor, Pieces, int]],
        done: Done,
        *,
        channel: int = 0,
    ) -> Transfer:
        """Writes to several peers (target, pieces, immediate) that are done together."""
        for target, pieces, _ in parts:
            self._check(region, target, pieces)
        transfer = self._transfer(done)
        for target, pieces, imm in parts:
            weight = imm & WEIGHT_MAX
            peer = self._outgoing(target.card)
            moved = forms.filled(np.ascontiguousarray(pieces, np.int64))
            shards = forms.shard(moved, weight, self._lanes)
            for index, (part, share) in enumerate(shards):
                lane = (transfer.number + index) % self._lanes
                shard = Shard(0, lane, region, part, target)
                parcel = Parcel(transfer, peer, lane, channel, imm - weight + share, shard)
                transfer.parcels.append(parcel)
        if region is not None:
            self._users[region] = self._users.get(region, 0) + 1
            transfer.cleanup = partial(self._released, region)
        return self._submit(transfer)

    def send(self, peer: Card, body: bytes, done: Done) -> Transfer:
        """A small message; done when the peer's `received` has had it."""
        if len(body) > MAIL_BYTES_MAX:
            raise TransferError(f"a message of {len(body)} bytes is too long: write it into a region")
        return self._mail([peer], Kind.MAIL, body, done)

    def barrier(self, peers: Sequence[Card], tag: bytes, done: Done) -> None:
        """Done when each of them has called this with the same tag and with us among its peers.

        It says nothing of writes: wait for your own to be done before.
        """
        self._meetings.append(([peer.owner for peer in peers], tag, done))

        def told(error: TransferError | None) -> None:
            meeting = next((m for m in self._meetings if m[2] is done), None)
            if error is not None and meeting is not None:
                self._meetings.remove(meeting)
                done(error)

        self._mail(peers, Kind.BARRIER, tag, told)
        self._post(self._meet)

    def cancel(self, transfer: Transfer) -> None:
        """Begin nothing more of it. It is done, with an error, when nothing of it can land any more: free its memory then, not before."""
        for parcel in list(transfer.parcels):
            name = parcel.peer.name(transfer)
            parcel.peer.cancel(parcel, TransferError(f"{name} was cancelled"))

    def close(self) -> None:
        """End all links and threads. What is unfinished is not reported any more."""
        self._closed = True
        for peer in self._peers.values():
            peer.forget()
        for arrivals in list(self._arrivals.values()):
            self._sever(arrivals)
        self._severing.close()
        for transport in self._transports.values():
            transport.close()

    def _check(self, region: Region | None, target: Descriptor, pieces: Pieces) -> None:
        if region is None:
            if len(pieces):
                raise TransferError("a write of bytes needs the region that they lie in")
            return
        if region not in self._regions:
            raise TransferError(f"region {region.number} is not registered with {self.address}")
        if region.layout != target.layout:
            raise TransferError(
                f"{self.address} cannot write to {target.owner}: the layouts of their memory differ "
                f"({region.layout!r} and {target.layout!r})"
            )
        try:
            forms.check(pieces, region.nbytes, target.nbytes)
        except TransferError as error:
            raise TransferError(f"{self.address} cannot write to {target.owner}: {error}") from None

    def _transfer(self, done: Done) -> Transfer:
        self._numbers += 1
        return Transfer(self._numbers, done)

    def _mail(self, peers: Sequence[Card], kind: Kind, body: bytes, done: Done) -> Transfer:
        transfer = self._transfer(done)
        for card in peers:
            transfer.parcels.append(Parcel(transfer, self._outgoing(card), 0, mail=(kind, body)))
        return self._submit(transfer)

    def _submit(self, transfer: Transfer) -> Transfer:
        parcels = list(transfer.parcels)
        # One more, so that it does not end while it is being handed out, or within this call.
        transfer.left = len(parcels) + 1
        for parcel in parcels:
            parcel.peer.submit(parcel)
        self._post(transfer.ended, None)
        return transfer

    def _released(self, region: Region) -> None:
        self._users[region] -= 1
        if not self._users[region]:
            del self._users[region]

    def _outgoing(self, card: Card) -> Outgoing:
        """Raises TransferError if we have no transport that leads there."""
        peer = self._peers.get(card.owner)
        if peer is None:
            name = choose(card, self.card.host, self._transports)
            peer = Outgoing(
                str(self.address),
                card,
                self._transports[name],
                self._turns,
                self._post,
                self._lanes,
                self._stall_ns,
                self._stall_name,
            )
            if card.owner.epoch <= self._forgotten.get(card.owner.name, -1):
                peer.gone = True
            else:
                self._peers[card.owner] = peer
        return peer

    # What peers do (called by transports, from any thread)

    def opened(self, inbound: Inbound) -> None:
        self._post(self._opened, inbound)

    def landed(self, inbound: Inbound, note: int) -> None:
        self._post(self._landed, inbound, note)

    def mailed(self, inbound: Inbound, message: bytes) -> None:
        self._post(self._mailed, inbound, message)

    def broken(self, inbound: Inbound, reason: str) -> None:
        self._post(self._broken, inbound, reason)

    def _opened(self, inbound: Inbound) -> None:
        source = inbound.source
        if self._closed or source.epoch <= self._forgotten.get(source.name, -1):
            inbound.refuse(f"{self.address} was told that {source} has ended")
            return
        if source in self._distrusted:
            inbound.refuse(f"{self.address} takes nothing of {source} any more: {self._distrusted[source]}")
            return
        before = self._arrivals.get(source)
        if before is not None and before.inbound.generation >= inbound.generation:
            inbound.refuse(f"{self.address} has a later link from {source}")
            return
        if before is not None:
            self._sever(before)
        self._arrivals[source] = Arrivals(inbound)
        self._severing.after(lambda earlier: earlier.source == source, partial(self._accept, inbound))

    def _accept(self, inbound: Inbound) -> None:
        """Nothing of its earlier links moves here any more."""
        if self._of(inbound) is not None:
            inbound.accept()

    def _of(self, inbound: Inbound) -> Arrivals | None:
        """None for a link that is over: what it says is not heard."""
        arrivals = self._arrivals.get(inbound.source)
        return arrivals if arrivals is not None and arrivals.inbound is inbound else None

    def _landed(self, inbound: Inbound, note: int) -> None:
        arrivals = self._of(inbound)
        if arrivals is None:
            return
        channel, serial, imm = parts_of(note)
        if not arrivals.once.first(serial):
            log.error("%s heard of shard %d of %s twice", self.address, serial, inbound.source)
            return
        try:
            if imm & WEIGHT_MAX:
                self.counter(channel).add(inbound.source, imm)
        except TransferError as error:
            self.distrust(inbound.source, str(error))
            return
        self._acknowledge(arrivals, serial)

    def _acknowledge(self, arrivals: Arrivals, serial: int) -> None:
        arrivals.acks.append(serial)
        self._to_acknowledge[arrivals] = None

    def _mailed(self, inbound: Inbound, message: bytes) -> None:
        arrivals = self._of(inbound)
        if arrivals is None:
            return
        try:
            said = messages.decode_forward(message)
        except msgspec.MsgspecError as error:
            self._broken(inbound, f"a message cannot be read: {error}")
            return
        match said:
            case Open():
                self._grant(arrivals, said)
            case Mail(serial, kind, body):
                if not arrivals.once.first(serial):
                    return
                if kind is Kind.BARRIER:
                    key = (inbound.source, body)
                    self._barriers[key] = self._barriers.get(key, 0) + 1
                    self._meet()
                elif self.received is not None:
                    self.received(inbound.source, body)
                self._acknowledge(arrivals, serial)

    def _grant(self, arrivals: Arrivals, asked: Open) -> None:
        inbound = arrivals.inbound
        try:
            region = self._regions.check(asked.region, asked.nbytes, asked.layout, asked.token)
        except TransferError as error:
            log.warning("%s refuses a write of %s: %s", self.address, inbound.source, error)
            inbound.reply(messages.encode(Refused(asked.region, asked.token, str(error))))
            return
        arrivals.granted[region.number] = region
        fds = inbound.grant(region)
        inbound.reply(messages.encode(Opened(asked.region, asked.token)), fds)

    def _broken(self, inbound: Inbound, reason: str) -> None:
        arrivals = self._of(inbound)
        if arrivals is not None:
            log.info("the link from %s to %s has ended: %s", inbound.source, self.address, reason)
            self._sever(arrivals)

    def _sever(self, arrivals: Arrivals) -> None:
        del self._arrivals[arrivals.inbound.source]
        self._to_acknowledge.pop(arrivals, None)
        self._severing.sever(arrivals.inbound)

    def _meet(self) -> None:
        for meeting in list(self._meetings):
            peers, tag, done = meeting
            if all(self._barriers.get((peer, tag), 0) for peer in peers):
                self._meetings.remove(meeting)
                for peer in peers:
                    self._barriers[peer, tag] -= 1
                    if not self._barriers[peer, tag]:
                        del self._barriers[peer, tag]
                done(None)

    # One thread

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call it on the engine's thread, after what was posted before; from any thread."""
        with self._posting:
            self._posted.append((call, arguments))
            if self._scheduled:
                return
            self._scheduled = True
        try:
            self._turns.call_soon_threadsafe(self._drain)
        except RuntimeError:
            # The loop has ended: so does this process, or its test.
            log.debug("%s has no loop any more", self.address)

    def _drain(self) -> None:
        while True:
            with self._posting:
                if not self._posted:
                    self._scheduled = False
                    break
                call, arguments = self._posted.popleft()
            if not self._closed:
                try:
                    call(*arguments)
                except BaseException:
                    # It is the loop's to report. What was posted behind it is still to be heard.
                    self._turns.call_soon_threadsafe(self._drain)
                    raise
        acknowledged, self._to_acknowledge = self._to_acknowledge, {}
        for arrivals in acknowledged:
            acks, arrivals.acks = arrivals.acks, []
            arrivals.inbound.reply(messages.encode(Ack(acks)))


def host_of() -> str:
    """Equal for two processes exactly if they share a kernel, a network namespace (Unix sockets) and a user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.getuid()}"


def choose(card: Card, host: str, transports: Mapping[str, Transport]) -> str:
    """The first of ours that the peer has, too, and that reaches its host (FlowKV: memory within a host, else the network)."""
    for name, transport in transports.items():
        if card.way(name) is not None and (card.host == host or not transport.one_host):
            return name
    theirs = ", ".join(way.transport for way in card.ways) or "none"
    raise TransferError(
        f"no transport leads to {card.owner}: it has {theirs}, we have {', '.join(transports) or 'none'}"
        + ("" if card.host == host else ", and it is on another host")
    )
