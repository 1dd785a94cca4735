"""The plan of one step's attention: query tiles, their chunks of partitions, who takes which, and what is merged in the end.

1. `describe` the batch: rows of query tokens, and the blocks of each (CSR).
2. Find the prefixes that are worth attending to together (`shared`): tall tiles of several rows' tokens. The rest of each row is its own.
3. Cut rows into tiles of at most `tile_vectors` query vectors, and tiles into chunks of partitions (`balance.chunk_partitions`).
4. Deal the units, an item under some KV heads each, to workers (`balance.deal`).

A token's partial states are merged left to right: the one of its leading chunk, whose partitions were merged in that order on the way, then
one for each partition behind it. So every plan gives the bits of every other one; only time and memory differ. No plan is made that would
gain by another order.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from headrace.compute.plans.balance import chunk_partitions, deal, head_span
from headrace.compute.plans.cost import tile_cost
from headrace.compute.plans.shared import Node, find_shared
from headrace.compute.plans.sparse import PARTITION, BlockSparse, Ints, Queries


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the attention that is planned."""

    heads: int
    kv_heads: int
    window: int = 0
    """Positions that a token attends, up to its own; 0: all."""

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads or self.window < 0:
            raise ValueError(f"{self.heads} heads over {self.kv_heads} KV heads, window {self.window}")

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may use."""

    workers: int
    """Threads or CTAs."""
    tile_vectors: int = 192
    """Query vectors (tokens x heads of a group) that share one reading of a key."""
    levels: int = 2
    """Shared prefixes that a token may be part of; 0 switches them off."""
    splits: int = 16
    """Items to a worker that splitting may add."""
    states_max: int = 65_536
    """Partial states (of a token, all heads) in memory."""

    def __post_init__(self) -> None:
        for name, least in (
            ("workers", 1),
            ("tile_vectors", 1),
            ("levels", 0),
            ("splits", 0),
            ("states_max", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Arrays of int32, ready to be handed to a kernel. Vector v of a tile is head v % group of token order[v // group]."""

    shape: Shape
    queries: Queries
    sparse: BlockSparse
    order: Ints
    """The batch's tokens, then those of tall tiles."""
    tile_begin: Ints
    """[tiles]: the first query vector, in `order`."""
    tile_end: Ints
    tile_blocks: Ints
    """[tiles]: where in sparse.indices the tile's sequence begins: sparse.indptr[tile_row]."""
    tile_row: Ints
    tile_low: Ints
    """[tiles]: the first key position that any of its vectors attends ..."""
    tile_high: Ints
    """... and the last."""
    item_tile: Ints
    item_begin: Ints
    """[items]: partitions item_begin .. item_end - 1 of the tile."""
    item_end: Ints
    item_state: Ints
    """[items]: where in its tokens' slots its states begin. 0: a leading chunk, with one state; else one a partition."""
    slots: Ints
    """[tokens + 1]: states slots[i] .. slots[i + 1] - 1 are merged, left to right, into token i's output; none: an item gives it."""
    head_span: int
    """KV heads of a unit. Unit u is item u // spans under the heads from u % spans * head_span on, spans = ceil(kv_heads / head_span)."""
    units: Ints
    """Every unit, dearest first: in this order threads take the next one when they are done with the last."""
    worker_indptr: Ints
    """[workers + 1]: for workers that are told what is theirs, units worker_units[worker_indptr[w] : worker_indptr[w + 1]]."""
    worker_units: Ints
    keys: int
    """Positions 0 .. keys - 1 are attended by some token."""
    tile_vectors: int
    """Query vectors of the tallest tile."""
    shared: tuple[Node, ...]
    """Prefixes that are attended to together."""
    addresses: tuple[int, ...] = field(init=False)
    """Of `arrays()` in memory: asked for once a step, not once a layer."""

    def __post_init__(self) -> None:
        found = tuple(array.__array_interface__["data"][0] for array in self.arrays())
        object.__setattr__(self, "addresses", found)

    @property
    def tokens(self) -> int:
        return len(self.slots) - 1

    @property
    def states(self) -> int:
        """How many partial states there is to be room for."""
        return int(self.slots[-1])

    def arrays(self) -> tuple[Ints, ...]:
        """What a kernel needs, in the order in which the native one takes it."""
        return (
            self.order,
            self.sparse.indices,
            self.tile_begin,
            self.tile_end,
            self.tile_blocks,
            self.tile_low,
            self.tile_high,
            self.item_tile,
            self.item_begin,
            self.item_end,
            self.item_state,
            self.slots,
            self.units,
        )


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Columns, one entry a tile."""

    begin: Ints
    end: Ints
    row: Ints
    """Whose blocks are read."""
    low: Ints
    high: Ints

    def partitions(self) -> tuple[Ints, Ints]:
        """First, and one behind the last."""
        return self.low // np.int32(PARTITION), self.high // np.int32(PARTITION) + np.int32(1)


def make_plan(queries: Queries, sparse: BlockSparse, shape: Shape, limits: Limits) -> Plan:
    """Plan the attention of a described batch. One input has one result."""
    nodes: list[Node] = []
    if not shape.window:
        nodes = find_shared(
            queries,
            sparse,
            group=shape.group,
            kv_heads=shape.kv_heads,
            tile_vectors=limits.tile_vectors,
            levels=limits.levels,
        )
    plan = _assemble(queries, sparse, shape, limits, nodes)
    if nodes and plan.states > limits.states_max:
        return _assemble(queries, sparse, shape, limits, [])
    return plan


def advance(plan: Plan, queries: Queries, sparse: BlockSparse) -> Plan | None:
    """The plan for the step after `plan`'s, if all is as it was, each row one token further: the same tiles, chunks and units.

    It is what a step of decoding is most of the time, and is had sooner than a new plan, whose costs would differ by less than a partition
    a row. None: a row came, went or entered another partition, or a window moves on.
    """
    before = plan.queries
    if (
        plan.shape.window
        or sparse.block_size != plan.sparse.block_size
        or sparse.blocks != plan.sparse.blocks
    ):
        return None
    if not np.array_equal(queries.indptr, before.indptr) or not np.array_equal(
        queries.first, before.first + 1
    ):
        return None
    last = before.first + before.counts()  # of the new queries
    if ((last % PARTITION == 0) | (queries.first % PARTITION == 0)).any():
        return None
    for node in plan.shared:
        count = node.end * PARTITION // sparse.block_size
        if any(
            sparse.indices[sparse.indptr[row] :][:count].tobytes()
            != plan.sparse.indices[plan.sparse.indptr[row] :][:count].tobytes()
            for row in node.rows
        ):
            return None
    own = plan.tile_begin < queries.tokens * plan.shape.group  # the rest are tall, and stay as they are
    return replace(
        plan,
        queries=queries,
        sparse=sparse,
        tile_blocks=sparse.indptr[plan.tile_row],
        tile_high=plan.tile_high + own.astype(np.int32),
        keys=plan.keys + 1,
    )


def _assemble(queries: Queries, sparse: BlockSparse, shape: Shape, limits: Limits, nodes: list[Node]) -> Plan:
    order, tiles = _tiles(queries, shape, limits.tile_vectors, nodes)
    begins, ends = tiles.partitions()
    counts = -(-tiles.end // np.int32(shape.group)) - tiles.begin // np.int32(shape.group)
    vectors = (tiles.end - tiles.begin).astype(np.int64)
    chunk = chunk_partitions(
        ends - begins,
        tile_cost(np.full_like(vectors, PARTITION), vectors),
        counts,
        kv_heads=shape.kv_heads,
        workers=limits.workers,
        splits_max=limits.splits * limits.workers,
        states_max=limits.states_max,
    )
    chunks = -(-(ends - begins) // np.int32(chunk))
    item_tile = np.arange(len(begins), dtype=np.int32).repeat(chunks)
    item_begin = begins[item_tile] + _count_up(chunks) * np.int32(chunk)
    item_end = np.minimum(item_begin + np.int32(chunk), ends[item_tile])
    slots, item_state = _slots(
        queries.tokens, order, tiles, shape.group, counts, item_tile, item_begin, chunk
    )

    low = np.maximum(tiles.low[item_tile], item_begin * np.int32(PARTITION))
    high = np.minimum(tiles.high[item_tile], item_end * np.int32(PARTITION) - np.int32(1))
    costs = tile_cost((high - low + np.int32(1)).astype(np.int64), vectors[item_tile])
    span = head_span(costs, shape.kv_heads, limits.workers)
    starts = np.arange(0, shape.kv_heads, span, dtype=np.int64)
    worker_indptr, worker_units, units = deal(
        (costs[:, None] * np.minimum(span, shape.kv_heads - starts)).ravel(), limits.workers
    )
    return Plan(
        shape=shape,
        queries=queries,
        sparse=sparse,
        order=order,
        tile_begin=tiles.begin,
        tile_end=tiles.end,
        tile_blocks=sparse.indptr[tiles.row],
        tile_row=tiles.row,
        tile_low=tiles.low,
        tile_high=tiles.high,
        item_tile=item_tile,
        item_begin=item_begin,
        item_end=item_end,
        item_state=item_state,
        slots=slots,
        head_span=span,
        units=units,
        worker_indptr=worker_indptr,
        worker_units=worker_units,
        keys=int(high.max()) + 1,
        tile_vectors=int(vectors.max()),
        shared=tuple(nodes),
    )


def _tiles(queries: Queries, shape: Shape, tile_vectors: int, nodes: list[Node]) -> tuple[Ints, _Tiles]:
    """Tokens and tiles: the rows' own, then those of nodes, children before their parents."""
    group, counts = shape.group, queries.counts()
    own = np.zeros(len(counts), dtype=np.int32)  # partitions of each row that nodes take care of
    for node in nodes:
        own[list(node.rows)] = node.end
    first, size = queries.indptr[:-1], counts
    row = np.arange(len(counts), dtype=np.int32)
    if group > tile_vectors:  # each token by itself
        row, size = row.repeat(counts), np.ones(queries.tokens, dtype=np.int32)
        first = np.arange(queries.tokens, dtype=np.int32)
    of, begin, end = _cut(first * np.int32(group), size * np.int32(group), group, tile_vectors)
    row = row[of]
    position = queries.first[row] - queries.indptr[row]  # plus a token's number: its position
    low = own[row] * np.int32(PARTITION)
    if shape.window:
        low = np.maximum(position + begin // np.int32(group) - np.int32(shape.window - 1), 0)
    parts = [_Tiles(begin, end, row, low, position + (end - np.int32(1)) // np.int32(group))]
    order = [np.arange(queries.tokens, dtype=np.int32)]
    placed = queries.tokens
    for node in reversed(nodes):
        tokens = np.concatenate([np.arange(queries.indptr[r], queries.indptr[r + 1]) for r in node.rows])
        base, size = np.array([[placed], [len(tokens)]], dtype=np.int32) * np.int32(group)
        _, begin, end = _cut(base, size, group, tile_vectors)
        filled = np.full_like(begin, node.rows[0])
        low, high = np.array([[node.begin], [node.end]], dtype=np.int32) * np.int32(PARTITION)
        parts.append(
            _Tiles(begin, end, filled, low.repeat(len(begin)), high.repeat(len(begin)) - np.int32(1))
        )
        order.append(tokens.astype(np.int32))
        placed += len(tokens)
    columns = zip(*((t.begin, t.end, t.row, t.low, t.high) for t in parts), strict=True)
    return np.concatenate(order), _Tiles(*(np.concatenate(column) for column in columns))


def _cut(first: Ints, size: Ints, group: int, tile_vectors: int) -> tuple[Ints, Ints, Ints]:
    """Runs of vectors in tiles of whole tokens where a tile has room for one: (which run, begin, end) of each tile."""
    step = np.int32(tile_vectors // group * group or tile_vectors)
    tiles = -(-size // step)
    of = np.arange(len(size), dtype=np.int32).repeat(tiles)
    begin = first[of] + _count_up(tiles) * step
    return of, begin, np.minimum(begin + step, (first + size)[of])


def _slots(
    tokens: int,
    order: Ints,
    tiles: _Tiles,
    group: int,
    counts: Ints,
    item_tile: Ints,
    item_begin: Ints,
    chunk: int,
) -> tuple[Ints, Ints]:
    """Where partial states go: `Plan.slots` and `Plan.item_state`. `counts`: tokens of each tile."""
    begins, ends = tiles.partitions()
    tile = np.arange(len(begins), dtype=np.int32).repeat(counts)
    token = order[(tiles.begin // np.int32(group)).repeat(counts) + _count_up(counts)]
    # All tiles of a token that begin at the same partition are alike here, so it does not matter which of them is found.
    leading = np.zeros(tokens, dtype=np.int32)
    last = np.zeros(tokens, dtype=np.int32)
    np.minimum.at(first := np.full(tokens, np.iinfo(np.int32).max, dtype=np.int32), token, begins[tile])
    np.maximum.at(last, token, ends[tile])
    leads = begins[tile] == first[token]
    leading[token[leads]] = tile[leads]
    fold = np.minimum(begins + np.int32(chunk), ends)[leading]
    slots = np.zeros(tokens + 1, dtype=np.int32)
    np.cumsum(np.where(last > fold, last - fold + 1, 0), out=slots[1:])
    model = order[tiles.begin // np.int32(group)][item_tile]  # any token of the item's tile
    state = np.where(item_begin == first[model], 0, item_begin - fold[model] + 1)
    return slots, state.astype(np.int32)


def _count_up(counts: Ints) -> Ints:
    """0 .. count - 1 for each of `counts`, one after the other."""
    ends = counts.cumsum(dtype=np.int32)
    return np.arange(ends[-1], dtype=np.int32) - (ends - counts).repeat(counts)
