import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.transfer.target import SLOTS, Expectations
from headrace.types.ids import Address, RequestId, SequenceKey, Slot

P, Q = Address("p"), Address("q", 1)


def key(n: int) -> SequenceKey:
    return SequenceKey(RequestId(n))


@given(weights=st.lists(st.integers(1, 9), min_size=1))
def test_it_is_complete_when_the_weights_add_up_in_any_order_and_never_before(weights: list[int]):
    expectations = Expectations()
    slot = expectations.open(key(1), sum(weights), P)
    for weight in weights[:-1]:
        assert not expectations.land(slot, weight).complete
    done = expectations.land(slot, weights[-1])
    assert done.complete and done.key == key(1)


def test_too_much_is_an_error():
    expectations = Expectations()
    slot = expectations.open(key(1), 3, P)
    with pytest.raises(AssertionError, match="too much"):
        expectations.land(slot, 4)


def test_a_slot_rests_as_long_as_can_be_before_it_is_used_again():
    expectations = Expectations()
    first = expectations.open(key(0), 1, P)
    held = expectations.open(key(1), 1, P)
    expectations.close(first)
    for n in range(2, SLOTS):
        slot = expectations.open(key(n), 1, P)
        assert slot == n
        expectations.close(slot)
    assert expectations.open(key(SLOTS), 1, P) == first
    assert expectations.open(key(SLOTS + 1), 1, P) == Slot(held + 1)
    assert len(expectations) == 3


def test_slots_are_counted_apart():
    expectations = Expectations()
    a, b = expectations.open(key(1), 2, P), expectations.open(key(2), 1, P)
    assert expectations.land(b, 1).complete
    assert not expectations.land(a, 1).complete


def test_more_may_be_expected_before_all_is_there():
    expectations = Expectations()
    slot = expectations.open(key(1), 3, P)
    assert not expectations.land(slot, 2).complete
    assert expectations.extend(slot, 4) == 7
    assert not expectations.land(slot, 1).complete and expectations.land(slot, 4).complete
    with pytest.raises(AssertionError):
        expectations.extend(slot, 1)


def test_a_write_counts_for_its_source_and_no_more_than_is_left_for_writes():
    expectations = Expectations()
    slot = expectations.open(key(1), 6, P, owed=1)
    assert not expectations.refusal(slot, 5, P)
    assert expectations.refusal(slot, 6, P) == f"it counted 6 for slot {slot}, where 5 were to come"
    assert expectations.refusal(slot, 1, Q) == f"it counted 1 for slot {slot}, which p#0 writes"
    assert "which nobody waits for" in expectations.refusal(Slot(9), 1, P)
    expectations.land(slot, 5)
    assert expectations.refusal(slot, 1, P) and not expectations.refusal(slot, 1, P, owed=1)
    assert expectations.refusal(slot, 2, P, owed=1), "its tail may not count too much either"
    assert expectations.land(slot, 1, owed=1).complete
