"""Policies that are asked every period: only while there is work, and what they say reaches the fleet and the instances."""

import pytest

from headrace.nodes.limits import RouterConfig
from headrace.nodes.router import Router
from headrace.types.events import PeerUp, Submitted, WakeAt, Withdrawn
from headrace.types.ids import Address, RequestId
from headrace.types.messages import Migrate, Start
from headrace.types.request import NEVER_NS, Request
from headrace.types.views import ClusterView, Move, Placement, Wait
from tests.nodes.harness import ROUTER, Bench, D, P, Scripted, info


class Turning:
    def __init__(self, answer: dict[Address, str], period_ns: int = 100) -> None:
        self.period_ns = period_ns
        self.answer = answer
        self.asked: list[int] = []

    def turn(self, view: ClusterView) -> dict[Address, str]:
        self.asked.append(view.now_ns)
        return self.answer


class Moving:
    def __init__(self, *answer: Move, period_ns: int = 70) -> None:
        self.period_ns = period_ns
        self.answer = list(answer)
        self.asked: list[int] = []

    def moves(self, view: ClusterView) -> list[Move]:
        self.asked.append(view.now_ns)
        return self.answer


class ControlBench(Bench):
    core: Router

    def __init__(self, roles: Turning | None = None, rebalance: Moving | None = None) -> None:
        self.placement = Scripted(Placement(P, P))
        super().__init__(Router(ROUTER, self.placement, RouterConfig(), roles=roles, rebalance=rebalance))
        self.tell(*(PeerUp(peer, info()) for peer in (P, D)))

    def submit(self) -> None:
        self.tell(Submitted(Request(RequestId(1), 10, (), 4)), at_ns=10)

    def wakes(self) -> list[int]:
        return [c.at_ns for c in self.commands(WakeAt)]


def test_they_are_asked_every_period_while_there_is_work():
    roles, rebalance = Turning({}), Moving()
    bench = ControlBench(roles, rebalance)
    assert not bench.wakes(), "there is none yet"
    bench.submit()
    assert bench.wakes() == [80]
    bench.tell(at_ns=79)
    assert (roles.asked, rebalance.asked) == ([], [])
    bench.tell(at_ns=80)
    assert (roles.asked, rebalance.asked) == ([], [80]) and bench.wakes() == [110]
    bench.tell(at_ns=110)
    assert roles.asked == [110] and bench.wakes() == [150]
    bench.tell(Withdrawn(RequestId(1)), at_ns=120)
    assert not bench.wakes()
    bench.tell(at_ns=500)
    assert (roles.asked, rebalance.asked) == ([110], [80]), "a fleet at rest stays at rest"


def test_leanings_turn():
    bench = ControlBench(Turning({P: "decode", D: "mixed", Address("x"): "prefill"}))
    bench.submit()
    bench.tell(at_ns=110)
    assert bench.core.fleet.view(1).leanings == ("mixed", "decode")
    assert bench.core.counters["roles_turned"] == 1, (
        "who leans there already, or is not there, has not turned"
    )


def test_who_waits_is_asked_for_again_when_a_leaning_turns():
    bench = ControlBench(Turning({P: "decode"}))
    bench.placement.answer = Wait("nobody leans to prefill")
    bench.submit()
    bench.placement.answer = Placement(P, P)
    bench.tell(at_ns=109)
    assert not bench.sent(Start)
    bench.tell(at_ns=110)
    assert bench.one(Start, P)


def test_moves_go_to_their_sources():
    x = Address("x")
    bench = ControlBench(rebalance=Moving(Move(P, D), Move(D, x), Move(x, D), Move(P, P)))
    bench.submit()
    bench.tell(at_ns=80)
    assert bench.one(Migrate, P) == Migrate(D) and not bench.sent(Migrate, D)


@pytest.mark.parametrize("period_ns", [NEVER_NS])
def test_a_policy_may_never_want_to_be_asked(period_ns: int):
    roles = Turning({}, period_ns)
    bench = ControlBench(roles)
    bench.submit()
    assert not bench.wakes()
    bench.tell(at_ns=10**15)
    assert not roles.asked
