"""Drives cores on an asyncio loop.

Life cycle of an event:
 1. `post`ed to a node, from the loop's thread. The first one asks the loop for a drain.
 2. The drain takes everything that is there and stamps it with one time: that is the instant. Each node handles its events in order.
 3. Every node that had one, or whose timer rang, settles once; its commands are carried out in order.
What is posted meanwhile is the next instant, which follows at once. Without events nothing runs.
"""

import asyncio
from collections.abc import Callable
from time import monotonic_ns

from headrace.ports import Core
from headrace.types.events import Command, Event, WakeAt

Carry = Callable[[Command], None]


class Node:
    """One core on a loop. `carry` carries out every command but `WakeAt`."""

    def __init__(self, loop: "CoreLoop", core: Core, carry: Carry) -> None:
        self.core = core
        self.carry = carry
        self.inbox: list[Event] = []
        self.wake_ns = 0
        """When to settle at the latest; 0: never."""
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def post(self, event: Event) -> None:
        """Handle it in the next instant. Only from the loop's thread."""
        self.inbox.append(event)
        self._loop.touch(self)

    def settle(self, now_ns: int) -> None:
        if self.wake_ns and self.wake_ns <= now_ns:
            self._set_timer(0, now_ns)
        for command in self.core.settle(now_ns):
            if isinstance(command, WakeAt):
                self._set_timer(command.at_ns, now_ns)
            else:
                self.carry(command)

    def close(self) -> None:
        self._set_timer(0, 0)

    def _set_timer(self, at_ns: int, now_ns: int) -> None:
        self.wake_ns = at_ns
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at_ns:
            self._timer = self._loop.call_later(max(0, at_ns - now_ns), self._ring)

    def _ring(self) -> None:
        now_ns = self._loop.now_ns()
        if now_ns < self.wake_ns:
            # The loop's clock is coarser than ours; a core that is woken early would wait for ever.
            self._set_timer(self.wake_ns, now_ns)
        else:
            self._loop.touch(self)


class CoreLoop:
    """The nodes of one process. An error of a core is fatal: `on_error` gets it, and nothing runs any more."""

    def __init__(
        self, on_error: Callable[[Exception], None], now_ns: Callable[[], int] = monotonic_ns
    ) -> None:
        self.now_ns = now_ns
        """The clock of its instants."""
        self._asyncio = asyncio.get_running_loop()
        self._on_error = on_error
        self._touched: dict[Node, None] = {}
        self._scheduled = False
        self._broken = False

    def add(self, core: Core, carry: Carry) -> Node:
        return Node(self, core, carry)

    def touch(self, node: Node) -> None:
        """Settle this node in the next instant."""
        self._touched[node] = None
        if not self._scheduled and not self._broken:
            self._scheduled = True
            self._asyncio.call_soon(self._drain)

    def call_later(self, delay_ns: int, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._asyncio.call_later(delay_ns / 1e9, call)

    def _drain(self) -> None:
        self._scheduled = False
        touched, self._touched = self._touched, {}
        now_ns = self.now_ns()
        try:
            for node in touched:
                events, node.inbox = node.inbox, []
                for event in events:
                    node.core.handle(event, now_ns)
            for node in touched:
                node.settle(now_ns)
        except Exception as error:
            # A core that failed half-way is in no known state.
            self._broken = True
            self._on_error(error)
