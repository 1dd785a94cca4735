"""The cluster's prompt tree: which pool holds which block, from the pools' own messages (MemServe, arXiv 2406.17565, sec. 5).

A block's hash names everything before it, so the tree is a dictionary from hash to the set of its holders, an int with bit p for pool p.
Walking a prompt's chain, the holders of all blocks so far are the AND of these sets; a pool that drops out holds as many leading blocks as
were walked. A tree per role is a choice of rows. It is as late as the messages are; a router that asks a pool for more than it still holds
only gets a shorter hit.
"""

from collections.abc import Sequence

import numpy as np

from headrace.types.ids import BlockHash, PoolId
from headrace.types.views import Column

FEW = 24
"""Up to so many pools it is faster to name them one by one than to unpack their set."""


class Prefixes:
    """Implements `types.views.PrefixView`. Pools are told apart by their numbers, which are small."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, int] = {}
        self._pools = np.zeros(0, dtype=np.int64)
        self._size = 0
        self._in_order = True

    def __len__(self) -> int:
        """Different blocks that some pool holds."""
        return len(self._holders)

    def map_rows(self, pools: Sequence[PoolId]) -> None:
        """From now on row i of the columns is pool `pools[i]`; rows may share a pool."""
        self._pools = np.array(pools, dtype=np.int64)
        self._size = max(pools, default=-1) + 1
        self._in_order = list(pools) == list(range(self._size))

    def stored(self, pool: PoolId, hashes: Sequence[BlockHash]) -> None:
        """These blocks entered the pool's index."""
        holders, bit = self._holders, 1 << pool
        for name in hashes:
            held = holders.get(name)
            holders[name] = bit if held is None else held | bit

    def removed(self, pool: PoolId, hashes: Sequence[BlockHash]) -> None:
        """These blocks left it. Those that were never told of are ignored."""
        holders, bit = self._holders, 1 << pool
        for name in hashes:
            held = holders.get(name, 0)
            if held == bit:
                del holders[name]
            elif held & bit:
                holders[name] = held ^ bit

    def forget(self, pool: PoolId) -> None:
        """The pool has ended, and all that it held. Walks every block."""
        bit = 1 << pool
        self.removed(pool, [name for name, held in self._holders.items() if held & bit])

    def hits(self, hashes: tuple[BlockHash, ...]) -> Column:
        """Leading blocks of a prompt that each row's pool holds, float64 [rows]."""
        depths = np.zeros(self._size)
        holders = self._holders
        alive = holders.get(hashes[0], 0) if hashes else 0
        for depth, name in enumerate(hashes):
            rest = alive & holders.get(name, 0)
            if rest != alive:
                self._write(depths, alive ^ rest, depth)
                alive = rest
            if not alive:
                break
        else:
            self._write(depths, alive, len(hashes))
        return depths if self._in_order else depths[self._pools]

    def _write(self, depths: Column, pools: int, depth: int) -> None:
        """`depths[p] = depth` for every pool p of a set; pools that no row has are left out."""
        pools &= (1 << self._size) - 1
        if pools.bit_count() > FEW:
            packed = np.frombuffer(pools.to_bytes(-(-self._size // 8), "little"), dtype=np.uint8)
            depths[np.unpackbits(packed, count=self._size, bitorder="little").view(np.bool_)] = depth
            return
        while pools:
            lowest = pools & -pools
            depths[lowest.bit_length() - 1] = depth
            pools ^= lowest
