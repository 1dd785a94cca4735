"""Steps to plan: what tests draw at random."""

from dataclasses import dataclass

import numpy as np

from headrace.compute.plans.sparse import BlockSparse, Ints, Queries, describe


@dataclass
class Step:
    tables: Ints
    rows: Ints
    positions: Ints
    block_size: int
    blocks: int

    def describe(self, window: int = 0) -> tuple[Queries, BlockSparse]:
        return describe(
            self.tables,
            self.rows,
            self.positions,
            blocks=self.blocks,
            block_size=self.block_size,
            window=window,
        )


def step(prefixes: list[int], spans: list[tuple[int, int]], block_size: int = 32, seed: int = 0) -> Step:
    """Sequences of (length, query tokens at its end); sequence i has the first prefixes[i] blocks of sequence i - 1."""
    counts = [-(-length // block_size) for length, _ in spans]
    order = np.random.default_rng(seed).permutation(sum(counts) + 5).astype(np.int32)
    tables = np.full((len(spans), max(counts) + 1), -1, dtype=np.int32)
    used = 0
    for i, count in enumerate(counts):
        shared = min(prefixes[i], count) if i else 0
        tables[i, :shared] = tables[i - 1, :shared]
        tables[i, shared:count] = order[used : used + count - shared]
        used += count - shared
    rows = np.concatenate([np.full(queries, i) for i, (_, queries) in enumerate(spans)]).astype(np.int32)
    positions = np.concatenate([np.arange(length - queries, length) for length, queries in spans])
    return Step(tables, rows, positions.astype(np.int32), block_size, len(order))


def random_step(seed: int) -> Step:
    """A few sequences, some with shared prefixes of any length, decoding or in a chunk of prefill."""
    draw = np.random.default_rng(seed)
    block_size = int(draw.choice([16, 32, 64]))
    spans: list[tuple[int, int]] = []
    prefixes: list[int] = []
    lengths = [int(draw.integers(1, 9000)) for _ in range(int(draw.integers(1, 4)))]
    for _ in range(int(draw.integers(1, 20))):
        length = max(1, int(draw.choice(lengths)) + int(draw.integers(-40, 40)))
        queries = 1 if draw.random() < 0.8 else int(draw.integers(1, min(length, 70) + 1))
        prefixes.append(int(draw.integers(0, length // block_size + 1)) if draw.random() < 0.8 else 0)
        spans.append((length, queries))
    for i in range(1, len(spans)):  # what a sequence computes now is its own
        prefixes[i] = min(
            prefixes[i],
            (spans[i][0] - spans[i][1]) // block_size,
            (spans[i - 1][0] - spans[i - 1][1]) // block_size,
        )
    return step(prefixes, spans, block_size, seed)
