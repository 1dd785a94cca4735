"""Shortest queue, and decode that pulls (DistServe, arXiv 2401.09670, section 4.3 and its artifact).

A prompt goes to the prefill instance with the fewest tokens still to prefill, of those given to it, ties by name. Nothing is pushed on to
decode: the KV stays where it was computed until a decode instance has room. One has room while it runs fewer sequences than it may, its
free blocks hold the sequence, and what waits there takes less than a twentieth of its memory. Of those with room the one with the fewest
tokens takes it; if none has, it waits. So queues stand before decode and not in it, and slow prefill by the memory that held KV takes.
Reports are late: sequences that the router has given to an instance and that it does not report as running or receiving count as waiting,
each of the mean size of what was given to it. Free is what is reported, or what the context of running sequences leaves, whichever is more.
An instance that has nothing has room for anything, heard of or not; else unknown is no room. One that shares the pool in which the KV lies
needs no memory for it.
Leaves out: several groups of KV (their blocks are one sum, so a sequence is taken to need as many of it as it has in one group); what
running sequences will still generate; batches grouped up to the length that saturates a device; cached prefixes, distance.
"""

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Rows, Wait

Flags = NDArray[np.bool_]


class Config(msgspec.Struct, frozen=True):
    waiting_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.05
    """Of a decode instance's blocks: with as much waiting it pulls no more."""


class Policy:
    reads_reports = True
    reads_prefixes = False

    def __init__(self, config: Config) -> None:
        self._waiting_share = config.waiting_share

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        rows = view.rows_for("prefill")
        if not len(rows):
            return Wait("no instance takes work")
        queue = view.assigned_tokens if view.assigned_prefill is None else view.assigned_prefill
        row = rows.item(int(np.argmin(queue[rows])))
        prefill = view.addresses[row]
        decode = prefill if view.takes(row, "decode") else None
        reasons = {"rule": "min_queue", "queue_tokens": queue.item(row), "of": len(rows)}
        return Placement(prefill, decode, reasons)

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        rows = view.rows_for("decode")
        if not len(rows):
            return Wait("no instance takes work")
        source = view.addresses.index(prefill) if prefill in view.addresses else -1
        if source in rows:
            # It may decode as well (the others have gone): what it holds needs no more room.
            return prefill
        roomy = rows[self._room(request, view, rows, source)]
        if not len(roomy):
            return Wait("no decode instance has room")
        return view.addresses[roomy.item(int(np.argmin(view.assigned_tokens[roomy])))]

    def horizon(self, view: ClusterView) -> int:
        return 1

    def _room(self, request: PlacementRequest, view: ClusterView, rows: Rows, source: int) -> Flags:
        """Which of the rows have room for what `source` holds. Comparisons with NaN are false."""
        assigned, tokens = view.assigned[rows], view.assigned_tokens[rows]
        pool = view.pools[source] if source >= 0 else None
        beside = np.array([view.pools[row] == pool for row in rows.tolist()], dtype=np.bool_)
        need = -(-request.total // view.block_size)
        unseen = np.maximum(assigned - view.running[rows] - view.receiving[rows], 0)
        waiting = unseen * np.ceil(tokens / np.maximum(assigned, 1) / view.block_size)
        few = waiting < self._waiting_share * view.blocks_total[rows]
        # What is reported as free is what the instance last heard of its pool: often too little, as what ended since is free too.
        context = np.ceil(view.tokens_running[rows] / view.block_size) + view.running[rows]
        free = np.fmax(view.blocks_free[rows], view.blocks_total[rows] - context) - waiting
        # What waits there may wait for the very blocks that are held for this one.
        memory = beside | (few & (need <= free))
        batch = np.fmax(view.running[rows], assigned) < view.sequences_max[rows]
        return (batch & memory) | (assigned <= 0)
