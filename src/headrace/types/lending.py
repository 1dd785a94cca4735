"""What an instance that lacks memory for one long sequence, and a peer that has some to spare, say to each other."""

import msgspec

from headrace.types.ids import SequenceKey, Slot
from headrace.types.kv import TableRun


class Borrow(msgspec.Struct, frozen=True, tag=True):
    """Reserve `blocks` blocks of every group for one partition of a sequence of mine. Answered by `Lent` or `Unlent`."""

    loan: int
    """The owner counts its loans: with its address, the name of this one."""
    blocks: int
    since_ns: int
    """Arrival of its request: where there is not enough for all, the oldest is served first, everywhere."""
    key: SequenceKey
    """The sequence: decides between two of one age."""


class Lent(msgspec.Struct, frozen=True, tag=True):
    """Reserved: write the partition there."""

    loan: int
    slot: Slot
    table: tuple[TableRun, ...]
    """`at` counts from the first block of the loan."""


class Unlent(msgspec.Struct, frozen=True, tag=True):
    """Not now. A holder never asks others in turn."""

    loan: int


class Holding(msgspec.Struct, frozen=True, tag=True):
    """All blocks of the loan have been written."""

    loan: int


class Repay(msgspec.Struct, frozen=True, tag=True):
    """No plan of mine reads these blocks, and no write of mine can land in them any more: they are yours. Unknown loans are ignored."""

    loan: int


class CallIn(msgspec.Struct, frozen=True, tag=True):
    """I need these blocks myself: repay them."""

    loan: int


LendingMessage = Borrow | Lent | Unlent | Holding | Repay | CallIn
