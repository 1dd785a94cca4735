"""The target's half of all transfers of one instance: slots, what has arrived, and fencing. See `transfer.target` for counting."""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.engine.memory import Memory
from headrace.engine.sequence import Sequence
from headrace.transfer.runs import expected_weight
from headrace.transfer.target import Expectations
from headrace.types.events import Command, Distrust, Send
from headrace.types.ids import Address, SequenceKey, Slot
from headrace.types.kv import KVSpec, TableRun
from headrace.types.messages import Abandon, Adopted, Dispatch, Found, Tail


@dataclass(slots=True)
class Incoming:
    """One session: complete when the slot's count is reached and the tail (and, with one pool, the handover) is among it."""

    sequence: Sequence
    source: Address
    slot: Slot
    shared: bool
    errand: bool = False
    """Cached blocks for the sequence, not the sequence itself."""
    tail: Tail | None = None
    found: Found | None = None
    """Of an errand."""
    complete: bool = False


class Receiving:
    """Appends its commands to the instance's `out`."""

    def __init__(self, spec: KVSpec, memory: Memory, out: Callable[[Command], None]) -> None:
        self._memory = memory
        self._out = out
        self._layers = [len(g.layers) for g in spec.groups]
        self._expectations = Expectations()
        self._sessions: dict[SequenceKey, Incoming] = {}

    @property
    def idle(self) -> bool:
        return not self._sessions and not len(self._expectations)

    def expect(self, sequence: Sequence, *, shared: bool) -> None:
        """Register what will come, then tell the source. The sequence's private blocks are the target (none with one pool)."""
        assert sequence.source is not None
        table = () if shared else tuple(self._memory.private(sequence))
        blocks = [sum(r.count for r in table if r.group == g) for g in range(len(self._layers))]
        # With one pool the handover counts for one in place of the blocks.
        expected = expected_weight(blocks, self._layers) + shared
        slot = self._expectations.open(sequence.key, expected, sequence.source, owed=1 + shared)
        self._sessions[sequence.key] = Incoming(sequence, sequence.source, slot, shared)
        self._out(
            Send(sequence.source, Dispatch(sequence.key, slot, table, shared, expected, sequence.total))
        )

    def extend(self, key: SequenceKey, slot: Slot, table: tuple[TableRun, ...]) -> None:
        """The source's sequence has grown: so many blocks more."""
        session = self._sessions[key]
        assert session.slot == slot and not session.shared and session.sequence.source is not None
        weight = sum(r.count * self._layers[r.group] for r in table)
        expected = self._expectations.extend(slot, weight)
        dispatch = Dispatch(key, slot, table, shared=False, expected=expected, known=session.sequence.total)
        self._out(Send(session.sequence.source, dispatch))

    def expect_blocks(
        self, key: SequenceKey, sequence: Sequence, source: Address, table: tuple[TableRun, ...]
    ) -> Slot:
        """Register that cached blocks, and a `Found`, will come under this key."""
        weight = sum(r.count * self._layers[r.group] for r in table)
        slot = self._expectations.open(key, 1 + weight, source, owed=1)
        self._sessions[key] = Incoming(sequence, source, slot, shared=False, errand=True)
        return slot

    def open(self, key: SequenceKey, blocks: int, source: Address) -> Slot:
        """A slot for so many blocks of every group, of no sequence here. Counted by `count`, closed by `shut`."""
        return self._expectations.open(key, blocks * sum(self._layers), source)

    def admits(self, slot: Slot, weight: int, source: Address, *, owed: int = 0) -> bool:
        """May this source count so much there? One that may not is distrusted from now on."""
        why = self._expectations.refusal(slot, weight, source, owed=owed)
        if why:
            self._out(Distrust(source, why))
        return not why

    def count(self, slot: Slot, weight: int) -> bool:
        """True if that was all."""
        return self._expectations.land(slot, weight).complete

    def shut(self, slot: Slot) -> None:
        self._expectations.close(slot)

    def found(self, message: Found) -> Incoming | None:
        """The last piece of an errand."""
        if not self.takes(message.key, message.slot):
            return None
        session = self._sessions[message.key]
        if not self.admits(message.slot, 1 + message.skipped, session.source, owed=1):
            return None
        session.found = message
        return self.landed(message.slot, 1 + message.skipped, owed=1)

    def takes(self, key: SequenceKey, slot: Slot) -> bool:
        """Is this session open?"""
        session = self._sessions.get(key)
        return session is not None and session.slot == slot

    def landed(self, slot: Slot, weight: int, *, owed: int = 0) -> Incoming | None:
        """Count what is admitted; the session, if this completed it."""
        expectation = self._expectations.land(slot, weight, owed=owed)
        if not expectation.complete:
            return None
        session = self._sessions[expectation.key]
        session.complete = True
        return session

    def tail(self, message: Tail) -> Incoming | None:
        """The last piece, in order of arrival not necessarily the last. None for a session that is over."""
        session = self._sessions.get(message.key)
        if session is None or session.slot != message.slot:
            return None
        if not self.admits(message.slot, 1 + message.skipped, session.source, owed=1):
            return None
        session.tail = message
        return self.landed(message.slot, 1 + message.skipped, owed=1)

    def adopted(self, message: Adopted) -> tuple[bool, Incoming | None]:
        """The pool handed blocks over: whether somebody still wants them (else what is private is in hand now), and the session, if this
        completed it."""
        session = self._sessions.get(message.key)
        if session is None:
            for run in message.table:
                private = run.at + run.count - max(run.at, message.published[run.group])
                if private > 0:
                    self._memory.spare[run.group].add(run.first + run.count - private, private)
            return False, None
        session.sequence.published = list(message.published)
        self._memory.adopt(session.sequence, message.table, session.sequence.published)
        return True, self.landed(session.slot, 1, owed=1)

    def abandon(self, key: SequenceKey) -> bool:
        """Give up. True if memory may still be written until the source says `Fenced`; else the session is over."""
        session = self._sessions.get(key)
        if session is None:
            return False
        self._out(Send(session.source, Abandon(key, session.slot)))
        if session.shared:
            self.close(key)
            return False
        return True

    def fenced(self, key: SequenceKey, slot: Slot) -> bool:
        """The source writes no more into this slot. False for an answer to a session that is over."""
        session = self._sessions.get(key)
        if session is None or session.slot != slot:
            return False
        self.close(key)
        return True

    def close(self, key: SequenceKey) -> None:
        """No late write can land: the slot may be used again."""
        session = self._sessions.pop(key, None)
        if session is not None:
            self._expectations.close(session.slot)

    def of(self, source: Address) -> list[SequenceKey]:
        """Sequences that this source feeds."""
        return [k for k, session in self._sessions.items() if session.source == source and not session.errand]
