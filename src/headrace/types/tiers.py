"""What a pool's core asks of the tiers below its memory (host memory, local disk), and what it is told of them.

A tier keeps whole blocks by name (the block's hash). Commands for one tier are carried out in the order given; each is answered once.
"""

from enum import Enum

import msgspec

from headrace.types.ids import BlockHash


class Tier(Enum):
    HOST = "host"
    DISK = "disk"


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """One block of the pool, and what it is called in a tier."""

    name: BlockHash
    block: int


class Save(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks of the pool into host memory. They are nobody's until `Saved`."""

    ticket: int
    pieces: tuple[Piece, ...]


class Load(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks of a tier into the pool, each only if it is what it is called."""

    ticket: int
    tier: Tier
    pieces: tuple[Piece, ...]


class Spill(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks from host memory to disk."""

    ticket: int
    names: tuple[BlockHash, ...]


class Drop(msgspec.Struct, frozen=True, tag=True):
    """A tier may forget these. Not answered."""

    tier: Tier
    names: tuple[BlockHash, ...]


class Flushed(msgspec.Struct, frozen=True, tag=True):
    """All that was to be on disk is there, or will not be."""


class Saved(msgspec.Struct, frozen=True, tag=True):
    """A `Save` has ended: nothing reads those blocks any more. `ok`: of each piece."""

    ticket: int
    ok: tuple[bool, ...]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """A `Load` has ended: nothing writes those blocks any more. `ok`: of each piece."""

    ticket: int
    ok: tuple[bool, ...]


class Spilled(msgspec.Struct, frozen=True, tag=True):
    """A `Spill` has ended. `ok`: of each name."""

    ticket: int
    ok: tuple[bool, ...]


class Recovered(msgspec.Struct, frozen=True, tag=True):
    """What an earlier life of the service has left on disk, the one used longest ago first."""

    names: tuple[BlockHash, ...]


class FlushAsked(msgspec.Struct, frozen=True, tag=True):
    """The service ends, and no instance is left: put what is cached on disk, and say `Flushed`."""


TierCommand = Save | Load | Spill | Drop | Flushed
TierEvent = Saved | Loaded | Spilled | Recovered | FlushAsked
