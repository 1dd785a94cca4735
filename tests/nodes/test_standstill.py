"""Who gives what up, and when, where nothing moves."""

from types import SimpleNamespace

from headrace.engine.sequence import Status
from headrace.nodes.standstill import Standstill
from headrace.types.events import Received
from headrace.types.ids import RequestId, SequenceKey
from headrace.types.messages import Cancel, Dispatch, Fenced, Matched, Refused, Role
from tests.nodes.harness import ROUTER, D, InstanceBench, P, key, start


def sequence(number: int, status: Status, blocks: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        key=SequenceKey(RequestId(number)), arrival_ns=number, status=status, tables=[[0] * blocks]
    )


def standstill(sessions=(), **state) -> Standstill:
    memory = SimpleNamespace(short=state.pop("short", True), pressed=state.pop("pressed", False))
    lists = {"inflight": [], "stopping": [], "loading": [], "waiting": [], **state}
    return Standstill(
        SimpleNamespace(memory=memory, **lists), {SequenceKey(RequestId(n)): None for n in sessions}, 10
    )


def given_up(watch: Standstill, sequences: list, until_ns: int) -> list[tuple[int, int]]:
    """(When, whom), asked at every nanosecond."""
    found = [(at_ns, watch.victim(sequences, at_ns)) for at_ns in range(1, until_ns)]
    return [(at_ns, victim.key.request) for at_ns, victim in found if victim is not None]


HELD = [sequence(1, Status.HELD), sequence(2, Status.HELD)]


def test_the_youngest_that_sits_idle_is_given_up_after_patience_that_doubles():
    assert given_up(standstill(), HELD, 75) == [(11, 2), (31, 2), (71, 2)]


def test_a_handover_that_succeeds_restores_patience():
    watch = standstill()
    given_up(watch, HELD, 40)
    watch.handed_over()
    assert given_up(watch, HELD, 15) == [(11, 2)]


def test_a_piece_that_comes_starts_it_anew():
    watch = standstill()
    assert given_up(watch, HELD, 11) == []
    watch.moved()
    assert given_up(watch, HELD, 11) == []


def test_nothing_is_given_up_where_something_moves_or_nothing_waits():
    for watch in (standstill(inflight=[1]), standstill(stopping=[1]), standstill(short=False)):
        assert given_up(watch, HELD, 50) == [] and watch.due_ns == 0
    for watch in (standstill(short=False, pressed=True), standstill(short=False, waiting=[1])):
        assert given_up(watch, HELD, 20)


def test_what_is_being_fetched_or_runs_is_kept():
    assert given_up(standstill(sessions=(1, 2)), HELD, 50) == []
    assert given_up(standstill(), [sequence(1, Status.RUNNING), sequence(2, Status.FENCING)], 50) == []


def test_a_reservation_goes_before_one_that_holds_no_memory():
    received = [sequence(1, Status.RECEIVING), sequence(2, Status.RECEIVING, blocks=0)]
    assert given_up(standstill(), received, 15) == [(11, 1)]


def test_what_is_given_up_in_the_instant_it_was_admitted_asks_for_nothing():
    """Found by a seed: its `Dispatch` went out after it had left, and its slot stayed open for ever."""
    bench = InstanceBench(D, pool=1, stuck_ns=100)
    bench.meet((P, 0))
    bench.begin(start(1, role=Role.DECODE))
    slot = bench.one(Dispatch).slot
    bench.hear(ROUTER, start(2, role=Role.DECODE), start(3, role=Role.DECODE))
    bench.tell(Received(bench.pool, Matched(key(2), 0, ())), at_ns=bench.now_ns + 200)
    assert [r.key for r in bench.sent(Refused)] == [key(2)]
    assert bench.sent(Dispatch) == [] and key(2) in bench.closed
    bench.hear(ROUTER, Cancel(key(1)), Cancel(key(3)))
    bench.hear(P, Fenced(key(1), slot))
    assert bench.core.idle
