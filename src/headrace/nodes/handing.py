"""Handing a prefilled sequence to its decode instance: both halves, as `nodes.instance` describes a sequence's life by role."""

from collections.abc import Callable

from headrace.engine.sequence import Sequence, Status
from headrace.nodes.leaving import Leaving
from headrace.nodes.limits import Caching
from headrace.nodes.parts import Parts
from headrace.nodes.receiving import Incoming
from headrace.nodes.standstill import Standstill
from headrace.types.ids import Address, SequenceKey
from headrace.types.messages import Adopted, Dispatch, Failed, InstanceInfo, Joined, Release, Role


class Handing:
    """`publish` puts what is full into the pool's index; `fetched` takes what came for a sequence that is to begin here."""

    def __init__(
        self,
        parts: Parts,
        leaving: Leaving,
        standstill: Standstill,
        publish: Callable[[Sequence], None],
        fetched: Callable[[Incoming], None],
    ) -> None:
        self._parts = parts
        self._leaving = leaving
        self._standstill = standstill
        self._publish = publish
        self._fetched = fetched

    # The source's half

    def dispatched(self, source: Address, message: Dispatch, now_ns: int) -> None:
        """The target says where it wants the blocks."""
        parts = self._parts
        sequence = parts.sequences.get(message.key)
        if sequence is not None and (sequence.role is not Role.PREFILL or sequence.ends):
            return
        parts.sending.dispatched(source, message, sequence)
        if sequence is None:
            return
        parts.deadlines.pop(message.key, None)
        if sequence.status is Status.HELD:
            self.hold(sequence, now_ns)
        elif sequence.status is Status.RUNNING:
            parts.sending.advance(sequence)

    def hold(self, sequence: Sequence, now_ns: int) -> None:
        """A held sequence: send all there is; without a target yet, wait for one."""
        parts = self._parts
        if parts.sending.advance(sequence):
            self._sent(sequence)
        elif sequence.key not in parts.sending:
            parts.deadlines[sequence.key] = now_ns + parts.config.hold_ns

    def written(self, key: SequenceKey, failed: bool, now_ns: int) -> None:
        """A write of this sequence's blocks has ended."""
        sequence = self._parts.sequences[key]
        if failed:
            self._leaving.fail(sequence, "a write to the decode instance failed", now_ns, retry=True)
        elif sequence.status is Status.HELD and self._parts.sending.advance(sequence):
            self._sent(sequence)

    def _sent(self, sequence: Sequence) -> None:
        """All is at the target: what was published stays here as cache."""
        self._standstill.handed_over()
        if self._parts.sending.handed_over(sequence.key):
            self._parts.memory.forget(sequence)
        self._leaving.leave(sequence)

    # The target's half

    def adopted(self, message: Adopted, now_ns: int) -> None:
        """The pool, which both use, has moved the blocks to us."""
        wanted, session = self._parts.receiving.adopted(message)
        if not wanted:
            self._parts.send(self._parts.pool, Release(message.key))
        self.complete(session, now_ns)

    def complete(self, session: Incoming | None, now_ns: int) -> None:
        """All KV is here: the sequence goes on from the tail's token."""
        if session is not None and session.errand:
            self._fetched(session)
            return
        if session is None or session.sequence.status is not Status.RECEIVING:
            return
        parts = self._parts
        sequence, tail = session.sequence, session.tail
        assert tail is not None
        self._standstill.handed_over()
        parts.receiving.close(sequence.key)
        parts.deadlines.pop(sequence.key, None)
        cached = sequence.computed
        sequence.role = Role.WHOLE
        sequence.begun = True
        sequence.total += tail.emitted
        sequence.scheduled = sequence.computed = sequence.total - 1
        sequence.emitted = sequence.told = tail.emitted
        sequence.hashes = list(tail.hashes)
        sequence.told_hashes = len(tail.hashes)
        if tail.moved:
            # Windows have passed blocks since they were reserved: what is in them never came.
            for trim in parts.memory.trim(sequence, sequence.computed):
                parts.send(parts.pool, trim)
        self._publish(sequence)
        parts.scheduler.join(sequence)
        if tail.moved:
            return
        if parts.config.caching is Caching.RETURN and not session.shared:
            sequence.prefiller = session.source
        joined = Joined(sequence.key, now_ns, cached, tail.blocks, tail.bytes, tail.writes)
        parts.send(parts.router, joined)

    # Both

    def lost(self, peer: Address, info: InstanceInfo, now_ns: int) -> None:
        """A peer's process has ended."""
        parts = self._parts
        for key in parts.sending.peer_lost(peer, info):
            # Either it had all, or the router begins anew: nobody will come for what is here.
            self._leaving.drop(parts.sequences[key], now_ns)
        for key in parts.receiving.of(peer):
            # No write can land any more.
            sequence = parts.sequences[key]
            if sequence.status is Status.RECEIVING:
                parts.send(parts.router, Failed(key, f"{peer} was lost", retry=True))
                parts.scheduler.receiving.remove(sequence)
            self._leaving.leave(sequence)
        for sequence in [s for s in parts.scheduler.waiting if s.role is Role.DECODE and s.source == peer]:
            self._leaving.fail(sequence, f"{peer} was lost", now_ns, retry=True)
