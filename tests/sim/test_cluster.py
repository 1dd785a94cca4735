"""A deployment on virtual time: what cannot work is said before anything runs, and the simplest cases come out as sums by hand."""

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from headrace.cluster.placement import least_load
from headrace.nodes.limits import InstanceConfig
from headrace.sim.cluster import Cluster, Member, Mishaps, PolicyChoice, Stuck, build, run
from headrace.sim.topology import Level, regular
from headrace.types.errors import ConfigError
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from headrace.types.trace import Trace, make_trace
from headrace.types.views import Wait
from tests.sim.timing_worlds import Stairs

SPEC = KVSpec((KVGroup(GroupKind.FULL, (0, 1), 1, 8),), 16, "bfloat16")
COSTS = Stairs(
    fixed_ps=10_000_000, row_ps=1_000_001, slope_ps=2_003, width=102, rise_ps=777_000, token_ps=500_000
)
MESSAGE_NS, INGRESS_NS, EGRESS_NS, LATENCY_NS = 50_000, 7_000, 9_000, 1_500
RATE = 1_000_000_000


def cluster_of(*leanings: str, blocks: int = 32, **more: Any) -> Cluster:
    members = tuple(Member(f"i{i}", leaning, COSTS, (blocks,), (i, 0)) for i, leaning in enumerate(leanings))
    return Cluster(
        spec=SPEC,
        members=members,
        topology=regular((Level("host", RATE, RATE, LATENCY_NS),), max(1, len(members))),
        instance=InstanceConfig(tokens_max=64, lease_blocks=32),
        message_ns=MESSAGE_NS,
        ingress_ns=INGRESS_NS,
        egress_ns=EGRESS_NS,
        **more,
    )


def trace_of(*requests: tuple[int, int, int]) -> Trace:
    """(Arrival, prompt, output)."""
    return make_trace("t", *[np.array(column, dtype=np.int64) for column in zip(*requests, strict=True)])


WAYS_NS = INGRESS_NS + 2 * MESSAGE_NS + EGRESS_NS + 2 * MESSAGE_NS
"""Of the first request's messages: there and back, and a fresh instance first asks its pool for memory."""


def up(ps: int) -> int:
    """The first nanosecond at which it has happened."""
    return -(-ps // 1000)


# Sums by hand


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("output", [1, 2, 5, 60])
def test_one_request_on_one_instance_takes_the_sum_of_its_costs(output: int, every_step: bool):
    data = run(cluster_of("mixed"), trace_of((4_000, 100, output)), every_step=every_step)
    prefill_ps = COSTS.step_ps([(64, 0)], 0, 0) + COSTS.step_ps([(36, 64)], 0, 0)
    decode_ps = 0
    for context in range(101, 100 + output):
        cost = COSTS.decode(1, context)
        decode_ps += cost.fixed_ps + cost.slope_ps * context
    o = data.outcomes
    assert o.first_ns[0] - o.arrival_ns[0] == WAYS_NS + up(prefill_ps)
    assert o.finished_ns[0] - o.arrival_ns[0] == WAYS_NS + up(prefill_ps + decode_ps)
    assert (o.placed_ns[0], o.prefill_ns[0]) == (4_000 + INGRESS_NS, 4_000 + INGRESS_NS + 3 * MESSAGE_NS)
    assert (o.output[0], o.attempts[0], o.prefill[0], o.decode[0]) == (output, 1, 0, 0)
    assert data.facts["steps"] >= 2 + output - 1


@pytest.mark.parametrize("every_step", [False, True])
def test_split_over_two_instances_it_also_takes_what_the_network_takes(every_step: bool):
    """Two chunks; the blocks of the first are written while the second is computed."""
    data = run(cluster_of("prefill", "decode"), trace_of((0, 100, 5)), every_step=every_step)
    o = data.outcomes
    prefill_ps = COSTS.step_ps([(64, 0)], 0, 0) + COSTS.step_ps([(36, 64)], 0, 0)
    there_ns = INGRESS_NS + 3 * MESSAGE_NS + up(prefill_ps)
    assert o.first_ns[0] == there_ns + MESSAGE_NS + EGRESS_NS
    # The last three of seven blocks go when the prefill has ended; the tail is a message and takes longer than they do.
    assert o.bytes_moved[0] == 7 * SPEC.block_bytes(0)
    assert 3 * SPEC.block_bytes(0) < MESSAGE_NS
    assert o.joined_ns[0] == there_ns + MESSAGE_NS + LATENCY_NS
    decode_ps = sum(
        COSTS.decode(1, context).fixed_ps + COSTS.decode(1, context).slope_ps * context
        for context in range(101, 105)
    )
    assert o.finished_ns[0] == o.joined_ns[0] + up(decode_ps) + MESSAGE_NS + EGRESS_NS
    assert (o.prefill[0], o.decode[0]) == (0, 1)


def test_a_slow_member_takes_longer_by_its_factor():
    plain, slow = cluster_of("mixed"), cluster_of("mixed")
    slow = replace(slow, members=tuple(replace(m, slow=2.0) for m in slow.members))
    trace = trace_of((0, 30, 20))
    a, b = run(plain, trace).outcomes, run(slow, trace).outcomes
    assert b.finished_ns[0] - WAYS_NS == pytest.approx(2 * (a.finished_ns[0] - WAYS_NS), abs=2)


def test_the_same_again_is_the_same_and_progress_is_told():
    trace = trace_of(*((n * 10_000, 20 + n, 10) for n in range(20)))
    told: list[tuple[int, int]] = []
    one = run(cluster_of("mixed", "mixed"), trace, 3, progress=lambda done, of: told.append((done, of)))
    two = run(cluster_of("mixed", "mixed"), trace, 3)
    assert one.outcomes.finished_ns.tolist() == two.outcomes.finished_ns.tolist()
    assert one.counters == two.counters
    assert told[-1] == (20, 20)
    assert one.counters["requests_finished"] == 20
    assert one.outcomes.succeeded.all()


def test_a_death_and_a_drain_end_no_request():
    mishaps = Mishaps(
        kills=((300_000, "i0"),), drains=((500_000, "i1"),), restart_ns=1_000_000, notice_ns=100_000
    )
    trace = trace_of(*((n * 20_000, 40, 30) for n in range(30)))
    data = run(cluster_of("mixed", "mixed", "mixed", mishaps=mishaps), trace)
    assert data.outcomes.succeeded.all()
    assert data.facts["deaths"] == 1 and data.counters["failovers"] > 0
    assert data.outcomes.attempts.max() > 1


# What cannot work


def problem(cluster: Cluster, trace: Trace | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        build(cluster, trace or trace_of((0, 10, 10)), 0)
    return str(caught.value)


def test_nobody_to_serve():
    assert "no instance" in problem(cluster_of())


def test_faults_of_an_instance_that_is_not_there():
    message = problem(cluster_of("mixed", "mixed", mishaps=Mishaps(kills=((5, "i7"),))))
    assert "'i7'" in message and "i0, i1" in message
    assert "'x'" in problem(cluster_of("mixed", mishaps=Mishaps(drains=((5, "x"),))))


def test_every_instance_killed_for_good():
    never_ns = 10**13
    mishaps = Mishaps(kills=((5, "i0"), (6, "i1")), restart_ns=never_ns)
    assert "every instance is killed" in problem(cluster_of("mixed", "mixed", mishaps=mishaps))
    build(cluster_of("mixed", "mixed", mishaps=replace(mishaps, restart_ns=10**9)), trace_of((0, 1, 1)), 0)


def test_every_instance_drained():
    mishaps = Mishaps(drains=((5, "i0"), (6, "i1")))
    assert "every instance is drained" in problem(cluster_of("mixed", "mixed", mishaps=mishaps))


def test_requests_that_fit_nowhere():
    message = problem(cluster_of("mixed", blocks=4), trace_of((0, 60, 4), (1, 60, 5), (2, 70, 1)))
    assert "2 of 3 requests" in message and "64 tokens" in message
    assert "row 1 with 60 in and 5 out" in message


def test_a_place_that_is_not_there():
    cluster = cluster_of("mixed", "mixed")
    assert "host 1" in problem(replace(cluster, topology=regular((Level("host", RATE, RATE),), 1)))


def test_a_policy_that_is_not_there():
    cluster = cluster_of("mixed", policies={"cluster.placement": PolicyChoice("best")})
    message = problem(cluster)
    assert "'best'" in message and "round_robin" in message


def test_where_nothing_moves_the_request_that_waits_is_named():
    with (
        mock.patch.object(least_load.Policy, "place", return_value=Wait("never")),
        pytest.raises(Stuck, match=r"2 requests wait, the first is 1, queued.*10 tokens in, 0 of 3 out"),
    ):
        # The trace lasts long enough for few samples.
        run(cluster_of("mixed"), trace_of((0, 10, 3), (200_000_000_000, 10, 3)))
