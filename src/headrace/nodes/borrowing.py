"""The owner's half of DistAttention (Infinite-LLM, arXiv 2401.02669): a sequence too long for this pool lies on several instances.

Its last tokens are here, where it is computed; leading partitions, in order, lie with peers that lend. What a step attends to there is
computed there, by partitions, and merged here (`compute.ops.partial`).
Life cycle of a loan, of one partition (one at a time is on the way):
 1. ASKED    `Borrow` was sent to a peer. `Unlent`, or no answer in time: the next one is asked, or after a pause the same.
 2. WRITING  `Lent`: the memory is reserved. The partition, computed and final, is written there while the sequence runs on: some blocks
             a step, or all at once if something waits for memory. A failed write or a deadline ends the loan.
 3. HELD     `Holding`: all is there. The next plan tells the executor; the blocks here are free when no earlier plan is in flight.
 4. Over     when the sequence leaves the batch for whatever reason: nothing reads or writes there any more; the holder hears `Repay`.
If a holder ends, calls its memory in, or does not answer the executor, the sequence is preempted: all its loans are repaid, and it is
computed again. If it stands still for want of memory, it is given up after some patience; another attempt may find more.
Who borrows: a sequence that is to be whole here and needs more blocks than the pool has, once it has filled half of the pool. One runs at
a time. Who lends: the peers of this host with a pool of their own; those first that never refused, or longest ago.
Left out: lending for the sake of a bigger batch where nothing is too long (the paper's greedy), window groups, which stay small anyhow,
and a cache of prefixes that are longer than a pool.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from headrace.engine.sequence import Sequence, Status
from headrace.nodes.leaving import Leaving
from headrace.nodes.parts import Parts
from headrace.nodes.sending import loan_key
from headrace.transfer.source import Outgoing
from headrace.types.ids import Address, SequenceKey
from headrace.types.kv import TableRun
from headrace.types.lending import Borrow, CallIn, Holding, Lent, Repay, Unlent
from headrace.types.messages import InstanceInfo, Role, Start
from headrace.types.plan import Elsewhere


class Stage(Enum):
    ASKED = "asked"
    WRITING = "writing"
    HELD = "held"


@dataclass(slots=True, eq=False)
class Loan:
    number: int
    sequence: Sequence
    holder: Address
    at: int
    """The partition's first logical block."""
    due_ns: int
    stage: Stage = Stage.ASKED
    table: tuple[TableRun, ...] = ()
    """At the holder, by logical blocks."""
    session: Outgoing | None = None
    sent: int = 0
    """Blocks of it that are written or on the way."""
    arrived: bool = False
    failed: bool = False
    """It comes to nothing, as soon as no write is in flight."""
    kept: list[TableRun] = field(default_factory=list[TableRun])
    """Its blocks here, until no plan in flight reads them."""
    until: int = 0
    """The last such plan."""


class Borrowing:
    """`peers` are those that are up now, as the instance knows them."""

    def __init__(
        self, parts: Parts, leaving: Leaving, info: InstanceInfo, peers: Mapping[Address, InstanceInfo]
    ) -> None:
        self._parts = parts
        self._leaving = leaving
        self._info = info
        self._peers = peers
        config, spec = parts.config, parts.spec
        self._each = config.partition_tokens // spec.block_size
        whole = config.partition_tokens % spec.block_size == 0
        self._able = config.lend_share > 0 and whole and not any(g.window for g in spec.groups)
        self._loans: dict[int, Loan] = {}
        self._coming: Loan | None = None
        """The one that is on the way."""
        self._number = 0
        self._refused: dict[Address, int] = {}
        """When a peer that did not lend may be asked again."""
        self._patience_ns = 0
        """When standing still has lasted too long; 0: nothing stands still."""
        self._steps = 0

    @property
    def idle(self) -> bool:
        return not self._loans

    def due_ns(self) -> int:
        """The next timer; 0: none."""
        due = [self._patience_ns] if self._patience_ns else []
        if self._coming is not None and not (self._coming.failed or self._coming.arrived):
            due.append(self._coming.due_ns)
        elif self._coming is None and self._refused and self._next() is not None:
            due.append(min(self._refused.values()))
        return min(due, default=0)

    def runs(self) -> list[TableRun]:
        """Blocks of this instance's lease that are of no table, as plans in flight may read them."""
        return [run for loan in self._loans.values() for run in loan.kept]

    # What is too long for this pool

    def takes(self, start: Start) -> bool:
        """Could this pool and what peers lend hold such a sequence? Asked if the pool alone cannot."""
        parts = self._parts
        if not self._able or start.role is not Role.WHOLE:
            return False
        blocks = parts.spec.blocks_for(start.total + start.emits_max)
        # Two partitions, that one of them is complete whatever the other is at, and the steps in flight.
        least = parts.spec.blocks_for(2 * parts.config.partition_tokens + 2 * parts.config.tokens_max)
        lenders = [p for p in self._peers.values() if self._lends(p)]
        lent = {p.pool: [int(parts.config.lend_share * n) for n in p.blocks_total] for p in lenders}
        for group, own in enumerate(parts.memory.blocks_total):
            others = sum(share[group] // self._each * self._each for share in lent.values())
            if own < least or own + others < blocks:
                return False
        return True

    def _lends(self, peer: InstanceInfo) -> bool:
        return peer.pool != self._info.pool and peer.host == self._info.host

    # Messages

    def lent(self, source: Address, message: Lent, now_ns: int) -> None:
        loan = self._current(source, message.loan)
        if loan is None or loan.stage is not Stage.ASKED:
            return
        loan.stage = Stage.WRITING
        self._steps = self._parts.scheduler.retired
        loan.due_ns = now_ns + self._parts.config.lend_ns
        loan.table = tuple(TableRun(r.group, loan.at + r.at, r.first, r.count) for r in message.table)
        loan.session = self._parts.sending.lend(source, loan.sequence.key, message.slot, loan.table)

    def unlent(self, source: Address, message: Unlent, now_ns: int) -> None:
        loan = self._current(source, message.loan)
        if loan is not None:
            self._forget(loan)
            self._refused[source] = now_ns + self._parts.config.lend_retry_ns

    def holding(self, source: Address, message: Holding) -> None:
        loan = self._current(source, message.loan)
        if loan is not None:
            loan.arrived = True

    def called_in(self, source: Address, message: CallIn) -> None:
        loan = self._loans.get(message.loan)
        if loan is not None and loan.holder == source:
            self._start_over(loan)

    def is_about(self, key: SequenceKey) -> bool:
        return key.request < 0

    def written(self, failed: bool) -> None:
        """A write to a holder has ended."""
        if failed and self._coming is not None:
            self._fail(self._coming)

    def lost(self, peer: Address) -> None:
        """A peer has ended."""
        self._refused.pop(peer, None)
        for loan in [loan for loan in self._loans.values() if loan.holder == peer]:
            self._start_over(loan)

    # The sequence

    def freed(self, sequence: Sequence) -> None:
        """It has left the batch, no plan that names it and no write from its blocks is in flight: repay all."""
        for loan in [loan for loan in self._loans.values() if loan.sequence is sequence]:
            self._parts.memory.put_back(loan.kept)
            self._repay(loan)

    def settle(self, now_ns: int) -> None:
        """Go on with the loan on the way, and see who needs the next one."""
        if not self._able:
            return
        parts = self._parts
        for loan in self._loans.values():
            if loan.kept and loan.until <= parts.scheduler.retired:
                parts.memory.put_back(loan.kept)
                loan.kept = []
                parts.scheduler.changed = True
        if any(parts.memory.need) and parts.memory.short:
            self._give_way()
        if self._coming is not None:
            self._go_on(self._coming, now_ns)
        if self._coming is None:
            self._ask(now_ns)

    def give_up(self, now_ns: int) -> None:
        """After planning: has something stood still for too long?"""
        parts, scheduler = self._parts, self._parts.scheduler
        stands = not scheduler.inflight and not scheduler.stopping and any(parts.memory.need)
        long = [s for s in scheduler.running if s.long] if self._able and stands else []
        if not long:
            self._patience_ns = 0
        elif not self._patience_ns:
            self._patience_ns = now_ns + parts.config.lend_wait_ns
        elif self._patience_ns <= now_ns:
            self._patience_ns = 0
            self._leaving.fail(long[-1], "no peer lends memory for so long a context", now_ns, retry=True)

    # One loan

    def _ask(self, now_ns: int) -> None:
        sequence = self._next()
        again = {a: self._refused.get(a, 0) for a, info in self._peers.items() if self._lends(info)}
        able = [a for a, at_ns in again.items() if at_ns <= now_ns]
        if sequence is None or not able:
            return
        self._number += 1
        due_ns = now_ns + self._parts.config.lend_ns
        loan = Loan(
            self._number, sequence, min(able, key=lambda a: (again[a], a)), sequence.trimmed[0], due_ns
        )
        self._coming = self._loans[loan.number] = loan
        self._parts.send(loan.holder, Borrow(loan.number, self._each, sequence.arrival_ns, sequence.key))

    def _give_way(self) -> None:
        """What is older comes first: see `nodes.lending`."""
        scheduler = self._parts.scheduler
        oldest = min((s.age for s in scheduler.waiting), default=None)
        for sequence in [s for s in scheduler.running if s.long and oldest is not None and s.age > oldest]:
            scheduler.stop(sequence, ends=False)

    def _next(self) -> Sequence | None:
        """Who has filled half of the pool, and can move a partition out."""
        parts = self._parts
        for sequence in parts.scheduler.running:
            at = sequence.trimmed[0]
            done = sequence.computed // parts.spec.block_size
            filled = 2 * (len(sequence.tables[0]) - at) >= parts.memory.blocks_total[0]
            if sequence.long and at + self._each <= done and (filled or any(parts.memory.need)):
                return None if parts.sending.busy(loan_key(sequence.key)) else sequence
        return None

    def _go_on(self, loan: Loan, now_ns: int) -> None:
        sequence, session, parts = loan.sequence, loan.session, self._parts
        if sequence.status is not Status.RUNNING:
            self._fail(loan)
        elif loan.due_ns <= now_ns and not loan.arrived:
            self._refused[loan.holder] = now_ns + parts.config.lend_retry_ns
            self._fail(loan)
        if loan.failed:
            if session is None or session.quiet:
                self._repay(loan)
            return
        if session is None:
            return
        if loan.arrived and session.quiet:
            self._move_out(loan)
            return
        steps, self._steps = parts.scheduler.retired - self._steps, parts.scheduler.retired
        hurry = any(parts.memory.need) or not parts.scheduler.inflight
        more = self._each if hurry else min(steps * parts.config.lend_blocks_step, self._each - loan.sent)
        if more and loan.sent < self._each:
            loan.sent = min(self._each, loan.sent + more)
            parts.sending.push(sequence, session, loan.at + loan.sent)

    def _move_out(self, loan: Loan) -> None:
        sequence, parts = loan.sequence, self._parts
        parts.sending.keep(loan_key(sequence.key))
        loan.stage, loan.session = Stage.HELD, None
        loan.kept = parts.memory.lend(sequence, loan.at, self._each)
        loan.until = sequence.last_step
        self._coming = None
        self._patience_ns = 0
        parts.scheduler.move_out(Elsewhere(sequence.key, loan.holder, loan.table))

    def _fail(self, loan: Loan) -> None:
        """It comes to nothing: write nothing more."""
        loan.failed = True
        self._parts.sending.stop(loan_key(loan.sequence.key))

    def _start_over(self, loan: Loan) -> None:
        """What lies there is lost, or to be given back."""
        if loan is self._coming:
            self._fail(loan)
        elif loan.sequence.status is Status.RUNNING:
            self._parts.scheduler.stop(loan.sequence, ends=False)

    def _repay(self, loan: Loan) -> None:
        self._forget(loan)
        if loan.holder in self._peers:
            self._parts.send(loan.holder, Repay(loan.number))

    def _forget(self, loan: Loan) -> None:
        if loan.session is not None:
            self._parts.sending.keep(loan_key(loan.sequence.key))
        del self._loans[loan.number]
        if loan is self._coming:
            self._coming = None

    def _current(self, source: Address, number: int) -> Loan | None:
        """The loan on the way, if this is it."""
        loan = self._coming
        return loan if loan is not None and (loan.holder, loan.number) == (source, number) else None
