"""The router, when an instance refuses a choice or fails with it: pauses, attempts, and who is waited for."""

from headrace.types.events import PeerLost, PeerUp, Reject, WakeAt
from headrace.types.ids import Address, RequestId
from headrace.types.messages import Begun, Failed, Refused, Role, Start
from tests.nodes.harness import D, P, RouterBench, info, key
from tests.nodes.test_router import JOINED, cancelled, run, split, whole


def test_a_refusal_is_asked_again_elsewhere_after_a_pause():
    router = split(refused_ns=100)
    router.hear(P, Refused(key(), "queue full"))
    assert cancelled(router) == {"p": 0, "d": 0} and not router.sent(Start)
    (wake,) = router.commands(WakeAt)
    assert wake.at_ns == router.now_ns + 100
    router.hear(D, Refused(key(), "queue full"), JOINED)
    router.tokens(P, run(0))
    assert not router.delivered and not router.sent(Start), "that attempt is over"
    router.tell(at_ns=wake.at_ns)
    assert {s.key.attempt for s in router.sent(Start)} == {1}
    assert router.loads() == {"p": (1, 10), "d": (1, 10)}


def test_who_says_that_it_drains_is_given_nothing_more():
    router = split()
    router.hear(P, Refused(key(), "draining"))
    router.tell(at_ns=10**12)
    assert list(router.placement.views[-1].draining) == [False, True]


def test_a_failure_is_tried_again_and_handovers_that_keep_failing_are_not():
    router = split(split_failures_max=2, refused_ns=0)
    for attempt in range(2):
        assert len(router.sent(Start)) == 2
        router.hear(D, Failed(key(attempt=attempt), "a write failed", retry=True))
    assert router.one(Start).role is Role.WHOLE


def test_a_failure_is_tried_again_after_a_pause():
    """Its cause may be a death that the router is about to hear of."""
    router = split(refused_ns=100)
    router.hear(D, Failed(key(), "p was lost", retry=True))
    assert not router.sent(Start)
    router.tell(at_ns=router.now_ns + 100)
    assert {s.key.attempt for s in router.sent(Start)} == {1}


def test_attempts_end():
    router = whole(attempts_max=3, refused_ns=0)
    for attempt in range(2):
        router.hear(P, Failed(key(attempt=attempt), "no KV came", retry=True))
        assert router.one(Start).key.attempt == attempt + 1
    router.hear(P, Failed(key(attempt=2), "no KV came", retry=True))
    assert router.commands(Reject) == [Reject(RequestId(1), "no KV came", overloaded=False)]
    assert router.core.idle and router.core.counters["requests_failed"] == 1


def test_pauses_grow_until_an_attempt_begins():
    router = whole(refused_ns=100)
    waited: list[int] = []
    for attempt in range(8):
        if attempt == 6:
            router.hear(P, Begun(key(attempt=attempt), 5, 0, 0))
        router.hear(P, Refused(key(attempt=attempt), "queue full"))
        (wake,) = router.commands(WakeAt)
        waited.append((wake.at_ns - router.now_ns) // 100)
        router.tell(at_ns=wake.at_ns)
    assert waited == [1, 2, 4, 8, 16, 16, 1, 2]


def test_who_lacks_lenders_waits_for_those_that_have_ended_as_long_as_they_may_be_back():
    router = whole(attempts_max=2, refused_ns=1, away_ns=1000)
    router.tell(PeerLost(D, info()))
    for attempt in range(5):
        router.hear(P, Failed(key(attempt=attempt), "too long", retry=True, alone=True))
        assert not router.commands(Reject)
        router.tell(at_ns=router.now_ns + 16)
    router.tell(PeerUp(Address(D.name, 1), info()))
    for attempt in range(5, 7):
        router.tell(at_ns=router.now_ns + 16)
        router.hear(P, Failed(key(attempt=attempt), "too long", retry=True, alone=True))
    assert router.commands(Reject)[0].reason == "too long", "all are there, and they lend too little"


def test_who_does_not_come_back_is_not_waited_for_and_a_deadline_ends_the_wait():
    router = whole(attempts_max=1, away_ns=1000)
    router.tell(PeerLost(D, info()))
    router.tell(at_ns=5000)
    router.hear(P, Failed(key(), "too long", retry=True, alone=True))
    assert router.commands(Reject)[0].reason == "too long"
    router = RouterBench(decode=P, refused_ns=100)
    router.submit(deadline_ns=50)
    router.tell(PeerLost(D, info()))
    router.hear(P, Failed(key(), "too long", retry=True, alone=True))
    router.tell(at_ns=60)
    assert "deadline" in router.commands(Reject)[0].reason


def test_a_failure_for_good_is_told_at_once():
    router = split()
    router.hear(D, Failed(key(), "too long", retry=False))
    assert router.commands(Reject)[0].reason == "too long" and cancelled(router) == {"p": 0, "d": 0}
