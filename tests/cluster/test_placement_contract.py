"""Contract of `cluster/placement`, on whatever policies there are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import registry
from headrace.types.ids import Address, PoolId, RequestId
from headrace.types.request import Request
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Wait
from tests.contract import policies

EVERY = pytest.mark.parametrize("policy", policies("cluster.placement"))
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["prefill", "decode", "mixed"]),
        st.booleans(),
        st.one_of(st.none(), st.integers(0, 99)),
    ),
    max_size=6,
)


def view_of(rows: Sequence[tuple[str, bool, int | None]]) -> ClusterView:
    """Rows of (leaning, draining, load); a load of None: nothing was heard from it yet."""
    loads = np.array([0 if load is None else load for _, _, load in rows], dtype=np.float64)
    heard = np.array([np.nan if load is None else load for _, _, load in rows], dtype=np.float64)
    return ClusterView(
        now_ns=100,
        addresses=tuple(Address(f"n{i}", i) for i in range(len(rows))),
        pools=tuple(PoolId(i) for i in range(len(rows))),
        leanings=tuple(leaning for leaning, _, _ in rows),
        draining=np.array([draining for _, draining, _ in rows], dtype=np.bool_),
        observed_at_ns=heard,
        waiting=heard,
        running=heard,
        blocks_total=np.full(len(rows), 64.0),
        blocks_free=heard,
        assigned=loads,
        assigned_tokens=loads * 10,
        tokens_waiting=heard,
        tokens_running=heard * 10,
        held=heard,
        receiving=heard,
        sending=heard,
        blocks_demand=heard,
        urgent=heard,
        preemptions=heard,
        sequences_max=np.full(len(rows), 8.0),
    )


def question(serial: int = 0, total: int = 40) -> PlacementRequest:
    return PlacementRequest(Request(RequestId(1), 40, (), 8), total, 0, serial)


def usable(view: ClusterView) -> set[Address]:
    return {a for a, draining in zip(view.addresses, view.draining, strict=True) if not draining}


@EVERY
@given(rows=ROWS, serial=st.integers(0, 20))
def test_work_goes_to_who_takes_it_and_the_answer_is_pure(
    policy: Any, rows: list[tuple[str, bool, int | None]], serial: int
):
    view, same = view_of(rows), view_of(rows)
    placed = policy.place(question(serial), view)
    assert placed == policy.place(question(serial), same)
    for name in ("draining", "observed_at_ns", "assigned", "assigned_tokens", "blocks_free"):
        np.testing.assert_array_equal(getattr(view, name), getattr(same, name))
    assert policy.horizon(view) >= 1
    if not usable(view):
        assert isinstance(placed, Wait | Decline) and placed.reason
    else:
        assert isinstance(placed, Placement) and placed.reasons["rule"]
        assert placed.prefill in usable(view)
        assert placed.decode is None or placed.decode in usable(view)


@EVERY
@given(rows=ROWS, serial=st.integers(0, 20))
def test_a_held_sequence_is_bound_to_who_takes_it(
    policy: Any, rows: list[tuple[str, bool, int | None]], serial: int
):
    view = view_of([*rows, ("prefill", True, 0)])
    bound = policy.bind(question(serial), view, view.addresses[-1])
    assert bound == policy.bind(question(serial), view, view.addresses[-1])
    assert bound in usable(view) or (isinstance(bound, Wait) and bound.reason)
    if any(view.assigned[view.candidates("decode")] == 0):
        assert not isinstance(bound, Wait), "where somebody has nothing to do, nothing waits"


@EVERY
def test_leanings_are_kept_where_there_is_a_choice(policy: Any):
    view = view_of([("decode", False, 0), ("prefill", False, 50), ("decode", False, 9)])
    for serial in range(6):
        placed = policy.place(question(serial), view)
        decode = placed.decode or policy.bind(question(serial), view, placed.prefill)
        assert placed.prefill == view.addresses[1] and decode in (view.addresses[0], view.addresses[2])


@EVERY
def test_what_one_instance_can_do_alone_is_not_split(policy: Any):
    view = view_of([("mixed", False, 0)])
    placed = policy.place(question(), view)
    assert placed.prefill == placed.decode == view.addresses[0]


def test_least_load_takes_the_lightest_and_ties_go_by_name():
    policy = registry.load("cluster.placement", "least_load")
    view = view_of(
        [("prefill", False, 5), ("prefill", False, 3), ("prefill", False, 3), ("decode", False, 9)]
    )
    placed = policy.place(question(), view)
    assert (placed.prefill, placed.decode) == (view.addresses[1], view.addresses[3])


def test_least_load_can_leave_the_decode_instance_open():
    policy = registry.load("cluster.placement", "least_load", {"bind": "late"})
    view = view_of([("prefill", False, 5), ("decode", False, 9), ("decode", False, 2)])
    assert policy.place(question(), view).decode is None
    assert policy.bind(question(), view, view.addresses[0]) == view.addresses[2]


def test_round_robin_takes_turns():
    policy = registry.load("cluster.placement", "round_robin")
    view = view_of([("prefill", False, 0), ("prefill", False, 0), ("decode", False, 0)])
    assert [policy.place(question(n), view).prefill.name for n in range(4)] == ["n0", "n1", "n0", "n1"]
