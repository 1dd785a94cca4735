"""The service's clock, on a host that has another one: monotonic clocks begin when their host does.

Deadlines, ages and times of stages are written in the clock of the serve process. Its messages say what it was there; what they
took to come is not known, so the latest of a number of them is the best guess: it is behind by the shortest way of a message.
"""

from collections.abc import Callable
from time import monotonic_ns

GUESSES = 16
"""Out of so many the best is taken, so that two clocks that drift apart are brought together again."""


class Clock:
    """Never goes backwards. Before the first `hear` it is the host's own."""

    def __init__(self, own_ns: Callable[[], int] = monotonic_ns) -> None:
        self._own_ns = own_ns
        self._ahead_ns: int | None = None
        """Of the service's clock before our own."""
        self._best_ns: int | None = None
        self._heard = 0
        self._told_ns = 0

    def __call__(self) -> int:
        self._told_ns = max(self._told_ns, self._own_ns() + (self._ahead_ns or 0))
        return self._told_ns

    def hear(self, service_ns: int) -> None:
        """A message that has just come was sent at this time."""
        guess_ns = service_ns - self._own_ns()
        self._best_ns = guess_ns if self._best_ns is None else max(self._best_ns, guess_ns)
        self._heard += 1
        if self._ahead_ns is None or guess_ns > self._ahead_ns:
            self._ahead_ns = guess_ns
        if self._heard == GUESSES:
            self._ahead_ns, self._best_ns, self._heard = self._best_ns, None, 0
