"""Breaks standstills: instances that wait for each other's memory.

A prefill instance may be full of sequences that nobody has room to decode, while the decode instances' room is reserved for sequences
that it has no memory to prefill; with mixed instances, or several in one pool, the circle can be longer. Nobody sees the whole of it, so
each does its part: one at which nothing runs, something waits, and something idle sits in memory gives up what came last of that, after
some patience. The router asks again for it, here or elsewhere; its published blocks stay as cache.
What looks like a standstill may be a slow peer, so patience doubles with everything given up, until a handover succeeds.
"""

from collections.abc import Iterable

from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, Status
from headrace.nodes.sending import Sending

DOUBLINGS_MAX = 6


class Standstill:
    def __init__(self, scheduler: Scheduler, sending: Sending, patience_ns: int) -> None:
        self._scheduler = scheduler
        self._sending = sending
        self._patience_ns = patience_ns
        self._given_up = 0
        """Since the last handover that succeeded."""
        self.due_ns = 0
        """When patience ends; 0 while something moves."""

    def moved(self) -> None:
        """A piece of a handover has come."""
        self.due_ns = 0

    def handed_over(self) -> None:
        """One is complete, here or at the target."""
        self.due_ns = self._given_up = 0

    def victim(self, sequences: Iterable[Sequence], now_ns: int) -> Sequence | None:
        """What to give up now."""
        scheduler, memory = self._scheduler, self._scheduler.memory
        moving = scheduler.inflight or scheduler.stopping or scheduler.loading
        waits = scheduler.waiting or memory.short or memory.pressed
        idle = [s for s in sequences if sits(s, self._sending)] if waits and not moving else []
        if not idle:
            self.due_ns = 0
            return None
        if self.due_ns and now_ns < self.due_ns:
            return None
        over = self.due_ns > 0
        self._given_up += over
        self.due_ns = now_ns + (self._patience_ns << min(self._given_up, DOUBLINGS_MAX))
        # With one pool for both, what is received has no memory here until it comes.
        return max(idle, key=lambda s: (any(s.tables), s.arrival_ns, s.key)) if over else None


def sits(sequence: Sequence, sending: Sending) -> bool:
    """Does it hold something for which it can do nothing itself?"""
    if sequence.status is Status.HELD:
        return sequence.key not in sending
    return sequence.status is Status.RECEIVING
