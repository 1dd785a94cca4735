"""Load states: idle instances of one half turn while the other half is short, and go home after."""

from typing import Any

import numpy as np
from msgspec.structs import replace

from headrace import registry
from headrace.cluster.roles.load_states import State
from headrace.types.views import ClusterView
from tests.cluster.test_placement_contract import view_of

BUSY, IDLE = 1.0, 0.0


class Fleet:
    """Rows with a leaning that turns as the policy says, and a load between 0 and 1 that the test says."""

    def __init__(self, leanings: str, **settings: Any) -> None:
        names = {"p": "prefill", "d": "decode", "m": "mixed"}
        self.leanings = [names[letter] for letter in leanings]
        self.draining = [False] * len(leanings)
        self.policy = registry.load("cluster.roles", "load_states", {"smoothing": 1} | settings)

    def view(self, *loads: float) -> ClusterView:
        rows = list(zip(self.leanings, self.draining, [0] * len(loads), strict=True))
        load = np.array(loads)
        return replace(
            view_of(rows),
            block_size=16,
            assigned_tokens=load * 16384,
            assigned=load * 8,
            blocks_total=np.full(len(loads), 2048.0),
            blocks_free=(1 - load) * 2048,
        )

    def step(self, *loads: float) -> str:
        """One period; the leanings after it."""
        view = self.view(*loads)
        for address, leaning in self.policy.turn(view).items():
            self.leanings[view.addresses.index(address)] = leaning
        return "".join(leaning[0] for leaning in self.leanings)


def test_nothing_turns_while_both_sides_carry_alike():
    fleet = Fleet("ppdd")
    for load in (IDLE, 0.3, BUSY):
        assert fleet.step(load, load, load, load) == "ppdd"
    assert fleet.policy.state is State.NORMAL


def test_the_idlest_of_the_other_side_turns_one_a_period_and_one_is_left():
    fleet = Fleet("pddd")
    assert fleet.step(BUSY, 0.2, 0.1, 0.2) == "pdpd"
    assert fleet.policy.state is State.PREFILL_SHORT
    assert fleet.step(BUSY, 0.2, BUSY, 0.1) == "pdpp"
    assert fleet.step(BUSY, 0.2, BUSY, BUSY) == "pdpp", "the last decode instance stays"
    other = Fleet("dppp", turns_max=2)
    assert other.step(BUSY, 0.1, 0.2, 0.1) == "ddpd"
    assert other.policy.state is State.DECODE_SHORT


def test_a_busy_instance_does_not_turn():
    """Its side is idle as a whole, it is not."""
    fleet = Fleet("pddddd")
    assert fleet.step(BUSY, 0.9, 0.0, 0.0, 0.0, 0.0)[1] == "d"
    assert Fleet("pddddd").step(BUSY, *[0.35] * 5) == "pddddd"


def test_turned_instances_stay_while_it_lasts_and_then_go_home():
    fleet = Fleet("pddd", stay_periods=3)
    assert fleet.step(BUSY, 0.1, 0.1, 0.1) == "ppdd"
    # Relieved, but not yet idle: it lasts, nobody turns in either direction.
    for _ in range(5):
        assert fleet.step(0.4, 0.4, 0.1, 0.1) == "ppdd"
    assert fleet.policy.state is State.PREFILL_SHORT
    assert fleet.step(0.1, 0.1, 0.1, 0.1) == "pddd"
    assert fleet.policy.state is State.NORMAL


def test_a_turn_lasts_a_few_periods_at_least():
    fleet = Fleet("pddd", stay_periods=3)
    assert fleet.step(BUSY, 0.1, 0.1, 0.1) == "ppdd"
    assert fleet.step(0.1, 0.1, 0.1, 0.1) == "ppdd"
    assert fleet.step(0.1, 0.1, 0.1, 0.1) == "ppdd"
    assert fleet.step(0.1, 0.1, 0.1, 0.1) == "pddd"


def test_if_the_other_side_gets_short_it_goes_home_at_once():
    fleet = Fleet("pddd", stay_periods=100)
    assert fleet.step(BUSY, 0.1, 0.1, 0.1) == "ppdd"
    assert fleet.step(0.1, 0.1, BUSY, BUSY) == "pddd"


def test_one_bad_moment_is_smoothed_away():
    fleet = Fleet("pddd", smoothing=0.3)
    assert fleet.step(0.1, 0.1, 0.1, 0.1) == "pddd"
    assert fleet.step(BUSY, 0.1, 0.1, 0.1) == "pddd"
    assert fleet.step(BUSY, 0.1, 0.1, 0.1) == "ppdd", "0.1, 0.37, 0.56"


def test_extremes_are_told_and_nothing_turns():
    fleet = Fleet("pd", extreme_periods=3)
    for load, state in ((BUSY, State.OVERLOADED), (IDLE, State.IDLE)):
        fleet.step(0.3, 0.3)
        for _ in range(2):
            assert fleet.step(load, load) == "pd" and fleet.policy.state is State.NORMAL
        assert fleet.step(load, load) == "pd" and fleet.policy.state is state


def test_mixed_and_draining_instances_are_left_alone():
    fleet = Fleet("pmdd")
    fleet.draining[2] = True
    assert fleet.step(BUSY, IDLE, IDLE, IDLE) == "pmdd"


def test_who_was_turned_by_somebody_else_is_at_home_there():
    fleet = Fleet("pddd")
    fleet.step(0.3, 0.3, 0.3, 0.3)
    fleet.leanings[1] = "prefill"
    for _ in range(20):
        assert fleet.step(0.1, 0.1, 0.1, 0.1) == "ppdd"


def test_the_last_of_a_side_does_not_go_home():
    fleet = Fleet("pdd", stay_periods=1)
    assert fleet.step(BUSY, 0.0, 0.1) == "ppd"
    fleet.draining[0] = True
    for _ in range(4):
        assert fleet.step(0.0, 0.0, 0.1) == "ppd"
