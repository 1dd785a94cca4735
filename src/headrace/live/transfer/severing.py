"""Inbound links that have been severed, and who waits until nobody moves anything here for them.

Life cycle of one:
 1. `sever`: it is closed, and nothing of it is heard any more. Where its source maps our memory, a copy may be under way there.
 2. `Inbound` says that it is gone, from any thread: its source has let go, or has ended. What waited for that goes on.
A source that is stopped may take for ever: that is said once, and costs what waits for it, and nobody else.
"""

import logging
from collections.abc import Callable
from threading import Event
from time import monotonic

from headrace.live.transports import Inbound
from headrace.types.ids import Address

log = logging.getLogger(__name__)

CLOSE_S = 10.0
"""What the end of an engine waits for sources that live to let go of its memory."""


class Severing:
    """Of one engine; on its thread. `post` gets calls there."""

    def __init__(self, own: Address, post: Callable[..., None]) -> None:
        self._own = own
        self._post = post
        self._leaving: dict[Inbound, Event] = {}
        """Set when nothing moves for it any more."""
        self._waiting: list[tuple[list[Inbound], Callable[[], None]]] = []

    def sever(self, inbound: Inbound) -> None:
        over = self._leaving[inbound] = Event()

        def gone() -> None:
            over.set()
            self._post(self._gone, inbound)

        inbound.sever(gone)

    def after(self, choose: Callable[[Inbound], bool], then: Callable[[], None]) -> None:
        """`then` nothing moves for those of the chosen that were severed before: within this call if there are none."""
        chosen = [inbound for inbound in self._leaving if choose(inbound)]
        if chosen:
            self._waiting.append((chosen, then))
        else:
            then()

    def close(self) -> None:
        """Wait for all of them, but not for ever."""
        until = monotonic() + CLOSE_S
        for inbound, over in self._leaving.items():
            if not over.wait(max(0.0, until - monotonic())):
                log.error("%s does not let go of memory of %s that it maps", inbound.source, self._own)

    def _gone(self, inbound: Inbound) -> None:
        del self._leaving[inbound]
        still, self._waiting = self._waiting, []
        for chosen, then in still:
            if any(one in self._leaving for one in chosen):
                self._waiting.append((chosen, then))
            else:
                then()
