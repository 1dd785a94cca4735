"""Contract of `cluster/rebalance`, on whatever policies there are."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.types.views import ClusterView
from tests.cluster.columns import COLUMNS, fleet_of
from tests.contract import policies

EVERY = pytest.mark.parametrize("policy", policies("cluster.rebalance"))
NAN = float("nan")


@st.composite
def fleets(draw: st.DrawFn) -> ClusterView:
    """Some rows drain, some have not reported yet."""
    rows = draw(st.integers(0, 7))
    heard = [draw(st.booleans()) or draw(st.booleans()) for _ in range(rows)]
    reported = {
        name: [draw(st.integers(0, most)) if known else NAN for known in heard]
        for name, most in (
            ("running", 6),
            ("waiting", 3),
            ("blocks_free", 64),
            ("blocks_demand", 40),
            ("urgent", 1),
        )
    }
    return fleet_of(
        [draw(st.sampled_from(["prefill", "decode", "mixed"])) for _ in range(rows)],
        draining=[i for i in range(rows) if draw(st.integers(0, 3)) == 0],
        blocks_total=64,
        observed_at_ns=[0.0 if known else NAN for known in heard],
        block_size=16,
        **reported,
    )


@EVERY
@given(view=fleets())
def test_moves_go_from_who_runs_something_to_who_takes_work(policy: Any, view: ClusterView):
    same = deepcopy(view)
    moves = policy.moves(view)
    assert moves == policy.moves(same)
    for name in [*COLUMNS, "draining"]:
        np.testing.assert_array_equal(getattr(view, name), getattr(same, name))
    row = {address: i for i, address in enumerate(view.addresses)}
    ends = [row[end] for move in moves for end in (move.source, move.target)]
    assert len(ends) == len(set(ends)), "one move of an instance at a time"
    assert not np.isnan(view.observed_at_ns[ends]).any(), "nothing is moved blindly"
    for move in moves:
        assert view.running[row[move.source]] > 0
        assert not view.draining[row[move.target]]


@EVERY
def test_it_says_how_often_to_ask(policy: Any):
    assert isinstance(policy.period_ns, int) and policy.period_ns > 0


@EVERY
def test_a_fleet_at_ease_is_left_alone(policy: Any):
    view = fleet_of(["mixed"] * 4, blocks_total=64, blocks_free=32, running=4)
    assert policy.moves(view) == []
