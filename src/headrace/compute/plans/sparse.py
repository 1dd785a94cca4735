"""A step's attention as a block-sparse matrix, CSR (FlashInfer, arXiv 2501.01005, section 3.1): which query tokens meet which blocks.

A row is a run of query tokens: successive positions of one sequence. Its columns are the blocks of that sequence, in order, from position 0
to the run's last one. Two rows whose leading blocks are the same share a prefix, wherever that is known from: the tables say it all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

PARTITION = 1024
"""Keys that share one accumulator. Sums over keys are cut here, always, and nowhere else."""


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """The KV that each row attends to."""

    indptr: Ints
    """[rows + 1]: row i has indices[indptr[i] : indptr[i + 1]]."""
    indices: Ints
    """Block ids by logical block; -1 where a window has left the block behind."""
    last: Ints
    """[rows]: keys in the last block, 1 to block_size."""
    block_size: int
    blocks: int
    """Of the pool: ids of attended blocks are below it."""

    @property
    def rows(self) -> int:
        return len(self.last)

    def keys(self) -> Ints:
        """[rows]: keys from position 0 on."""
        return (np.diff(self.indptr) - 1) * np.int32(self.block_size) + self.last


@dataclass(frozen=True, slots=True)
class Queries:
    """The rows' query tokens."""

    indptr: Ints
    """[rows + 1]: row i has tokens indptr[i] to indptr[i + 1] - 1 of the batch."""
    first: Ints
    """[rows]: position of its first token. The others follow one by one."""

    @property
    def tokens(self) -> int:
        return int(self.indptr[-1])

    def counts(self) -> Ints:
        """[rows]: tokens."""
        return np.diff(self.indptr)


def describe(
    tables: Ints, rows: Ints, positions: Ints, *, blocks: int, block_size: int, window: int = 0
) -> tuple[Queries, BlockSparse]:
    """Describe a flat batch.

    Args:
        tables: int32 [sequences, blocks_max]: block ids, -1 where there is none.
        rows: int32 [tokens]: the row of `tables` of each token.
        positions: int32 [tokens]: its position. Neighbours at successive positions of one sequence make one row.
        blocks: how many blocks there are.
        block_size: tokens of one.
        window: positions that a token attends, up to its own; 0: all.

    Raises:
        ValueError: an array does not fit, or a table names no block for a position that is attended.
    """
    for name, array, dims in (("tables", tables, 2), ("rows", rows, 1), ("positions", positions, 1)):
        _check(name, array, dims)
    if len(rows) != len(positions) or not len(rows):
        raise ValueError(f"{len(rows)} rows for {len(positions)} positions")
    if block_size < 1 or window < 0:
        raise ValueError(f"block size {block_size}, window {window}")
    if rows.min() < 0 or rows.max() >= len(tables):
        raise ValueError(f"a token has no table row: rows {rows.min()} to {rows.max()} of {len(tables)}")
    if positions.min() < 0 or positions.max() // block_size >= tables.shape[1]:
        raise ValueError(f"position {positions.min()} or {positions.max()} lies outside its table")
    begins = np.flatnonzero((np.diff(rows) != 0) | (np.diff(positions) != 1)).astype(np.int32) + np.int32(1)
    indptr = np.concatenate(([0], begins, [len(rows)])).astype(np.int32)
    first, final = positions[indptr[:-1]], positions[indptr[1:] - 1]
    counts = final // block_size + 1
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    own = rows[indptr[:-1]]
    indices = np.empty(offsets[-1], dtype=np.int32)
    for i, (row, count) in enumerate(zip(own.tolist(), counts.tolist(), strict=True)):
        indices[offsets[i] : offsets[i + 1]] = tables[row, :count]
    sparse = BlockSparse(offsets, indices, final % np.int32(block_size) + np.int32(1), block_size, blocks)
    _check_blocks(sparse, first, own, blocks, window)
    return Queries(indptr, first), sparse


def _check(name: str, array: NDArray[Any], dims: int) -> None:
    if array.dtype != np.int32 or array.ndim != dims:
        raise ValueError(f"{name} must be int32 of {dims} dimensions, not {array.dtype}{list(array.shape)}")


def _check_blocks(sparse: BlockSparse, first: Ints, own: Ints, blocks: int, window: int) -> None:
    missing = (sparse.indices < 0) | (sparse.indices >= blocks)
    if not missing.any():
        return
    low = np.maximum(first - window + 1, 0) // sparse.block_size if window else np.zeros_like(first)
    at = np.flatnonzero(missing)
    row = np.searchsorted(sparse.indptr, at, side="right") - 1
    wrong = at - sparse.indptr[row] >= low[row]
    if wrong.any():
        raise ValueError(f"table row {own[row[wrong][0]]} names no block for a position it attends")
