"""The router's part in live migrations: P runs it, D is to have it."""

import pytest

from headrace.types.events import DrainAsked, PeerLost, PeerUp, Reject, Withdrawn
from headrace.types.ids import Address, RequestId
from headrace.types.messages import (
    Cancel,
    Failed,
    Joined,
    Moved,
    Offer,
    Prefilled,
    Refused,
    Role,
    Start,
    Stay,
    Stayed,
    TokenRun,
)
from headrace.types.request import FinishReason
from headrace.types.views import Placement
from tests.nodes.harness import D, P, RouterBench, hashes, info, key

X = Address("x")
MOVED = Moved(key(), D, blocks=4, bytes=99, writes=2, recomputed=3)


def run(first: int, finish: FinishReason | None = None, count: int = 1) -> TokenRun:
    return TokenRun(key(), first, count, finish)


def running(tokens: int = 2) -> RouterBench:
    """P runs request 1, of which so many tokens are delivered."""
    router = RouterBench(decode=P, peers=(P, D, X))
    router.submit(tokens_max=20)
    router.hear(P, Prefilled(key(), 9))
    if tokens:
        router.tokens(P, run(0, count=tokens))
    return router


def moving() -> RouterBench:
    router = running()
    router.hear(P, Offer(key(), D))
    return router


def counts(router: RouterBench) -> tuple[int, int]:
    counters = router.core.counters
    return counters.get("migrations", 0), counters.get("migrations_aborted", 0)


def test_what_is_offered_is_started_where_it_is_to_go():
    router = moving()
    assert router.one(Start, D) == Start(key(), Role.DECODE, 11, 1, 19, hashes(1, 2), 1, 2**62, 0, P)
    assert router.loads() == {"d": (1, 12), "p": (1, 10), "x": (0, 0)}


def test_it_changes_hands_when_the_owner_says_so():
    router = moving()
    router.tokens(D, run(3))
    assert not router.delivered, "token 2 is still on the way"
    router.tokens(P, run(2))
    assert router.delivered == [(0, 2, 1, None), (0, 3, 1, None)]
    router.hear(P, MOVED)
    assert counts(router) == (1, 0) and router.loads()["p"] == (0, 0) and not router.said
    router.tell(PeerLost(P, info()))
    assert not router.sent(Start), "it needs P no more"
    router.tokens(D, run(4, FinishReason.STOP))
    (done,) = [c for c in router.said if hasattr(c, "timeline")]
    assert (done.timeline.recomputed, done.timeline.joined_ns, done.timeline.attempts) == (3, 0, 1)
    assert router.core.idle and set(router.loads().values()) == {(0, 0)}
    assert router.core.counters["transfer_bytes"] == 99


def test_it_may_go_on_from_there_and_never_comes_back():
    router = moving()
    router.hear(P, MOVED)
    router.hear(D, Offer(key(), P))
    assert router.one(Stay, D) == Stay(key(), P)
    router.hear(D, Offer(key(), X))
    assert router.one(Start, X).source == D
    router.hear(X, Joined(key(), 5, 0, 0, 0, 0))
    router.hear(D, Moved(key(), X, 1, 1, 1, 0))
    router.tell(PeerLost(X, info()))
    assert router.one(Start).key.attempt == 1
    router.tokens(D, run(2))
    assert not router.delivered, "that attempt is over"


@pytest.mark.parametrize("why", ["drains", "gone", "seen", "moving", "not the owner", "no token yet"])
def test_what_is_not_wanted_stays(why: str):
    router = running(tokens=0 if why == "no token yet" else 2)
    target, source = D, P
    if why == "drains":
        router.tell(DrainAsked(D))
    elif why == "gone":
        router.tell(PeerLost(D, info()))
    elif why == "seen":
        target = P
    elif why == "moving":
        router.hear(P, Offer(key(), X))
    elif why == "not the owner":
        source = X
    router.hear(source, Offer(key(), target))
    assert router.one(Stay, source) == Stay(key(), target) and not router.sent(Start, D)
    assert router.core.choices[RequestId(1)][0].decode == P


def test_offers_of_what_is_over_need_no_answer():
    router = running()
    router.tell(Withdrawn(RequestId(1)))
    router.hear(P, Offer(key(), D), MOVED, Stayed(key(), D))
    assert not router.said and router.core.idle


# It stays


def test_the_owner_keeps_it():
    router = moving()
    router.hear(P, Stayed(key(), X))
    assert not router.said, "not about this one"
    router.hear(P, Stayed(key(), D))
    assert router.one(Cancel, D) == Cancel(key()) and counts(router) == (0, 1)
    assert router.loads() == {"d": (0, 0), "p": (1, 10), "x": (0, 0)}
    router.hear(D, Failed(key(), "cancelled", retry=True))
    assert not router.said, "it has no part in it any more"
    router.tokens(P, run(2, FinishReason.STOP))
    assert router.core.idle


@pytest.mark.parametrize(
    "word", [Failed(key(), "no", retry=True), Failed(key(), "no", retry=False), Refused(key(), "draining")]
)
def test_the_target_gives_up(word: Failed | Refused):
    router = moving()
    router.hear(D, word)
    assert router.one(Stay, P) == Stay(key(), D) and not router.commands(Reject)
    assert counts(router) == (0, 1) and router.loads()["d"] == (0, 0)
    router.hear(P, Stayed(key(), D))
    assert not router.said and counts(router) == (0, 1)
    router.hear(P, Offer(key(), D))
    assert router.one(Stay, P), "an attempt goes to an instance once"
    router.tokens(P, run(2))
    assert router.delivered == [(0, 2, 1, None)]


def test_the_target_gives_up_when_the_owner_has_let_go():
    router = moving()
    router.hear(D, Failed(key(), "no", retry=True))
    router.placement.answer = Placement(X, X)
    router.hear(P, MOVED)
    again = router.one(Start, X)
    assert (again.key.attempt, again.history) == (1, 2) and counts(router) == (0, 1)


def test_the_target_dies():
    router = moving()
    router.tell(PeerLost(D, info()))
    assert not router.said and counts(router) == (0, 1)
    router.tokens(P, run(2))
    assert router.delivered


def test_the_target_dies_when_the_owner_has_let_go():
    router = moving()
    router.tell(PeerLost(D, info()))
    router.placement.answer = Placement(X, X)
    router.hear(P, MOVED)
    assert router.one(Start, X).key.attempt == 1


@pytest.mark.parametrize("order", ["lost, moved", "moved, lost"])
def test_the_owner_dies(order: str):
    router = moving()
    router.placement.answer = Placement(X, X)
    if order == "moved, lost":
        router.hear(P, MOVED)
    router.tell(PeerLost(P, info()))
    if order == "moved, lost":
        assert not router.said
        return
    assert router.one(Cancel, D) and router.one(Start, X).key.attempt == 1
    router.tell(PeerUp(Address("p", 1), info()))
    router.hear(D, MOVED)
    assert not router.said and router.core.counters["failovers"] == 1


@pytest.mark.parametrize("how", ["stops", "leaves", "deadline"])
def test_it_ends_on_the_way(how: str):
    router = moving()
    if how == "stops":
        router.tokens(P, run(2, FinishReason.STOP))
    elif how == "leaves":
        router.tell(Withdrawn(RequestId(1)))
    else:
        router.hear(P, Failed(key(), "too long", retry=False))
    assert router.one(Cancel, D) == Cancel(key()) and router.core.idle
    assert set(router.loads().values()) == {(0, 0)}
