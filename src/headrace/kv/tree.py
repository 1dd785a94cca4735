"""The tree of block hashes that prefix indexes use.

A block's hash names everything before it, so the tree needs no edges to walk: a dictionary from hash to entry is the tree, and an entry's
`children` count says whether something hangs on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Protocol

from headrace.types.ids import BlockHash


@dataclass(slots=True, eq=False)
class Entry:
    """One published block."""

    block: int
    hash: BlockHash
    parent: BlockHash | None
    depth: int
    """Logical block index in every sequence that has it."""
    refs: int = 0
    children: int = 0
    used_ns: int = 0
    uses: int = 0
    indexed: bool = False
    """False for a second copy of a block that is in the tree: it serves its own sequence only, and is free when that ends."""
    twin: "Entry | None" = None
    """Of a second copy: the indexed one, locked as long as this one, so that what hangs on it keeps its whole prefix."""


class Eviction(Protocol):
    """A policy of `kv/evict`."""

    def rank(self, entry: Entry) -> tuple[Any, ...]:
        """The lowest goes first. Must not change while the entry is unused."""
        ...


class PrefixTree:
    """Entries of one KV group. With `rooted`, an entry that others hang on is never evicted, so every entry's whole prefix is present."""

    def __init__(self, eviction: Eviction, rooted: bool) -> None:
        self._eviction = eviction
        self._rooted = rooted
        self._entries: dict[BlockHash, Entry] = {}
        self._idle: list[tuple[tuple[Any, ...], int, Entry]] = []
        self._serial = 0
        self.evictable = 0
        """Entries without a lock. With `rooted` all of them can go, leaves first: whoever locks a block locks its whole prefix."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, name: BlockHash) -> Entry | None:
        return self._entries.get(name)

    def insert(self, entry: Entry) -> bool:
        """Index a locked entry. False, and the entry locks the one that is there (its twin) instead, if its hash is present."""
        assert entry.refs > 0
        twin = self._entries.get(entry.hash)
        if twin is not None:
            self.lock(twin)
            entry.twin = twin
            return False
        if self._rooted and entry.parent is not None:
            self._entries[entry.parent].children += 1
        self._entries[entry.hash] = entry
        entry.indexed = True
        return True

    def lock(self, entry: Entry) -> None:
        assert entry.indexed
        if entry.refs == 0:
            self.evictable -= 1
        entry.refs += 1
        entry.uses += 1

    def unlock(self, entry: Entry, now_ns: int) -> bool:
        """Drop one lock. True if the block is free now: no lock is left and the tree does not hold it."""
        assert entry.refs > 0
        entry.refs -= 1
        entry.used_ns = now_ns
        if entry.refs:
            return False
        if entry.twin is not None:
            self.unlock(entry.twin, now_ns)
            entry.twin = None
        if not entry.indexed:
            return True
        self.evictable += 1
        self._offer(entry)
        return False

    def evict(self) -> int:
        """Drop the lowest-ranked unlocked entry; its block id. Call only while `evictable` > 0."""
        while True:
            rank, _, entry = heappop(self._idle)
            stale = entry.refs or not entry.indexed or rank != self._eviction.rank(entry)
            if stale or (self._rooted and entry.children):
                continue
            self._remove(entry)
            return entry.block

    def clear(self) -> list[int]:
        """Drop every unlocked entry; their blocks."""
        return [self.evict() for _ in range(self.evictable)]

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.hash]
        entry.indexed = False
        self.evictable -= 1
        if self._rooted and entry.parent is not None:
            parent = self._entries[entry.parent]
            parent.children -= 1
            if not parent.refs and not parent.children:
                self._offer(parent)

    def _offer(self, entry: Entry) -> None:
        self._serial += 1
        heappush(self._idle, (self._eviction.rank(entry), self._serial, entry))
