"""The receiving half of a transfer session, at the decode instance: expectations counted in block-layers, never in calls or by order.

So merging, splitting, sharding and reordering of writes change nothing (TransferEngine, section 3: an immediate counter). What a source
counts is not believed blindly: `refusal` says what cannot be.
"""

from dataclasses import dataclass

from headrace.types.ids import Address, SequenceKey, Slot

SLOTS = 2**16


@dataclass(slots=True)
class Expectation:
    key: SequenceKey
    expected: int
    source: Address
    """Who writes."""
    owed: int
    """Of what is still expected, what no write may count: a message does."""
    landed: int = 0

    @property
    def complete(self) -> bool:
        return self.landed == self.expected


class Expectations:
    """Open slots of one instance. A slot is used again only after `close`, which its owner calls when no late write can land."""

    def __init__(self) -> None:
        self._open: dict[Slot, Expectation] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, key: SequenceKey, expected: int, source: Address, *, owed: int = 0) -> Slot:
        """Register before the source is told. Slots go round, so that a number rests as long as can be."""
        assert len(self._open) < SLOTS and 0 <= owed <= expected > 0
        while Slot(self._next) in self._open:
            self._next = (self._next + 1) % SLOTS
        slot = Slot(self._next)
        self._next = (self._next + 1) % SLOTS
        self._open[slot] = Expectation(key, expected, source, owed)
        return slot

    def extend(self, slot: Slot, weight: int) -> int:
        """More will come; what is expected in all. Register before the source is told."""
        expectation = self._open[slot]
        assert not expectation.complete
        expectation.expected += weight
        return expectation.expected

    def refusal(self, slot: Slot, weight: int, source: Address, *, owed: int = 0) -> str:
        """Why this source cannot have written so much; empty: it can. `owed`: of a message, the part that is owed."""
        expectation = self._open.get(slot)
        if expectation is None:
            return f"it counted {weight} for slot {slot}, which nobody waits for"
        if expectation.source != source:
            return f"it counted {weight} for slot {slot}, which {expectation.source} writes"
        left = expectation.expected - expectation.owed + owed - expectation.landed
        return f"it counted {weight} for slot {slot}, where {left} were to come" if weight > left else ""

    def land(self, slot: Slot, weight: int, *, owed: int = 0) -> Expectation:
        """Count a write; or a tail or a handover, with that part of the weight that was owed."""
        expectation = self._open[slot]
        expectation.owed -= owed
        expectation.landed += weight
        assert expectation.landed <= expectation.expected, (
            f"slot {slot} of {expectation.key} counted too much"
        )
        return expectation

    def close(self, slot: Slot) -> None:
        del self._open[slot]
