"""The pool core: one owner of every block of one pool, in a process that outlives its holders.

Life cycle of a lease request:
 1. `Lease` joins the queue, or replaces what its holder asked before. The queue's order is the age of the requests that wait, so the oldest
    of all is never stopped for another, and two holders cannot stop each other in turn for ever.
 2. Each settle serves the queue in order. Whoever's need cannot be met is *short*: it is told, and the first gets whatever comes free.
 3. While someone is short, all other holders are under pressure (`Recall(on=True)`): they keep nothing spare. One that is short itself,
    behind the first, is forced: it stops its lowest-ranked sequence. So the first always gets on, and the queue moves.
 4. When nobody is short, pressure ends (`Recall(on=False)`).

Life cycle of a dead holder's blocks: what it published stays valid; its unpublished extents are in quarantine until every instance that
was alive has said `Quiet` (it writes there no more) or has ended itself.

Below the pool's memory there may be host memory and disk (`nodes.tiering`): a look-up that goes on there is answered when that is loaded.
"""

from dataclasses import dataclass

from headrace.kv.pool import BlockPool
from headrace.kv.tree import Eviction
from headrace.nodes.limits import TierConfig
from headrace.nodes.tiering import Tiering
from headrace.types.events import Command, Event, PeerLost, PeerUp, Received, Send, WakeAt
from headrace.types.ids import Address, PoolId
from headrace.types.kv import BlockRun, KVSpec
from headrace.types.messages import (
    Adopted,
    AnyMessage,
    Handover,
    Indexed,
    Lease,
    Leased,
    Match,
    Matched,
    Publish,
    Quiet,
    Recall,
    Release,
    Report,
    Return,
    Trim,
)
from headrace.types.tiers import FlushAsked, Loaded, Recovered, Saved, Spilled


@dataclass(slots=True)
class Ask:
    """An unmet lease request."""

    need: tuple[int, ...]
    want: tuple[int, ...]
    since_ns: int
    told: bool = False
    """The holder knows that it is short."""
    forced: bool = False
    """The holder was asked to stop a sequence, and has not answered yet."""


class PoolCore:
    """See the module. Only incarnations announced by `PeerUp` for this pool are holders; others' messages are dropped.

    `listener` (the router) is told what enters and leaves the prefix index, once per settle in which it has changed.
    """

    def __init__(
        self,
        address: Address,
        pool: PoolId,
        spec: KVSpec,
        blocks: tuple[int, ...],
        eviction: Eviction,
        *,
        listener: Address | None = None,
        tiers: TierConfig | None = None,
    ) -> None:
        self.address = address
        self.blocks = BlockPool(pool, spec, blocks, eviction)
        self.tiering: Tiering | None = None
        """What lies below the pool's memory, if anything does."""
        if tiers is not None:
            self.tiering = Tiering(self.blocks, tiers, self._carry, self._send)
        self._wake_ns = 0
        self._listener = listener
        self._told = 0
        """Messages to the listener."""
        if listener is not None:
            self.blocks.tell_changes()
        self._peers: dict[Address, None] = {}
        self._queue: dict[Address, Ask] = {}
        self._pressed: dict[Address, None] = {}
        self._writers: dict[Address, dict[Address, None]] = {}
        """Dead holder -> live peers that have not yet said that they write there no more."""
        self._early: dict[Address, dict[Address, None]] = {}
        """Instance of whose end we have not heard -> peers that have, and write there no more."""
        self._ended: dict[str, int] = {}
        """Name -> its highest epoch that has ended."""
        self._out: list[Command] = []

    def handle(self, event: Event, now_ns: int) -> None:
        match event:
            case PeerUp(peer, info):
                self._peers[peer] = None
                if info.pool == self.blocks.pool:
                    self.blocks.join(peer)
            case PeerLost(peer):
                self._lost(peer, now_ns)
            case Received(source, message):
                if source in self._peers:
                    self._message(source, message, now_ns)
            case Saved() | Loaded() | Spilled() | Recovered() | FlushAsked():
                assert self.tiering is not None
                self.tiering.handle(event, now_ns)
            case _:
                raise TypeError(f"a pool has no use for {event!r}")

    def settle(self, now_ns: int) -> list[Command]:
        if self.tiering is None or not self.tiering.flushing:
            self._serve()
        self._press()
        if self.tiering is not None:
            self._settle_tiers(self.tiering, now_ns)
        self._tell()
        out, self._out = self._out, []
        return out

    def observe(self, now_ns: int) -> Report | None:
        return None

    def _message(self, source: Address, message: AnyMessage, now_ns: int) -> None:
        pool = self.blocks
        match message:
            case Lease(need, want, since_ns):
                self._queue[source] = Ask(need, want, since_ns)
            case Return(runs):
                pool.take_back(source, runs)
                self._gave(source)
            case Match(key, hashes, limit):
                tokens, table = pool.match(source, key, hashes, limit, now_ns)
                # Where somebody is short of blocks none are taken for what can be computed.
                below = None if self._queue else self.tiering
                if below is None or not below.look_up(source, message, now_ns):
                    self._send(source, Matched(key, tokens, table))
            case Publish(key, table, hashes, first):
                pool.publish(source, key, table, hashes, first)
            case Trim(key, group, below):
                pool.trim(source, key, group, below, now_ns)
            case Release(key):
                if self.tiering is not None:
                    self.tiering.released(source, key)
                pool.release(source, key, now_ns)
                self._gave(source)
            case Handover():
                self._hand_over(source, message, now_ns)
            case Quiet(lost):
                self._quiet(lost, source)
            case _:
                raise TypeError(f"a pool has no use for {message!r}")

    def _hand_over(self, source: Address, message: Handover, now_ns: int) -> None:
        key, pool = message.key, self.blocks
        if message.target in pool.leases:
            table, published = pool.hand_over(source, message.target, key, message.private)
            self._send(message.target, Adopted(key, table, published))
            return
        pool.release(source, key, now_ns)
        pool.take_back(source, tuple(BlockRun(pool.pool, r.group, r.first, r.count) for r in message.private))

    def _lost(self, peer: Address, now_ns: int) -> None:
        self._peers.pop(peer, None)
        self._queue.pop(peer, None)
        self._pressed.pop(peer, None)
        for lost in list(self._writers):
            self._quiet(lost, peer)
        self._ended[peer.name] = peer.epoch
        if self.tiering is not None:
            self.tiering.forget(peer)
        if peer in self.blocks.leases:
            self.blocks.forget(peer, now_ns)
            early = self._early.pop(peer, {})
            self._writers[peer] = {p: None for p in self._peers if p not in early}
            self._quiet(peer, peer)

    def _quiet(self, lost: Address, writer: Address) -> None:
        writers = self._writers.get(lost)
        if writers is None:
            if lost.epoch > self._ended.get(lost.name, -1):
                # The writer heard of the loss (perhaps even of the birth) before we did.
                self._early.setdefault(lost, {})[writer] = None
            return
        writers.pop(writer, None)
        if not writers:
            del self._writers[lost]
            self.blocks.end_quarantine(lost)

    # Leases

    def _gave(self, holder: Address) -> None:
        """The holder stopped something, perhaps because it was forced: if the first still lacks blocks it is forced again."""
        if holder in self._queue:
            self._queue[holder].forced = False

    def _serve(self) -> None:
        """Serve the queue, the oldest first; those behind one that is short get nothing of what it lacks."""
        scarce = [False] * len(self.blocks.blocks)
        for holder in self._in_order():
            ask = self._queue[holder]
            runs: list[BlockRun] = []
            lacks: list[int] = []
            for group, need in enumerate(ask.need):
                count = 0 if scarce[group] else max(need, ask.want[group])
                granted = self.blocks.grant(holder, group, count)
                runs += granted
                lacks.append(max(0, need - sum(r.count for r in granted)))
            short = any(lacks)
            if short:
                ask.need = ask.want = tuple(lacks)
                scarce = [s or n > 0 for s, n in zip(scarce, lacks, strict=True)]
            else:
                del self._queue[holder]
            if runs or not short or not ask.told:
                ask.told = True
                self._send(holder, Leased(tuple(runs), short, self.blocks.available()))

    def _in_order(self) -> list[Address]:
        """The oldest need first; those that only ask ahead come last."""
        asks = self._queue
        return sorted(asks, key=lambda holder: (not any(asks[holder].need), asks[holder].since_ns, holder))

    def _press(self) -> None:
        """Tell who is under pressure, and force those that are short behind the first."""
        first = next(iter(self._in_order()), None)
        for holder in self.blocks.leases:
            on = first is not None and holder != first
            ask = self._queue.get(holder)
            force = on and ask is not None and not ask.forced
            if ask is not None:
                # Who is first now is let off; should it fall behind again, it is forced again.
                ask.forced = on
            if force or on != (holder in self._pressed):
                self._send(holder, Recall(on, force))
            if on:
                self._pressed[holder] = None
            else:
                self._pressed.pop(holder, None)

    def _tell(self) -> None:
        """What has changed in the prefix index."""
        if self._listener is None:
            if self.tiering is not None:
                self.tiering.tiers.changes.clear()
            return
        stored, removed = self.blocks.changes()
        if self.tiering is not None:
            stored, removed = self.tiering.listed(stored, removed)
        if stored or removed:
            self._told += 1
            self._send(self._listener, Indexed(self._told, stored, removed))

    def _settle_tiers(self, tiering: Tiering, now_ns: int) -> None:
        tiering.settle(now_ns)
        due_ns = tiering.due_ns()
        if due_ns and due_ns != self._wake_ns:
            self._out.append(WakeAt(due_ns))
        self._wake_ns = due_ns

    def _send(self, target: Address, message: AnyMessage) -> None:
        self._out.append(Send(target, message))

    def _carry(self, command: Command) -> None:
        self._out.append(command)
