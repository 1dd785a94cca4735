"""Placement at random, for scenarios: any instance for any half, the other half chosen early or late, sometimes not at all for now.

The other half is mostly another instance, as it is between two that most goes wrong.
"""

from headrace.ports import Rng
from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Wait


class Scatter:
    reads_reports = False

    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        if not view.addresses or self._draw("wait", request) < 0.02:
            return Wait("no instance, or no mood")
        prefill = self._any("prefill", request, view)
        late = self._draw("late", request) < 0.3
        return Placement(prefill, None if late else self._other("decode", request, view, prefill))

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        if not view.addresses or self._draw("bind later", request) < 0.02:
            return Wait("no instance, or no mood")
        return self._other("bind", request, view, prefill)

    def horizon(self, view: ClusterView) -> int:
        return 1

    def _draw(self, what: str, request: PlacementRequest) -> float:
        return self._rng.uniform(f"scatter {what}", request.request.id, request.serial)

    def _any(self, what: str, request: PlacementRequest, view: ClusterView) -> Address:
        return view.addresses[int(self._draw(what, request) * len(view.addresses))]

    def _other(self, what: str, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address:
        chosen = self._any(what, request, view)
        if chosen == prefill and self._draw("elsewhere", request) < 0.7:
            return self._any(f"{what} elsewhere", request, view)
        return chosen
