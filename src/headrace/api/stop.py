"""Stop strings, found in text as it grows. One automaton per string (Knuth, Morris, Pratt), so cost is linear in the text.

Text that may be the beginning of a stop string is held back until it is decided. What is found does not depend on how the text is cut
into tokens: the first string to be complete wins, the longest of those complete at one character.
"""

import msgspec


class Found(msgspec.Struct, frozen=True):
    """What `StopFinder.push` says: text that may be shown now, and the stop string that ended it."""

    text: str
    stop: str | None = None


def failure_links(pattern: str) -> list[int]:
    """links[i]: length of the longest proper prefix of pattern[:i+1] that is also its suffix."""
    links = [0] * len(pattern)
    k = 0
    for i in range(1, len(pattern)):
        while k and pattern[i] != pattern[k]:
            k = links[k - 1]
        if pattern[i] == pattern[k]:
            k += 1
        links[i] = k
    return links


class StopFinder:
    """Watches one choice's text for `stops` (each not empty). With `include` the found string stays in the text."""

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        # Longest first: of strings complete at one character the first one seen is taken.
        self._patterns = [(stop, failure_links(stop)) for stop in sorted(stops, key=len, reverse=True)]
        self._matched = [0] * len(self._patterns)
        self._include = include
        self._held = ""

    def push(self, text: str) -> Found:
        """Take the next piece of text. After a stop string was found, push no more."""
        if not self._patterns:
            return Found(text)
        for at, char in enumerate(text):
            for which, (stop, links) in enumerate(self._patterns):
                k = self._matched[which]
                while k and stop[k] != char:
                    k = links[k - 1]
                k += stop[k] == char
                if k == len(stop):
                    return self._end(self._held + text[: at + 1], stop)
                self._matched[which] = k
        pending = self._held + text
        hold = max(self._matched)
        self._held = pending[len(pending) - hold :]
        return Found(pending[: len(pending) - hold])

    def flush(self) -> str:
        """The text ends here: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _end(self, pending: str, stop: str) -> Found:
        self._held = ""
        return Found(pending if self._include else pending[: len(pending) - len(stop)], stop)
