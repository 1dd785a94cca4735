"""Chunk size by binary search, and units of work dealt to workers by a min-heap (FlashInfer, arXiv 2501.01005, section 3.3)."""

from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from headrace.compute.plans.sparse import Ints


def chunk_partitions(
    partitions: Ints,
    costs: NDArray[np.int64],
    tokens: Ints,
    *,
    kv_heads: int,
    workers: int,
    splits_max: int,
    states_max: int,
) -> int:
    """Partitions of the longest chunk of any tile.

    The longest such that no chunk takes more than an eighth of a worker's share, but long enough that splitting makes at most `splits_max`
    items more, and `states_max` partial states.

    Args:
        partitions: int32 [tiles]: of each tile; at least 1.
        costs: int64 [tiles]: of one partition of it under one KV head.
        tokens: int32 [tiles]: whose states a split makes.
    """
    longest = int(partitions.max())
    share = max(1, int((partitions * costs).sum()) * kv_heads // (8 * workers))

    def balanced(chunk: int) -> bool:
        return int((np.minimum(partitions, chunk) * costs).max()) <= share

    def affordable(chunk: int) -> bool:
        more = int((-(-partitions // np.int32(chunk)) - 1).sum())
        split = partitions > chunk
        states = int((tokens * (partitions - chunk + 1))[split].sum())
        return more <= splits_max and states <= states_max

    low, high = 0, longest  # the longest that balances; 0: none does
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if balanced(middle) else (low, middle - 1)
    at_most = max(1, low)
    low, high = at_most, longest  # the shortest from there on that can be afforded; the longest always can
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if affordable(middle) else (middle + 1, high)
    return low


def head_span(costs: NDArray[np.int64], kv_heads: int, workers: int) -> int:
    """KV heads that make one unit: as many as leave no unit above an eighth of a worker's share, and each worker 16 units.

    `costs`: int64 [items], of one KV head.
    """
    total, longest = int(costs.sum()) * kv_heads, int(costs.max())
    span = kv_heads
    while span > 1 and (
        longest * span * 8 * workers > total or len(costs) * -(-kv_heads // span) < 16 * workers
    ):
        span = (span + 1) // 2
    return span


def deal(costs: NDArray[np.int64], workers: int) -> tuple[Ints, Ints, Ints]:
    """Dearest first, each unit to the worker with the least so far.

    Returns:
        (indptr [workers + 1], units by worker in that order, all units dearest first). Ties go by number: one input has one result.
        The dearest worker has at most the mean plus one unit (Graham 1969), and at most 4/3 - 1/(3 workers) of the best possible.
    """
    order = np.argsort(-costs, kind="stable").astype(np.int32)
    heap = [(0, worker) for worker in range(workers)]
    heapify(heap)
    owners = np.empty(len(costs), dtype=np.int32)
    for unit, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        load, worker = heap[0]
        owners[unit] = worker
        heapreplace(heap, (load + cost, worker))
    dealt = order[np.argsort(owners[order], kind="stable")]
    indptr = np.zeros(workers + 1, dtype=np.int32)
    np.cumsum(np.bincount(owners, minlength=workers), out=indptr[1:])
    return indptr, dealt, order
