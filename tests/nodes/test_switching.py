"""A change of weights: the router waits, gives up what is between two instances, and tells all of them in one instant."""

from msgspec.structs import replace

from headrace.types.events import Execute, PeerLost, PeerUp, Send, WakeAt
from headrace.types.ids import Address
from headrace.types.messages import Cancel, Joined, Offer, Prefilled, Publish, Refused, Start, Stay, TokenRun
from headrace.types.weights import (
    Committed,
    Completed,
    Running,
    Switch,
    SwitchAsked,
    SwitchDropped,
    Switched,
    UseWeights,
    WeightsReady,
)
from tests.nodes.harness import ROUTER, D, InstanceBench, P, RouterBench, hashes, info, key, start

X = Address("x")
KEEP = SwitchAsked(1, Running.KEEP, hold_ns=100)
RECOMPUTE = SwitchAsked(1, Running.RECOMPUTE, hold_ns=100)


def split() -> RouterBench:
    """Request 1 prefills on P, to be decoded on D."""
    router = RouterBench()
    router.submit(tokens_max=20)
    return router


def decoding() -> RouterBench:
    """It decodes on D, and its client has one token."""
    router = split()
    router.hear(P, Prefilled(key(), 9))
    router.tokens(P, TokenRun(key(), 0, 1))
    router.hear(D, Joined(key(), 9, 0, 3, 99, 1))
    return router


def committed(router: RouterBench) -> bool:
    return bool(router.commands(Committed))


def test_nothing_is_under_way_and_the_switch_is_at_once():
    router = RouterBench()
    router.tell(KEEP)
    assert [c.target for c in router.said if isinstance(c, Send)] == [D, P]
    assert router.commands(Committed) == [Committed(1, 0, 0, 0)]
    router.hear(P, Switched(1))
    assert not router.commands(Completed)
    router.hear(D, Switched(1))
    assert router.commands(Completed) == [Completed(1)]


def test_new_starts_wait_until_a_handover_has_ended_and_then_begin_under_the_new_version():
    router = split()
    router.tell(KEEP)
    assert not committed(router)
    router.submit(2)
    assert not router.said, "it waits"
    router.hear(P, Prefilled(key(), 9))
    router.tokens(P, TokenRun(key(), 0, 1))
    assert not committed(router) and router.delivered, "streams go on"
    router.hear(D, Joined(key(), 9, 0, 3, 99, 1))
    assert router.commands(Committed) == [Committed(1, kept=1, recomputed=0, held_ns=4)]
    sent = [(c.target, type(c.message)) for c in router.said if isinstance(c, Send)]
    assert sent == [(D, Switch), (P, Switch), (P, Start), (D, Start)]
    assert {(s.version, s.hashes) for s in router.sent(Start)} == {(1, ())}, "hashes of another root are void"


def test_a_handover_that_takes_too_long_is_given_up_and_done_again():
    router = split()
    router.tell(KEEP)
    assert router.commands(WakeAt) == [WakeAt(router.now_ns + 100)]
    router.tell(at_ns=router.now_ns + 100)
    assert router.commands(Committed) == [Committed(1, 0, 1, 100)]
    sent = [(c.target, type(c.message)) for c in router.said if isinstance(c, Send)]
    assert sent == [(P, Cancel), (D, Cancel), (D, Switch), (P, Switch), (P, Start), (D, Start)]
    assert router.sent(Start)[0].key == key(attempt=1)


def test_all_that_runs_is_computed_again_where_that_is_wanted():
    router = decoding()
    router.tell(RECOMPUTE)
    assert router.commands(Committed) == [Committed(1, 0, 1, 0)]
    again = router.one(Start, P)
    assert (again.history, again.version, again.hashes, again.key.attempt) == (1, 1, (), 1)
    router.tokens(P, TokenRun(key(attempt=1), 1, 1, hashes=hashes(9, 2)))
    router.tell(PeerLost(D, info()))
    assert router.one(Start, P).hashes == hashes(9, 2), "the new instances have named its blocks"


def test_what_is_kept_does_not_migrate_and_loses_its_version_with_its_instance():
    router = decoding()
    router.tell(KEEP)
    assert router.commands(Committed)[0].kept == 1
    router.hear(D, Offer(key(), P))
    assert router.sent(Stay, D) == [Stay(key(), P)]
    router.tell(PeerLost(D, info()))
    assert {s.version for s in router.sent(Start)} == {1}


def test_nothing_migrates_while_a_switch_is_held():
    router = decoding()
    router.submit(2)
    router.tell(KEEP)
    assert not committed(router), "the second one prefills"
    router.hear(D, Offer(key(), P))
    assert router.sent(Stay, D) == [Stay(key(), P)]


def test_a_switch_that_is_dropped_leaves_all_as_it_was():
    router = split()
    router.tell(KEEP)
    router.submit(2)
    router.tell(SwitchDropped(1))
    assert {(s.version, s.hashes) for s in router.sent(Start)} == {(0, hashes(2, 2))}
    router.tell(SwitchAsked(2, Running.RECOMPUTE, 100))
    router.tell(SwitchDropped(2))
    assert {s.version for s in router.sent(Start)} <= {2} and router.core.switching.version == 2, "too late"


def test_blocks_that_newer_weights_filled_are_not_published():
    worker = InstanceBench()
    worker.begin(start(total=10, emits_max=40))
    published = 0
    for switches in (False, True):
        if switches:
            worker.hear(ROUTER, Switch(1))
        for _ in range(8):
            worker.step()
            published += sum(run.count for message in worker.sent(Publish) for run in message.table)
    # Seventeen tokens were computed, or in a plan that was given, when the weights changed.
    assert worker.core.sequences[key()].computed == 25 and published == 4


def test_who_joins_with_other_weights_is_told_to_switch_before_anything_else():
    router = RouterBench(peers=(P,), decode=P)
    router.tell(KEEP)
    router.hear(P, Switched(1))
    router.tell(PeerUp(D, info()), PeerUp(X, replace(info(), version=1)))
    assert [(c.target, c.message) for c in router.said if isinstance(c, Send)] == [(D, Switch(1))]
    router.tell(PeerLost(D, info()))
    assert not router.commands(Completed), "all that were there had switched"


def test_an_instance_that_ends_need_not_switch():
    router = RouterBench()
    router.tell(KEEP)
    router.hear(P, Switched(1))
    router.tell(PeerLost(D, info()))
    assert router.commands(Completed) == [Completed(1)]


def test_requests_that_come_with_hashes_of_another_version_are_started_without():
    router = RouterBench()
    router.tell(KEEP)
    router.submit(1)
    assert {s.hashes for s in router.sent(Start)} == {()}
    router.submit(2, version=1)
    assert {(s.hashes, s.version) for s in router.sent(Start)} == {(hashes(2, 2), 1)}


def test_an_instance_changes_behind_the_plans_that_are_given():
    worker = InstanceBench(depth=2)
    worker.begin(start())
    assert worker.plans
    worker.hear(ROUTER, Switch(3))
    kinds = [type(c) for c in worker.said]
    assert UseWeights in kinds and Execute not in kinds[: kinds.index(UseWeights)]
    assert worker.core.observe(1).version == 3
    worker.tell(WeightsReady(3))
    assert worker.sent(Switched, ROUTER) == [Switched(3)]
    worker.hear(ROUTER, start(2))
    assert "version 3, not 0" in worker.one(Refused).reason
    worker.hear(ROUTER, start(3, version=3))
    assert not worker.sent(Refused)
