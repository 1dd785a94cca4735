"""A pool under everything that its holders may do: no block is ever lost, or owned twice."""

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.kv.evict import lru
from headrace.kv.pool import BlockPool, first_block_needed
from headrace.types.ids import Address, BlockHash, PoolId, RequestId, SequenceKey
from headrace.types.kv import BlockRun, GroupKind, KVGroup, KVSpec, TableRun, table_runs

SIZE = 2
SPEC = KVSpec(
    (KVGroup(GroupKind.FULL, (0,), 1, 8), KVGroup(GroupKind.WINDOW, (1,), 1, 8, window=4)), SIZE, "float32"
)
BLOCKS = (14, 10)
PICK = st.integers(0, 99)


@dataclass(eq=False)
class Held:
    """A sequence at its holder: tables by group, as the instance keeps them."""

    holder: Address
    key: SequenceKey
    text: str
    tables: list[list[int]] = field(default_factory=lambda: [[], []])
    published: list[int] = field(default_factory=lambda: [0, 0])
    trimmed: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        return tuple(BlockHash(self.text[: i + 1].encode()) for i in range(len(self.text)))


class Holders(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(PoolId(0), SPEC, BLOCKS, lru.Policy(lru.Config()))
        self.now_ns = 0
        self.epochs = {"a": 0, "b": 0}
        self.spare: dict[Address, list[list[int]]] = {}
        self.held: list[Held] = []
        self.dead: list[Address] = []
        self.serial = 0
        for name in self.epochs:
            self.join(Address(name))

    def join(self, holder: Address) -> None:
        self.pool.join(holder)
        self.spare[holder] = [[], []]

    def holder(self, pick: int) -> Address:
        return list(self.spare)[pick % len(self.spare)]

    @rule(pick=PICK, group=st.integers(0, 1), count=st.integers(0, 6))
    def grant(self, pick: int, group: int, count: int) -> None:
        before = self.pool.available()[group]
        runs = self.pool.grant(self.holder(pick), group, count)
        blocks = [b for run in runs for b in range(run.first, run.first + run.count)]
        assert len(blocks) == min(count, before)
        self.spare[self.holder(pick)][group] += blocks

    @rule(pick=PICK, group=st.integers(0, 1))
    def take_back(self, pick: int, group: int) -> None:
        spare = self.spare[self.holder(pick)][group]
        if spare:
            self.pool.take_back(self.holder(pick), (BlockRun(PoolId(0), group, spare.pop(), 1),))

    @rule(pick=PICK, text=st.text("ab", min_size=1, max_size=5))
    def match(self, pick: int, text: str) -> None:
        self.serial += 1
        held = Held(self.holder(pick), SequenceKey(RequestId(self.serial)), text)
        tokens, table = self.pool.match(held.holder, held.key, held.hashes, len(text) * SIZE, self.now_ns)
        for run in table:
            held.tables[run.group] = [-1] * run.at + list(range(run.first, run.first + run.count))
            held.trimmed[run.group] = run.at
        held.published = [len(t) for t in held.tables]
        assert held.published == ([tokens // SIZE] * 2 if tokens else [0, 0])
        self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(pick=PICK, count=st.integers(1, 4))
    def grow(self, pick: int, count: int) -> None:
        held = self.held[pick % len(self.held)]
        for group, spare in enumerate(self.spare[held.holder]):
            while spare and len(held.tables[group]) < min(held.published[0] + count, len(held.text) + 1):
                held.tables[group].append(spare.pop(0))

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def publish(self, pick: int) -> None:
        held = self.held[pick % len(self.held)]
        full = min(len(held.text), *map(len, held.tables))
        runs: list[TableRun] = []
        for group, table in enumerate(held.tables):
            at = held.published[group]
            runs += table_runs(group, at, table[at:full]) if at < full else []
            held.published[group] = max(at, full)
        if runs:
            self.pool.publish(held.holder, held.key, tuple(runs), held.hashes[:full])
        below = first_block_needed(4, full * SIZE, SIZE)
        if held.trimmed[1] < below:
            self.pool.trim(held.holder, held.key, 1, below, self.now_ns)
            held.tables[1][:below] = [-1] * below
            held.trimmed[1] = below

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        held = self.held.pop(pick % len(self.held))
        self.pool.release(held.holder, held.key, self.now_ns)
        for group, table in enumerate(held.tables):
            self.spare[held.holder][group] += table[held.published[group] :]

    @precondition(lambda self: self.held and len(self.spare) > 1)
    @rule(pick=PICK)
    def hand_over(self, pick: int) -> None:
        held = self.held[pick % len(self.held)]
        target = next(h for h in self.spare if h != held.holder)
        private = [
            run
            for g, table in enumerate(held.tables)
            for run in table_runs(g, held.published[g], table[held.published[g] :])
        ]
        table, published = self.pool.hand_over(held.holder, target, held.key, tuple(private))
        told = {(r.group, r.at + i): r.first + i for r in table for i in range(r.count)}
        own = {(g, i): b for g, t in enumerate(held.tables) for i, b in enumerate(t) if b >= 0}
        assert told.keys() == own.keys() and list(published) == held.published
        held.holder = target

    @precondition(lambda self: len(self.spare) > 1)
    @rule(pick=PICK)
    def die(self, pick: int) -> None:
        holder = self.holder(pick)
        self.pool.forget(holder, self.now_ns)
        del self.spare[holder]
        self.held = [h for h in self.held if h.holder != holder]
        self.dead.append(holder)
        self.epochs[holder.name] += 1
        self.join(Address(holder.name, self.epochs[holder.name]))

    @precondition(lambda self: self.dead)
    @rule()
    def quiet(self) -> None:
        self.pool.end_quarantine(self.dead.pop(0))

    @invariant()
    def audit(self) -> None:
        self.now_ns += 1
        self.pool.audit()
        for group, total in enumerate(BLOCKS):
            leased = sum(lease[group].total for lease in self.pool.leases.values())
            waiting = sum(lease[group].total for lease in self.pool.quarantine.values())
            copies = sum(not e.indexed for h in self.pool.handles.values() for e in h[group].entries)
            published = len(self.pool.trees[group]) + copies
            assert self.pool.free[group].total + leased + waiting + published == total

    def teardown(self) -> None:
        while self.held:
            self.leave(0)
        for holder, lists in self.spare.items():
            for group, spare in enumerate(lists):
                self.pool.take_back(holder, tuple(BlockRun(PoolId(0), group, b, 1) for b in spare))
        while self.dead:
            self.quiet()
        assert self.pool.available() == BLOCKS and not self.pool.handles
        self.pool.audit()


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=80, stateful_step_count=40)
