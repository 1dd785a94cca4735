"""What lies in the tiers below a pool's memory, by block hash: least recently used first, with a capacity each (MemServe, section 4).

Life cycle of a copy:
 1. `save`: on its way into host memory; it counts there, and cannot be loaded yet.
 2. `saved`: in host memory. It goes when room is needed and it is the one used longest ago, unless it is pinned.
 3. `spill`: on its way to disk as well; pinned in host memory meanwhile.
 4. `spilled`: on disk. Its place in host memory can be taken at any moment.
 5. Dropped from disk when that is full, used longest ago first.
A copy is pinned in a tier while something reads it there. A chain is entered from its end, so that its beginning outlives its end.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from headrace.types.ids import BlockHash
from headrace.types.tiers import Tier

NEAR = 64
"""So many of those used longest ago are looked at for one that lies on disk, too."""


@dataclass(slots=True)
class Copy:
    """One block in one tier."""

    pins: int = 0
    ready: bool = True
    """Not on its way into the tier any more."""


class Shelf:
    """The copies of one tier."""

    def __init__(self, blocks_max: int) -> None:
        self.blocks_max = blocks_max
        self._copies: OrderedDict[BlockHash, Copy] = OrderedDict()

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._copies

    @property
    def full(self) -> bool:
        return len(self._copies) >= self.blocks_max

    def ready(self, name: BlockHash) -> bool:
        copy = self._copies.get(name)
        return copy is not None and copy.ready

    def __iter__(self) -> Iterator[BlockHash]:
        """Those used longest ago first."""
        return iter(self._copies)

    def add(self, name: BlockHash, *, ready: bool) -> None:
        assert name not in self._copies and not self.full
        self._copies[name] = Copy(ready=ready)

    def arrived(self, name: BlockHash) -> None:
        self._copies[name].ready = True

    def remove(self, name: BlockHash) -> None:
        assert not self._copies[name].pins
        del self._copies[name]

    def touch(self, name: BlockHash) -> None:
        """It is used now."""
        if name in self._copies:
            self._copies.move_to_end(name)

    def pin(self, name: BlockHash) -> None:
        self._copies[name].pins += 1

    def unpin(self, name: BlockHash) -> None:
        copy = self._copies[name]
        assert copy.pins > 0
        copy.pins -= 1

    def idle(self, name: BlockHash) -> bool:
        """Nothing reads or writes it."""
        copy = self._copies[name]
        return copy.ready and not copy.pins


class Tiers:
    """Both tiers. Whoever calls carries out what it says; `dropped` says what a tier may forget."""

    def __init__(self, host_blocks: int, disk_blocks: int) -> None:
        self.host = Shelf(host_blocks)
        self.disk = Shelf(disk_blocks)
        self._dropped: list[tuple[Tier, BlockHash]] = []
        self.changes: dict[BlockHash, None] = {}
        """What may have entered or left since it was emptied last."""
        self.lost = 0
        """Blocks that no tier had room for any more."""
        self.closed = False
        """Disk took something no more (it is full, or fails): nothing more goes there; what it has is served."""

    def __contains__(self, name: BlockHash) -> bool:
        return name in self.host or name in self.disk

    def shelf(self, tier: Tier) -> Shelf:
        return self.host if tier is Tier.HOST else self.disk

    def where(self, name: BlockHash) -> Tier | None:
        """The nearest tier from which it can be loaded now."""
        if self.host.ready(name):
            return Tier.HOST
        return Tier.DISK if self.disk.ready(name) else None

    def touch(self, names: list[BlockHash]) -> None:
        """This piece of a chain is used now."""
        for name in reversed(names):
            self.host.touch(name)
            self.disk.touch(name)

    def dropped(self) -> dict[Tier, tuple[BlockHash, ...]]:
        """What may be forgotten since this was asked last."""
        drops, self._dropped = self._dropped, []
        return {t: names for t in Tier if (names := tuple(n for tier, n in drops if tier is t))}

    # Host memory

    def save(self, name: BlockHash) -> bool:
        """Make room for a block and note that it comes. False: there is none, as all that is there is in use."""
        assert name not in self
        if self.host.full:
            self._make_room()
        if self.host.full:
            return False
        self.host.add(name, ready=False)
        self.changes[name] = None
        return True

    def saved(self, name: BlockHash, *, ok: bool) -> None:
        self.host.arrived(name)
        if not ok:
            self.forget(Tier.HOST, name)

    def _make_room(self) -> None:
        """One of those used longest ago goes, if it can be one that is on disk."""
        idle = list(islice((name for name in self.host if self.host.idle(name)), NEAR))
        victim = next((name for name in idle if name in self.disk), idle[0] if idle else None)
        if victim is not None:
            self.lost += victim not in self.disk
            self.forget(Tier.HOST, victim)

    # Disk

    @property
    def spilling(self) -> bool:
        """Does disk take anything?"""
        return self.disk.blocks_max > 0 and not self.closed

    def spills(self, blocks_max: int, ahead: int) -> list[BlockHash]:
        """What to copy to disk now, at most so many, so that `ahead` blocks of host memory are free or can go; each is pinned there."""
        if not self.spilling or blocks_max <= 0:
            return []
        names: list[BlockHash] = []
        room = self.host.blocks_max - len(self.host)
        for name in self.host:
            if room >= ahead or len(names) == blocks_max:
                break
            if name in self.disk:
                room += 1
            elif self.host.idle(name) and self._disk_room():
                self.disk.add(name, ready=False)
                self.host.pin(name)
                names.append(name)
                room += 1
        return names

    def _disk_room(self) -> bool:
        """What host memory has, too, stays: else the two would take turns for ever where disk is the smaller one."""
        if self.disk.full:
            idle = (name for name in self.disk if self.disk.idle(name))
            victim = next((name for name in idle if name not in self.host), None)
            if victim is not None:
                self.lost += 1
                self.forget(Tier.DISK, victim)
        return not self.disk.full

    def spilled(self, name: BlockHash, *, ok: bool) -> None:
        self.host.unpin(name)
        self.disk.arrived(name)
        if not ok:
            self.forget(Tier.DISK, name)
            self.closed = True

    def recovered(self, names: tuple[BlockHash, ...]) -> None:
        """What an earlier life has left, used longest ago first; what is beyond the capacity goes."""
        for name in names:
            if name not in self.disk and self._disk_room():
                self.disk.add(name, ready=True)
                self.changes[name] = None

    # Both

    def forget(self, tier: Tier, name: BlockHash) -> None:
        """This copy is no more."""
        self.shelf(tier).remove(name)
        self._dropped.append((tier, name))
        self.changes[name] = None
