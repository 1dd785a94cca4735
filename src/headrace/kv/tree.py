"""The tree of block hashes that prefix indexes use.

A block's hash names everything before it, so the tree needs no edges to walk: a dictionary from hash to entry is the tree, and an entry's
`children` count says whether something hangs on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
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
    """False for a second copy of a block that is in the tree: it serves its own sequence only, and is free when that ends, unless it has
    taken the first one's place by then."""
    original: "Entry | None" = None
    """Of a second copy: the indexed one."""
    copies: "list[Entry]" = field(default_factory=list["Entry"])
    """Of the indexed one: second copies, oldest first. When its own last lock goes, the first of them takes its place, so that what hangs
    on it keeps its whole prefix, and nobody keeps two blocks for one."""


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
        self.changes: dict[BlockHash, bool] | None = None
        """If somebody wants to know: what entered (True) or left since it was emptied last; None: nobody does."""
        self.evictable = 0
        """Entries without a lock. With `rooted` all of them can go, leaves first: whoever locks a block locks its whole prefix."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, name: BlockHash) -> Entry | None:
        return self._entries.get(name)

    def insert(self, entry: Entry) -> Entry | None:
        """Index a locked entry. If its hash is there and locked, it becomes a second copy of that one; if that one is idle, it takes its
        place, and the idle one, whose block is free now, is returned."""
        assert entry.refs > 0
        present = self._entries.get(entry.hash)
        if present is None:
            if self._rooted and entry.parent is not None:
                self._entries[entry.parent].children += 1
            self._entries[entry.hash] = entry
            entry.indexed = True
            if self.changes is not None:
                self.changes[entry.hash] = True
            return None
        if present.refs:
            entry.original = present
            present.copies.append(entry)
            return None
        self.evictable -= 1
        self._succeed(present, entry)
        return present

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
        if entry.original is not None:
            entry.original.copies.remove(entry)
            entry.original = None
            return True
        if entry.copies:
            self._succeed(entry, entry.copies.pop(0))
            return True
        self.evictable += 1
        self._offer(entry)
        return False

    def evict(self) -> int:
        """Drop the lowest-ranked unlocked entry; its block id. Call only while `evictable` > 0."""
        return self.take().block

    def take(self) -> Entry:
        """The same; the entry."""
        while True:
            offer = heappop(self._idle)
            entry = offer[2]
            if self._stands(offer):
                self._remove(entry)
                return entry

    def clear(self) -> list[int]:
        """Drop every unlocked entry; their blocks."""
        return [self.evict() for _ in range(self.evictable)]

    def _stands(self, offer: tuple[tuple[Any, ...], int, Entry]) -> bool:
        """Can this entry still go, at this rank?"""
        rank, _, entry = offer
        hung_on = self._rooted and entry.children > 0
        return not entry.refs and entry.indexed and not hung_on and rank == self._eviction.rank(entry)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.hash]
        if self.changes is not None:
            self.changes[entry.hash] = False
        entry.indexed = False
        self.evictable -= 1
        if self._rooted and entry.parent is not None:
            parent = self._entries[entry.parent]
            parent.children -= 1
            if not parent.refs and not parent.children:
                self._offer(parent)

    def _succeed(self, entry: Entry, heir: Entry) -> None:
        """Another copy of the same block takes an unlocked entry's place."""
        assert not entry.refs and heir.refs
        heir.original, heir.copies, entry.copies = None, entry.copies, []
        for copy in heir.copies:
            copy.original = heir
        heir.children, heir.uses = entry.children, heir.uses + entry.uses
        entry.indexed, heir.indexed = False, True
        self._entries[heir.hash] = heir

    def _offer(self, entry: Entry) -> None:
        if len(self._idle) > 4 * len(self._entries) + 64:
            # Entries that are locked and unlocked again and again leave stale offers behind.
            self._idle = [offer for offer in self._idle if self._stands(offer)]
            heapify(self._idle)
        self._serial += 1
        heappush(self._idle, (self._eviction.rank(entry), self._serial, entry))
