"""Virtual time: a heap of (at_ns, seq), taken off one instant at a time.

An instant is all events of one time. Each is carried out (nodes that it concerns are touched), then every touched node settles once, in the
order of its index. What a settle asks for happens at least 1 ns later, so an instant always closes.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Protocol

FIRST = 2**62


class Settler(Protocol):
    """A node as the loop sees it."""

    index: int
    """Order in which nodes of one instant settle; never reused."""

    def settle(self, now_ns: int) -> None: ...

    def wake(self, now_ns: int) -> None:
        """It is time for what it wanted to be settled for."""
        ...


class Loop:
    def __init__(self) -> None:
        self.now_ns = 0
        self.events = 0
        """Carried out so far."""
        self._heap: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []
        self._serial = 0
        self._touched: dict[int, Settler] = {}
        self._wakes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, at_ns: int, action: Callable[..., object], *arguments: Any, first: bool = False) -> None:
        """Call `action(*arguments)` at a time after this instant. Events of one time keep the order in which they were put in, but `first`
        ones come before all others."""
        assert at_ns > self.now_ns, "nothing happens in the instant that asked for it"
        self._serial += 1
        heappush(self._heap, (at_ns, self._serial - FIRST if first else self._serial, action, arguments))

    def touch(self, node: Settler) -> None:
        """The node settles when this instant's events are in."""
        self._touched[node.index] = node

    def wake_at(self, node: Settler, at_ns: int) -> None:
        """The node settles at this time even if nothing happens; replaces what it asked before."""
        at_ns = max(at_ns, self.now_ns + 1)
        if self._wakes.get(node.index) != at_ns:
            self._wakes[node.index] = at_ns
            self.at(at_ns, self._wake, node, at_ns)

    def forget(self, node: Settler) -> None:
        """The node is gone: it settles no more."""
        self._wakes.pop(node.index, None)
        self._touched.pop(node.index, None)

    def instant(self) -> bool:
        """Run the next instant. False: there is none."""
        heap = self._heap
        if not heap:
            return False
        self.now_ns = now_ns = heap[0][0]
        while heap and heap[0][0] == now_ns:
            _, _, action, arguments = heappop(heap)
            self.events += 1
            action(*arguments)
        touched = self._touched
        for index in sorted(touched) if len(touched) > 1 else list(touched):
            node = touched.pop(index, None)
            if node is not None:
                node.settle(now_ns)
        assert not self._touched, "a settle touched a node in its own instant"
        return True

    def _wake(self, node: Settler, at_ns: int) -> None:
        if self._wakes.get(node.index) == at_ns:
            del self._wakes[node.index]
            node.wake(self.now_ns)
