"""The router's queue: choices that wait for the placement policy, oldest first.

A choice that was told to wait is asked for again once the fleet has changed, and then only while the policy finds places: after
`REASKED_MAX` waits in a row the rest has to wait for the next settle. New ones are always asked for. So a long queue costs little.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from headrace.nodes.choices import Choice

REASKED_MAX = 64

Entry = tuple[int, Choice]
"""Ticket, choice. Tickets are unique and ascend."""


class Queue:
    def __init__(self) -> None:
        self._new: deque[Entry] = deque()
        self._again: list[Entry] = []
        """A heap: to be asked for again."""
        self._told: list[Entry] = []
        """Told to wait by the policy as it saw the fleet at `_version`."""
        self._paused: list[tuple[int, int, Choice]] = []
        """A heap: (not before, ticket, choice)."""
        self._version = 0
        self._ticket = 0

    def put(self, choice: Choice, not_before_ns: int = 0) -> None:
        """At the end. What place it had before is void."""
        self._ticket += 1
        choice.ticket = self._ticket
        if not_before_ns:
            heappush(self._paused, (not_before_ns, choice.ticket, choice))
        else:
            self._new.append((choice.ticket, choice))

    def serve(self, version: int, now_ns: int, waits: Callable[[Choice, int], bool]) -> None:
        """Ask for each that may be asked for now; `waits` says whether it was told to wait. `version` changes when the fleet does."""
        while self._paused and self._paused[0][0] <= now_ns:
            _, ticket, choice = heappop(self._paused)
            heappush(self._again, (ticket, choice))
        if version != self._version:
            self._version = version
            for entry in self._told:
                heappush(self._again, entry)
            self._told.clear()
        waited = 0
        while self._again and waited < REASKED_MAX:
            entry = heappop(self._again)
            if _stands(entry):
                waited = waited + 1 if self._ask(entry, now_ns, waits) else 0
        for _ in range(len(self._new)):
            entry = self._new.popleft()
            if _stands(entry):
                self._ask(entry, now_ns, waits)

    def due_ns(self) -> int:
        """When the next pause ends; 0: there is none."""
        while self._paused and not _stands(self._paused[0][1:]):
            heappop(self._paused)
        return self._paused[0][0] if self._paused else 0

    def _ask(self, entry: Entry, now_ns: int, waits: Callable[[Choice, int], bool]) -> bool:
        waited = waits(entry[1], now_ns)
        if waited:
            self._told.append(entry)
        return waited


def _stands(entry: Entry) -> bool:
    """Does it still wait, in this place?"""
    ticket, choice = entry
    return choice.ticket == ticket and choice.waits
