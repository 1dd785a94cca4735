"""Contract of `cluster/roles`, on whatever policies there are."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import registry
from headrace.types.views import ClusterView
from tests.cluster.test_placement_contract import ROWS, view_of

EVERY = pytest.mark.parametrize("name", registry.names("cluster.roles"))
COLUMNS = ("draining", "waiting", "running", "blocks_free", "assigned", "assigned_tokens", "held", "sending")


def sides(leanings: tuple[str, ...], draining: Any) -> list[int]:
    """Instances that lean to each half alone and can take work."""
    return [
        sum(leaning == side and not gone for leaning, gone in zip(leanings, draining, strict=True))
        for side in ("prefill", "decode")
    ]


def checked(policy: Any, view: ClusterView, same: ClusterView) -> dict[Any, str]:
    """The answer, after checks that hold for every one."""
    turned = policy.turn(view)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(view, name), getattr(same, name))
    leanings = dict(zip(view.addresses, view.leanings, strict=True))
    assert all(leaning in ("prefill", "decode", "mixed") for leaning in turned.values())
    assert all(leaning != leanings[address] for address, leaning in turned.items()), "only changes"
    after = tuple(turned.get(a, leaning) for a, leaning in leanings.items())
    before, left = sides(view.leanings, view.draining), sides(after, view.draining)
    assert all(n or not was or "mixed" in after for was, n in zip(before, left, strict=True)), "one is left"
    return turned


@EVERY
@given(fleets=st.lists(ROWS, max_size=5))
def test_leanings_change_among_those_there_are_and_the_answers_are_pure(
    name: str, fleets: list[list[tuple[str, bool, int | None]]]
):
    """Rows come and go, drain and turn as they like."""
    first, second = registry.load("cluster.roles", name), registry.load("cluster.roles", name)
    assert first.period_ns == second.period_ns > 0
    for rows in fleets:
        said = checked(first, view_of(rows), view_of(rows))
        assert said == checked(second, view_of(rows), view_of(rows))
        assert all(address in view_of(rows).addresses for address in said)


@EVERY
def test_a_fleet_that_nothing_was_heard_from_stays_as_it_is(name: str):
    policy = registry.load("cluster.roles", name)
    view = view_of([("prefill", False, None), ("decode", False, None), ("decode", False, None)])
    assert all(policy.turn(view) == {} for _ in range(20))


def test_static_roles_stay():
    policy = registry.load("cluster.roles", "static")
    view = view_of([("prefill", False, 99), ("decode", False, 0), ("decode", False, 0)])
    assert all(policy.turn(view) == {} for _ in range(20))
