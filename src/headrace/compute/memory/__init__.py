"""How a sequence's KV is seen by attention. Both ways compute on the same pool of blocks, and the same block tables.

- `paged`: attention looks each block up in the sequence's table.
- `virtual`: each sequence has one contiguous range of addresses, into which its blocks are mapped.
"""

from typing import Protocol

from torch import Tensor

from headrace.compute.layers.batch import Batch
from headrace.types.ids import SequenceKey
from headrace.types.plan import StepPlan
from headrace.types.ranges import RangeCounts


class Memory(Protocol):
    """Tables in, tensors for attention out. All but `ahead` and `counts` is called on the executor's thread."""

    @property
    def pool(self) -> tuple[Tensor, ...]:
        """All blocks: [blocks, layers, planes, kv_heads, block_size, head_dim] of every group."""
        ...

    def ahead(self, plan: StepPlan) -> None:
        """The plan will be executed behind those named before. Any thread; returns at once."""
        ...

    def prepare(self, plan: StepPlan) -> dict[SequenceKey, str]:
        """See to it that what the plan names can be computed on. Sequences for which that cannot be, and why."""
        ...

    def row(self, key: SequenceKey) -> int | None:
        """The row that a sequence of the plan must have; None: any."""
        ...

    def view(self, batch: Batch) -> Batch:
        """The batch with its KV as attention is to see it."""
        ...

    def release(self, key: SequenceKey) -> None:
        """The sequence is over. Unknown ones are ignored."""
        ...

    def counts(self) -> RangeCounts | None:
        """Of ranges, where there are any. Any thread."""
        ...
