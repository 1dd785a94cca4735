"""The same requests say the same on one instance, split over several, at either depth: token for token."""

from dataclasses import replace

import pytest
from msgspec.structs import replace as change

from headrace.sim.faults import FaultPlan
from headrace.sim.run import Outcome, simulate
from headrace.sim.scenarios import MILLI, World, draw_world


def calm(seed: int) -> World:
    """A drawn world in which nobody leaves, dies or gives up: what is said is all that was asked for."""
    world = draw_world(seed)
    asks = tuple(replace(a, request=change(a.request, deadline_ns=2**62)) for a in world.asks)
    network = replace(world.network, failed_share=0.0)
    return replace(world, asks=asks, network=network, faults=FaultPlan(heal_ns=MILLI))


def at_depth(world: World, depth: int) -> World:
    return replace(
        world, instance=change(world.instance, depth=depth), shell=replace(world.shell, depth=depth)
    )


def alone(world: World) -> World:
    """One instance with the largest pool."""
    shell = replace(world.shell, slow=())
    return replace(world, places=((0, "mixed"),), pools=(max(world.pools),), shell=shell)


def split(world: World) -> World:
    """Prefill here, decode there, each with a pool of its own."""
    shell = replace(world.shell, slow=())
    policies = {**world.policies, "cluster.placement": "least_load"}
    places = ((0, "prefill"), (1, "decode"))
    pools = (max(world.pools), max(world.pools))
    return replace(world, places=places, pools=pools, shell=shell, policies=policies)


def texts(outcome: Outcome) -> tuple:
    assert all(stream.finish for client in outcome.shell.clients.all.values() for stream in client.streams)
    return outcome.texts


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_split_alone_and_depth_say_the_same(first: int):
    moved = 0
    for seed in range(first, first + 20):
        world = calm(seed)
        if world.instance.lend_share:
            # What is too long for one pool needs the others: `test_lending` plays these.
            continue
        wanted = texts(simulate(at_depth(alone(world), 1)))
        for other in (at_depth(alone(world), 2), at_depth(split(world), 1), at_depth(split(world), 2), world):
            outcome = simulate(other)
            assert texts(outcome) == wanted
        moved += outcome.shell.router.state.counters.get("transfer_writes", 0)
    assert moved


def test_splits_do_move_kv():
    outcome = simulate(split(calm(0)))
    assert outcome.shell.router.state.counters["transfer_writes"] > 0


STANDSTILLS = (107, 134, 262, 272, 304, 349)
"""Worlds in which instances came to wait for each other's memory, or livelocked in breaking that up too soon."""


@pytest.mark.parametrize("seeds", [STANDSTILLS, *(range(i, i + 50) for i in range(1000, 1200, 50))])
def test_without_faults_nobody_waits_for_a_stage_to_time_out(seeds):
    for seed in seeds:
        world = calm(seed)
        patient = change(world.instance, hold_ns=3600 * 10**9, receive_ns=3600 * 10**9, fence_ns=3600 * 10**9)
        texts(simulate(replace(world, instance=patient)))
