"""The router's columns, what is shared between views, and the pools' prefix indexes."""

import numpy as np

from headrace.cluster.prefixes import Prefixes
from headrace.nodes.fleet import Fleet
from headrace.types.costs import Costs, DecodeCost
from headrace.types.ids import Address, BlockHash
from headrace.types.messages import Indexed, Report
from tests.nodes.harness import OTHER_POOL, POOL, D, P, info

A, B, C = (BlockHash(bytes([n])) for n in range(3))
REPORT = Report(77, 3, 2, 1, 0, 40, 64, 20, 9, draining=False)


class Flat:
    """Everything takes 1."""

    def decode(self, rows: int, context: int) -> DecodeCost:
        return DecodeCost(1, 0, context + 1)

    def step_ps(self, prefills: object, rows: int, context: int) -> int:
        return 1

    def transfer_ns(self, nbytes: int) -> int:
        return 1


def fleet(costs: dict[str, Costs] | None = None, prefixes: Prefixes | None = None) -> Fleet:
    made = Fleet(costs, prefixes)
    made.add(P, info(0, "prefill"))
    made.add(D, info(1, "decode"))
    return made


def test_views_share_what_has_not_changed():
    made = fleet()
    one = made.view(1)
    assert made.view(1) is one
    one.rows_for("prefill")
    two = made.view(2)
    assert two.now_ns == 2 and two.takers is one.takers and two.addresses is one.addresses == (D, P)
    made.report(P, REPORT)
    assert made.view(3).takers is one.takers and made.view(3).waiting[1] == 3


def test_whoever_may_take_what_is_looked_up_again_when_that_changes():
    made = fleet()
    assert made.view(1).candidates("prefill") == [1]
    assert made.turn(D, "mixed") and not made.turn(D, "mixed") and not made.turn(Address("x"), "mixed")
    assert made.view(1).candidates("prefill") == [0, 1] and made.view(1).leanings == ("mixed", "prefill")
    made.drain(P)
    assert made.view(1).candidates("prefill") == [0]
    made.remove(D)
    made.add(D, info(1, "decode"))
    assert made.view(1).leanings == ("decode", "prefill"), "a new incarnation leans as it was started"


def test_every_change_has_a_version():
    made = fleet(prefixes=Prefixes())
    versions = [made.version]
    changes = (
        lambda: made.report(P, REPORT),
        lambda: made.assign(P, 1, 10),
        lambda: made.drain(D),
        lambda: made.turn(P, "mixed"),
        lambda: made.indexed(POOL, Indexed(1, (A,), ())),
        lambda: made.lost_pool(POOL),
        lambda: made.remove(P),
        lambda: made.add(P, info()),
    )
    for change in changes:
        change()
        versions.append(made.version)
    assert versions == sorted(set(versions))
    made.view(5)
    made.drain(D)
    made.assign(Address("x"), 1, 1)
    assert made.version == versions[-1], "nothing of that changed anything"


def test_work_is_counted_apart_until_it_is_prefilled():
    made = fleet()
    made.assign(P, 1, 10, 10)
    made.assign(P, 0, 0, -4)
    view = made.view(1)
    assert view.assigned_prefill is not None
    assert (view.assigned[1], view.assigned_tokens[1], view.assigned_prefill[1]) == (1, 10, 6)


def test_costs_are_shown_by_name_and_stay_the_same_object():
    cost = Flat()
    made = fleet({"d": cost})
    assert made.view(1).costs == (cost, None)
    assert made.view(2).costs is made.view(1).costs
    assert fleet().view(1).costs == ()


def hits(made: Fleet) -> list[float]:
    prefixes = made.view(1).prefixes
    assert prefixes is not None
    return prefixes.hits((A, B, C)).tolist()


def test_pools_say_what_they_hold():
    made = fleet(prefixes=Prefixes())
    made.indexed(POOL, Indexed(1, (A, B), ()))
    made.indexed(OTHER_POOL, Indexed(1, (A,), ()))
    assert hits(made) == [1, 2]
    made.indexed(POOL, Indexed(2, (C,), (B,)))
    assert hits(made) == [1, 1]


def test_after_a_gap_nothing_that_was_known_is_sure():
    made = fleet(prefixes=Prefixes())
    made.indexed(POOL, Indexed(1, (A, B), ()))
    made.indexed(POOL, Indexed(3, (C,), ()))
    assert hits(made) == [0, 0]
    made.indexed(POOL, Indexed(4, (A, B), ()))
    assert hits(made) == [0, 3]


def test_a_pool_outlives_its_instances_and_ends_by_itself():
    made = fleet(prefixes=Prefixes())
    made.indexed(POOL, Indexed(1, (A, B), ()))
    made.remove(P)
    made.add(Address("q"), info(0))
    assert hits(made) == [0, 2]
    made.lost_pool(POOL)
    assert hits(made) == [0, 0] and not made.has_pool(POOL)


def test_who_reads_no_prefixes_is_shown_none():
    made = fleet()
    made.indexed(POOL, Indexed(1, (A,), ()))
    assert made.view(1).prefixes is None


def test_unknown_is_not_a_number():
    view = fleet().view(1)
    assert np.isnan(view.waiting).all() and not np.isnan(view.assigned).any()
