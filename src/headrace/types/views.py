"""What policies are shown, and what a placement says."""

from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.costs import Costs
from headrace.types.ids import Address, BlockHash, PoolId
from headrace.types.request import Request

Column = NDArray[np.float64]
Rows = NDArray[np.int64]


class PrefixView(Protocol):
    """What the router knows of the pools' prefix indexes; as late as their messages."""

    def hits(self, hashes: tuple[BlockHash, ...]) -> Column:
        """Leading blocks of a prompt that each row's pool holds."""
        ...


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
    tokens_waiting: Column
    """Tokens still to prefill, as reported; like all columns below."""
    tokens_running: Column
    """Context of running sequences."""
    held: Column
    receiving: Column
    sending: Column
    blocks_demand: Column
    """Blocks that the first waiting sequence needs."""
    urgent: Column
    """Running sequences of a priority below 0."""
    preemptions: Column
    """Since the instance's start."""
    sequences_max: Column
    """Sequences that it runs at once."""
    block_size: int = 1
    prefixes: PrefixView | None = None
    """None: nobody keeps such an index."""
    costs: tuple[Costs | None, ...] = ()
    """What steps and transfers cost on each row's hardware; empty, or None: not known."""
    assigned_prefill: Column | None = None
    """Of `assigned_tokens`: those still to prefill, as the router knows without delay; None: it does not count them."""
    block_bytes: int = 0
    """KV of one block, over all groups; 0: not known."""
    takers: dict[str, Rows] = {}
    """What `rows_for` has found so far. A fleet may show one dictionary again until a leaning or `draining` changes."""

    def rows_for(self, leaning: str) -> Rows:
        """Rows for one half of the work, ascending: those that lean to it or are mixed; if none can take work, every row that can."""
        rows = self.takers.get(leaning)
        if rows is None:
            usable = np.flatnonzero(~self.draining)
            willing = [i for i in usable.tolist() if self.leanings[i] in (leaning, "mixed")]
            rows = self.takers[leaning] = np.array(willing, dtype=np.int64) if willing else usable
        return rows

    def candidates(self, leaning: str) -> list[int]:
        """`rows_for` as a list."""
        return self.rows_for(leaning).tolist()

    def takes(self, row: int, leaning: str) -> bool:
        """Is this row, which takes other work, among `rows_for(leaning)`?"""
        rows = self.rows_for(leaning)
        willing = (leaning, "mixed")
        return self.leanings[row] in willing or self.leanings[rows[0]] not in willing


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
    fetch: Address | None = None
    """Who sends the prefill instance a cached prefix before it computes the rest."""


class Wait(msgspec.Struct, frozen=True):
    """No instance now; asked again when the view changes."""

    reason: str


class Decline(msgspec.Struct, frozen=True):
    """No instance, and waiting will not help."""

    reason: str
    overloaded: bool = True


class Move(msgspec.Struct, frozen=True):
    """A rebalancing decision: `source` hands one running sequence of its choice to `target`."""

    source: Address
    target: Address
