"""Who has been served how much: tokens computed for each share, for orderings that are fair.

A share is a tenant, or a request of nobody in particular. It is counted while it has a sequence here. One that comes (back) begins with the
least that any other has, so that nobody saves up claims while away (VTC, arXiv 2401.00588, counter lift). What is computed again after a
preemption does not count: so counts end with the work, and sequences cannot take turns for ever without getting on.
"""

from headrace.engine.sequence import Sequence
from headrace.types.ids import SequenceKey


def share_of(sequence: Sequence) -> str:
    return sequence.tenant or f"request {sequence.key.request}"


class Shares:
    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        """Tokens, by share."""
        self._members: dict[str, int] = {}
        """Its sequences here."""
        self._reached: dict[SequenceKey, int] = {}
        """Leading tokens that were computed at least once."""

    def enter(self, sequence: Sequence) -> None:
        share = share_of(sequence)
        self._members[share] = self._members.get(share, 0) + 1

    def leave(self, sequence: Sequence) -> None:
        share = share_of(sequence)
        self._members[share] -= 1
        self._reached.pop(sequence.key, None)
        if not self._members[share]:
            del self._members[share]
            self.served.pop(share, None)

    def begin(self) -> None:
        """Before a step is planned: those that have come since get their first count."""
        if len(self.served) < len(self._members):
            least = min(self.served.values(), default=0)
            for share in self._members:
                self.served.setdefault(share, least)

    def serve(self, sequence: Sequence, tokens: int) -> None:
        """The last `tokens` of those that are scheduled are new in a plan."""
        share, end = share_of(sequence), sequence.scheduled
        begin = max(end - tokens, self._reached.get(sequence.key, 0))
        if share in self.served and end > begin:
            self.served[share] += end - begin
            self._reached[sequence.key] = end
