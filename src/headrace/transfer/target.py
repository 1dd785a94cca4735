"""The receiving half of a transfer session, at the decode instance: expectations counted in block-layers, never in calls or by order.

So merging, splitting, sharding and reordering of writes change nothing (TransferEngine, section 3: an immediate counter).
"""

from dataclasses import dataclass

from headrace.types.ids import SequenceKey, Slot

SLOTS = 2**16


@dataclass(slots=True)
class Expectation:
    key: SequenceKey
    expected: int
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

    def open(self, key: SequenceKey, expected: int) -> Slot:
        """Register before the source is told. Slots go round, so that a number rests as long as can be."""
        assert len(self._open) < SLOTS and expected > 0
        while Slot(self._next) in self._open:
            self._next = (self._next + 1) % SLOTS
        slot = Slot(self._next)
        self._next = (self._next + 1) % SLOTS
        self._open[slot] = Expectation(key, expected)
        return slot

    def extend(self, slot: Slot, weight: int) -> int:
        """More will come; what is expected in all. Register before the source is told."""
        expectation = self._open[slot]
        assert not expectation.complete
        expectation.expected += weight
        return expectation.expected

    def land(self, slot: Slot, weight: int) -> Expectation:
        """Count a write, a tail or a handover."""
        expectation = self._open[slot]
        expectation.landed += weight
        assert expectation.landed <= expectation.expected, (
            f"slot {slot} of {expectation.key} counted too much"
        )
        return expectation

    def close(self, slot: Slot) -> None:
        del self._open[slot]
