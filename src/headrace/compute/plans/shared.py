"""Composable formats: rows that share a prefix attend to it as one tall tile (FlashInfer, arXiv 2501.01005, section 3.1.2).

Rows are put in a radix tree by the block ids of their whole partitions. Of each node it is asked what its rows save by reading the node's
keys together, and what their partial states cost; the best set of nodes with at most `levels` on any path from the root is taken.
What remains of a row, its own partition at least, it attends to alone. Only whole partitions before the first of a row's queries are
shared, so that every query attends to all of their keys, and the partial states are the ones that it would have had alone.
Left out: prefixes that end within a partition are shared up to the partition's border only; that would need states handed on in the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.compute.plans.cost import PACK, SHARE_MIN, STATE
from headrace.compute.plans.sparse import PARTITION, BlockSparse, Queries


@dataclass(frozen=True, slots=True)
class Node:
    """Rows that attend partitions begin .. end - 1 together."""

    rows: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Search:
    sparse: BlockSparse
    group: int
    kv_heads: int
    tile_vectors: int
    vectors: list[int]
    """By row: query vectors under one KV head."""
    whole: list[int]
    """By row: partitions that all of its queries attend whole."""

    def common(self, rows: Sequence[int], known: int) -> int:
        """How many leading partitions the rows share, where they share `known`."""
        each = PARTITION // self.sparse.block_size
        depth = min(self.whole[row] for row in rows)
        model = self.columns(rows[0], known * each, depth * each)
        for row in rows[1:]:
            differs = np.flatnonzero(self.columns(row, known * each, known * each + len(model)) != model)
            if len(differs):
                model = model[: differs[0] // each * each]
        return known + len(model) // each

    def columns(self, row: int, begin: int, end: int) -> np.ndarray:
        base = self.sparse.indptr[row]
        return self.sparse.indices[base + begin : base + end]

    def split(self, rows: Sequence[int], depth: int) -> list[list[int]]:
        """By partition `depth`; rows that have none, and such as are alone, are left out."""
        each = PARTITION // self.sparse.block_size
        found: dict[bytes, list[int]] = {}
        for row in rows:
            if self.whole[row] > depth:
                found.setdefault(self.columns(row, depth * each, (depth + 1) * each).tobytes(), []).append(
                    row
                )
        return [group for group in found.values() if len(group) > 1]

    def gain(self, rows: Sequence[int], begin: int, end: int) -> int:
        """What attending to these partitions together saves, all KV heads."""
        vectors = sum(self.vectors[row] for row in rows)
        tiles = -(-vectors // (self.tile_vectors // self.group * self.group))
        saved = (len(rows) - tiles) * (end - begin) * PARTITION * PACK
        states = sum(self.vectors[row] * (self.whole[row] + 2 - begin) for row in rows)
        return (saved - states * STATE) * self.kv_heads

    def best(self, rows: Sequence[int], begin: int, levels: int) -> tuple[int, list[Node]]:
        """The most that can be saved from partition `begin` on, and how."""
        end = self.common(rows, begin)
        parts = self.split(rows, end)
        apart, nodes = self._sum(parts, begin, levels)
        gain = self.gain(rows, begin, end) if end > begin else 0
        if not levels or gain <= 0:
            return apart, nodes
        below, deeper = self._sum(parts, end, levels - 1)
        if gain + below <= apart:
            return apart, nodes
        return gain + below, [Node(tuple(rows), begin, end), *deeper]

    def _sum(self, parts: Sequence[Sequence[int]], begin: int, levels: int) -> tuple[int, list[Node]]:
        found = [self.best(part, begin, levels) for part in parts] if levels else []
        return sum(gain for gain, _ in found), [node for _, nodes in found for node in nodes]


def find_shared(
    queries: Queries, sparse: BlockSparse, *, group: int, kv_heads: int, tile_vectors: int, levels: int
) -> list[Node]:
    """The prefixes that are worth attending to together. Parents stand before their children.

    `group`: query heads that share a KV head. `tile_vectors`: query vectors that share one reading of a key.
    """
    if PARTITION % sparse.block_size or group > tile_vectors or not levels:
        return []
    vectors = (queries.counts() * np.int32(group)).tolist()
    whole = (queries.first // PARTITION).tolist()
    # A row that fills a tile by itself has nothing to gain.
    rows = [i for i, count in enumerate(vectors) if whole[i] and 2 * count <= tile_vectors]
    search = _Search(sparse, group, kv_heads, tile_vectors, vectors, whole)
    gain, nodes = 0, []
    for part in search.split(rows, 0):
        more, found = search.best(part, 0, levels)
        gain += more
        nodes += found
    return nodes if gain >= SHARE_MIN else []
