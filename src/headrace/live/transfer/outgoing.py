"""The source's half of an engine, for one incarnation of one peer: what is to be moved there, and over which link.

Life cycle of a link:
 1. None until something is to be sent.
 2. Linking: the transport connects and proves who we are; parcels wait.
 3. Up. A region is asked for before the first write into it (`Open`); its parcels wait until it is granted, and fail if it is refused.
 4. Broken, by an error or by a lane that has not moved for `stall_ns`. When our threads are out of it a new link is made, of a higher
    generation, until the peer is forgotten.
A parcel that was given to a link has ended when it is acknowledged; or failed, once a later link is up, or refused for good: the peer does
either only when the earlier one can move nothing more. Or when the peer is forgotten. So what has ended can never land late, and neither
can its immediate.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic_ns
from typing import Any, Protocol

import msgspec

from headrace.live.transfer import messages
from headrace.live.transfer.channels import close_all
from headrace.live.transfer.counters import SERIALS, note_of
from headrace.live.transfer.messages import Ack, Kind, Mail, Open, Opened, Refused
from headrace.live.transfer.pieces import empty
from headrace.live.transfer.regions import Card, Descriptor
from headrace.live.transports import Link, Shard, Transport
from headrace.types.errors import TransferError

log = logging.getLogger(__name__)

FLYING_MAX = SERIALS // 4
"""Given to a link and not acknowledged: serial numbers must tell them apart."""
RELINK_S, RELINK_MAX_S = 0.01, 1.0
"""Before a broken link is made anew; doubled while it does not get up."""


class Turns(Protocol):
    """Where an engine runs: an asyncio loop, say."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> Any: ...
    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Any: ...


@dataclass(eq=False, slots=True)
class Transfer:
    """One write or message to one peer or several, as its caller sees it."""

    number: int
    done: Callable[[TransferError | None], None]
    left: int = 0
    """Parcels that have not ended."""
    error: TransferError | None = None
    parcels: list["Parcel"] = field(default_factory=list["Parcel"])
    cleanup: Callable[[], None] | None = None

    def ended(self, error: TransferError | None) -> None:
        """One of its parcels has."""
        self.left -= 1
        self.error = self.error or error
        if not self.left:
            self.parcels.clear()
            if self.cleanup is not None:
                self.cleanup()
            self.done(self.error)


@dataclass(eq=False, slots=True)
class Parcel:
    """A shard or a mail of a transfer, and how far it is."""

    transfer: Transfer
    peer: "Outgoing"
    lane: int
    channel: int = 0
    imm: int = 0
    shard: Shard | None = None
    mail: tuple[Kind, bytes] | None = None
    serial: int = -1
    """Given to a link under this number; -1: still here."""
    cancelled: TransferError | None = None


def grant_of(descriptor: Descriptor) -> tuple[int, int, str, str]:
    return descriptor.region, descriptor.nbytes, descriptor.layout, descriptor.token


class Outgoing:
    """See the module. Everything runs on the engine's thread; a transport's calls get there by `post`."""

    def __init__(
        self,
        own: str,
        card: Card,
        transport: Transport,
        turns: Turns,
        post: Callable[..., None],
        lanes: int,
        stall_ns: int,
        stall_name: str = "",
    ) -> None:
        """`stall_name`: what its user calls `stall_ns`, for errors."""
        self.card = card
        self.gone = False
        self._own = own
        self._transport = transport
        self._turns = turns
        self._post = post
        self._lanes = lanes
        self._stall_ns = stall_ns
        self._patience = f"{stall_ns / 1e9:g} s" + (f" ({stall_name})" if stall_name else "")
        self._link: Link | None = None
        self._closing: Link | None = None
        self._up = False
        self._generation = 0
        self._serial = 0
        self._queue: list[Parcel] = []
        self._flying: dict[int, Parcel] = {}
        self._stale: list[Parcel] = []
        """Given to links that have broken."""
        self._reason = ""
        """Why the last link broke."""
        self._grants: dict[tuple[int, int, str, str], str | None] = {}
        """None: granted; "": asked for; else why it was refused."""
        self._asked: dict[tuple[int, str], Descriptor] = {}
        self._pause_s = RELINK_S
        self._progress: dict[int, tuple[int, int]] = {}
        """Lane -> what had moved by it, and when that was seen."""
        self._acknowledged: dict[int, int] = {}
        self._watched = False
        self._due_ns = 0
        """When we are to look again; 0: not at all."""
        self._waiting_ns = 0
        """Since when there has been something to send and no link."""

    @property
    def idle(self) -> bool:
        return not (self._queue or self._flying or self._stale)

    def name(self, transfer: Transfer) -> str:
        return f"transfer {transfer.number} from {self._own} to {self.card.owner}"

    # What is to be sent

    def connect(self) -> None:
        """Make a link now, though nothing is to be sent yet."""
        if self._link is None and self._closing is None and not self.gone:
            self._make()

    def submit(self, parcel: Parcel) -> None:
        if self.gone:
            self._post(self._fail, parcel, "the peer has ended")
            return
        if not self._queue and not self._up:
            self._waiting_ns = monotonic_ns()
        if self._up:
            # It alone: what waits is looked at when something has come, not once for each that joins it.
            self._give_all([parcel])
        else:
            self._queue.append(parcel)
            self.connect()
        if not self._watched:
            self._watch()

    def cancel(self, parcel: Parcel, error: TransferError) -> None:
        """Do not begin it any more. It ends as always: when it cannot land."""
        parcel.cancelled = parcel.cancelled or error
        if parcel in self._queue:
            self._queue.remove(parcel)
            parcel.transfer.ended(error)
        elif parcel.shard is not None:
            parcel.shard.dropped = True

    def forget(self) -> None:
        """The peer has ended: everything ends as soon as our own threads are out of it."""
        self.gone = True
        self._reason = "the peer has ended"
        if self._link is not None:
            self._drop_link()
        elif self._closing is None:
            self._post(self._all_failed)

    # The link

    def _make(self) -> None:
        self._generation += 1
        generation = self._generation
        self._stale += self._flying.values()
        self._flying, self._serial = {}, 0
        self._grants, self._asked, self._progress = {}, {}, {}
        self._link = self._transport.link(self.card, generation, Ends(self, generation, self._post))

    def _drop_link(self) -> None:
        assert self._link is not None
        self._closing, self._link, self._up = self._link, None, False
        self._closing.close(partial(self._post, self._closed))

    def _closed(self) -> None:
        self._closing = None
        if self.gone:
            self._all_failed()
        elif not self.idle:
            self._turns.call_later(self._pause_s, self.connect)
            self._pause_s = min(self._pause_s * 2, RELINK_MAX_S)

    def current(self, generation: int) -> bool:
        return generation == self._generation and self._link is not None

    def up(self) -> None:
        self._up = True
        self._pause_s = RELINK_S
        stale, self._stale = self._stale, []
        for parcel in stale:
            self._fail(parcel, self._reason)
        self._pump()

    def broken(self, reason: str, lane: int, final: bool) -> None:
        log.warning("the link from %s to %s is broken: %s", self._own, self.card.owner, reason)
        self._reason = reason
        if self._up:
            self._waiting_ns = monotonic_ns()
        self._drop_link()
        if final:
            self._all_failed()

    def _all_failed(self) -> None:
        parcels = [*self._stale, *self._flying.values(), *self._queue]
        self._stale, self._flying, self._queue = [], {}, []
        for parcel in parcels:
            self._fail(parcel, self._reason)

    def _fail(self, parcel: Parcel, reason: str) -> None:
        error = parcel.cancelled or TransferError(f"{self.name(parcel.transfer)} failed: {reason}")
        parcel.transfer.ended(error)

    # Moving

    def _pump(self) -> None:
        """Something has changed: give the link what waits, if it may be written now."""
        queue, self._queue = self._queue, []
        self._give_all(queue)

    def _give_all(self, parcels: Sequence[Parcel]) -> None:
        for index, parcel in enumerate(parcels):
            if not self._up or len(self._flying) >= FLYING_MAX:
                self._queue += parcels[index:]
                return
            shard = parcel.shard
            if shard is not None and shard.target is not None and len(shard.pieces):
                why = self._grant(shard.target)
                if why == "":
                    self._queue.append(parcel)
                    continue
                if why is not None:
                    self._fail(parcel, why)
                    continue
            self._give(parcel)

    def _grant(self, target: Descriptor) -> str | None:
        key, short = grant_of(target), (target.region, target.token)
        if key not in self._grants:
            if short in self._asked:
                # Another that differs in what answers do not say: one of them is wrong. After that one.
                return ""
            self._grants[key] = ""
            self._asked[short] = target
            assert self._link is not None
            self._link.send(messages.encode(Open(*key)))
        return self._grants[key]

    def _give(self, parcel: Parcel) -> None:
        assert self._link is not None
        serial, self._serial = self._serial, (self._serial + 1) % SERIALS
        parcel.serial = serial
        self._flying[serial] = parcel
        if parcel.mail is not None:
            self._link.send(messages.encode(Mail(serial, *parcel.mail)))
        else:
            assert parcel.shard is not None
            parcel.shard.note = note_of(parcel.channel, serial, parcel.imm)
            self._link.write(parcel.shard)

    def dropped(self, shard: Shard) -> None:
        """Its number must not be missed at the target: nothing goes in its place."""
        assert self._link is not None
        serial = shard.note >> 32 & (SERIALS - 1)
        self._link.write(Shard(note_of(0, serial, 0), shard.lane, None, empty()))

    def replied(self, message: bytes, fds: Sequence[int]) -> None:
        try:
            reply = messages.decode_backward(message)
            if isinstance(reply, Ack):
                self._acknowledge(reply.serials)
            else:
                self._answered(reply, fds)
        except msgspec.MsgspecError as error:
            self.broken(f"{self.card.owner} says what cannot be read: {error}", 0, final=False)

    def _answered(self, reply: Opened | Refused, fds: Sequence[int]) -> None:
        target = self._asked.pop((reply.region, reply.token), None)
        if target is None or self._link is None:
            close_all(fds)
            return
        why = (
            f"{self.card.owner} refused the descriptor: {reply.reason}"
            if isinstance(reply, Refused)
            else None
        )
        if why is None:
            try:
                self._link.attach(target, fds)
            except TransferError as error:
                why = str(error)
        self._grants[grant_of(target)] = why
        self._pump()

    def _acknowledge(self, serials: Sequence[int]) -> None:
        full = len(self._flying) >= FLYING_MAX
        for serial in serials:
            parcel = self._flying.pop(serial, None)
            if parcel is not None:
                self._acknowledged[parcel.lane] = self._acknowledged.get(parcel.lane, 0) + 1
                parcel.transfer.ended(parcel.cancelled)
        if full and self._link is not None:
            self._pump()

    # Stalls

    def _watch(self) -> None:
        """As long as anything is unfinished, see that every lane moves."""
        self._watched = not self.gone and not self.idle
        due_ns, self._due_ns = self._due_ns, 0
        if not self._watched:
            return
        now_ns = monotonic_ns()
        if due_ns and now_ns - due_ns > self._stall_ns // 2:
            # We were held up ourselves: what has moved, or was said to us, may still be unread.
            self._progress.clear()
            self._waiting_ns = now_ns
        if self._up:
            self._check_lanes(now_ns)
        elif self._queue and now_ns - self._waiting_ns > self._stall_ns:
            queue, self._queue = self._queue, []
            why = f"no link for {self._patience}" + (f": {self._reason}" if self._reason else "")
            for parcel in queue:
                self._fail(parcel, why)
        self._due_ns = now_ns + self._stall_ns // 4
        self._turns.call_later(self._stall_ns / 4e9, self._watch)

    def _check_lanes(self, now_ns: int) -> None:
        assert self._link is not None
        lanes = {parcel.lane: None for parcel in self._flying.values()}
        if self._queue and not self._flying:
            lanes[0] = None
        self._progress = {lane: seen for lane, seen in self._progress.items() if lane in lanes}
        for lane in lanes:
            moved = self._link.moved(lane) + self._acknowledged.get(lane, 0)
            before, since_ns = self._progress.get(lane, (-1, now_ns))
            if moved != before:
                self._progress[lane] = (moved, now_ns)
            elif now_ns - since_ns > self._stall_ns:
                self.broken(
                    f"lane {lane} of {self._lanes} to {self.card.owner} has not moved for {self._patience}",
                    lane,
                    final=False,
                )
                return


class Ends:
    """Implements `transports.Upward` for one generation of a link: what an older one still says is not heard."""

    def __init__(self, outgoing: Outgoing, generation: int, post: Callable[..., None]) -> None:
        self._outgoing = outgoing
        self._generation = generation
        self._post = post

    def up(self) -> None:
        self._post(self._hear, self._outgoing.up)

    def dropped(self, shard: Shard) -> None:
        self._post(self._hear, self._outgoing.dropped, shard)

    def replied(self, message: bytes, fds: Sequence[int] = ()) -> None:
        self._post(self._reply, message, fds)

    def broken(self, reason: str, lane: int, *, final: bool) -> None:
        self._post(self._hear, self._outgoing.broken, reason, lane, final)

    def _reply(self, message: bytes, fds: Sequence[int]) -> None:
        if self._outgoing.current(self._generation):
            self._outgoing.replied(message, fds)
        else:
            close_all(fds)

    def _hear(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._outgoing.current(self._generation):
            call(*arguments)
