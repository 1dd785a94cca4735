"""The router against instances played by hand: P prefills, D decodes."""

from itertools import permutations

import pytest

from headrace.types.events import (
    Deliver,
    DrainAsked,
    Kill,
    Landed,
    PeerLost,
    PeerUp,
    Reject,
    Send,
    Submitted,
    WakeAt,
    Withdrawn,
)
from headrace.types.ids import Address, RequestId, Slot
from headrace.types.messages import (
    Begun,
    Cancel,
    Drain,
    Failed,
    Joined,
    Prefilled,
    Report,
    Resume,
    Role,
    Start,
    TokenRun,
    Unfenced,
)
from headrace.types.request import FinishReason, Request
from headrace.types.views import Decline, Placement, Wait
from tests.nodes.harness import D, P, RouterBench, hashes, info, key

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
REPORT = Report(77, 3, 2, 1, 0, 40, 64, 20, 9, draining=False)
JOINED = Joined(key(), 50, cached=4, blocks=2, bytes=99, writes=1)


def run(
    first: int, finish: FinishReason | None = None, *, attempt: int = 0, choice: int = 0, count: int = 1
) -> TokenRun:
    return TokenRun(key(1, choice, attempt), first, count, finish)


def whole(**limits: int) -> RouterBench:
    router = RouterBench(decode=P, **limits)
    router.submit()
    return router


def split(**limits: int) -> RouterBench:
    router = RouterBench(**limits)
    router.submit()
    return router


def late(**limits: int) -> RouterBench:
    router = RouterBench(decode=None, **limits)
    router.submit()
    return router


def cancelled(router: RouterBench) -> dict[str, int]:
    """Who was told to cancel which attempt of request 1."""
    return {
        c.target.name: c.message.key.attempt
        for c in router.said
        if isinstance(c, Send) and isinstance(c.message, Cancel)
    }


def at_stage(stage: str) -> RouterBench:
    router = late() if stage in ("binding", "bound") else split()
    if stage == "binding":
        router.placement.bound = Wait("not now")
    if stage != "prefill":
        router.hear(P, Begun(key(), 5, 4), Prefilled(key(), 9))
    if stage == "decode":
        router.tokens(P, run(0))
        router.hear(D, JOINED)
    return router


STAGES = ("prefill", "transfer", "binding", "bound", "decode")


# The life cycle


def test_a_whole_sequence():
    router = whole()
    assert router.one(Start, P) == Start(key(), Role.WHOLE, 10, 0, 4, hashes(1, 2), 1, 2**62)
    router.hear(P, Begun(key(), 5, 4), Prefilled(key(), 9))
    router.tokens(P, run(0), run(1))
    assert router.delivered == [(0, 0, 1, None), (0, 1, 1, None)]
    router.tokens(P, run(2, STOP))
    (last,) = router.commands(Deliver)
    assert last.key == key() and last.timeline is not None
    timeline = last.timeline
    stages = (timeline.arrival_ns, timeline.placed_ns, timeline.prefill_ns, timeline.prefilled_ns)
    assert stages == (1, 3, 5, 9)
    assert (timeline.finished_ns, timeline.cached, timeline.attempts) == (router.now_ns, 4, 1)
    assert not cancelled(router) and router.core.idle and router.loads() == {"p": (0, 0), "d": (0, 0)}


def test_a_split_sequence():
    router = split()
    assert router.one(Start, P).role is Role.PREFILL and router.one(Start, P).source is None
    assert router.one(Start, D).role is Role.DECODE and router.one(Start, D).source == P
    assert router.loads() == {"p": (1, 10), "d": (1, 10)}
    router.hear(P, Begun(key(), 5, 0), Prefilled(key(), 9))
    router.tokens(P, run(0))
    router.hear(D, JOINED)
    assert router.loads() == {"p": (0, 0), "d": (1, 10)}
    router.tokens(D, run(1, count=2))
    router.tokens(D, run(3, LENGTH))
    (last,) = router.commands(Deliver)
    assert last.timeline is not None
    assert (last.timeline.joined_ns, last.timeline.cached_decode, last.timeline.blocks_moved) == (50, 4, 2)
    assert router.core.idle and not cancelled(router)
    assert router.core.counters["tokens_transferred"] == 6 and router.core.counters["tokens_generated"] == 4
    assert router.core.counters["requests_finished"] == 1


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_client_gets_tokens_in_order_whoever_is_faster(order: tuple[int, ...]):
    router = split()
    told = ((P, run(0)), (D, run(1)), (D, run(2, count=2)))
    delivered: list[tuple[int, int]] = []
    for at in order:
        router.tokens(*told[at])
        delivered += [(first, count) for _, first, count, _ in router.delivered]
    assert delivered == [(0, 1), (1, 1), (2, 2)]


def test_a_decode_instance_may_join_and_finish_before_the_first_token_is_here():
    router = split()
    router.hear(D, JOINED)
    router.tokens(D, run(1, STOP))
    assert not router.delivered and not router.core.idle
    router.hear(P, Begun(key(), 5, 0), Prefilled(key(), 9))
    router.tokens(P, run(0))
    assert router.delivered == [(0, 0, 1, None), (0, 1, 1, STOP)] and router.core.idle


def test_the_decode_instance_may_be_chosen_when_the_prefill_has_ended():
    router = late()
    assert [c.target for c in router.said if isinstance(c, Send)] == [P]
    router.hear(P, Prefilled(key(), 9))
    assert router.one(Start, D).role is Role.DECODE and router.one(Start, D).source == P
    router.tokens(P, run(0))
    router.hear(D, JOINED)
    router.tokens(D, run(1, STOP))
    assert router.core.idle


def test_it_may_be_the_same_one():
    router = late()
    router.placement.bound = P
    router.hear(P, Prefilled(key(), 9))
    assert router.one(Resume, P) == Resume(key()) and not router.sent(Start)
    router.tokens(P, run(0), run(1, STOP))
    assert router.core.idle and router.loads()["p"] == (0, 0)


def test_a_bind_that_has_to_wait_is_asked_again():
    router = at_stage("binding")
    assert not router.sent(Start)
    asked = len(router.placement.asked)
    router.placement.bound = D
    router.tell()
    assert len(router.placement.asked) == asked, "nothing in the fleet has changed"
    router.hear(P, REPORT)
    assert router.one(Start, D).role is Role.DECODE
    router.hear(P, REPORT)
    assert not router.said


def test_who_ends_with_the_first_token_needs_no_decode_instance():
    router = split()
    router.hear(P, Prefilled(key(), 9))
    router.tokens(P, run(0, STOP))
    assert router.delivered == [(0, 0, 1, STOP)] and cancelled(router) == {"d": 0} and router.core.idle
    router.hear(D, JOINED, Failed(key(), "cancelled", retry=True))
    assert not router.said


def test_who_ends_with_the_first_token_before_it_is_bound():
    router = at_stage("binding")
    router.tokens(P, run(0, STOP))
    assert router.core.idle and not cancelled(router)
    router.placement.bound = D
    router.hear(P, REPORT)
    assert not router.said


def test_a_block_hash_of_each_delivered_block_is_known_to_the_next_attempt():
    router = whole()
    router.tokens(P, TokenRun(key(), 0, 1), TokenRun(key(), 1, 2, None, hashes(9, 1)))
    router.tell(PeerLost(P, info()))
    again = router.one(Start)
    assert (again.total, again.history, again.emits_max) == (13, 3, 1)
    assert again.hashes == (*hashes(1, 2), *hashes(9, 1)) and again.key == key(attempt=1)


@pytest.mark.parametrize(("fetch", "told"), [(D, D), (P, None), (Address("x"), None)])
def test_who_is_asked_for_a_prefix_is_told_to_the_prefill_instance_alone(
    fetch: Address, told: Address | None
):
    router = RouterBench()
    router.placement.answer = Placement(P, D, fetch=fetch)
    router.submit()
    assert (router.one(Start, P).fetch, router.one(Start, D).fetch) == (told, None)


def test_work_to_prefill_is_counted_until_it_is_done():
    router = split()

    def unprefilled() -> list[float]:
        column = router.core.fleet.view(router.now_ns).assigned_prefill
        assert column is not None
        return column.tolist()

    assert unprefilled() == [0, 10]
    router.hear(P, Begun(key(), 5, 4, fetched=4))
    assert unprefilled() == [0, 6] and router.core.counters["tokens_prompt_fetched"] == 4
    router.hear(P, Prefilled(key(), 9))
    assert unprefilled() == [0, 0]
    router.submit(2)
    router.tell(Withdrawn(RequestId(2)))
    assert unprefilled() == [0, 0]


# Several choices


def test_choices_wait_until_the_first_has_drawn_a_token():
    router = RouterBench(decode=P)
    router.submit(choices=3)
    assert [s.key.choice for s in router.sent(Start)] == [0] and router.core.waiting == 2
    router.hear(P, Prefilled(key(), 9))
    assert not router.sent(Start)
    router.tokens(P, run(0))
    assert [s.key.choice for s in router.sent(Start)] == [1, 2]
    for choice in (2, 0, 1):
        assert not router.core.idle
        router.tokens(P, run(0, choice=choice), run(1, STOP, choice=choice))
    assert router.core.idle and router.core.unfinished == 0


@pytest.mark.parametrize("how", ["withdrawn", "ended"])
def test_nobody_waits_for_a_leader_that_has_gone(how: str):
    router = RouterBench(decode=P)
    router.submit(choices=2)
    if how == "withdrawn":
        router.tell(Withdrawn(RequestId(1), 0))
    else:
        router.tokens(P, run(0, STOP))
    assert [s.key.choice for s in router.sent(Start)] == [1]


def test_another_choice_that_leaves_frees_nobody():
    router = RouterBench(decode=P)
    router.submit(choices=3)
    router.tell(Withdrawn(RequestId(1), 2))
    assert not router.sent(Start)
    router.tokens(P, run(0))
    assert [s.key.choice for s in router.sent(Start)] == [1]


def test_one_choice_that_cannot_be_served_ends_the_request():
    router = RouterBench(decode=P)
    router.submit(choices=2)
    router.tokens(P, run(0))
    router.hear(P, Failed(key(1, 1), "too long", retry=False))
    assert router.commands(Reject) == [Reject(RequestId(1), "too long", overloaded=False)]
    assert router.core.idle and len(router.sent(Cancel)) == 2


def finished(router: RouterBench) -> int:
    return router.core.counters.get("requests_finished", 0)


def test_a_request_is_finished_when_its_last_choice_is():
    router = RouterBench(decode=P)
    router.submit(choices=2)
    router.tokens(P, run(0, STOP))
    assert finished(router) == 0
    router.tokens(P, run(0, STOP, choice=1))
    assert finished(router) == 1


def test_a_stop_string_finishes_a_request_and_a_client_that_leaves_does_not():
    router = RouterBench(decode=P)
    router.submit(choices=2)
    router.tokens(P, run(0))
    router.tell(Withdrawn(RequestId(1), 0))
    router.tokens(P, run(0, STOP, choice=1))
    assert finished(router) == 1 and router.core.idle
    router.submit(2)
    router.tell(Withdrawn(RequestId(2), None))
    router.submit(3)
    router.hear(P, Failed(key(3), "too long", retry=False))
    assert finished(router) == 1 and router.core.idle


# Death


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lost", [P, D])
def test_a_lost_instance_that_is_needed_ends_the_attempt(stage: str, lost: Address):
    router = at_stage(stage)
    before = router.core.choices[RequestId(1)][0].next
    needed = lost == P if stage == "binding" else (stage, lost) != ("decode", P)
    router.placement.answer = Placement(D if lost == P else P, D if lost == P else P)
    router.tell(PeerLost(lost, info()))
    if not needed:
        assert not router.said
        return
    again = router.one(Start)
    assert (again.key.attempt, again.history, again.role) == (1, before, Role.WHOLE)
    others = {} if stage == "binding" or stage == "decode" else {"d" if lost == P else "p": 0}
    assert cancelled(router) == others
    assert router.core.counters["failovers"] == 1
    router.tell()
    assert not router.said, "it is asked once"


def test_a_prefill_instance_is_needed_until_its_token_is_here():
    router = split()
    router.hear(D, JOINED)
    router.tokens(D, run(1))
    router.tell(PeerLost(P, info()))
    assert cancelled(router) == {"d": 0} and router.sent(Start)[0].history == 0
    router.tokens(D, run(2))
    assert not router.delivered


def test_a_stream_goes_on_where_it_was_cut():
    router = split()
    router.tokens(P, run(0))
    router.hear(D, JOINED)
    router.tokens(D, run(1))
    router.placement.answer = Placement(P, P)
    router.tell(PeerLost(D, info()))
    assert (router.one(Start).history, router.one(Start).total, router.one(Start).emits_max) == (2, 12, 2)
    router.hear(P, Begun(key(attempt=1), 70, 8))
    router.tokens(P, run(2, attempt=1), run(3, LENGTH, attempt=1))
    assert router.delivered == [(0, 2, 1, None), (0, 3, 1, LENGTH)]
    timeline = router.commands(Deliver)[-1].timeline
    assert timeline is not None and (timeline.attempts, timeline.recomputed) == (2, 4)


def test_a_request_under_which_workers_keep_dying_fails():
    router = whole(deaths_max=3)
    for epoch in range(3):
        router.placement.answer = Wait("nobody is here")
        router.tell(PeerLost(Address("p", epoch), info()))
        router.placement.answer = Placement(Address("p", epoch + 1), Address("p", epoch + 1))
        router.tell(PeerUp(Address("p", epoch + 1), info()))
    assert router.core.idle and router.core.counters["requests_failed"] == 1


def test_the_dead_and_strangers_are_not_heard():
    router = split()
    router.tell(PeerLost(P, info()), PeerLost(Address("x"), info()))
    router.tokens(P, run(0, attempt=1))
    router.hear(Address("x"), Unfenced(D))
    assert not router.delivered and not router.commands(Kill)


def test_who_does_not_confirm_is_ended_once_it_is_known():
    router = split()
    router.hear(D, Unfenced(P))
    assert router.commands(Kill) == [Kill(P)]
    router.tell(PeerLost(P, info()))
    router.hear(D, Unfenced(P))
    assert not router.commands(Kill)


# Withdrawn, late, too many


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_withdrawn_is_cancelled_wherever_it_is(stage: str):
    router = at_stage(stage)
    router.tell(Withdrawn(RequestId(1), None))
    others = {"binding": {"p": 0}, "decode": {"d": 0}}
    assert cancelled(router) == others.get(stage, {"p": 0, "d": 0})
    assert router.core.idle and set(router.loads().values()) == {(0, 0)}
    router.tokens(P, run(0))
    router.hear(D, JOINED)
    router.tell(Withdrawn(RequestId(1), None))
    assert not router.said and router.core.counters["choices_withdrawn"] == 1


def test_what_waits_can_be_withdrawn():
    router = RouterBench()
    router.placement.answer = Wait("nobody is here")
    router.submit(choices=2)
    router.tell(Withdrawn(RequestId(1), None))
    router.placement.answer = Placement(P, P)
    router.hear(P, REPORT)
    assert not router.said and router.core.idle


@pytest.mark.parametrize("stage", ["queued", *STAGES])
def test_a_deadline_ends_a_request_wherever_it_is(stage: str):
    router = RouterBench(decode=None if stage in ("binding", "bound") else D)
    if stage == "queued":
        router.placement.answer = Wait("nobody is here")
    router.placement.bound = Wait("not now") if stage == "binding" else D
    router.submit(deadline_ns=100)
    (wake,) = router.commands(WakeAt)
    assert wake.at_ns == 100
    if stage not in ("queued", "prefill"):
        router.hear(P, Prefilled(key(), 9))
    if stage == "decode":
        router.tokens(P, run(0))
        router.hear(D, JOINED)
    router.tell(at_ns=99)
    assert not router.commands(Reject)
    router.tell(at_ns=100)
    assert router.commands(Reject) == [
        Reject(RequestId(1), "the request's deadline has passed", overloaded=False)
    ]
    expected = {"queued": set(), "binding": {"p"}, "decode": {"d"}}.get(stage, {"p", "d"})
    assert set(cancelled(router)) == expected and router.core.idle


def test_a_deadline_of_what_has_ended_wakes_nobody():
    router = RouterBench(decode=P)
    router.submit(deadline_ns=100)
    router.tokens(P, run(0, STOP))
    router.submit(2, deadline_ns=200)
    assert router.commands(WakeAt) == [WakeAt(200)]


def test_too_much_is_overload():
    router = RouterBench(decode=P, choices_max=3)
    router.submit(1, choices=2)
    router.submit(2, choices=2)
    assert router.commands(Reject) == [
        Reject(RequestId(2), "too many requests are unfinished", overloaded=True)
    ]
    router.submit(3)
    assert router.one(Start).key == key(3)


def test_a_policy_may_decline():
    router = RouterBench()
    router.placement.answer = Decline("shedding")
    router.submit()
    assert router.commands(Reject) == [Reject(RequestId(1), "shedding", overloaded=True)] and router.core.idle


def test_who_waits_is_placed_when_there_is_somebody():
    router = RouterBench()
    router.placement.answer = Wait("nobody is here")
    router.submit(1)
    router.submit(2)
    assert router.core.waiting == 2
    router.placement.answer = Placement(P, P)
    router.hear(P, REPORT)
    assert [s.key.request for s in router.sent(Start)] == [1, 2], "in order"
    assert [q.serial for q in router.placement.asked] == sorted(q.serial for q in router.placement.asked)


# Drain, reports


def test_draining_one_instance_tells_it_and_the_policy():
    router = split()
    router.tell(DrainAsked(D))
    assert router.one(Drain, D) == Drain()
    router.submit(2)
    assert list(router.placement.views[-1].draining) == [True, False]


def test_draining_everything_finishes_what_there_is():
    router = whole()
    router.tell(DrainAsked(None))
    router.submit(2)
    assert router.commands(Reject) == [Reject(RequestId(2), "the service is shutting down", overloaded=True)]
    router.tokens(P, run(0, STOP))
    assert router.delivered and router.core.idle


def test_reports_are_what_the_policy_sees_and_unknown_is_not_zero():
    router = RouterBench()
    router.hear(P, REPORT)
    router.submit()
    view = router.placement.views[0]
    assert view.addresses == (D, P) and list(view.waiting[1:]) == [3] and view.observed_at_ns[1] == 77
    assert all(column[0] != column[0] for column in (view.waiting, view.observed_at_ns, view.blocks_free))
    router.hear(P, Report(78, 3, 2, 1, 0, 40, 64, -1, 9, draining=True))
    router.submit(2)
    view = router.placement.views[-1]
    assert view.blocks_free[1] != view.blocks_free[1] and list(view.draining) == [False, True]


def test_a_fleet_that_changes_keeps_what_is_known_of_the_others():
    router = split()
    router.hear(P, REPORT)
    router.tell(DrainAsked(D), PeerUp(Address("a"), info()))
    router.submit(2)
    view = router.placement.views[-1]
    assert view.addresses == (Address("a"), D, P)
    assert list(view.waiting[2:]) == [3] and list(view.draining) == [False, True, False]
    assert list(view.assigned) == [0, 2, 2] and list(view.blocks_total) == [64, 64, 64]


@pytest.mark.parametrize("event", [Landed(Slot(0), 1, P)])
def test_what_is_not_for_a_router_is_an_error(event: Landed):
    router = RouterBench()
    with pytest.raises(TypeError, match="no use"):
        router.tell(event)
    with pytest.raises(TypeError, match="no use"):
        router.hear(P, Drain())


def test_a_request_is_submitted_once():
    router = whole()
    with pytest.raises(AssertionError, match="twice"):
        router.tell(Submitted(Request(RequestId(1), 1, (), 1)))
