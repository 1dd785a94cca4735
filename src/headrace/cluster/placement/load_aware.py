"""Load-aware placement (FlowKV, arXiv 2504.03775, section 4): least time to the first token, then least time to move the KV.

Prefill goes to the row with the least estimated time to first token: what waits there, and what its pool does not hold of the prompt.
Decode then goes to the row that the KV reaches soonest from there: at once if both share a pool, else by what that row does not hold. Ties
go to the least load score, then by name. Rows whose score is at or over `full` are passed over while others are left: else the decode rows
that share a pool with a busy prefill row would take all. Where costs are not known of every row, a token counts 1.
The score of a row is a weighted sum of what it has over what it can have, for each half of the work; `roles.load_states` smooths it. The
paper's weights are not published: these are chosen, the scarce thing first (tokens that wait for prefill, memory for decode).
Leaves out: device and memory-bandwidth utilisation, which no report has; swapped sequences; the load of links.
"""

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.costs import Costs
from headrace.types.ids import Address
from headrace.types.views import ClusterView, Column, Decline, Placement, PlacementRequest, Rows, Wait

Counts = NDArray[np.int64]

CHUNK = 1024
"""A token's time of prefill is that of a chunk of so many, divided."""

Weight = Annotated[float, msgspec.Meta(ge=0)]


class PrefillWeights(msgspec.Struct, frozen=True):
    """What makes up the load of a row as prefill; each part is between 0 and 1."""

    queue: Weight = 0.7
    """Tokens that wait there to be prefilled, over `queue_tokens`."""
    sending: Weight = 0.1
    """Sequences that are held or being sent, over those that may run."""
    memory: Weight = 0.2
    """Blocks in use."""
    queue_tokens: Annotated[int, msgspec.Meta(ge=1)] = 16384
    """A full queue."""

    def score(self, view: ClusterView) -> Column:
        queue = np.minimum(_queue(view) / self.queue_tokens, 1)
        sending = _share(np.fmax(view.held, 0) + np.fmax(view.sending, 0), view.sequences_max)
        return self.queue * queue + self.sending * sending + self.memory * _memory(view)


class DecodeWeights(msgspec.Struct, frozen=True):
    """What makes up the load of a row as decode; each part is between 0 and 1."""

    memory: Weight = 0.5
    """Blocks in use."""
    batch: Weight = 0.3
    """Sequences given to it, over those that may run."""
    waiting: Weight = 0.2
    """Sequences that wait there or are being received, over those that may run."""

    def score(self, view: ClusterView) -> Column:
        batch = _share(view.assigned, view.sequences_max)
        waiting = _share(np.fmax(view.waiting, 0) + np.fmax(view.receiving, 0), view.sequences_max)
        return self.memory * _memory(view) + self.batch * batch + self.waiting * waiting


class Config(msgspec.Struct, frozen=True):
    full: Weight = 0.9
    """A row of this score takes work only if all have it."""
    prefill: PrefillWeights = PrefillWeights()
    decode: DecodeWeights = DecodeWeights()


class Policy:
    reads_reports = True
    reads_prefixes = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._prices = Prices(())

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        rows = view.rows_for("prefill")
        if not len(rows):
            return Wait("no instance takes work")
        if self._prices.costs is not view.costs:
            self._prices = Prices(view.costs)
        held = _held(request, view)
        computed = request.total - held * view.block_size
        time = self._prices.prefill(_queue(view) + computed)
        score = self._config.prefill.score(view)
        row = self._least(rows, time, score)
        prefill = view.addresses[row]
        whole = view.takes(row, "decode")
        reasons = {
            "rule": "load_aware",
            "time": time.item(row),
            "unit": "ns" if self._prices.known else "tokens",
            "held": held.item(row) * view.block_size,
            "load": score.item(row),
        }
        decode = prefill if whole else view.addresses[self._reach(request, view, held, row)]
        return Placement(prefill, decode, reasons)

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        if not len(view.rows_for("decode")):
            return Wait("no instance takes work")
        if self._prices.costs is not view.costs:
            self._prices = Prices(view.costs)
        source = view.addresses.index(prefill) if prefill in view.addresses else -1
        return view.addresses[self._reach(request, view, _held(request, view), source)]

    def horizon(self, view: ClusterView) -> int:
        return 1

    def _reach(self, request: PlacementRequest, view: ClusterView, held: Counts, source: int) -> int:
        """The decode row that the KV reaches soonest from `source` (-1: a row that is not known any more)."""
        rows = view.rows_for("decode")
        blocks = -(-request.total // view.block_size)
        time = self._prices.transfer(blocks - held, view)
        if source >= 0:
            pool = view.pools[source]
            time[[i for i in rows.tolist() if view.pools[i] == pool]] = 0
        return self._least(rows, time, self._config.decode.score(view))

    def _least(self, rows: Rows, time: Column, score: Column) -> int:
        fresh = rows[score[rows] < self._config.full]
        rows = fresh if len(fresh) else rows
        soonest = rows[time[rows] == time[rows].min()]
        return soonest.item(int(np.argmin(score[soonest])))


class Prices:
    """What the rows' hardware takes, nanoseconds; tokens where it is not known of every row. Equal hardware is asked once."""

    def __init__(self, costs: tuple[Costs | None, ...]) -> None:
        self.costs = costs
        self.known = bool(costs) and None not in costs
        different: list[tuple[Costs, list[int]]] = []
        for row, cost in enumerate(costs if self.known else ()):
            same = next((rows for other, rows in different if other is cost), None)
            if same is not None:
                same.append(row)
            elif cost is not None:
                different.append((cost, [row]))
        self._kinds = [(cost, np.array(rows, dtype=np.int64)) for cost, rows in different]
        """Different hardware, and the rows that have it."""
        self._rates = np.ones(len(costs) if self.known else 1)
        for cost, rows in self._kinds:
            self._rates[rows] = cost.step_ps([(CHUNK, 0)], 0, 0) / 1000 / CHUNK

    def prefill(self, tokens: Column) -> Column:
        """To compute so many tokens, each row."""
        return tokens * self._rates

    def transfer(self, blocks: Counts, view: ClusterView) -> Column:
        """To receive the KV of so many blocks, each row."""
        if not (self.known and view.block_bytes):
            return blocks.astype(np.float64) * view.block_size
        time = np.empty(len(blocks))
        for cost, rows in self._kinds:
            here = blocks[rows]
            different = np.flatnonzero(np.bincount(here)).tolist()
            by_count = np.zeros(here.max() + 1)
            by_count[different] = [cost.transfer_ns(n * view.block_bytes) for n in different]
            time[rows] = by_count[here]
        return time


def _queue(view: ClusterView) -> Column:
    """Tokens still to prefill, as the router knows."""
    return view.assigned_tokens if view.assigned_prefill is None else view.assigned_prefill


def _held(request: PlacementRequest, view: ClusterView) -> Counts:
    """Leading blocks of the prompt that each row holds; one token at least is always computed."""
    if view.prefixes is None:
        return np.zeros(len(view.addresses), dtype=np.int64)
    hits = np.fmax(view.prefixes.hits(request.request.hashes), 0)
    return np.minimum(hits, (request.total - 1) // view.block_size).astype(np.int64)


def _share(part: Column, whole: Column) -> Column:
    """`part / whole` up to 1; 0 where it is not known."""
    return np.fmax(np.minimum(part / whole, 1), 0)


def _memory(view: ClusterView) -> Column:
    """Blocks in use over all: as reported, or by what the router has given to it, whichever is more."""
    used = np.fmax(view.blocks_total - view.blocks_free, view.assigned_tokens / view.block_size)
    return _share(used, view.blocks_total)
