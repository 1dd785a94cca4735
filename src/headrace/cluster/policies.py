"""The router's axes as protocols. A policy is pure: the same request and view give the same answer."""

from typing import Protocol

from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Wait


class PlacementPolicy(Protocol):
    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        """Prefill here, decode there (None: decided by `bind`), or not now, or not at all. Prefill and decode may be one instance."""
        ...

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        """Where to decode what `prefill` has computed and holds; `prefill` itself is a valid answer."""
        ...

    def horizon(self, view: ClusterView) -> int:
        """For how many placements the answer only depends on the request and `serial`."""
        ...
