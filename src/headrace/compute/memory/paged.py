"""Attention looks each block up in its sequence's table (Kwon et al. 2023, arXiv:2309.06180): nothing to be done ahead."""

from collections.abc import Sequence

from headrace.compute.layers.batch import Batch
from headrace.compute.pool import pool_tensors
from headrace.types.ids import SequenceKey
from headrace.types.kv import KVSpec
from headrace.types.plan import StepPlan
from headrace.types.ranges import RangeCounts


class PagedMemory:
    """Implements `Memory`."""

    def __init__(
        self, spec: KVSpec, blocks: Sequence[int], buffers: Sequence[memoryview] | None = None
    ) -> None:
        """As `pool_tensors`."""
        self.pool = pool_tensors(spec, blocks, buffers)

    def ahead(self, plan: StepPlan) -> None:
        pass

    def prepare(self, plan: StepPlan) -> dict[SequenceKey, str]:
        return {}

    def row(self, key: SequenceKey) -> int | None:
        return None

    def view(self, batch: Batch) -> Batch:
        return batch

    def release(self, key: SequenceKey) -> None:
        pass

    def counts(self) -> RangeCounts | None:
        return None
