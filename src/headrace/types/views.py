"""What policies are shown, and what a placement says."""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.ids import Address, PoolId
from headrace.types.request import Request

Column = NDArray[np.float64]


class ClusterView(msgspec.Struct, frozen=True):
    """The fleet as columns, one row an instance, ordered by name. Unknown is NaN, never 0. `observed_at_ns` says how old a row is."""

    now_ns: int
    addresses: tuple[Address, ...]
    pools: tuple[PoolId, ...]
    leanings: tuple[str, ...]
    draining: NDArray[np.bool_]
    observed_at_ns: Column
    waiting: Column
    running: Column
    blocks_total: Column
    blocks_free: Column
    assigned: Column
    """Sequences that the router has given to it and not seen end: known without delay."""
    assigned_tokens: Column
    """Their tokens still to prefill plus their context, as the router knows."""

    def candidates(self, leaning: str) -> list[int]:
        """Rows for one half of the work: those that lean to it or are mixed; if none can take work, every row that can."""
        usable = [i for i in range(len(self.addresses)) if not self.draining[i]]
        leaning_rows = [i for i in usable if self.leanings[i] in (leaning, "mixed")]
        return leaning_rows or usable


class PlacementRequest(msgspec.Struct, frozen=True):
    """What a placement may know of the sequence to place."""

    request: Request
    total: int
    """Prompt plus history, tokens."""
    attempt: int
    serial: int
    """Counts placements: a keyed draw or a round uses it."""


class Placement(msgspec.Struct, frozen=True):
    """The decision and its reasons. `decode` None leaves it open until the prefill has ended (`bind`)."""

    prefill: Address
    decode: Address | None
    reasons: dict[str, Any] = {}


class Wait(msgspec.Struct, frozen=True):
    """No instance now; asked again when the view changes."""

    reason: str


class Decline(msgspec.Struct, frozen=True):
    """No instance, and waiting will not help."""

    reason: str
    overloaded: bool = True
