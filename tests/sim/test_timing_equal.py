"""Skipping unchanged steps changes nothing: a run in strides and one step by step are equal to the bit, over random worlds.

By hand, for many more: `python -m tests.sim.test_timing_equal FIRST LAST`.
"""

import sys
from collections import Counter

import pytest

from headrace import registry
from tests.sim.timing_worlds import AXES, Seen, differences, draw_world, observe

CHUNK = 12
FOUND = (225, 365, 381, 643, 858, 868, 1070, 1187, 1254, 2319, 2465, 2590, 2892)
"""Worlds that told the two apart once: history after a death, look-ups before what had filled, refusals that turned into needs."""


def compare(seed: int) -> tuple[Seen, Seen]:
    world = draw_world(seed)
    slow, fast = observe(world, every_step=True), observe(world, every_step=False)
    found = differences(fast, slow)
    assert not found, f"seed {seed}: " + "\n".join(found[:20])
    return fast, slow


@pytest.mark.parametrize("first", range(0, 84, CHUNK))
def test_strides_and_steps_are_equal(first: int):
    skipped = 0
    for seed in range(first, first + CHUNK):
        fast, slow = compare(seed)
        skipped += max(0, slow.events - fast.events)
    assert skipped > 0, "nothing was skipped"


@pytest.mark.parametrize("seed", FOUND)
def test_worlds_that_were_not_equal(seed: int):
    compare(seed)


def test_worlds_leave_no_path_out():
    """They preempt, hit prefixes, hand over, die, drain, give up, and draw every policy of every axis."""
    met: Counter[str] = Counter()
    for seed in range(120):
        world = draw_world(seed)
        cluster = world.cluster
        met.update(f"{axis}.{choice.name}" for axis, choice in cluster.policies.items())
        met["windows"] += any(g.window for g in cluster.spec.groups)
        met["shared pools"] += any(m.pool is not None for m in cluster.members)
        met["slowdown"] += cluster.slowdown is not None
        met["kills"] += bool(cluster.mishaps.kills)
        met["drains"] += bool(cluster.mishaps.drains)
        met["hashes"] += world.trace.block_size > 0
        met["other block sizes"] += world.trace.block_size not in (0, cluster.spec.block_size)
    for axis in (*AXES, "cluster.placement", "kv.evict"):
        assert all(met[f"{axis}.{name}"] for name in registry.names(axis)), met
    assert all(
        met[what] > 5 for what in ("windows", "shared pools", "slowdown", "kills", "drains", "hashes")
    ), met
    assert met["other block sizes"] > 5


def test_things_happen_in_them():
    happened: Counter[str] = Counter()
    for seed in range(30):
        seen = observe(draw_world(seed), every_step=False)
        happened["recomputed"] += any(seen.columns["recomputed"])
        happened["cached"] += any(seen.columns["cached"])
        happened["moved"] += any(seen.columns["bytes_moved"])
        happened["failed"] += any(seen.columns["error"])
        happened["again"] += any(n > 1 for n in seen.columns["attempts"])
    assert all(happened[what] for what in ("recomputed", "cached", "moved", "failed", "again")), happened


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            compare(number)
        except Exception as error:
            sys.stdout.write(f"seed {number}: {type(error).__name__}: {str(error)[:400]}\n")
