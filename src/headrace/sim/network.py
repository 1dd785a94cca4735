"""Messages and block writes between nodes, with the freedom that the design gives a real network, and no more.

Messages: in order per pair of incarnations, any order between pairs, each at least 1 ns under way. What a dead incarnation had sent may be
lost (from some message on) or arrive late, even after its `PeerLost`; what is sent to a dead one is lost.
A session between two incarnations may break: what is under way is lost, what is said meanwhile waits. When it is resumed, each side sends
again all that it does not know to have arrived, and the other takes in what it has not heard yet: see `Session`.
Writes: any order, and memory is read and written at some moment before `Written`. A failed one leaves part of its blocks behind, or all of
them: then only its acknowledgement was lost. `Landed` comes no earlier than the memory and no later than `Written`, which is what an
acknowledgement proves. A dead source's writes reach memory (and are told) before anybody hears of its death, or never; a dead target's
memory is still there, because the pool's process lives on.
A partition stops what would arrive within it, in one direction or both: messages wait for its end, writes wait or fail.
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from headrace.sim.loop import Loop
from headrace.sim.nodes import ContentWorker, Node
from headrace.sim.rng import KeyedRng
from headrace.types.events import Landed, Write, Written
from headrace.types.messages import AnyMessage, Report
from headrace.types.payload import Emission, SequencePayload

Attachment = SequencePayload | tuple[Emission, ...] | None
"""What a shell adds to a message: ids that no core sees."""

UNHEARD_MAX = 32
"""A sender knows of every message but the latest so many that were taken in that it was."""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    latency_ns: int = 5_000
    """Most messages take up to this."""
    late_ns: int = 200_000
    """Late ones take up to this."""
    late_share: float = 0.0
    skew_ns: int = 0
    """Pairs differ by up to this, for good: what one says is always overtaken by what another says later."""
    grid_ns: int = 1
    """Everything arrives at a multiple of this, so that much of it meets in one instant, as in the inbox of a busy process."""
    stale_ns: int = 0
    """Reports of an instance are sent up to this after they were made; the same for all of one incarnation."""
    write_ns: int = 20_000
    """A write takes up to this."""
    slow_write_share: float = 0.0
    """Of writes: these take up to 20 times as long."""
    failed_share: float = 0.0
    """Of writes."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Nothing of `left` reaches `right` from `start_ns` on and before `end_ns`. Both are names of nodes."""

    start_ns: int
    end_ns: int
    left: tuple[str, ...]
    right: tuple[str, ...]
    both: bool = True
    """Nor the other way round."""

    def stops(self, source: str, target: str) -> bool:
        return (source in self.left and target in self.right) or (
            self.both and source in self.right and target in self.left
        )


@dataclass(slots=True, eq=False)
class Session:
    """What one incarnation says to another. Numbers begin at 1 with each pair of incarnations, so a pair of epochs has its own.

    1. Each message has the next number. Until its sender knows that it has arrived, it keeps it.
    2. `cut`: the connection is gone, and what was under way with it. What is said now is kept and not sent.
    3. `resume`: all that is kept is sent again, in order. Some of it has been heard: only the knowledge of that was lost.
    4. The receiver `takes` the numbers that it has not heard.
    """

    source: Node
    target: Node
    skew: float
    number: int = 0
    """Of the latest message."""
    heard: int = 0
    """The highest number that was taken in."""
    connection: int = 0
    """What comes on an earlier one is lost."""
    up: bool = True
    last_ns: int = 0
    """When the latest message arrives. No later one does so before."""
    kept: deque[tuple[int, AnyMessage, Attachment]] = field(
        default_factory=deque[tuple[int, AnyMessage, Attachment]]
    )

    def keep(self, message: AnyMessage, attachment: Attachment) -> int:
        """Its number."""
        self.number += 1
        self.kept.append((self.number, message, attachment))
        self.acknowledge(self.heard - UNHEARD_MAX)
        return self.number

    def acknowledge(self, number: int) -> None:
        """The sender knows that all up to this have arrived."""
        while self.kept and self.kept[0][0] <= number:
            self.kept.popleft()

    def takes(self, number: int) -> bool:
        """Is this news to the receiver?"""
        if number <= self.heard:
            return False
        assert number == self.heard + 1, f"message {number} comes after {self.heard}"
        self.heard = number
        return True


class Network:
    def __init__(self, loop: Loop, rng: KeyedRng, config: NetworkConfig) -> None:
        self.config = config
        self.deliver: Callable[[Node, Node, AnyMessage, Attachment], None]
        """Set by the shell: a message has arrived."""
        self.on_copy: Callable[[ContentWorker, Write], None] = lambda target, write: None
        """Told just before a write reaches memory."""
        self.on_send: Callable[[Node, Node, AnyMessage], None] = lambda source, target, message: None
        """Told of what is sent."""
        self.counts: Counter[str] = Counter()
        """What went wrong so far."""
        self._loop = loop
        self._rng = rng
        self._sessions: dict[tuple[int, int], Session] = {}
        self._serial = 0
        self._lingers = config.late_share > 0
        self._partitions: list[Partition] = []
        """By start."""

    def heal(self) -> None:
        """No message is late and no write is slow or fails from now on."""
        self.config = replace(self.config, late_share=0.0, skew_ns=0, slow_write_share=0.0, failed_share=0.0)

    def hold_until(self, source: Node, target: Node, at_ns: int) -> None:
        """No message of this pair arrives before: the target has not heard of the source yet."""
        session = self._session(source, target)
        session.last_ns = max(session.last_ns, at_ns)

    def delay_ns(self, *key: int) -> int:
        """How long one message takes."""
        draw = self._rng.uniform("latency", *key)
        late = self.config.late_share
        if draw < late:
            return 1 + int(draw / late * self.config.late_ns)
        return 1 + int((draw - late) / (1 - late) * self.config.latency_ns)

    def part(self, partition: Partition) -> None:
        """From now on this one is known. What is under way already gets through."""
        insort(self._partitions, partition, key=lambda known: known.start_ns)

    def open_ns(self, source: Node, target: Node, at_ns: int) -> int:
        """When what would arrive at `at_ns` does: then, or as long after the end of a partition as it would have taken from now."""
        for cut in self._partitions:
            inside = cut.start_ns <= at_ns < cut.end_ns
            if inside and cut.stops(source.address.name, target.address.name):
                at_ns = cut.end_ns + at_ns - self._loop.now_ns
        return at_ns

    def on_grid(self, at_ns: int) -> int:
        """The first multiple of `grid_ns` from then on."""
        grid_ns = self.config.grid_ns
        return -(-at_ns // grid_ns) * grid_ns

    # Messages

    @property
    def quiet(self) -> bool:
        """All that was said between the living has been heard."""
        return all(
            session.heard == session.number
            for session in self._sessions.values()
            if session.source.alive and session.target.alive
        )

    def heard_all(self, source: Node, target: Node) -> bool:
        """Has the target heard all that the source has said so far?"""
        session = self._session(source, target)
        return session.heard == session.number

    def send(self, source: Node, target: Node, message: AnyMessage, attachment: Attachment) -> None:
        self.on_send(source, target, message)
        if self.config.stale_ns and isinstance(message, Report):
            wait_ns = int(self._rng.uniform("stale", source.index) * self.config.stale_ns)
            self._loop.at(self._loop.now_ns + 1 + wait_ns, self._post, source, target, message, attachment)
        else:
            self._post(source, target, message, attachment)

    def break_sessions(self, left: tuple[str, ...], right: tuple[str, ...], until_ns: int) -> None:
        """Cut all sessions between nodes of these names, both directions; they are resumed at `until_ns`."""
        for session in self._sessions.values():
            names = session.source.address.name, session.target.address.name
            between = (names[0] in left and names[1] in right) or (names[0] in right and names[1] in left)
            if between and session.up and session.source.alive and session.target.alive:
                self._cut(session)
                self._loop.at(until_ns, self._resume, session)

    def _session(self, source: Node, target: Node) -> Session:
        pair = (source.index, target.index)
        session = self._sessions.get(pair)
        if session is None:
            skew = self._rng.uniform("skew", *pair) ** 3 if self.config.skew_ns else 0.0
            session = self._sessions[pair] = Session(source, target, skew)
        return session

    def _post(self, source: Node, target: Node, message: AnyMessage, attachment: Attachment) -> None:
        if not source.alive:
            return
        session = self._session(source, target)
        number = session.keep(message, attachment)
        if session.up:
            self._transmit(session, number, message, attachment)

    def _transmit(self, session: Session, number: int, message: AnyMessage, attachment: Attachment) -> None:
        self._serial += 1
        at_ns = self._loop.now_ns + self.delay_ns(self._serial)
        if self.config.skew_ns:
            at_ns += int(session.skew * self.config.skew_ns)
        if self._partitions:
            reached_ns = self.open_ns(session.source, session.target, at_ns)
            self.counts["messages stalled"] += reached_ns > at_ns
            at_ns = reached_ns
        session.last_ns = at_ns = max(self.on_grid(at_ns), session.last_ns)
        self._loop.at(at_ns, self._arrive, session, session.connection, number, message, attachment)

    def _arrive(
        self, session: Session, connection: int, number: int, message: AnyMessage, attachment: Attachment
    ) -> None:
        source, target, now_ns = session.source, session.target, self._loop.now_ns
        if not target.alive:
            return
        if connection != session.connection:
            self.counts["messages lost"] += 1
            return
        if source.alive:
            self._hear(session, number, message, attachment)
            return
        pair = (source.index, target.index)
        lasts = self._rng.uniform("last words", *pair)
        if now_ns > source.died_ns + int(lasts * 2 * self.config.late_ns):
            return
        # Where messages may be late the last words of the dead all are, so that some are heard after the news of the death.
        linger_ns = int(self._rng.uniform("lingers", *pair) * self.config.late_ns) if self._lingers else 0
        if linger_ns:
            self._loop.at(now_ns + linger_ns, self._hear, session, number, message, attachment)
        else:
            self._hear(session, number, message, attachment)

    def _hear(self, session: Session, number: int, message: AnyMessage, attachment: Attachment) -> None:
        if not session.target.alive:
            return
        if session.takes(number):
            self.deliver(session.source, session.target, message, attachment)
        else:
            self.counts["messages doubled"] += 1

    def _cut(self, session: Session) -> None:
        """What the sender knows of is anything between what it must know and what is so."""
        self.counts["sessions broken"] += 1
        session.connection += 1
        session.up = False
        session.acknowledge(session.heard - UNHEARD_MAX)
        known = session.kept[0][0] - 1 if session.kept else session.number
        key = (session.source.index, session.target.index, session.connection)
        session.acknowledge(self._rng.between(known, session.heard, "acknowledged", *key))

    def _resume(self, session: Session) -> None:
        """A dead source has nobody who could send again."""
        session.up = True
        if session.source.alive and session.target.alive:
            for number, message, attachment in session.kept:
                self._transmit(session, number, message, attachment)

    # Writes

    def write(self, source: ContentWorker, target: ContentWorker, write: Write) -> None:
        rng, config, now_ns = self._rng, self.config, self._loop.now_ns
        key = (source.index, write.write)
        span = config.write_ns * (1 + write.count)
        if config.slow_write_share and rng.uniform("slow write", *key) < config.slow_write_share:
            span *= 20
        copied_ns = now_ns + 1 + int(rng.uniform("write", *key) ** 2 * span)
        told_ns = copied_ns + int(rng.uniform("landed", *key) ** 4 * span)
        written_ns = told_ns + int(rng.uniform("written", *key) ** 2 * span)
        there_ns = self.open_ns(source, target, copied_ns)
        back_ns = self.open_ns(target, source, max(written_ns, there_ns))
        stalls = there_ns > copied_ns or back_ns > written_ns
        fails = rng.uniform("write fails", *key)
        ok = fails >= (0.5 if stalls else config.failed_share)
        if stalls and ok:
            copied_ns, told_ns, written_ns = there_ns, max(there_ns, told_ns), back_ns
        # Of a failed write all may have arrived: what was lost is the word of it.
        whole = ok or (there_ns == copied_ns and rng.uniform("write unheard", *key) < 0.25)
        count = write.count if whole else rng.between(0, write.count, "write stops", *key)
        self.counts["writes stalled"] += stalls
        self.counts["writes failed"] += not ok
        self._loop.at(copied_ns, self._copy, source, target, write, count)
        told_ns, written_ns = self.on_grid(told_ns), self.on_grid(written_ns)
        if whole:
            self._loop.at(told_ns, self._landed, source, target, write)
        self._loop.at(written_ns, self._written, source, write, ok)

    def _copy(self, source: ContentWorker, target: ContentWorker, write: Write, count: int) -> None:
        if self._reaches(source):
            self.on_copy(target, write)
            layers = (write.layer, write.layer + write.layers) if write.layers else None
            runs = write.group, write.source_first, write.target_first, count
            target.memory.copy_from(source.memory, *runs, layers)

    def _landed(self, source: ContentWorker, target: ContentWorker, write: Write) -> None:
        if self._reaches(source):
            target.receive(Landed(write.slot, write.weight, source.address), self._loop.now_ns)

    def _written(self, source: ContentWorker, write: Write, ok: bool) -> None:
        source.receive(Written(write.write, ok), self._loop.now_ns)

    def _reaches(self, source: ContentWorker) -> bool:
        """May a write of this source touch memory now? For some time between its death and its discovery, perhaps."""
        if source.alive:
            return True
        share = self._rng.uniform("last write", source.index)
        return self._loop.now_ns <= source.died_ns + int(share * (source.found_ns - source.died_ns))
