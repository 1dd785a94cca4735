"""An instance's half of live migrations: one running sequence at a time leaves for another instance, and hardly notices.

By Llumnix (arXiv 2406.03243, section 4.2): stages, each of which copies what the one before left, while the sequence goes on.
 1. `Migrate`: the source chooses (the lowest priority, then the shortest) and says `Offer`; the router starts the sequence at the target as
    DECODE with the source as its source. The target looks up its own prefix, reserves, and says where it wants the blocks (`Dispatch`).
 2. While much is left: full blocks are written, the sequence RUNS on. When all are there the source asks for room for what has grown
    (`More`); the target extends its table by another `Dispatch`.
 3. When little is left, or after so many stages, it leaves the batch. Its plans retire, then it is HELD and the rest is written, the last,
    partly filled block too.
 4. When all writes are acknowledged, the tail goes to the target and `Moved` to the router, and it leaves. With one pool for both this is
    all there is: the pool hands the blocks over.
The tail is the moment at which it changes hands: before it the source may always keep the sequence (`Stayed`), and the target has computed
nothing; after it the source has nothing to do with it any more. So whoever dies, the sequence has one owner. An attempt goes to an instance
at most once (the router sees to that), so what two instances say of one key never concerns two migrations.
"""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.engine.memory import Memory
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, Status
from headrace.nodes.limits import InstanceConfig
from headrace.nodes.receiving import Receiving
from headrace.nodes.sending import Sending
from headrace.transfer.source import Outgoing
from headrace.types.ids import Address, SequenceKey
from headrace.types.kv import table_runs
from headrace.types.messages import AnyMessage, Dispatch, More, Moved, Offer, Role, Stay, Stayed


@dataclass(slots=True, eq=False)
class Departure:
    """The sequence that is to leave."""

    sequence: Sequence
    target: Address
    mark: int
    """Tokens dropped by preemption when it was chosen: if there are more, it has started over."""
    due_ns: int
    """Until when the target may make room (the first time)."""
    session: Outgoing | None = None
    """None: it is offered."""
    room: int = 0
    """Leading blocks for which the target has a table."""
    sent: int = 0
    """Leading blocks that are there or under way."""
    stages: int = 0
    asked: bool = False
    """The target is to make room."""


class Migrating:
    """`send` says something to another node; `leave` ends a sequence here, `flush` first tells the router all that it drew."""

    def __init__(
        self,
        router: Address,
        config: InstanceConfig,
        scheduler: Scheduler,
        sending: Sending,
        receiving: Receiving,
        send: Callable[[Address, AnyMessage], None],
        flush: Callable[[Sequence], None],
        leave: Callable[[Sequence], None],
    ) -> None:
        self._router = router
        self._config = config
        self._scheduler = scheduler
        self._memory: Memory = scheduler.memory
        self._sending = sending
        self._receiving = receiving
        self._send = send
        self._flush = flush
        self._leave = leave
        self._departure: Departure | None = None
        self._barred: dict[SequenceKey, dict[Address, None]] = {}
        """Where sequences that run here cannot go any more."""

    # The source

    def due_ns(self) -> int:
        """The next timer; 0: none."""
        departure = self._departure
        return departure.due_ns if departure is not None and departure.session is None else 0

    def choose(self, target: Address, now_ns: int) -> None:
        """`Migrate`: offer what is best moved, if anything is."""
        if self._departure is not None:
            return
        running = self._scheduler.running
        self._barred = {s.key: self._barred[s.key] for s in running if s.key in self._barred}
        able = [s for s in running if self._is_able(s) and target not in self._barred.get(s.key, {})]
        if able:
            sequence = min(able, key=lambda s: (-s.priority, s.total, s.key))
            due_ns = now_ns + self._config.move_ns
            self._departure = Departure(sequence, target, _dropped(sequence), due_ns)
            self._send(self._router, Offer(sequence.key, target))

    def dispatched(self, source: Address, message: Dispatch) -> bool:
        """The target has made room. False: this is not about a migration."""
        departure = self._departure
        if departure is None or (departure.sequence.key, departure.target) != (message.key, source):
            return False
        if departure.sequence.ends:
            # In this very instant: nothing of it is sent any more.
            return True
        departure.session = self._sending.moves(source, message)
        departure.asked = False
        departure.room = self._memory.spec.blocks_for(message.known)
        for run in message.table:
            departure.room = max(departure.room, run.at + run.count)
        return True

    def stay(self, message: Stay) -> None:
        departure = self._departure
        if departure is not None and (departure.sequence.key, departure.target) == (
            message.key,
            message.target,
        ):
            self._keep(departure)

    def lost(self, peer: Address) -> None:
        if self._departure is not None and self._departure.target == peer:
            self._keep(self._departure)

    def is_about(self, key: SequenceKey) -> bool:
        return self._departure is not None and self._departure.sequence.key == key

    def failed(self) -> None:
        """A write has failed."""
        if self._departure is not None:
            self._keep(self._departure)

    def check(self, now_ns: int) -> None:
        """Has it ended, was it preempted, or has the target given up, or never made room?"""
        departure = self._departure
        if departure is not None:
            sequence, session = departure.sequence, departure.session
            gone = sequence.ends or sequence.status not in (Status.RUNNING, Status.HELD)
            over = departure.due_ns <= now_ns if session is None else session.stopped
            if gone or over or _dropped(sequence) != departure.mark:
                self._keep(departure)

    def settle(self, now_ns: int) -> None:
        """Go on as far as can be, before the next step is planned."""
        self.check(now_ns)
        departure = self._departure
        if departure is None:
            return
        sequence, session = departure.sequence, departure.session
        if session is None or departure.asked or not session.quiet:
            return
        if not sequence.paused:
            self._stage(departure, session)
        if sequence.paused and session.quiet and not departure.asked:
            self._finish(departure, session)

    def _is_able(self, sequence: Sequence) -> bool:
        decodes = sequence.role is Role.WHOLE and sequence.emitted > 0 and not sequence.prefilling
        goes_on = sequence.emitted + sequence.pending < sequence.emits_max
        return decodes and goes_on and sequence.key not in self._sending and not sequence.long

    def _stage(self, departure: Departure, session: Outgoing) -> None:
        """Send what is full, or ask for room, or let the sequence leave the batch."""
        sequence, spec = departure.sequence, self._memory.spec
        while session.quiet:
            left = spec.blocks_for(sequence.computed) - departure.sent
            few = left <= max(1, self._config.move_blocks_last)
            if few or session.dispatch.shared or departure.stages >= self._config.move_stages_max:
                sequence.paused = True
                self._scheduler.changed = True
                return
            ready = min(sequence.computed // spec.block_size, departure.room)
            if ready <= departure.sent:
                self._ask(departure, session)
                return
            departure.stages += 1
            departure.sent = ready
            self._sending.push(sequence, session, ready)

    def _finish(self, departure: Departure, session: Outgoing) -> None:
        """Out of the batch: as soon as no plan names it, send the rest; when that is there, let go."""
        sequence = departure.sequence
        if sequence.last_step > self._scheduler.retired:
            return
        if sequence.status is Status.RUNNING:
            self._scheduler.hold(sequence)
        if not session.dispatch.shared:
            blocks = self._memory.spec.blocks_for(sequence.computed)
            if blocks > departure.room:
                self._ask(departure, session)
                return
            departure.sent = blocks
            self._sending.push(sequence, session, blocks)
            if not session.quiet:
                return
        self._departure = None
        self._flush(sequence)
        self._sending.send_tail(sequence, session)
        moved = Moved(
            sequence.key,
            departure.target,
            session.blocks,
            session.bytes,
            session.writes,
            sequence.recomputed,
        )
        self._send(self._router, moved)
        if session.dispatch.shared:
            self._memory.forget(sequence)
        self._leave(sequence)

    def _ask(self, departure: Departure, session: Outgoing) -> None:
        departure.asked = True
        sequence = departure.sequence
        self._send(departure.target, More(sequence.key, session.dispatch.slot, sequence.computed))

    def _keep(self, departure: Departure) -> None:
        """The migration is over, and the sequence goes on here, if it does."""
        self._departure = None
        sequence = departure.sequence
        self._barred.setdefault(sequence.key, {})[departure.target] = None
        self._sending.keep(sequence.key)
        sequence.paused = False
        self._scheduler.changed = True
        if sequence.status is Status.HELD:
            self._scheduler.join(sequence)
        if not sequence.ends:
            self._send(self._router, Stayed(sequence.key, departure.target))

    # The target

    def extend(self, message: More, sequences: dict[SequenceKey, Sequence]) -> Sequence | None:
        """The source's sequence has grown: make room for it. The sequence, if there is none."""
        sequence = sequences.get(message.key)
        if sequence is None or not self._receiving.takes(message.key, message.slot):
            return None
        if sequence.status is not Status.RECEIVING:
            return None
        missing = self._memory.missing(sequence, message.tokens)
        if not self._memory.covers(missing):
            return sequence
        before = [len(table) for table in sequence.tables]
        self._memory.grow(sequence, missing)
        tables = enumerate(zip(sequence.tables, before, strict=True))
        runs = [run for group, (table, at) in tables for run in table_runs(group, at, table[at:])]
        self._receiving.extend(message.key, message.slot, tuple(runs))
        return None


def _dropped(sequence: Sequence) -> int:
    """Tokens of which preemption has dropped the KV so far."""
    return sequence.lost + sequence.recomputed
