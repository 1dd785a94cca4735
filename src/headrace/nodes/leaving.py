"""How sequences leave an instance: dropped, failed, preempted or expired, and freed as soon as nothing can touch their blocks."""

from collections.abc import Callable

from headrace.engine.sequence import Sequence, Status
from headrace.nodes.parts import Parts
from headrace.types.events import Close
from headrace.types.ids import SequenceKey
from headrace.types.messages import Failed, Release, Unfenced


class Leaving:
    """`dropped` hears of sequences that are given up before anything else does, `freed` of those whose blocks go; `closed` takes the
    command for the executor.
    """

    def __init__(
        self,
        parts: Parts,
        dropped: Callable[[Sequence, int], None],
        freed: Callable[[Sequence], None],
        closed: Callable[[Close], None],
    ) -> None:
        self._parts = parts
        self._dropped = dropped
        self._freed = freed
        self._closed = closed

    def drop(self, sequence: Sequence, now_ns: int) -> None:
        """It has no more to do here: free what it has as soon as nothing can touch it."""
        self._parts.deadlines.pop(sequence.key, None)
        self._parts.sending.stop(sequence.key)
        self._dropped(sequence, now_ns)
        if sequence.status is Status.FENCING:
            self._parts.deadlines[sequence.key] = now_ns + self._parts.config.fence_ns
        elif sequence.status is Status.RECEIVING and self._parts.receiving.abandon(sequence.key):
            self._parts.scheduler.receiving.remove(sequence)
            sequence.status = Status.FENCING
            self._parts.deadlines[sequence.key] = now_ns + self._parts.config.fence_ns
        else:
            self._parts.scheduler.stop(sequence, ends=True)

    def fail(self, sequence: Sequence, reason: str, now_ns: int, *, retry: bool) -> None:
        self._parts.send(self._parts.router, Failed(sequence.key, reason, retry))
        self.drop(sequence, now_ns)

    def reap(self) -> bool:
        """Stopped sequences that no plan and no write in flight uses: free their blocks; those preempted start over. True if any."""
        self._parts.swapping.save()
        drained = self._parts.scheduler.drained(self._busy)
        if drained and (self._parts.scheduler.waiting or any(self._parts.memory.need)):
            self._parts.scheduler.changed = True
        for sequence in drained:
            if sequence.ends:
                self.leave(sequence)
            else:
                self.free(sequence)
                self._parts.swapping.requeued(sequence)
                self._parts.scheduler.requeue(sequence)
        return bool(drained)

    def _busy(self, key: SequenceKey) -> bool:
        """Does anybody but a plan use its blocks?"""
        return self._parts.sending.busy(key) or self._parts.swapping.busy(key)

    def leave(self, sequence: Sequence) -> None:
        """Nothing can touch its blocks any more: free them and forget it."""
        key = sequence.key
        self.free(sequence)
        self._parts.sending.close(key)
        self._parts.receiving.close(key)
        self._parts.swapping.forget(key)
        if self._parts.scheduler.shares is not None:
            self._parts.scheduler.shares.leave(sequence)
        self._parts.scheduler.leave(sequence, closes=True)
        self._parts.deadlines.pop(key, None)
        del self._parts.sequences[key]
        self._closed(Close(key))

    def free(self, sequence: Sequence) -> None:
        if any(sequence.published):
            self._parts.send(self._parts.pool, Release(sequence.key))
        self._freed(sequence)
        self._parts.memory.ask_again()
        self._parts.memory.free(sequence)

    def expire(self, now_ns: int) -> None:
        for key in [k for k, at_ns in self._parts.deadlines.items() if at_ns <= now_ns]:
            sequence = self._parts.sequences[key]
            if sequence.status is Status.FENCING:
                assert sequence.source is not None
                self._parts.send(self._parts.router, Unfenced(sequence.source))
                self._parts.deadlines[key] = now_ns + self._parts.config.fence_ns
            else:
                held = sequence.status is Status.HELD
                reason = "its KV was not fetched in time" if held else "no KV came in time"
                self.fail(sequence, reason, now_ns, retry=True)
