"""Counting: by weight, never by order, never twice."""

import random

import pytest

from headrace.live.transfer.counters import (
    SERIALS,
    ImmCounter,
    Once,
    immediate,
    note_of,
    parts_of,
)
from headrace.types.errors import TransferError
from headrace.types.ids import Address

A = Address("a")


def test_an_expectation_fires_once_at_its_count() -> None:
    counter = ImmCounter()
    fired: list[int] = []
    counter.expect(5, 6, lambda: fired.append(5))
    counter.extend(5, 4)
    for weight in (1, 2, 3):
        counter.add(A, immediate(5, weight))
    assert not fired and len(counter) == 1
    counter.add(A, immediate(5, 4))
    assert fired == [5] and len(counter) == 0
    # Free again, and what comes now is vacant until somebody expects it.
    counter.add(A, immediate(5, 7))
    assert counter.vacant(5) == 7
    counter.expect(5, 7, lambda: fired.append(6))
    assert fired == [5, 6]


def test_too_much_is_an_error_and_a_closed_slot_forgets() -> None:
    counter = ImmCounter()
    counter.expect(1, 2, lambda: None)
    with pytest.raises(TransferError, match="slot 1 counted 3 of 2"):
        counter.add(A, immediate(1, 3))
    counter.close(1)
    counter.add(A, immediate(1, 1))
    counter.close(1)
    assert counter.vacant(1) == 0
    counter.expect(2, 1, lambda: None)
    with pytest.raises(TransferError, match="slot 2 is expected already"):
        counter.expect(2, 1, lambda: None)


@pytest.mark.parametrize(("slot", "weight"), [(-1, 1), (1 << 16, 1), (0, 0), (0, 1 << 16)])
def test_immediates_have_16_bits_each(slot: int, weight: int) -> None:
    with pytest.raises(TransferError, match="16 bits"):
        immediate(slot, weight)


def test_notes_hold_all_their_parts() -> None:
    for parts in ((0, 0, 0), (255, SERIALS - 1, 0xFFFFFFFF), (7, 123456, immediate(9, 65535))):
        assert parts_of(note_of(*parts)) == parts
        assert note_of(*parts) < 1 << 64


@pytest.mark.parametrize("start", [0, SERIALS - 50])
def test_a_serial_number_counts_once_in_any_order(start: int) -> None:
    once = Once()
    once._next = start
    numbers = [(start + i) % SERIALS for i in range(100)]
    draw = random.Random(1)
    draw.shuffle(numbers)
    assert all(once.first(n) for n in numbers)
    assert not any(once.first(n) for n in numbers)
    assert not once._beyond
