"""Placement at random, for scenarios: any instance for any half, the other half chosen early or late, sometimes not at all for now.

The other half is mostly another instance, as it is between two that most goes wrong. Prefixes are fetched from anybody, whether he has them
or not; sequences move, and leanings change, for no reason.
"""

from headrace.ports import Rng
from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Move, Placement, PlacementRequest, Wait


class Scatter:
    reads_reports = False
    reads_prefixes = True

    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        if not view.addresses or self._draw("wait", request) < 0.02:
            return Wait("no instance, or no mood")
        prefill = self._any("prefill", request, view)
        late = self._draw("late", request) < 0.3
        decode = None if late else self._other("decode", request, view, prefill)
        return Placement(prefill, decode, fetch=self._holder(request, view, prefill))

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        if not view.addresses or self._draw("bind later", request) < 0.02:
            return Wait("no instance, or no mood")
        return self._other("bind", request, view, prefill)

    def horizon(self, view: ClusterView) -> int:
        return 1

    def _holder(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | None:
        """Who is asked for the prefix: nobody; or one that has most of it beside the one that asks; or anybody."""
        drawn = self._draw("fetch", request)
        if drawn < 0.3 or view.prefixes is None:
            return None
        if drawn < 0.4:
            return self._any("fetch from", request, view)
        hits = view.prefixes.hits(request.request.hashes)
        hits[view.addresses.index(prefill)] = -1
        return view.addresses[int(hits.argmax())]

    def _draw(self, what: str, request: PlacementRequest) -> float:
        return self._rng.uniform(f"scatter {what}", request.request.id, request.serial)

    def _any(self, what: str, request: PlacementRequest, view: ClusterView) -> Address:
        return view.addresses[int(self._draw(what, request) * len(view.addresses))]

    def _other(self, what: str, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address:
        chosen = self._any(what, request, view)
        if chosen == prefill and self._draw("elsewhere", request) < 0.7:
            return self._any(f"{what} elsewhere", request, view)
        return chosen


class ScatterRoles:
    """Anybody leans anywhere."""

    period_ns = 150_000

    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def turn(self, view: ClusterView) -> dict[Address, str]:
        turned: dict[Address, str] = {}
        for row, address in enumerate(view.addresses):
            drawn = self._rng.uniform("scatter roles", view.now_ns, row)
            if drawn < 0.3:
                turned[address] = ("prefill", "decode", "mixed")[int(drawn * 10)]
        return turned


class ScatterMoves:
    """Anybody moves anything anywhere."""

    period_ns = 60_000

    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def moves(self, view: ClusterView) -> list[Move]:
        count = len(view.addresses)
        moves: list[Move] = []
        for row, address in enumerate(view.addresses):
            drawn = self._rng.uniform("scatter moves", view.now_ns, row)
            if drawn < 0.6:
                moves.append(Move(address, view.addresses[int(drawn / 0.6 * count)]))
        return moves
