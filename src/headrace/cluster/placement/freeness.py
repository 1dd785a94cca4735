"""Freeness: the instance with the most room for each of its sequences (Llumnix, arXiv 2406.03243, sec. 4; its INFaaS++ baseline).

F = (free blocks - demand of all that is queued there) / sequences; the most wins, ties go to the fewest assigned tokens. A lack is not
divided: else the longest queue would look like the smallest lack. What the router has assigned and no report covers yet counts as queued.
A headroom beside urgent sequences keeps others out; an urgent one sees it where there are none, so that they come together. Alone this is
INFaaS++, with `cluster/rebalance/virtual_usage` it is Llumnix.
Leaves out: Llumnix counts only the first of a queue, as its reports are not late; cached prefixes; distance.
"""

import msgspec
import numpy as np

from headrace.cluster.usage import headroom, queued_tokens
from headrace.types.ids import Address
from headrace.types.views import ClusterView, Column, Decline, Placement, PlacementRequest, Wait


class Config(msgspec.Struct, frozen=True):
    urgent_tokens: int = 1600
    """Load at which an instance that runs urgent sequences counts as full; 0: it is like any other."""


class Policy:
    reads_reports = True
    reads_prefixes = False

    def __init__(self, config: Config) -> None:
        self._urgent_tokens = config.urgent_tokens

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        if not len(view.rows_for("prefill")):
            return Wait("no instance takes work")
        free = self._freeness(request, view)
        row = _freest(view, free, "prefill")
        decode = row if view.takes(row, "decode") else _freest(view, free, "decode")
        reasons = {"rule": "freeness", "prefill": free.item(row), "decode": free.item(decode)}
        return Placement(view.addresses[row], view.addresses[decode], reasons)

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        if not len(view.rows_for("decode")):
            return Wait("no instance takes work")
        return view.addresses[_freest(view, self._freeness(request, view), "decode")]

    def horizon(self, view: ClusterView) -> int:
        return 1

    def _freeness(self, request: PlacementRequest, view: ClusterView) -> Column:
        """F of every row, in blocks, or what it lacks. One that nothing was heard from is as empty as what was assigned to it allows."""
        free = np.where(np.isnan(view.blocks_free), view.blocks_total, view.blocks_free)
        room = free - queued_tokens(view) / view.block_size
        if self._urgent_tokens:
            kept = (view.urgent > 0) != (request.request.priority < 0)
            room = room - np.where(kept, headroom(view, self._urgent_tokens), 0.0)
        return np.where(room > 0, room / np.maximum(view.assigned, 1.0), room)


def _freest(view: ClusterView, free: Column, leaning: str) -> int:
    rows = view.rows_for(leaning)
    best = rows[free[rows] == free[rows].max()]
    return best.item(int(np.argmin(view.assigned_tokens[best])))
