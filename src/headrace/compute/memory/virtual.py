"""Each sequence's KV in one contiguous range of addresses: vAttention (Prabhu et al., ASPLOS 2025, arXiv:2405.04437), on a pool of blocks.

The pool's blocks, whoever owns and shares and moves them, are the physical pages; a range is a view of those that the sequence's table
names, in order. With a token-major layout that view is one strided tensor [tokens, heads, dim] for each layer's K and V, as any kernel for
contiguous KV takes it. Ours takes it as a table of one large block a sequence, and gives the same bits as on scattered blocks.

Life of a plan:
1. `ahead`, when it is issued, which may be a step before it runs: a thread of our own gives new sequences their ranges, enters the blocks
   that tables grow by, and maps what the plan's tokens need.
2. While it has nothing else to do, that thread maps the rest of long tables, piece by piece. If a plan needs nothing mapped, it unmaps one
   block of a range that no sequence has.
3. `prepare`, when the plan is to run: what is not done yet is waited for, or done (a stall).

Leaves out: taking pages from present sequences that have more than they need (theirs are leased from the pool by a core), and growing
tables further ahead than the core does.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Condition, Thread
from time import monotonic_ns

import torch
from torch import Tensor

from headrace.compute.checkpoint import DTYPES
from headrace.compute.layers.batch import Batch, GroupKV
from headrace.compute.memory.pages import Pages, Unmappable
from headrace.compute.memory.ranges import Ranges
from headrace.compute.pool import ordered, pool_tensors, stored_shape
from headrace.types.ids import SequenceKey, StepId
from headrace.types.kv import KVSpec, Layout
from headrace.types.plan import StepPlan
from headrace.types.ranges import RangeCounts

AHEAD_BYTES = 4 * 2**20
"""Mapped at a time ahead of need: a step that becomes due waits no longer than that takes."""

Outcome = dict[SequenceKey, str] | Exception


class VirtualMemory:
    """Implements `Memory`."""

    def __init__(
        self,
        spec: KVSpec,
        blocks: Sequence[int],
        buffers: Sequence[memoryview],
        *,
        pages: Pages,
        offsets: Sequence[int],
        length: int,
        ranges: int,
        look_ahead: bool = True,
    ) -> None:
        """`blocks`, `buffers`: as `pool_tensors`. `pages`: of the same memory. `offsets`: of each group's block 0 in it, bytes.

        `length`: longest sequence, tokens. `ranges`: how many sequences at once; twice those of a step, as the new ones of a plan
        get theirs while the one before it may run. Without `look_ahead` each plan is prepared when it is to run.

        Raises ValueError if the layout is not token-major or blocks are not whole pages, Unmappable if the addresses are not to be had.
        """
        if spec.layout is not Layout.TOKEN_MAJOR:
            raise ValueError(f"virtual KV ranges take a token-major pool, not a {spec.layout.value} one")
        self.pool = pool_tensors(spec, blocks, buffers)
        self._spec = spec
        self._ranges = Ranges.reserve(pages, spec, offsets, length, ranges)
        self._views = tuple(self._view_of(g) for g in range(len(spec.groups)))
        self._tables = torch.arange(ranges, dtype=torch.int32).view(ranges, 1)
        self._windows = [group.window for group in spec.groups]
        self._partial: dict[SequenceKey, None] = {}
        """Sequences whose table is not all in place."""
        self._ahead: dict[SequenceKey, None] = {}
        """Those of them for which the rest may be mapped ahead."""
        self._changed = Condition()
        self._knocks = {"ahead": False, "step": False}
        """Who waits for the lock. Each is set by one thread only; what can wait lets them in first."""
        self._coming: deque[StepPlan] = deque()
        """Named by `ahead`, and not begun with."""
        self._outcomes: dict[StepId, Outcome] = {}
        """Of those that are done and were not asked for yet."""
        self._spare_steps = 0
        """Plans that needed nothing, for each of which a block of an idle range goes."""
        self._stalls = 0
        self._stall_ns = 0
        self._closed = False
        self._failure: Exception | None = None
        self._thread: Thread | None = None
        if look_ahead:
            self._thread = Thread(target=self._look_ahead, name="headrace-pages", daemon=True)
            self._thread.start()

    # As `Memory`

    def ahead(self, plan: StepPlan) -> None:
        if self._thread is None:
            return
        with self._entered("ahead"):
            if plan.ends or plan.starts or plan.growth or self._partial or self._coming:
                self._coming.append(plan)
            else:
                self._spare_steps += 1

    def prepare(self, plan: StepPlan) -> dict[SequenceKey, str]:
        started_ns = monotonic_ns()
        with self._entered("step") as had_to_wait:
            if self._failure is not None:
                raise self._failure
            if self._coming and self._coming[0].step == plan.step:
                # Nobody has begun with it, and to do it here is quicker than to wake somebody.
                self._coming.popleft()
            outcome, calls = self._outcomes.pop(plan.step, None), self._ranges.tally.calls
            if outcome is None:
                outcome = self._prepared(plan)
            if had_to_wait or self._ranges.tally.calls > calls:
                self._stalls += 1
                self._stall_ns += monotonic_ns() - started_ns
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def row(self, key: SequenceKey) -> int | None:
        with self._entered("step"):
            return self._ranges.held[key].range

    def view(self, batch: Batch) -> Batch:
        groups = tuple(GroupKV(view, self._tables, batch.rows) for view in self._views)
        return replace(batch, offsets=batch.positions, groups=groups)

    def release(self, key: SequenceKey) -> None:
        with self._entered("step"):
            self._release(key)

    def counts(self) -> RangeCounts:
        ranges, tally = self._ranges, self._ranges.tally
        return RangeCounts(
            blocks_mapped=tally.mapped,
            blocks_in_place=tally.in_place,
            blocks_unmapped=tally.unmapped,
            map_calls=tally.calls,
            map_ns=tally.map_ns,
            stalls=self._stalls,
            stall_ns=self._stall_ns,
            in_use=len(ranges.held),
            mapped_bytes=ranges.mapped_bytes,
            held_bytes=ranges.held_bytes,
            resident_bytes=ranges.pages.resident_bytes(),
        )

    # Beyond it

    def contiguous(self, key: SequenceKey, group: int, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of a sequence's first tokens, each [tokens, kv_heads, head_dim]: what a kernel that knows of no blocks takes.

        `layer`: index in the group. The tokens' blocks must be in place (a step has run on them), and the tensors are good until the
        sequence ends. Raises KeyError for an unknown sequence.
        """
        with self._changed:
            index = self._ranges.held[key].range
        k, v = self._views[group][index, layer, :, :, :tokens].transpose(1, 2)
        return k, v

    def contiguous_view(self, group: int) -> Tensor:
        """All ranges of a group: [ranges, layers, planes, kv_heads, tokens of a range, head_dim], the blocks of a pool to which `row` is
        the block table. Good until `close`."""
        return self._views[group]

    def settle(self) -> None:
        """Wait until nothing is left to be done ahead."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None or not self._due())

    def close(self) -> None:
        """Give the addresses back. Tensors of `view` must be gone by then."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._views = ()
        self._ranges.pages.close()

    def _view_of(self, group: int) -> Tensor:
        """[ranges, layers, planes, kv_heads, tokens of a range, head_dim]: every range as one large block."""
        spec, ranges = self._spec, self._ranges.groups[group]
        count, blocks = ranges.shown.shape
        stored = self._ranges.pages.bytes_at(ranges.address, count * blocks * ranges.block_bytes)
        shape = stored_shape(spec, group, count, blocks * spec.block_size)
        return ordered(stored.view(DTYPES[spec.dtype]).view(shape), spec.layout)

    # Ranges. All of this holds the lock.

    def _prepared(self, plan: StepPlan) -> Outcome:
        """Do what the plan needs."""
        wrong: dict[SequenceKey, str] = {}
        try:
            for key in plan.ends:
                self._release(key)
            for start in plan.starts:
                self._release(start.key)
                try:
                    self._ranges.claim(start.key, start.table)
                except Unmappable as error:
                    wrong[start.key] = str(error)
                    continue
                self._begin(start.key)
            for growth in plan.growth:
                if growth.key in self._ranges.held:
                    self._ranges.extend(growth.key, growth.table)
                    self._begin(growth.key)
            for work in plan.work if self._partial else ():
                if work.key in self._partial:
                    try:
                        self._fill(work.key, work.first, work.first + work.count)
                    except Unmappable as error:
                        wrong[work.key] = str(error)
        except (ValueError, OSError) as error:
            return error
        return wrong

    def _fill(self, key: SequenceKey, first: int, until: int) -> None:
        """Map what tokens `first`..`until - 1` attend."""
        held, size = self._ranges.held[key], self._spec.block_size
        for group, window in enumerate(self._windows):
            near = max(0, first - window + 1) // size if window else 0
            if max(0, held.first[group]) > near:
                raise ValueError(f"{key}: group {group}'s table names no block for a position it attends")
            self._ranges.fill(key, group, -(-until // size))
        self._end_if_full(key)

    def _begin(self, key: SequenceKey) -> None:
        self._partial[key] = self._ahead[key] = None

    def _end_if_full(self, key: SequenceKey) -> None:
        if self._ranges.full(key):
            self._partial.pop(key, None)
            self._ahead.pop(key, None)

    def _release(self, key: SequenceKey) -> None:
        self._ranges.release(key)
        self._partial.pop(key, None)
        self._ahead.pop(key, None)

    @contextmanager
    def _entered(self, who: str) -> Iterator[bool]:
        """Hold the lock; whether that had to be waited for."""
        self._knocks[who] = True
        free = self._changed.acquire(blocking=False)
        if not free:
            self._changed.acquire()
        self._knocks[who] = False
        try:
            yield not free
        finally:
            if self._due():
                self._changed.notify_all()
            self._changed.release()

    def _due(self) -> bool:
        return bool(self._coming or self._ahead or (self._spare_steps and self._ranges.stale))

    def _may_work(self) -> bool:
        return self._closed or bool(self._coming) or (self._due() and not any(self._knocks.values()))

    def _look_ahead(self) -> None:
        try:
            while not self._closed:
                with self._changed:
                    self._changed.wait_for(self._may_work)
                    self._work_ahead()
                    self._changed.notify_all()
        except Exception as error:
            # Nobody waits for this thread but the next plan.
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _work_ahead(self) -> None:
        if self._coming:
            plan = self._coming.popleft()
            self._outcomes[plan.step] = self._prepared(plan)
        elif self._ahead:
            self._fill_ahead(next(iter(self._ahead)))
        elif self._spare_steps:
            self._spare_steps -= 1
            self._ranges.trim()

    def _fill_ahead(self, key: SequenceKey) -> None:
        """One piece of a table that is not all in place."""
        for group, ranges in enumerate(self._ranges.groups):
            try:
                most = max(1, AHEAD_BYTES // ranges.block_bytes)
                if self._ranges.fill(key, group, ranges.shown.shape[1], most):
                    break
            except Unmappable:
                # The step that needs it will be told.
                del self._ahead[key]
                return
        self._end_if_full(key)
