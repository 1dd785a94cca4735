"""How long a plan's arrays can get: known from capacity alone, so that kernels in a CUDA graph can be given buffers of one size and place.

A plan is then padded to its bounds: units beyond the last are -1, which a kernel's program that finds it leaves at once; a token without
states has an empty interval of slots. FlashInfer (arXiv 2501.01005, section 3.3.1) pads its grid in the same way.
"""

from dataclasses import dataclass

import numpy as np

from headrace.compute.plans.plan import Limits, Plan, Shape
from headrace.compute.plans.sparse import Ints


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one step can hold at most."""

    tokens: int
    rows: int
    """Runs of query tokens."""
    keys: int
    """Of the longest row."""
    block_size: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lengths that no plan of a capacity exceeds."""

    order: int
    indices: int
    tiles: int
    items: int
    units: int
    states: int

    def pad(self, plan: Plan) -> tuple[Ints, ...]:
        """`Plan.arrays()`, each as long as the bound. Raises ValueError if the plan is of a greater capacity."""
        tiles, items = (self.tiles,) * 5, (self.items,) * 4
        lengths = (self.order, self.indices, *tiles, *items, len(plan.slots), self.units)
        if plan.states > self.states:
            raise ValueError(f"a plan with {plan.states} states, and there is room for {self.states}")
        return tuple(_padded(array, length) for array, length in zip(plan.arrays(), lengths, strict=True))


def bounds(capacity: Capacity, shape: Shape, limits: Limits) -> Bounds:
    """Of every plan with these limits for a batch within the capacity."""
    rows = min(capacity.rows, capacity.tokens)
    if shape.group > limits.tile_vectors:
        tiles, tall = capacity.tokens * -(-shape.group // limits.tile_vectors), 0
    else:
        full = capacity.tokens // (
            limits.tile_vectors // shape.group
        )  # each run ends with one that may not be full
        tiles = rows + full
        tall = 0 if shape.window else limits.levels * (rows // 2 + full)
    items = tiles + tall + limits.splits * limits.workers
    return Bounds(
        order=capacity.tokens * (1 + (limits.levels if tall else 0)),
        indices=rows * -(-capacity.keys // capacity.block_size),
        tiles=tiles + tall,
        items=items,
        units=items * shape.kv_heads,
        states=limits.states_max,
    )


def _padded(array: Ints, length: int) -> Ints:
    if len(array) > length:
        raise ValueError(f"a plan with {len(array)} entries where there is room for {length}")
    padded = np.full(length, -1, dtype=np.int32)
    padded[: len(array)] = array
    return padded
