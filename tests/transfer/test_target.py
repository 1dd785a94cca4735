import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.transfer.target import SLOTS, Expectations
from headrace.types.ids import RequestId, SequenceKey, Slot


def key(n: int) -> SequenceKey:
    return SequenceKey(RequestId(n))


@given(weights=st.lists(st.integers(1, 9), min_size=1))
def test_it_is_complete_when_the_weights_add_up_in_any_order_and_never_before(weights: list[int]):
    expectations = Expectations()
    slot = expectations.open(key(1), sum(weights))
    for weight in weights[:-1]:
        assert not expectations.land(slot, weight).complete
    done = expectations.land(slot, weights[-1])
    assert done.complete and done.key == key(1)


def test_too_much_is_an_error():
    expectations = Expectations()
    slot = expectations.open(key(1), 3)
    with pytest.raises(AssertionError, match="too much"):
        expectations.land(slot, 4)


def test_a_slot_rests_as_long_as_can_be_before_it_is_used_again():
    expectations = Expectations()
    first = expectations.open(key(0), 1)
    held = expectations.open(key(1), 1)
    expectations.close(first)
    for n in range(2, SLOTS):
        slot = expectations.open(key(n), 1)
        assert slot == n
        expectations.close(slot)
    assert expectations.open(key(SLOTS), 1) == first
    assert expectations.open(key(SLOTS + 1), 1) == Slot(held + 1)
    assert len(expectations) == 3


def test_slots_are_counted_apart():
    expectations = Expectations()
    a, b = expectations.open(key(1), 2), expectations.open(key(2), 1)
    assert expectations.land(b, 1).complete
    assert not expectations.land(a, 1).complete


def test_more_may_be_expected_before_all_is_there():
    expectations = Expectations()
    slot = expectations.open(key(1), 3)
    assert not expectations.land(slot, 2).complete
    assert expectations.extend(slot, 4) == 7
    assert not expectations.land(slot, 1).complete and expectations.land(slot, 4).complete
    with pytest.raises(AssertionError):
        expectations.extend(slot, 1)
