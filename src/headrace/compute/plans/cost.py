"""What a tile's work costs, in time per key and query vector: enough to balance, and to tell whether sharing pays."""

import numpy as np
from numpy.typing import NDArray

PACK = 16
"""Reading and packing a key takes as long as so many query vectors' use of it. Measured: decode attention out of memory, two threads."""
STATE = 32
"""Writing a vector's partial state, and merging it, takes as long as so many of its keys."""
SHARE_MIN = 4_000
"""What sharing must save at least, all KV heads together: a second pass over the batch, which wakes the threads again, takes some 10 us."""


Longs = NDArray[np.int64]


def tile_cost(keys: Longs, vectors: Longs) -> Longs:
    """Of tiles, under one KV head."""
    return keys * (vectors + PACK)
