"""How much of a trace's prompts a prefix cache could serve: exactly, for every cache size at once, under least-recently-used.

A request uses its blocks from the last to the first, so that no block is older than one that needs it, as prefix caches evict leaves first.
A block is then found in a cache of C blocks if and only if fewer than C different blocks have been used since its own last use (Mattson's
stack), counted when the request comes. Answers are not cached.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.types.trace import Ints, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Reuse:
    """Of the full blocks of all prompts."""

    block_size: int
    blocks: int
    """Uses."""
    different: int
    tokens: int
    """Of all prompts, in full blocks or not."""
    needed: Ints
    """Ascending: of each use that an infinite cache would serve, the least cache that serves it, blocks."""

    def hits(self, cache_blocks: int | None = None) -> int:
        """Uses found in a cache of this size; None: infinite."""
        if cache_blocks is None:
            return len(self.needed)
        return int(np.searchsorted(self.needed, cache_blocks, "right"))

    def block_rate(self, cache_blocks: int | None = None) -> float:
        """Share of full blocks found."""
        return self.hits(cache_blocks) / self.blocks if self.blocks else 0.0

    def token_rate(self, cache_blocks: int | None = None) -> float:
        """Share of prompt tokens found."""
        return self.hits(cache_blocks) * self.block_size / self.tokens if self.tokens else 0.0

    def curve(self, points: int = 200) -> tuple[Ints, NDArray[np.float64]]:
        """Cache sizes, blocks, and the share of tokens found with each."""
        most = int(self.needed[-1]) if len(self.needed) else 1
        sizes = np.unique(np.rint(np.geomspace(1, max(most, 2), points)).astype(np.int64))
        return sizes, np.array([self.token_rate(int(size)) for size in sizes])


def reuse(trace: Trace) -> Reuse:
    """How a trace's prompts share blocks."""
    needed = np.sort(_needed(trace.hash_ids, np.diff(trace.hash_starts)))
    return Reuse(
        block_size=trace.block_size,
        blocks=len(trace.hash_ids),
        different=len(trace.hash_ids) - len(needed),
        tokens=int(trace.prompt.sum()),
        needed=needed,
    )


def _needed(ids: Ints, counts: Ints) -> Ints:
    """Of each use of a block that was used before, in no order: 1 + the different blocks used since, up to when its request came.

    Those are the uses since, but for blocks that were used again before the request came. Blocks that were last used next to each other,
    and are used so again, differ by one, so that only the first of such a run is counted; and no run stands partly before a last use.
    """
    uses = len(ids)
    begin = np.repeat(np.cumsum(counts) - counts, counts)  # of the request that uses it
    used = np.empty_like(ids)
    used[2 * begin + np.repeat(counts, counts) - 1 - np.arange(uses)] = ids  # last block first
    by_block = np.argsort(used, kind="stable")
    again = np.concatenate(([False], np.diff(used[by_block]) == 0))[:uses]
    before = np.full(uses, -1, dtype=np.int64)
    before[by_block[again]] = by_block[np.flatnonzero(again) - 1]
    hits = np.flatnonzero(before >= 0)
    last, came = before[hits], begin[hits]
    broken = (np.diff(hits) != 1) | (np.diff(last) != 1) | (np.diff(came) != 0)
    first = np.flatnonzero(np.concatenate(([True], broken))[: len(hits)])
    length = np.diff(np.concatenate((first, [len(hits)])))
    earlier = np.searchsorted(hits[first], came[first])  # runs of requests that came before
    used_again = _weight_at_least(last[first], length, earlier, last[first])
    place = np.arange(len(hits)) - np.repeat(first, length)
    return np.repeat(came[first] - last[first] - used_again, length) - place


def _weight_at_least(values: Ints, weights: Ints, prefix: Ints, bound: Ints) -> Ints:
    """For each i, the weights of those of values[: prefix[i]] that are at least bound[i]: prefixes as powers of two, each sorted once."""
    found = np.zeros(len(prefix), dtype=np.int64)
    span = int(values.max(initial=0)) + 1
    for level in range(len(values).bit_length()):
        size = 1 << level
        whole = len(values) // size * size
        keys = np.arange(whole) // size * span + values[:whole]
        order = np.argsort(keys, kind="stable")
        total = np.concatenate(([0], np.cumsum(weights[order])))
        asked = np.flatnonzero((prefix >> level) & 1)
        piece = (prefix[asked] >> level) - 1
        begin = np.searchsorted(keys[order], piece * span + bound[asked])
        found[asked] += total[(piece + 1) * size] - total[begin]
    return found
