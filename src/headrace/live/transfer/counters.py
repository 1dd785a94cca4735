"""Immediates, and how a target counts them: completion is by count, never by order (TransferEngine, section 3).

An immediate is 32 bits: a slot (16) and a weight (16). A weight of 0 is no immediate at all. On the wire it travels in a note of 64 bits
with the shard's serial number (24) and its channel (8): what a network card's completion queue can carry.
"""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.transfer.runs import WEIGHT_MAX
from headrace.transfer.target import SLOTS
from headrace.types.errors import TransferError
from headrace.types.ids import Address

CHANNELS = 1 << 8
SERIALS = 1 << 24

NO_IMMEDIATE = 0

Generic = Callable[[Address, int, int], None]
"""(source, slot, weight) of an arrival for a slot that nobody expects."""


def immediate(slot: int, weight: int) -> int:
    """Raises TransferError for what does not fit into its 16 bits."""
    if not 0 <= slot < SLOTS or not 1 <= weight <= WEIGHT_MAX:
        raise TransferError(f"slot {slot} and weight {weight} do not fit into 16 bits each")
    return slot << 16 | weight


def note_of(channel: int, serial: int, imm: int) -> int:
    return channel << 56 | serial << 32 | imm


def parts_of(note: int) -> tuple[int, int, int]:
    """(channel, serial, immediate)."""
    return note >> 56, note >> 32 & (SERIALS - 1), note & 0xFFFFFFFF


@dataclass(slots=True)
class Expected:
    count: int
    callback: Callable[[], None]
    landed: int = 0


class ImmCounter:
    """What has arrived, by slot.

    Register with `expect` before the peer is told of the slot. An arrival for a slot that nobody expects goes to `generic`; without one it
    is kept as vacant, and counts when the slot is expected later.
    """

    def __init__(self, generic: Generic | None = None) -> None:
        self.generic = generic
        self._expected: dict[int, Expected] = {}
        self._vacant: dict[int, int] = {}

    def __len__(self) -> int:
        """Slots that are expected and not complete."""
        return len(self._expected)

    def expect(self, slot: int, count: int, callback: Callable[[], None]) -> None:
        """Call back when weights of `count` in all have arrived; the slot is then free again. Raises TransferError for a slot in use."""
        if not 0 <= slot < SLOTS or count < 1:
            raise TransferError(f"slot {slot} cannot expect {count}")
        if slot in self._expected:
            raise TransferError(f"slot {slot} is expected already")
        self._expected[slot] = Expected(count, callback)
        vacant = self._vacant.pop(slot, 0)
        if vacant:
            self._count(slot, vacant)

    def extend(self, slot: int, count: int) -> None:
        """So much more will come. Tell the source afterwards."""
        self._expected[slot].count += count

    def close(self, slot: int) -> None:
        """Forget it, once no late write can land: what came of it is forgotten, too."""
        self._expected.pop(slot, None)
        self._vacant.pop(slot, None)

    def add(self, source: Address, imm: int) -> None:
        """A write with this immediate is in memory."""
        slot, weight = imm >> 16, imm & WEIGHT_MAX
        if slot in self._expected:
            self._count(slot, weight)
        elif self.generic is not None:
            self.generic(source, slot, weight)
        else:
            self._vacant[slot] = self._vacant.get(slot, 0) + weight

    def vacant(self, slot: int) -> int:
        """What has come for a slot that nobody expects."""
        return self._vacant.get(slot, 0)

    def _count(self, slot: int, weight: int) -> None:
        expected = self._expected[slot]
        if expected.landed + weight > expected.count:
            # What came before still counts: it may be of others, who are honest.
            raise TransferError(f"slot {slot} counted {expected.landed + weight} of {expected.count}")
        expected.landed += weight
        if expected.landed == expected.count:
            del self._expected[slot]
            expected.callback()


class Once:
    """Serial numbers that have been seen, of one link: ascending modulo 2**24, in nearly any order."""

    def __init__(self) -> None:
        self._next = 0
        """All before it have been seen."""
        self._beyond: dict[int, None] = {}

    def first(self, serial: int) -> bool:
        """True the first time that this number comes."""
        if (serial - self._next) % SERIALS >= SERIALS // 2 or serial in self._beyond:
            return False
        self._beyond[serial] = None
        while self._next in self._beyond:
            del self._beyond[self._next]
            self._next = (self._next + 1) % SERIALS
        return True
