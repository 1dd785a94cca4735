"""Lending memory for a sequence that is too long for its pool: P owns it, D (another pool) holds, each played against the other by hand."""

from typing import Any

from headrace.engine.sequence import Status
from headrace.types.events import Landed, StepDone, Write, Written
from headrace.types.ids import Address, PoolId, Slot
from headrace.types.kv import BlockRun, TableRun
from headrace.types.lending import Borrow, CallIn, Holding, Lent, Repay, Unlent
from headrace.types.messages import Abandon, Cancel, Dispatch, Failed, Fenced, Lease, Leased, Refused, Role
from headrace.types.plan import Elsewhere, Output, StepResult
from tests.nodes.harness import OTHER_POOL, POOL, ROUTER, D, InstanceBench, P, key, start

E = Address("e")
LENDS = {"lend_share": 1.0, "partition_tokens": 8, "tokens_max": 16}
"""Two blocks a partition."""


def owner(**limits: Any) -> InstanceBench:
    """P computes 300 tokens, of which its pool holds 256, and has just asked D for a partition."""
    node = InstanceBench(P, spare=64, **{**LENDS, **limits})
    node.meet((D, 1))
    node.hear(ROUTER, start(total=300))
    while not node.sent(Borrow):
        node.step()
    return node


def lent(node: InstanceBench, source: Address = D, loan: int = 1, first: int = 10) -> None:
    node.hear(source, Lent(loan, Slot(5), (TableRun(0, 0, first, 2),)))


def writes(node: InstanceBench) -> list[Write]:
    """Step until both blocks are on their way."""
    found = node.commands(Write)
    while sum(w.count for w in found) < 2:
        node.step()
        found += node.commands(Write)
    return found


def held(node: InstanceBench) -> list[Elsewhere]:
    """The first partition gets to D; what the next plan says of it."""
    lent(node)
    sent = writes(node)
    node.tell(*(Written(w.write, True) for w in sent))
    node.hear(D, Holding(1))
    told = [m for plan in node.plans for m in plan.elsewhere]
    while not told:
        node.step()
        told = [m for plan in node.plans for m in plan.elsewhere]
    return told


def test_a_sequence_that_is_too_long_is_refused_where_nobody_lends():
    for peers, limits in ((((D, 1),), {}), ((), LENDS), (((D, 0),), LENDS)):
        node = InstanceBench(P, spare=64, **limits)
        node.meet(*peers)
        node.hear(ROUTER, start(total=300))
        refusal = node.one(Failed, ROUTER)
        assert "300" not in refusal.reason and "308 tokens need [77] blocks" in refusal.reason
        assert refusal.retry is bool(limits), "where peers lend, more may be up the next time"
    node = InstanceBench(P, spare=64, **LENDS)
    node.meet((D, 1))
    node.hear(ROUTER, start(total=600))
    assert node.sent(Failed, ROUTER), "too long for both"


def test_whoever_lacks_a_lender_says_so_and_serves_once_one_is_back():
    node = InstanceBench(P, spare=64, **LENDS)
    for n, role in enumerate((Role.WHOLE, Role.PREFILL)):
        node.hear(ROUTER, start(n, total=300, role=role))
        assert node.one(Failed, ROUTER).alone is (role is Role.WHOLE), "only who is whole may borrow"
    node.meet((D, 1))
    node.lose(D)
    node.hear(ROUTER, start(3, total=300))
    assert node.one(Failed, ROUTER).alone
    node.meet((Address(D.name, 1), 1))
    node.hear(ROUTER, start(4, total=300))
    assert key(4) in node.core.sequences


def test_who_gives_way_to_a_peer_is_stopped_for_good_at_once():
    node = owner()
    while node.core.scheduler.inflight or not node.core.memory.short:
        node.step()
        if node.sent(Lease):
            node.hear(POOL, Leased((), True, (0,)))
    node.hear(D, Unlent(1), Borrow(9, 2, 0, key(9)))
    assert node.one(Lent, D).loan == 9, "nothing was in flight, so nothing would have ended later"


def test_only_whole_sequences_borrow():
    node = InstanceBench(P, spare=64, **LENDS)
    node.meet((D, 1))
    node.hear(ROUTER, start(total=300, role=Role.PREFILL))
    assert node.one(Failed, ROUTER).retry


def test_partitions_go_to_a_peer_once_half_of_the_pool_is_full():
    node = owner()
    assert node.one(Borrow, D) == Borrow(1, 2, 1, key())
    assert len(node.core.sequences[key()].tables[0]) * 2 >= 64
    (moved,) = held(node)
    assert moved == Elsewhere(key(), D, (TableRun(0, 0, 10, 2),))
    sequence = node.core.sequences[key()]
    assert sequence.tables[0][:3] == [-1, -1, 2] and not sequence.published[0]


def test_its_blocks_are_free_when_no_earlier_plan_reads_them():
    node = owner(depth=2)
    lent(node)
    sent = writes(node)
    node.tell(*(Written(w.write, True) for w in sent))
    before = node.core.memory.spare[0].total
    node.hear(D, Holding(1))
    assert node.core.scheduler.inflight and node.core.loans.borrowing.runs() == [TableRun(0, 0, 0, 2)]
    last = node.core.sequences[key()].last_step
    while node.core.loans.borrowing.runs():
        assert node.core.scheduler.retired < last
        before = node.core.memory.spare[0].total
        node.step()
    assert before < 64


def test_nothing_is_repaid_while_a_write_is_in_flight():
    node = owner()
    lent(node)
    sent = writes(node)
    node.hear(ROUTER, Cancel(key()))
    node.step()
    assert not node.sent(Repay) and key() in node.core.sequences
    node.tell(*(Written(w.write, True) for w in sent))
    assert node.one(Repay, D) == Repay(1) and node.core.idle and node.free == 64


def test_a_failed_write_ends_the_loan_and_not_the_sequence():
    node = owner()
    lent(node)
    sent = writes(node)
    node.tell(*(Written(w.write, False) for w in sent))
    assert node.one(Repay, D) == Repay(1) and node.core.sequences[key()].tables[0][0] == 0


def test_who_refuses_is_asked_again_after_a_while_and_others_at_once():
    node = owner(lend_retry_ns=1000)
    node.meet((E, 2))
    node.hear(D, Unlent(1))
    assert node.one(Borrow, E).loan == 2
    node.hear(E, Unlent(2))
    assert not node.sent(Borrow)
    node.tell(at_ns=node.now_ns + 2000)
    assert node.sent(Borrow)


def test_a_lender_that_does_not_answer_is_left():
    node = owner(lend_ns=1000)
    node.tell(at_ns=node.now_ns + 2000)
    assert node.one(Repay, D) == Repay(1)
    lent(node)
    assert not node.commands(Write), "what comes late is of no use"


def test_the_end_of_a_holder_starts_the_sequence_over():
    node = owner()
    held(node)
    node.lose(D)
    node.step()
    sequence = node.core.sequences[key()]
    assert sequence.lost or sequence.recomputed, "it was preempted"
    assert not node.core.loans.borrowing.runs() and sequence.trimmed == [0]


def test_a_loan_that_is_called_in_is_repaid_when_no_plan_reads_it():
    node = owner()
    held(node)
    node.hear(D, CallIn(1))
    assert Repay(1) not in node.sent(Repay)
    node.step()
    assert Repay(1) in node.sent(Repay, D)


def test_a_holder_that_does_not_answer_the_executor_costs_a_recomputation():
    node = owner()
    held(node)
    plan = node.core.scheduler.inflight[0].plan
    result = StepResult(plan.step, tuple(Output(w.key, 0, lost=True) for w in plan.work))
    node.tell(StepDone(result))
    assert Repay(1) in node.sent(Repay, D) and not node.sent(Failed)
    assert node.core.sequences[key()].lost or node.core.sequences[key()].recomputed
    assert node.plans[0].ends == (key(),) and node.plans[0].starts[0].key == key()


def holder(spare: int = 8, **limits: Any) -> InstanceBench:
    node = InstanceBench(D, spare=spare, pool=1, **{**LENDS, **limits})
    node.meet((P, 0))
    return node


def test_a_holder_reserves_counts_and_takes_back():
    node = holder()
    node.hear(P, Borrow(7, 2, 1, key()))
    given = node.one(Lent, P)
    assert given.table == (TableRun(0, 0, 0, 2),) and node.free == 6
    node.tell(Landed(given.slot, 2, P))
    assert not node.sent(Holding)
    node.tell(Landed(given.slot, 2, P))
    assert node.one(Holding, P) == Holding(7), "two blocks of two layers"
    node.hear(P, Repay(7))
    assert node.core.idle and node.free == 8
    node.hear(P, Repay(7))
    assert node.free == 8, "what is unknown is ignored"


def test_a_holder_takes_back_what_was_never_written():
    node = holder()
    node.hear(P, Borrow(7, 2, 1, key()))
    node.hear(P, Repay(7))
    assert node.core.idle and node.free == 8


def test_the_end_of_an_owner_frees_what_it_borrowed():
    node = holder()
    node.hear(P, Borrow(7, 2, 1, key()))
    node.lose(P, pool=0)
    assert node.core.idle and node.free == 8


def test_a_holder_lends_no_more_than_its_share():
    node = holder(lend_share=3 / 64)
    node.hear(P, Borrow(1, 2, 1, key()), Borrow(2, 2, 1, key()))
    assert node.one(Lent, P).loan == 1 and node.one(Unlent, P) == Unlent(2)


def test_a_holder_without_blocks_asks_its_pool_first():
    node = holder(spare=0)
    node.hear(P, Borrow(1, 2, 1, key()))
    assert not node.sent(Lent) and not node.sent(Unlent)
    node.hear(OTHER_POOL, Leased((BlockRun(PoolId(1), 0, 4, 2),), False, (0,)))
    assert node.one(Lent, P).table == (TableRun(0, 0, 4, 2),)


def test_a_holder_whose_pool_has_nothing_says_no():
    node = holder(spare=0)
    node.hear(P, Borrow(1, 2, 1, key()))
    node.hear(OTHER_POOL, Leased((), False, (0,)))
    assert node.one(Unlent, P) == Unlent(1)


def test_an_older_sequence_of_the_holder_comes_first_and_a_younger_one_does_not():
    for arrival, says in ((5, Unlent), (500, Lent)):
        node = holder(sequences_max=1)
        node.begin(start(1, total=4, arrival_ns=1))
        node.hear(ROUTER, start(2, total=4, arrival_ns=arrival))
        node.hear(P, Borrow(1, 2, 50, key(9)))
        assert node.sent(says, P), (arrival, node.said)


def test_what_only_sits_at_a_holder_gives_way_to_an_older_loan_and_nobody_younger_takes_it():
    node = holder(spare=4)
    slots: dict[int, Slot] = {}
    for n in (1, 2):
        node.begin(start(n, total=8, role=Role.DECODE, arrival_ns=60 + n))
        slots[n] = node.one(Dispatch, P).slot
    node.hear(P, Borrow(1, 4, 50, key(9)))
    node.begin(start(3, total=8, role=Role.DECODE, arrival_ns=70))
    for n in (2, 1):
        node.hear(OTHER_POOL, Leased((), False, (0,)))
        assert node.one(Refused, ROUTER).key == key(n) and node.sent(Abandon, P) and not node.sent(Unlent)
        node.hear(P, Fenced(key(n), slots[n]))
        assert not node.sent(Dispatch), "two blocks are enough for the third, and not for the loan"
    assert node.one(Lent, P).loan == 1


def test_what_only_sits_stays_for_a_younger_loan_and_where_something_runs():
    for arrival, runs in ((50, True), (80, False)):
        node = holder(spare=6 if runs else 5)
        if runs:
            node.begin(start(3, total=1, arrival_ns=90))
        node.begin(start(1, total=16, role=Role.DECODE, arrival_ns=60))
        if runs:
            node.step()
        assert node.core.sequences[key(1)].status is Status.RECEIVING
        node.hear(P, Borrow(1, 2, arrival, key(9)))
        node.hear(OTHER_POOL, Leased((), False, (0,)))
        assert node.one(Unlent, P).loan == 1 and not node.sent(Refused)


def test_who_was_held_back_for_a_loan_begins_when_it_is_wanted_no_more():
    node = holder(spare=0)
    node.hear(P, Borrow(1, 4, 50, key(9)))
    node.begin(start(2, total=4, arrival_ns=70))
    node.hear(OTHER_POOL, Leased((BlockRun(PoolId(1), 0, 0, 2),), False, (0,)))
    assert node.sent(Unlent, P) and node.plans, "two blocks are too few for the one and enough for the other"


def test_a_holder_that_is_short_calls_in_the_younger_loan():
    node = holder(spare=4)
    node.hear(P, Borrow(1, 2, 50, key(9)))
    assert node.sent(Lent)
    node.begin(start(1, total=16, arrival_ns=1))
    node.hear(OTHER_POOL, Leased((), True, (0,)))
    assert node.one(CallIn, P) == CallIn(1)
    node.hear(P, Repay(1))
    assert node.plans, "now it begins"
    assert POOL != OTHER_POOL
