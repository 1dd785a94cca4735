"""Worlds in which no pool holds the longest sequence: they serve it, and leave no path of lending out."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest

from headrace.nodes import lending
from headrace.nodes.borrowing import Borrowing, Loan
from headrace.nodes.loans import Loans
from headrace.nodes.tiering import Tiering
from headrace.sim import run
from headrace.sim.faults import Ambush, FaultPlan, Victim
from headrace.sim.lending import LENDING
from headrace.sim.run import Failure, simulate
from headrace.sim.scenarios import MICRO, MILLI, World, draw_world
from headrace.types.events import Received, StepDone
from headrace.types.ids import Address
from headrace.types.lending import Lent, Repay


def lending_worlds(count: int) -> list[World]:
    worlds = (draw_world(seed) for seed in range(10_000))
    return list(islice((w for w in worlds if w.instance.lend_share), count))


def happened(world: World) -> Counter[str]:
    """Messages by kind, and outputs that a silent holder cost."""
    said: Counter[str] = Counter()
    for node in simulate(world).shell.nodes:
        for record in node.journal:
            for event in record.events:
                if isinstance(event, Received):
                    said[type(event.message).__name__] += 1
                elif isinstance(event, StepDone):
                    said["lost"] += sum(output.lost for output in event.result.outputs)
    return said


def test_no_message_is_left_out():
    said = sum((happened(world) for world in lending_worlds(16)), Counter[str]())
    assert set(LENDING) <= set(said), said


def test_holders_that_die_cost_a_recomputation_and_no_word():
    lost = 0
    for number, world in enumerate(lending_worlds(12)):
        ambush = Ambush("Holding", 1 + number % 4, Victim.SENDER, (1 + 10 * number) * MICRO)
        plan = FaultPlan(ambushes=(ambush,), heal_ns=20 * MILLI)
        shell = replace(world.shell, notice_ns=300 * MICRO)
        lost += happened(replace(world, faults=plan, shell=shell))["lost"]
    assert lost > 0, "somebody was asked between his death and the news of it"


def is_read_before_it_is_there(patch: pytest.MonkeyPatch) -> None:
    lent = Borrowing.lent

    def trusting(self: Borrowing, source: Address, message: Lent, now_ns: int) -> None:
        lent(self, source, message, now_ns)
        if self._coming is not None:
            self._coming.arrived = True

    patch.setattr(Borrowing, "lent", trusting)


def is_repaid_while_a_plan_in_flight_reads_it(patch: pytest.MonkeyPatch) -> None:
    start_over = Borrowing._start_over

    def at_once(self: Borrowing, loan: Loan) -> None:
        start_over(self, loan)
        if loan is not self._coming and loan.holder in self._peers:
            self._parts.send(loan.holder, Repay(loan.number))

    patch.setattr(Borrowing, "_start_over", at_once)


def is_kept_by_who_gave_way(patch: pytest.MonkeyPatch) -> None:
    """Until something else happens there, which may be never."""

    def stopped(self: Loans, now_ns: int) -> bool:
        return self.lending.settle(now_ns)

    patch.setattr(Loans, "after_plan", stopped)


def is_reserved_for_what_cannot_come(patch: pytest.MonkeyPatch) -> None:
    """Nobody who only sits there gives way."""
    patch.setattr(lending, "sits", lambda sequence, sending: False)


def has_its_new_copy_dropped(patch: pytest.MonkeyPatch) -> None:
    """Drops are said last: of a block that made room for another, and is copied anew in the same instant, too."""
    settle, drop = Tiering.settle, Tiering._drop

    def late(self: Tiering, now_ns: int) -> None:
        settle(self, now_ns)
        drop(self)

    patch.setattr(Tiering, "settle", late)
    patch.setattr(Tiering, "_drop", lambda self: None)


MUTANTS = {
    is_read_before_it_is_there: (),
    is_repaid_while_a_plan_in_flight_reads_it: (),
    is_kept_by_who_gave_way: (3353,),
    is_reserved_for_what_cannot_come: (3689,),
    has_its_new_copy_dropped: (8846,),
}
"""With seeds that notice them first."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All that is tried here ends within a tenth of this.
    monkeypatch.setattr(run, "HANG_NS", 200 * MILLI)
    mutant(monkeypatch)
    with pytest.raises(Failure):
        for world in [*map(draw_world, MUTANTS[mutant]), *lending_worlds(60)]:
            simulate(world)
