"""The holder's half of lending memory: blocks for one partition of a peer's sequence. See `nodes.borrowing` for the owner's half.

Life cycle of a loan here:
 1. `Borrow`: WANTED until the blocks are in hand. If there are too few, or somebody here has the older claim, or time is up: `Unlent`.
 2. `Lent`: the blocks are taken from what is in hand, and a slot counts what lands in them.
 3. `Holding`: all has landed. The owner's executor asks this one's for partial results over them; no core is part of that.
 4. Over by `Repay`, at any of these, which the owner says when it neither reads nor writes there any more, or when the owner has ended.
Between sequences of several instances the age of their requests decides, as in a pool (`nodes.pool`), so no circle of lenders waits for
itself: who asks gets nothing while an older one lacks memory or waits here; a younger long one that runs here is stopped for it; where
nothing runs, a younger one that only sits here (held for a decode instance, or waiting for what a prefill instance may have no memory to
compute) is given up for it; and if an older one here is short, the youngest loan to a younger one is called in (`CallIn`), one at a time.
What gives way for a loan is not taken by somebody younger: nobody younger is admitted while the asker waits (`Scheduler.oldest`).
"""

from dataclasses import dataclass

from headrace.engine.sequence import Sequence, Status
from headrace.nodes.leaving import Leaving
from headrace.nodes.parts import Parts
from headrace.nodes.standstill import sits
from headrace.types.ids import Address, RequestId, SequenceKey, Slot
from headrace.types.kv import TableRun, table_runs
from headrace.types.lending import Borrow, CallIn, Holding, Lent, Repay, Unlent
from headrace.types.messages import Refused

Name = tuple[Address, int]
"""The owner, and its number of the loan."""


Age = tuple[int, SequenceKey]
"""Arrival, and what decides between two of one arrival."""


@dataclass(slots=True)
class Wanted:
    age: Age
    blocks: int
    due_ns: int
    answered: bool = False
    """The pool has given what it has, and nothing has become free since: it need not be asked again."""


@dataclass(slots=True)
class Given:
    age: Age
    table: tuple[TableRun, ...]
    slot: Slot | None
    """None once all has landed."""
    called: bool = False


class Lending:
    """`draining`: see `Instance`. `leaving` is given before anything happens."""

    def __init__(self, parts: Parts, share: float) -> None:
        self._parts = parts
        self._most = [int(share * n) for n in parts.memory.blocks_total]
        self._wanted: dict[Name, Wanted] = {}
        self._given: dict[Name, Given] = {}
        self._slots: dict[Slot, Name] = {}
        self._count = 0
        self.draining = False
        self.leaving: Leaving

    @property
    def idle(self) -> bool:
        return not (self._wanted or self._given)

    def due_ns(self) -> int:
        """The next timer; 0: none."""
        return min((w.due_ns for w in self._wanted.values()), default=0)

    def runs(self) -> list[TableRun]:
        """All that is lent: of this instance's lease, and of nobody's table here."""
        return [run for given in self._given.values() for run in given.table]

    def lent_to(self, owner: Address) -> list[TableRun]:
        """What this owner may read."""
        return [run for name, given in self._given.items() if name[0] == owner for run in given.table]

    # Messages

    def asked(self, owner: Address, message: Borrow, now_ns: int) -> None:
        self._wanted[owner, message.loan] = Wanted(
            (message.since_ns, message.key), message.blocks, now_ns + self._parts.config.lend_ns
        )

    def repaid(self, owner: Address, message: Repay) -> None:
        self._wanted.pop((owner, message.loan), None)
        self._end((owner, message.loan))

    def landed(self, slot: Slot, weight: int) -> bool:
        """False: that is no slot of a loan."""
        name = self._slots.get(slot)
        if name is None:
            return False
        if self._parts.receiving.count(slot, weight):
            self._close(slot)
            self._given[name].slot = None
            self._parts.send(name[0], Holding(name[1]))
        return True

    def leased(self, now_ns: int) -> None:
        """The pool has given what it has: who is not served by it is not served."""
        for name, wanted in list(self._wanted.items()):
            if not self._serve(name, wanted):
                wanted.answered = True
                self._make_room(name, wanted, now_ns)

    def freed(self) -> None:
        """Somebody has left memory, here or in the pool."""
        for wanted in self._wanted.values():
            wanted.answered = False

    def lost(self, owner: Address) -> None:
        """It reads and writes nothing any more."""
        for name in [n for n in self._wanted if n[0] == owner]:
            del self._wanted[name]
        for name in [n for n in self._given if n[0] == owner]:
            self._end(name)

    def serve(self) -> None:
        """Before planning: what somebody younger here would take."""
        for name, wanted in list(self._wanted.items()):
            self._serve(name, wanted)
        self._bar()

    def settle(self, now_ns: int) -> bool:
        """Serve who can be served, and say what is wished of the pool. True: some who were not admitted may be now."""
        memory, scheduler = self._parts.memory, self._parts.scheduler
        for name, wanted in list(self._wanted.items()):
            if wanted.due_ns <= now_ns or not self._may(wanted):
                self._refuse(name)
            elif self._serve(name, wanted):
                continue
            elif memory.short or not self._within(wanted):
                self._make_room(name, wanted, now_ns)
            elif not wanted.answered:
                memory.wish = [max(wish, wanted.blocks) for wish in memory.wish]
        if memory.short and any(memory.need):
            claims = [s.age for s in (*scheduler.running, *scheduler.waiting)]
            if claims:
                self._call_in(min(claims))
        return self._bar()

    # What comes of it

    def _bar(self) -> bool:
        """Nobody younger is admitted while somebody's loan waits for what becomes free. True: somebody may be now who was not."""
        scheduler = self._parts.scheduler
        before = scheduler.oldest
        scheduler.oldest = min((w.age for w in self._wanted.values()), default=None)
        return before is not None and (scheduler.oldest is None or scheduler.oldest > before)

    def _may(self, wanted: Wanted) -> bool:
        """Has nobody here an older claim?"""
        memory, scheduler = self._parts.memory, self._parts.scheduler
        if self.draining or memory.pressed or any(s.age < wanted.age for s in scheduler.waiting):
            return False
        return not (any(memory.need) and any(s.age < wanted.age for s in scheduler.running))

    def _within(self, wanted: Wanted) -> bool:
        """Is so much for lending at all?"""
        lent = [0] * len(self._most)
        for run in self.runs():
            lent[run.group] += run.count
        return all(n + wanted.blocks <= most for n, most in zip(lent, self._most, strict=True))

    def _serve(self, name: Name, wanted: Wanted) -> bool:
        memory = self._parts.memory
        room = self._within(wanted) and memory.covers([wanted.blocks] * len(memory.spare))
        if not room or not self._may(wanted):
            return False
        del self._wanted[name]
        runs: list[TableRun] = []
        for group, spare in enumerate(memory.spare):
            taken = spare.take(wanted.blocks)
            runs += table_runs(group, 0, [block for first, n in taken for block in range(first, first + n)])
        self._count += 1
        # Counted under a key that no sequence has.
        slot = self._parts.receiving.open(SequenceKey(RequestId(-self._count)), wanted.blocks, name[0])
        self._slots[slot] = name
        self._given[name] = Given(wanted.age, tuple(runs), slot)
        self._parts.send(name[0], Lent(name[1], slot, tuple(runs)))
        return True

    def _refuse(self, name: Name) -> None:
        del self._wanted[name]
        self._parts.send(name[0], Unlent(name[1]))

    def _make_room(self, name: Name, wanted: Wanted, now_ns: int) -> None:
        """There is nothing left: a younger loan is called in, or a sequence of ours that is younger gives way."""
        scheduler, sequences = self._parts.scheduler, self._parts.sequences.values()
        giving = [s for s in sequences if s.status in (Status.STOPPING, Status.FENCING)]
        if self._call_in(wanted.age) or any(s.long or not scheduler.running for s in giving):
            return
        younger = [s for s in scheduler.running if s.long and s.age > wanted.age]
        idle = [s for s in sequences if sits(s, self._parts.sending) and any(s.tables) and s.age > wanted.age]
        if younger and self._within(wanted):
            scheduler.stop(max(younger, key=_age), ends=False)
        elif idle and self._within(wanted) and not (scheduler.running or scheduler.loading):
            stuck = max(idle, key=_age)
            self._parts.send(self._parts.router, Refused(stuck.key, "memory is short"))
            self.leaving.drop(stuck, now_ns)
        else:
            self._refuse(name)

    def _call_in(self, age: Age) -> bool:
        """The youngest loan to somebody younger than this, one at a time. False: there is none."""
        younger = [name for name, given in self._given.items() if given.age > age]
        if younger and not any(given.called for given in self._given.values()):
            name = max(younger, key=lambda n: (self._given[n].age, n))
            self._given[name].called = True
            self._parts.send(name[0], CallIn(name[1]))
        return bool(younger)

    def _end(self, name: Name) -> None:
        given = self._given.pop(name, None)
        if given is None:
            return
        if given.slot is not None:
            self._close(given.slot)
        self._parts.memory.put_back(given.table)
        self._parts.scheduler.changed = True
        self.freed()

    def _close(self, slot: Slot) -> None:
        self._parts.receiving.shut(slot)
        del self._slots[slot]


def _age(sequence: Sequence) -> Age:
    return sequence.age
