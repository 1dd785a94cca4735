"""A test of the tests: each way to get it wrong is noticed by some seed."""

import pytest

from headrace.sim.run import Failure, simulate
from headrace.sim.scenarios import draw_world
from tests.sim.swap_mutants import MUTANTS

TRIES_MAX = 300
"""Likely worlds, at most."""


def first_noticed(likely, seeds) -> tuple[int, int, Failure] | None:
    """Seed, tries until then, and what it said."""
    tries = 0
    for seed in seeds:
        world = draw_world(seed)
        if not likely(world):
            continue
        tries += 1
        try:
            simulate(world)
        except Failure as failure:
            return seed, tries, failure
        if tries == TRIES_MAX:
            return None
    return None


@pytest.mark.parametrize("name", MUTANTS)
def test_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    change, likely = MUTANTS[name]
    change(monkeypatch)
    assert first_noticed(likely, range(5000)) is not None, f"no seed noticed {name}"
