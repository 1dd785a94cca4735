"""The router's axes as protocols.

A policy does no I/O and draws only by key. It may remember what it was shown, and nothing else: shown the same again from the start, it
gives the same answers.
"""

from typing import Protocol

from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Move, Placement, PlacementRequest, Wait


class PlacementPolicy(Protocol):
    reads_reports: bool
    """It looks at columns that instances report; else nobody need report on its account."""
    reads_prefixes: bool
    """It looks at what the pools' prefix indexes hold; else they need not tell."""

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        """Prefill here, decode there (None: decided by `bind`), or not now, or not at all. Prefill and decode may be one instance."""
        ...

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        """Where to decode what `prefill` has computed and holds; `prefill` itself is a valid answer."""
        ...

    def horizon(self, view: ClusterView) -> int:
        """For how many placements the answer only depends on the request and `serial`."""
        ...


class RolesPolicy(Protocol):
    """Which instances lean to prefill or decode now."""

    period_ns: int
    """It is asked this often."""

    def turn(self, view: ClusterView) -> dict[Address, str]:
        """Leanings to change: "prefill" | "decode" | "mixed"."""
        ...


class RebalancePolicy(Protocol):
    """Which instance hands a running sequence to which other one."""

    period_ns: int
    """It is asked this often."""

    def moves(self, view: ClusterView) -> list[Move]: ...
