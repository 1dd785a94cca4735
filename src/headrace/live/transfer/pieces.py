"""What a write copies: an int64 array [n, 3] of (source offset, target offset, nbytes), offsets in bytes from their regions' first byte.

All forms of a write (single, paged, strided, scatter) become such an array, so transports know one form only. The makers merge neighbours
that are adjacent on both sides (FlowKV, section 3.2): one side alone does not merge.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrace.types.errors import TransferError

Pieces = NDArray[np.int64]

SHARD_BYTES_MIN = 1 << 20
"""A write is split over lanes no finer than this."""
FEW = 8
"""Up to so many pieces plain Python is the faster: a write begins with them, when the caches hold none of numpy."""
SHARD_ALIGNMENT = 8192
"""Shards are cut at multiples of this many bytes (TransferEngine, domain groups)."""


def empty() -> Pieces:
    """Nothing: the write carries its immediate only."""
    return np.empty((0, 3), np.int64)


def single(source: int, target: int, nbytes: int) -> Pieces:
    """One run."""
    return merge(np.array([(source, target, nbytes)], np.int64))


def paged(
    source_pages: ArrayLike,
    target_pages: ArrayLike,
    stride: int,
    *,
    offset: int = 0,
    nbytes: int | None = None,
    target_stride: int | None = None,
    target_offset: int | None = None,
) -> Pieces:
    """Page `source_pages[i]` to page `target_pages[i]`: `nbytes` (the whole page, if None) from `offset` in each page of `stride` bytes.

    The target's pages may have another stride and offset. Raises TransferError if the lists differ in length.
    """
    sources, targets = np.asarray(source_pages, np.int64), np.asarray(target_pages, np.int64)
    if sources.shape != targets.shape or sources.ndim != 1:
        raise TransferError(f"{sources.size} source pages cannot go to {targets.size} target pages")
    pieces = np.empty((sources.size, 3), np.int64)
    pieces[:, 0] = sources * stride + offset
    pieces[:, 1] = targets * (target_stride or stride) + (offset if target_offset is None else target_offset)
    pieces[:, 2] = stride - offset if nbytes is None else nbytes
    return merge(pieces)


def strided(
    source: int, target: int, count: int, nbytes: int, source_stride: int, target_stride: int
) -> Pieces:
    """`count` runs of `nbytes`, each so far from the one before on either side."""
    steps = np.arange(count, dtype=np.int64)
    pieces = np.empty((count, 3), np.int64)
    pieces[:, 0] = source + steps * source_stride
    pieces[:, 1] = target + steps * target_stride
    pieces[:, 2] = nbytes
    return merge(pieces)


def scatter(runs: ArrayLike) -> Pieces:
    """Any runs: rows of (source offset, target offset, nbytes)."""
    return merge(np.array(runs, np.int64).reshape(-1, 3))


def merge(pieces: Pieces) -> Pieces:
    """Neighbours that continue each other on both sides become one; those of no bytes go."""
    pieces = filled(pieces)
    if len(pieces) < 2:
        return pieces
    ends = pieces[:-1, :2] + pieces[:-1, 2:]
    first = np.concatenate(([True], (ends != pieces[1:, :2]).any(axis=1)))
    if first.all():
        return pieces
    merged = pieces[first]
    merged[:, 2] = np.add.reduceat(pieces[:, 2], np.flatnonzero(first))
    return merged


def filled(pieces: Pieces) -> Pieces:
    """Without those of no bytes."""
    if len(pieces) <= FEW and all(nbytes for _, _, nbytes in pieces.tolist()):
        return pieces
    return pieces[pieces[:, 2] != 0] if (pieces[:, 2] == 0).any() else pieces


def total(pieces: Pieces) -> int:
    """Bytes."""
    return int(pieces[:, 2].sum())


def check(pieces: Pieces, source_nbytes: int, target_nbytes: int) -> None:
    """Raises TransferError if a piece leaves either region."""
    if len(pieces) <= FEW and all(
        0 <= source <= source_nbytes - nbytes and 0 <= target <= target_nbytes - nbytes and nbytes >= 0
        for source, target, nbytes in pieces.tolist()
    ):
        return
    check_side(pieces[:, 0], pieces[:, 2], source_nbytes, "source")
    check_side(pieces[:, 1], pieces[:, 2], target_nbytes, "target")


def check_side(offsets: NDArray[np.int64], sizes: NDArray[np.int64], nbytes: int, side: str) -> None:
    """Raises TransferError if a run leaves a region of `nbytes`."""
    # So put, an offset near the largest integer cannot wrap round.
    outside = (offsets < 0) | (sizes < 0) | (sizes > nbytes) | (offsets > nbytes - sizes)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise TransferError(
            f"bytes {offsets[at]} to {int(offsets[at]) + int(sizes[at])} are not in the {side}'s region of {nbytes}"
        )


def shard(pieces: Pieces, weight: int, lanes: int) -> list[tuple[Pieces, int]]:
    """Deal a write over at most `lanes` shards of about equal bytes, and its weight with them.

    Every shard weighs at least 1, so there are at most as many shards as the write weighs; the weights' sum is the write's. A write of no
    weight (no immediate) is dealt the same way, all shards weighing 0.
    """
    if lanes < 2:
        return [(pieces, weight)]
    nbytes = total(pieces)
    count = min(lanes, -(-nbytes // SHARD_BYTES_MIN))
    if weight:
        count = min(count, weight)
    if count < 2:
        return [(pieces, weight)]
    step = -(-nbytes // count)
    step = -(-step // SHARD_ALIGNMENT) * SHARD_ALIGNMENT
    parts = cut(pieces, range(step, nbytes, step))
    share, more = divmod(weight, len(parts))
    return [(part, share + (i < more)) for i, part in enumerate(parts)]


def cut(pieces: Pieces, borders: range) -> list[Pieces]:
    """In parts: before the byte `border` of all bytes, for each border in turn."""
    parts: list[Pieces] = []
    ends = np.cumsum(pieces[:, 2])
    rest, passed = pieces, 0
    for border in borders:
        at = int(np.searchsorted(ends, border, side="left"))
        here = at - passed
        head = rest[: here + 1].copy()
        surplus = int(ends[at]) - border
        head[-1, 2] -= surplus
        parts.append(head)
        if surplus:
            tail = rest[here:].copy()
            moved = tail[0, 2] - surplus
            tail[0] += (moved, moved, -moved)
            rest, passed = tail, at
        else:
            rest, passed = rest[here + 1 :], at + 1
    parts.append(rest)
    return parts
