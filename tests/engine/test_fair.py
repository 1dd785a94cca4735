"""Fair ordering: who was served less comes first; priorities that change by themselves; and whoever waits may take a runner's place."""

from itertools import pairwise

import pytest

from headrace.engine.ordering import fair
from headrace.engine.policies import Moment
from headrace.engine.sequence import Status
from headrace.engine.shares import Shares, share_of
from tests.engine.build import (
    SIZE,
    give,
    matched,
    memory_of,
    numbers,
    policies_of,
    reap,
    retire,
    scheduler_of,
    sequence_of,
)


def order(policy: fair.Policy, steps: int, count: int = 12) -> list[int]:
    sequences = [sequence_of(n, 5) for n in range(count)]
    moment = Moment(0, steps)
    return numbers(sorted(sequences, key=lambda s: policy.rank(s, moment)))


@pytest.mark.parametrize("pattern", ["random", "markov"])
def test_priorities_change_by_themselves_as_often_as_asked(pattern: str):
    policy = fair.Policy(fair.Config(pattern=pattern, frequency=0.04))
    orders = [order(policy, steps) for steps in range(250)]
    changes = [n for n in range(1, 250) if orders[n] != orders[n - 1]]
    assert changes and all(n % 25 == 0 for n in changes)
    assert orders == [order(policy, steps) for steps in range(250)], "keyed, not drawn one after another"


def test_a_markov_level_stays_as_often_as_asked():
    policy = fair.Policy(fair.Config(pattern="markov", frequency=1, stay=0.75, levels=1000))
    levels = [[policy.rank(sequence_of(n, 5), Moment(0, step))[0] for step in range(200)] for n in range(20)]
    stays = sum(a == b for row in levels for a, b in pairwise(row)) / (20 * 199)
    assert 0.7 < stays < 0.8


def test_the_least_served_comes_first_in_units_of_a_quantum():
    policy = fair.Policy(fair.Config(quantum=100))
    sequences = [sequence_of(n, 5) for n in range(3)]
    served = dict(zip(map(share_of, sequences), (250, 199, 101), strict=True))
    moment = Moment(0, 0, served)
    assert numbers(sorted(sequences, key=lambda s: policy.rank(s, moment))) == [1, 2, 0], (
        "and then by arrival"
    )


def test_shares_count_what_is_new_and_who_comes_begins_with_the_least():
    shares = Shares()
    first, second, third = (sequence_of(n, 8) for n in range(3))
    first.tenant = second.tenant = "a"
    for sequence in (first, second):
        shares.enter(sequence)
    shares.begin()
    first.scheduled = 8
    shares.serve(first, 8)
    first.scheduled = 4
    shares.serve(first, 4)
    assert shares.served == {"a": 8}, "what is computed again does not count"
    shares.enter(third)
    shares.begin()
    assert shares.served == {"a": 8, "request 2": 8}
    shares.leave(first)
    assert "a" in shares.served
    shares.leave(second)
    assert list(shares.served) == ["request 2"]


def test_who_waits_takes_the_place_of_one_that_ranks_behind_it_and_has_drawn_a_token():
    memory = memory_of(8, total=8)
    memory.pool_free = [0]
    policies = policies_of(ordering=fair.Policy(fair.Config(quantum=4)))
    scheduler = scheduler_of(memory, policies=policies)
    first, second = sequence_of(1, 6 * SIZE), sequence_of(2, 6 * SIZE)
    for sequence in (first, second):
        assert scheduler.shares is not None
        scheduler.shares.enter(sequence)
    matched(scheduler, first)
    scheduler.plan(0)
    retire(scheduler, [first])
    matched(scheduler, second)
    give(memory, 0, short=True)
    scheduler.plan(0)
    assert first.status is Status.RUNNING and not scheduler.stopping, "it has not drawn a token yet"
    retire(scheduler, [first])
    scheduler.plan(0)
    assert numbers(scheduler.stopping) == [1]
    reap(scheduler)
    scheduler.plan(0)
    assert numbers(scheduler.running) == [2]


def test_an_order_that_does_not_displace_leaves_runners_alone():
    memory = memory_of(8, total=8)
    memory.pool_free = [0]
    scheduler = scheduler_of(memory)
    first, second = sequence_of(1, 6 * SIZE, arrival_ns=9), sequence_of(2, 6 * SIZE)
    matched(scheduler, first)
    scheduler.plan(0)
    matched(scheduler, second)
    give(memory, 0, short=True)
    for _ in range(3):
        retire(scheduler, [first])
        scheduler.plan(0)
    assert numbers(scheduler.running) == [1] and not scheduler.stopping
