"""Who owns which block of one pool: free, leased to an instance, published (locked or cached), or in quarantine.

Every block is in exactly one of these. Instances lease extents in bulk and sub-allocate from them; full blocks whose step has retired are
published into the prefix index and locked by their sequence's handle; when the last lock goes they stay as cache until evicted.
"""

from dataclasses import dataclass, field

from headrace.kv.segments import Segments
from headrace.kv.tree import Entry, Eviction, PrefixTree
from headrace.types.ids import Address, BlockHash, PoolId, SequenceKey
from headrace.types.kv import BlockRun, GroupKind, KVSpec, TableRun, table_runs

Holding = tuple[Address, SequenceKey]


@dataclass(slots=True)
class Locks:
    """A handle's locked entries of one group: logical blocks `at`, `at + 1`, ..."""

    at: int = 0
    entries: list[Entry] = field(default_factory=list[Entry])

    @property
    def end(self) -> int:
        return self.at + len(self.entries)


class BlockPool:
    """All state of one pool. Holders are incarnations of instances."""

    def __init__(self, pool: PoolId, spec: KVSpec, blocks: tuple[int, ...], eviction: Eviction) -> None:
        assert len(blocks) == len(spec.groups)
        self.pool = pool
        self.spec = spec
        self.blocks = blocks
        self.free = [Segments() for _ in blocks]
        for segments, count in zip(self.free, blocks, strict=True):
            segments.add(0, count)
        self.trees = [PrefixTree(eviction, rooted=g.kind is GroupKind.FULL) for g in spec.groups]
        self.leases: dict[Address, list[Segments]] = {}
        self.handles: dict[Holding, list[Locks]] = {}
        self.quarantine: dict[Address, list[Segments]] = {}
        self.away = [Segments() for _ in blocks]
        """On their way to a tier below, or from there: nobody's."""
        self.evicted: list[BlockHash] | None = None
        """If somebody wants to know: what was dropped from the index to lease its block."""

    def tell_changes(self) -> None:
        """From now on `changes` says what enters and leaves the index."""
        self._listened.changes = {}

    def changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """What has entered the index, and what has left it, since this was asked last.

        Of the first full group: of a window group only the last blocks of a prefix are kept, so it says little of what can be served.
        """
        changes = self._listened.changes
        if not changes:
            return (), ()
        entered = tuple(name for name, is_in in changes.items() if is_in)
        left = tuple(name for name, is_in in changes.items() if not is_in)
        changes.clear()
        return entered, left

    @property
    def _listened(self) -> PrefixTree:
        kinds = [g.kind for g in self.spec.groups]
        return self.trees[kinds.index(GroupKind.FULL) if GroupKind.FULL in kinds else 0]

    def available(self) -> tuple[int, ...]:
        """Blocks that are free or evictable, per group; not what is on its way to a tier or from there."""
        return tuple(f.total + t.evictable for f, t in zip(self.free, self.trees, strict=True))

    # Leases

    def join(self, holder: Address) -> None:
        assert holder not in self.leases
        self.leases[holder] = [Segments() for _ in self.blocks]

    def grant(self, holder: Address, group: int, count: int) -> list[BlockRun]:
        """Lease up to `count` blocks, evicting cached ones if it must."""
        free, tree = self.free[group], self.trees[group]
        count = min(count, free.total + tree.evictable)
        self._free_up(group, count)
        runs = free.take(count)
        for first, size in runs:
            self.leases[holder][group].add(first, size)
        return [BlockRun(self.pool, group, first, size) for first, size in runs]

    def take_back(self, holder: Address, runs: tuple[BlockRun, ...]) -> None:
        for run in runs:
            self.leases[holder][run.group].remove(run.first, run.count)
            self.free[run.group].add(run.first, run.count)

    def forget(self, holder: Address, now_ns: int) -> None:
        """The holder's process has ended: its locks go, its unpublished blocks wait in quarantine for peers that may still write."""
        for holding in [h for h in self.handles if h[0] == holder]:
            self.release(holder, holding[1], now_ns)
        self.quarantine[holder] = self.leases.pop(holder)

    def end_quarantine(self, holder: Address) -> None:
        """Nobody can write into the dead holder's blocks any more."""
        for group, segments in enumerate(self.quarantine.pop(holder)):
            for first, count in segments.take_all():
                self.free[group].add(first, count)

    # Prefix index

    def match(
        self, holder: Address, key: SequenceKey, hashes: tuple[BlockHash, ...], limit: int, now_ns: int
    ) -> tuple[int, tuple[TableRun, ...]]:
        """Lock the longest prefix of at most `limit` tokens that every group can serve: its tokens, and where it lies."""
        assert (holder, key) not in self.handles
        blocks = self._longest(hashes[: limit // self.spec.block_size])
        if blocks == 0:
            return 0, ()
        handle: list[Locks] = []
        table: list[TableRun] = []
        for group, tree in enumerate(self.trees):
            at = self._first_needed(group, blocks)
            locks = Locks(at)
            for name in hashes[at:blocks]:
                entry = tree.get(name)
                assert entry is not None
                tree.lock(entry)
                entry.used_ns = now_ns
                locks.entries.append(entry)
            handle.append(locks)
            table += table_runs(group, at, [e.block for e in locks.entries])
        self.handles[(holder, key)] = handle
        return blocks * self.spec.block_size, tuple(table)

    def publish(
        self,
        holder: Address,
        key: SequenceKey,
        table: tuple[TableRun, ...],
        hashes: tuple[BlockHash, ...],
        first: int = 0,
    ) -> None:
        """Move full blocks from the lease into the index, locked by the handle. A second copy of a block in use serves this handle only.

        `hashes` are those of logical blocks from `first` on.
        """
        handle = self.handles.setdefault((holder, key), [Locks() for _ in self.blocks])
        for run in table:
            self.leases[holder][run.group].remove(run.first, run.count)
            locks, tree = handle[run.group], self.trees[run.group]
            if not locks.entries:
                locks.at = run.at
            assert locks.end == run.at, "a handle is published in order"
            for i in range(run.count):
                depth = run.at + i
                parent = hashes[depth - first - 1] if depth else None
                entry = Entry(run.first + i, hashes[depth - first], parent, depth, refs=1, uses=1)
                idle = tree.insert(entry)
                if idle is not None:
                    self.free[run.group].add(idle.block, 1)
                locks.entries.append(entry)

    def trim(self, holder: Address, key: SequenceKey, group: int, below: int, now_ns: int) -> None:
        """Drop the handle's locks on logical blocks before `below`: a window has passed them."""
        locks = self.handles[(holder, key)][group]
        count = min(max(below - locks.at, 0), len(locks.entries))
        for entry in locks.entries[:count]:
            self._unlock(group, entry, now_ns)
        del locks.entries[:count]
        locks.at += count

    def release(self, holder: Address, key: SequenceKey, now_ns: int) -> None:
        """Drop all locks of a handle; unknown handles (nothing was matched or published) are fine."""
        for group, locks in enumerate(self.handles.pop((holder, key), [])):
            for entry in locks.entries:
                self._unlock(group, entry, now_ns)

    def hand_over(
        self, source: Address, target: Address, key: SequenceKey, private: tuple[TableRun, ...]
    ) -> tuple[tuple[TableRun, ...], tuple[int, ...]]:
        """Move a handle and the sequence's unpublished blocks to another holder: the whole table, and the published blocks per group."""
        assert (target, key) not in self.handles
        handle = self.handles.pop((source, key), None)
        if handle is None:
            handle = [Locks() for _ in self.blocks]
        else:
            # An empty handle would never be released: to its holder, nothing is published.
            self.handles[(target, key)] = handle
        table: list[TableRun] = []
        for group, locks in enumerate(handle):
            table += table_runs(group, locks.at, [e.block for e in locks.entries])
        for run in private:
            self.leases[source][run.group].remove(run.first, run.count)
            self.leases[target][run.group].add(run.first, run.count)
            table.append(run)
        return tuple(table), tuple(locks.end for locks in handle)

    # Tiers below

    def demote(self) -> Entry:
        """Take the cached entry that the policy gives up first out of the index; its block is away. Only with one group."""
        (tree,) = self.trees
        entry = tree.take()
        self.away[0].add(entry.block, 1)
        return entry

    def make_room(self, count: int) -> list[int]:
        """Blocks that are away from now on, to be filled from a tier, at the cost of what is cached. At most what is available."""
        self._free_up(0, count)
        runs = self.free[0].take(count)
        for first, size in runs:
            self.away[0].add(first, size)
        return [block for first, size in runs for block in range(first, first + size)]

    def come_back(self, block: int) -> None:
        """Nothing reads or writes it any more: it is free."""
        self.away[0].remove(block, 1)
        self.free[0].add(block, 1)

    def promote(self, block: int, name: BlockHash, parent: BlockHash | None, depth: int, now_ns: int) -> bool:
        """Index a block that was filled from a tier, as cache. False: what it hangs on is not there, and it is free."""
        (tree,) = self.trees
        if parent is not None and tree.get(parent) is None:
            self.come_back(block)
            return False
        self.away[0].remove(block, 1)
        entry = Entry(block, name, parent, depth, refs=1)
        idle = tree.insert(entry)
        if idle is not None:
            self.free[0].add(idle.block, 1)
        self._unlock(0, entry, now_ns)
        return True

    def audit(self) -> None:
        """Every block has exactly one owner, and every index entry as many locks as handles say; else AssertionError."""
        for group, count in enumerate(self.blocks):
            owners: list[str] = [""] * count
            claims = [("free", first, size) for first, size in self.free[group].runs()]
            claims += [("away", first, size) for first, size in self.away[group].runs()]
            for holder, lease in self.leases.items():
                claims += [(f"leased to {holder}", first, size) for first, size in lease[group].runs()]
            for holder, lease in self.quarantine.items():
                claims += [
                    (f"in quarantine after {holder}", first, size) for first, size in lease[group].runs()
                ]
            locks: dict[int, int] = {}
            for handle in self.handles.values():
                for entry in handle[group].entries:
                    locks[entry.block] = locks.get(entry.block, 0) + 1
                    if not entry.indexed:
                        claims.append(("a second copy", entry.block, 1))
            idle = 0
            for entry in self.trees[group]:
                claims.append(("in the index", entry.block, 1))
                idle += not entry.refs
                held = locks.get(entry.block, 0)
                assert entry.refs == held, f"block {entry.block}: {entry.refs} locks, {held} in handles"
            for owner, first, size in claims:
                for block in range(first, first + size):
                    assert not owners[block], f"block {block} of group {group} is {owners[block]} and {owner}"
                    owners[block] = owner
            assert all(owners), f"block {owners.index('')} of group {group} has no owner"
            evictable = self.trees[group].evictable
            assert idle == evictable, f"group {group}: {idle} entries are idle, {evictable} are counted"

    def _free_up(self, group: int, count: int) -> None:
        """Evict until so many blocks are free."""
        free, tree = self.free[group], self.trees[group]
        while free.total < count:
            entry = tree.take()
            free.add(entry.block, 1)
            if self.evicted is not None:
                self.evicted.append(entry.hash)

    def _unlock(self, group: int, entry: Entry, now_ns: int) -> None:
        if self.trees[group].unlock(entry, now_ns):
            self.free[group].add(entry.block, 1)

    def _first_needed(self, group: int, blocks: int) -> int:
        """First logical block that a sequence of `blocks` full blocks still reads in this group."""
        g = self.spec.groups[group]
        return first_block_needed(g.window, blocks * self.spec.block_size, self.spec.block_size)

    def _longest(self, hashes: tuple[BlockHash, ...]) -> int:
        """Full groups serve any edge up to their first gap; window groups those edges whose last tokens they hold."""
        longest = len(hashes)
        for tree, g in zip(self.trees, self.spec.groups, strict=True):
            if g.kind is GroupKind.FULL:
                longest = next((i for i in range(longest) if tree.get(hashes[i]) is None), longest)
        return next((edge for edge in range(longest, 0, -1) if self._windows_serve(hashes, edge)), 0)

    def _windows_serve(self, hashes: tuple[BlockHash, ...], edge: int) -> bool:
        return all(
            tree.get(hashes[i]) is not None
            for group, tree in enumerate(self.trees)
            if self.spec.groups[group].kind is GroupKind.WINDOW
            for i in range(self._first_needed(group, edge), edge)
        )


def first_block_needed(window: int, tokens: int, block_size: int) -> int:
    """First logical block that the token at position `tokens` (and any later one) attends to. `window` 0: all."""
    return 0 if window == 0 else max(0, tokens - window + 1) // block_size
