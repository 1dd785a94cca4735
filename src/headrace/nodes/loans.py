"""Both halves of lending memory of one instance, under one roof. See `nodes.borrowing` and `nodes.lending`."""

from collections.abc import Mapping

from headrace.engine.sequence import Sequence
from headrace.nodes.borrowing import Borrowing
from headrace.nodes.leaving import Leaving
from headrace.nodes.lending import Lending
from headrace.nodes.parts import Parts
from headrace.types.ids import Address
from headrace.types.kv import TableRun
from headrace.types.lending import Borrow, CallIn, Holding, LendingMessage, Lent, Repay, Unlent
from headrace.types.messages import Failed, InstanceInfo, Role, Start


class Loans:
    """`open` before anything else: what leaves the instance is known later than what leaves hear of."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.lending = Lending(parts, parts.config.lend_share)
        self.borrowing: Borrowing
        self._leaving: Leaving

    def open(self, leaving: Leaving, info: InstanceInfo, peers: Mapping[Address, InstanceInfo]) -> None:
        self._leaving = self.lending.leaving = leaving
        self.borrowing = Borrowing(self._parts, leaving, info, peers)

    def fits(self, start: Start) -> bool:
        """Does this pool alone hold it?"""
        memory = self._parts.memory
        demand = memory.demand(start.total + start.emits_max, self._parts.config.tokens_max)
        return all(n <= most for n, most in zip(demand, memory.blocks_total, strict=True))

    def refusal(self, start: Start) -> Failed | None:
        """What is too long even with what peers lend is not taken."""
        if self.fits(start) or self.borrowing.takes(start):
            return None
        tokens, memory = start.total + start.emits_max, self._parts.memory
        demand = memory.demand(tokens, self._parts.config.tokens_max)
        reason = f"{tokens} tokens need {demand} blocks of KV, the pool has {list(memory.blocks_total)}"
        # Where peers lend, more may be up next time, and what is too long must be whole in one place.
        lends = self._parts.config.lend_share > 0
        alone = lends and start.role is Role.WHOLE
        return Failed(
            start.key, f"{reason}: raise --kv-memory or ask for fewer tokens", retry=lends, alone=alone
        )

    @property
    def idle(self) -> bool:
        return self.lending.idle and self.borrowing.idle

    def due_ns(self) -> int:
        """The next timer; 0: none."""
        due = (self.lending.due_ns(), self.borrowing.due_ns())
        return min((at_ns for at_ns in due if at_ns), default=0)

    def runs(self) -> list[TableRun]:
        """Blocks of this instance's lease that are in no table here."""
        return [*self.lending.runs(), *self.borrowing.runs()]

    def heard(self, source: Address, message: LendingMessage, now_ns: int) -> None:
        match message:
            case Borrow():
                self.lending.asked(source, message, now_ns)
            case Repay():
                self.lending.repaid(source, message)
            case Lent():
                self.borrowing.lent(source, message, now_ns)
            case Unlent():
                self.borrowing.unlent(source, message, now_ns)
            case Holding():
                self.borrowing.holding(source, message)
            case CallIn():
                self.borrowing.called_in(source, message)

    def freed(self, sequence: Sequence) -> None:
        self.borrowing.freed(sequence)
        self.lending.freed()

    def lost(self, peer: Address) -> None:
        self.borrowing.lost(peer)
        self.lending.lost(peer)

    def before_plan(self, now_ns: int) -> None:
        self.borrowing.settle(now_ns)
        self.lending.serve()

    def after_plan(self, now_ns: int) -> bool:
        """True: plan again. Somebody gave way to a peer, and what he had is free now, or a peer waits no more for what is free. Perhaps
        nothing else ever happens here that would lead to a plan.
        """
        lifted = self.lending.settle(now_ns)
        reaped = self._leaving.reap()
        if reaped:
            self.lending.serve()
        return lifted or reaped
