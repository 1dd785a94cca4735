"""An instance's share of a pool: what it leases, what its sequences' tables hold of it, and when to ask for more.

The instance sub-allocates from bulk leases, so no message stands in a step. `need` is what work waits for; beyond it `lease_blocks` are
kept in hand (low water), and what exceeds four times that goes back (high water). Under pressure (another holder is short) nothing spare
is kept.
"""

from collections.abc import Iterable

from headrace.engine.sequence import Sequence
from headrace.kv.pool import first_block_needed
from headrace.kv.segments import Segments
from headrace.types.ids import PoolId
from headrace.types.kv import BlockRun, GroupKind, KVSpec, TableRun, id_runs, table_runs
from headrace.types.messages import Lease, Leased, Publish, Return, Role, Trim


class Memory:
    """Block accounting of one instance. Counts are blocks per group."""

    def __init__(self, spec: KVSpec, pool: PoolId, blocks_total: tuple[int, ...], lease_blocks: int) -> None:
        self.spec = spec
        self.pool = pool
        self.blocks_total = blocks_total
        self.spare = [Segments() for _ in blocks_total]
        self.pool_free = list(blocks_total)
        """Free or evictable in the pool as last heard."""
        self.short = False
        """The pool could not meet our need and will send more when it can."""
        self.pressed = False
        """Another holder is short."""
        self.need = [0] * len(blocks_total)
        """What work waited for when the last step was planned, beyond `spare`."""
        self.since_ns = 0
        """Arrival of the request that waited."""
        self._lease_blocks = lease_blocks
        self.wish = [0] * len(blocks_total)
        """What is asked for once if it is not in hand, and can be done without."""
        self.awaits = False
        """Something was given up while we were short, and the pool has not said yet what that changes."""
        self._asked: tuple[tuple[int, ...], int] | None = None
        """Need and age of the request that the pool knows of."""

    @property
    def used(self) -> float:
        """Share of the pool that is in use, 0..1, as far as is known."""
        free = sum(s.total + f for s, f in zip(self.spare, self.pool_free, strict=True))
        return 1 - min(1.0, free / sum(self.blocks_total))

    # Tables

    def missing(self, sequence: Sequence, tokens: int) -> list[int]:
        """Blocks to add per group so that the table covers `tokens` tokens."""
        blocks = self.spec.blocks_for(tokens)
        return [max(0, blocks - len(table)) for table in sequence.tables]

    def demand(self, tokens: int, chunk: int) -> list[int]:
        """Blocks per group that a sequence of `tokens` tokens holds at most, computed in chunks of at most `chunk`."""
        whole = self.spec.blocks_for(tokens)
        # A window and a chunk may begin anywhere in a block.
        near = [self.spec.blocks_for(g.window + chunk) + 1 if g.window else whole for g in self.spec.groups]
        return [min(whole, n) for n in near]

    def missing_at_start(self, sequence: Sequence, chunk: int) -> list[int]:
        """Blocks to begin with: all that is known in full groups (so that it lies in one piece), the first `chunk` tokens in windows.

        What is received needs all its blocks at once.
        """
        if sequence.role is Role.DECODE:
            return self.missing(sequence, sequence.total)
        near = self.missing(sequence, min(sequence.total, max(sequence.scheduled, sequence.kept) + chunk))
        if sequence.long:
            return near
        whole = self.missing(sequence, sequence.total)
        return [
            w if g.kind is GroupKind.FULL else n
            for g, w, n in zip(self.spec.groups, whole, near, strict=True)
        ]

    def covers(self, blocks: list[int]) -> bool:
        """Is that much in hand?"""
        return all(n <= s.total for n, s in zip(blocks, self.spare, strict=True))

    def covered(self, sequence: Sequence) -> int:
        """Tokens for which the tables have blocks."""
        tables = sequence.tables
        blocks = len(tables[0]) if len(tables) == 1 else min(map(len, tables))
        return blocks * self.spec.block_size

    def grow(self, sequence: Sequence, blocks: list[int]) -> None:
        """Append blocks in hand to the sequence's tables."""
        assert self.covers(blocks)
        for table, spare, count in zip(sequence.tables, self.spare, blocks, strict=True):
            if count:
                near = table[-1] + 1 if table else -1
                for first, size in spare.take(count, near):
                    table.extend(range(first, first + size))

    def extend(self, sequence: Sequence) -> None:
        """Append one block in hand to each table: a running sequence's tables are of one length."""
        for table, spare in zip(sequence.tables, self.spare, strict=True):
            table.append(spare.take(1, table[-1] + 1)[0][0])

    def adopt(self, sequence: Sequence, table: tuple[TableRun, ...], covered: list[int]) -> None:
        """Put runs that the pool named into the sequence's tables, in order. They cover so many leading blocks per group, of which those
        before a table's first run (all, if a window needs none) are absent.
        """
        for run in table:
            blocks = sequence.tables[run.group]
            if not blocks:
                blocks.extend([-1] * run.at)
                sequence.trimmed[run.group] = run.at
            assert len(blocks) == run.at
            blocks.extend(range(run.first, run.first + run.count))
        for group, count in enumerate(covered):
            if not sequence.tables[group]:
                sequence.tables[group] = [-1] * count
                sequence.trimmed[group] = count

    def private(self, sequence: Sequence) -> list[TableRun]:
        """The runs of a sequence that are of this instance's lease."""
        runs: list[TableRun] = []
        for group, table in enumerate(sequence.tables):
            at = max(sequence.published[group], sequence.trimmed[group])
            runs += table_runs(group, at, table[at:])
        return runs

    def free(self, sequence: Sequence) -> None:
        """Take the private blocks back in hand and empty the tables. The pool still has to be told to release the published ones."""
        for run in self.private(sequence):
            self.spare[run.group].add(run.first, run.count)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Empty the tables of a sequence whose blocks are somebody else's now."""
        for group in range(len(self.spare)):
            sequence.tables[group] = []
            sequence.published[group] = 0
            sequence.trimmed[group] = 0

    def publish(self, sequence: Sequence) -> Publish | None:
        """What can be published now: full blocks whose KV exists, is what their hash says, and whose hash is known."""
        if not sequence.caches:
            return None
        named = sequence.computed if sequence.genuine is None else min(sequence.computed, sequence.genuine)
        full = min(named // self.spec.block_size, len(sequence.hashes))
        runs: list[TableRun] = []
        for group, table in enumerate(sequence.tables):
            at = max(sequence.published[group], sequence.trimmed[group])
            if at < full:
                runs += table_runs(group, at, table[at:full])
                sequence.published[group] = full
        if not runs:
            return None
        # With the hash before them, so that the pool knows what they hang on.
        first = max(0, min(run.at for run in runs) - 1)
        return Publish(sequence.key, tuple(runs), tuple(sequence.hashes[first:full]), first)

    def trim(self, sequence: Sequence, tokens: int) -> list[Trim]:
        """Give back what windows have passed: blocks that no token from position `tokens` on attends to."""
        trims: list[Trim] = []
        for group, g in enumerate(self.spec.groups):
            below = first_block_needed(g.window, tokens, self.spec.block_size)
            at = sequence.trimmed[group]
            if below <= at:
                continue
            table = sequence.tables[group]
            for first, count in id_runs(table[max(at, sequence.published[group]) : below]):
                self.spare[group].add(first, count)
            if at < sequence.published[group]:
                trims.append(Trim(sequence.key, group, min(below, sequence.published[group])))
            table[at:below] = [-1] * (below - at)
            sequence.trimmed[group] = below
            sequence.published[group] = max(sequence.published[group], below)
        return trims

    def headroom(self) -> int:
        """Blocks by which tables may grow (in every group) before more would be asked for; negative: it is asked for now."""
        low = 0 if self.pressed or self._asked is not None else self._lease_blocks // 2
        room: list[int] = []
        for spare, free, need in zip(self.spare, self.pool_free, self.need, strict=True):
            # What is above the high water is given back at once.
            kept = min(spare.total, self._kept(need))
            room.append(kept - (low if free or kept < spare.total else 0))
        return min(room)

    def lend(self, sequence: Sequence, at: int, count: int) -> list[TableRun]:
        """The sequence's next leading blocks are to be elsewhere: take them out of its tables. The caller puts them back in hand."""
        runs: list[TableRun] = []
        for group, table in enumerate(sequence.tables):
            assert sequence.trimmed[group] == at and not sequence.published[group]
            runs += table_runs(group, at, table[at : at + count])
            table[at : at + count] = [-1] * count
            sequence.trimmed[group] = at + count
        return runs

    def put_back(self, runs: Iterable[TableRun]) -> None:
        """These are of no use to anybody any more."""
        for run in runs:
            self.spare[run.group].add(run.first, run.count)

    # The lease

    def _kept(self, need: int) -> int:
        """High water: what is above it goes back. Never what was asked for ahead: running sequences take of it before `need` is met."""
        return need if self.pressed else max(need + self._lease_blocks, 4 * self._lease_blocks)

    def leased(self, message: Leased) -> None:
        for run in message.runs:
            self.spare[run.group].add(run.first, run.count)
        self.short, self.awaits = message.short, False
        self.pool_free = list(message.free)
        if not message.short:
            self._asked = None

    def ask_again(self) -> None:
        """A sequence gave up what it had. That may free too little (others share its blocks): then the pool would say nothing, but its
        answer to a repeated request lets the next sequence be stopped.
        """
        if self.short:
            self._asked, self.awaits = None, True

    def exceeds(self) -> bool:
        """Is more in hand than is kept?"""
        return any(s.total > self._kept(n) for s, n in zip(self.spare, self.need, strict=True))

    def messages(self) -> tuple[Return | Lease, ...]:
        """What to say to the pool now."""
        if not self.short and len(self.spare) == 1 and not self.wish[0]:
            spare, need = self.spare[0].total, self.need[0]
            low = not self.pressed and self._asked is None and self.pool_free[0] > 0
            if need <= spare <= self._kept(need) and not (low and spare < self._lease_blocks // 2):
                return ()
        return tuple(m for m in (self.surplus(), self.request()) if m is not None)

    def request(self) -> Lease | None:
        """What to ask of the pool now; None if enough is in hand or the same was asked already."""
        need = tuple(max(0, n - s.total) for n, s in zip(self.need, self.spare, strict=True))
        ahead = 0 if self.pressed else self._lease_blocks
        # Where the pool had nothing left, asking again for more than is needed would go on for ever.
        low = any(s.total < ahead // 2 and f for s, f in zip(self.spare, self.pool_free, strict=True))
        if not any(need) and self.short:
            self.short = False
            self._asked = None
            return Lease(need, need)
        wish = any(w > s.total for w, s in zip(self.wish, self.spare, strict=True))
        if not any(need) and not low and not wish:
            return None
        if self._asked is not None and (not any(need) or (need, self.since_ns) == self._asked):
            return None
        self._asked = (need, self.since_ns)
        most = zip(self.need, self.wish, self.spare, strict=True)
        want = tuple(max(0, n + ahead - s.total, w - s.total) for n, w, s in most)
        self.wish = [0] * len(want)
        return Lease(need, want, self.since_ns)

    def surplus(self) -> Return | None:
        """What to give back now, keeping what work waits for."""
        runs: list[BlockRun] = []
        for group, segments in enumerate(self.spare):
            excess = segments.total - self._kept(self.need[group])
            if excess > 0:
                self.pool_free[group] += excess
                runs += [BlockRun(self.pool, group, first, count) for first, count in segments.take(excess)]
        return Return(tuple(runs)) if runs else None
