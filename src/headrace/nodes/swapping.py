"""Swapping of preempted sequences to host memory and back, beside the steps (FastSwitch, arXiv 2411.18424).

Life of a swap:
 1. A sequence is stopped to make room. When no plan in flight names it and nothing of it is being sent, the preemption policy says what
    becomes of its KV. To be swapped, it needs room in the host area; where there is none it is recomputed (counted as `full`).
 2. What the host has no valid copy of is copied, one copy for each run that is contiguous on both sides (`SwapOut`). Until that has ended
    the sequence is STOPPING and its device blocks are its own: nobody else is given them, and who needs one waits for this copy alone.
 3. `Swapped`: its blocks are freed, its published ones released (they stay in the pool's index until they are evicted), and it queues
    again, with `kept` tokens on the host. A copy that failed is given up: it will be recomputed.
 4. First in order, it is looked up and admitted as any other. What the pool still had is not copied; the rest comes back (`SwapIn`) while
    it is LOADING and in no plan. A failure leads back to the queue, with nothing on the host.
 5. It runs. With `reuse` the copy stays, and 2 copies only what is new; its last blocks may be taken for others meanwhile (never while its
    sequence waits: then it is all there is). Without, it is dropped.
A sequence that ends (cancelled, failed) in 2 or 4 leaves when its copies have ended.

The paper polls for finished copies once a step. Here the shell tells of them (`Swapped`) and the next step that is planned knows: a step is
never planned with a copy that has ended unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from headrace.engine.policies import Fate
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, Status
from headrace.kv.hostarea import HostArea
from headrace.transfer.runs import merge
from headrace.types.events import Command
from headrace.types.ids import SequenceKey
from headrace.types.swaps import SwapId, SwapIn, SwapOut, Swapped, SwapRun


class SwapCounts(msgspec.Struct):
    """What swapping has come to so far."""

    out: int = 0
    """Sequences whose KV went to host memory,"""
    back: int = 0
    """and came back."""
    copies: int = 0
    """Runs copied, either way,"""
    blocks: int = 0
    """and blocks."""
    reused: int = 0
    """Blocks that the host still had, and that were not copied out again."""
    found: int = 0
    """Blocks that the pool still had, and that were not copied back."""
    full: int = 0
    """Victims for which there was no room."""
    failed: int = 0
    conflicts: int = 0
    """Swaps for whose device blocks somebody waited."""


@dataclass(slots=True, eq=False)
class Job:
    """Copies under way."""

    sequence: Sequence
    back: bool
    tokens: int
    """KV of the sequence that is then on the other side."""
    awaited: bool = False


class Swapping:
    """`sends`: is something of this sequence being sent? `out` takes commands."""

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: tuple[int, ...],
        sends: Callable[[SequenceKey], bool],
        out: Callable[[Command], None],
    ) -> None:
        self._scheduler = scheduler
        self._memory = scheduler.memory
        self._policy = scheduler.policies.preemption
        rules = self._policy.swapping
        self._grouped = rules is not None and rules.group_blocks > 0
        self._reuse = rules is not None and rules.reuse
        self.swaps = rules is not None
        self.area = HostArea(
            blocks or (0,) * len(self._memory.spec.groups), rules.group_blocks if rules is not None else 0
        )
        self.counts = SwapCounts()
        self._sends = sends
        self._out = out
        self._jobs: dict[SwapId, Job] = {}
        self._busy: dict[SequenceKey, None] = {}
        self._decided: dict[SequenceKey, None] = {}
        """Stopped sequences of which it is known what becomes of their KV."""
        self._number = 0

    @property
    def idle(self) -> bool:
        return not self._jobs and not self.area.copies

    def busy(self, key: SequenceKey) -> bool:
        """Copies from or into its blocks are under way."""
        return key in self._busy

    # Out

    def save(self) -> None:
        """Begin to copy what is stopped, will come back, and is used by nobody else any more."""
        scheduler = self._scheduler
        for sequence in scheduler.stopping if self.swaps else ():
            key = sequence.key
            used = sequence.last_step > scheduler.retired or self._sends(key)
            if used or sequence.ends or key in self._decided:
                continue
            self._decided[key] = None
            # What lies with peers is not to be had for a copy.
            if self._policy.fate(sequence) is Fate.SWAP and sequence.computed > 0 and not sequence.long:
                self._save(sequence)
            elif self._reuse:
                self._fall_back(sequence)

    def _save(self, sequence: Sequence) -> None:
        key, spec = sequence.key, self._memory.spec
        if not self._reuse:
            self.area.drop(key)
        blocks = spec.blocks_for(sequence.computed)
        spans = [(trimmed, blocks) for trimmed in sequence.trimmed]
        donors = [s.key for s in reversed(self._scheduler.running)]
        if not self.area.hold(key, spans, donors):
            self.counts.full += 1
            self._fall_back(sequence)
            return
        runs: list[SwapRun] = []
        for group, (copy, table) in enumerate(zip(self.area.copies[key], sequence.tables, strict=True)):
            begin = max(copy.at, copy.valid)
            self.counts.reused += begin - copy.at
            runs += self._runs(group, table[begin:blocks], copy.blocks[begin - copy.at :])
        if runs:
            self._begin(Job(sequence, False, sequence.computed), runs)
        else:
            sequence.kept = sequence.computed

    def _fall_back(self, sequence: Sequence) -> None:
        """What the host has from before is a prefix that need not be recomputed."""
        valid = self.area.valid(sequence.key)
        sequence.kept = min(valid * self._memory.spec.block_size, sequence.computed)
        if not valid:
            self.area.drop(sequence.key)

    def requeued(self, sequence: Sequence) -> None:
        """It was stopped, and its blocks are free now."""
        self._decided.pop(sequence.key, None)

    # Back

    def found(self, sequence: Sequence) -> None:
        """The pool has its first `computed` tokens. That is KV of its own weights; where the host has what newer ones made of the same
        tokens, what is computed after that does not go on after this."""
        if sequence.genuine is None or sequence.computed <= sequence.genuine:
            return
        if sequence.kept > sequence.genuine:
            self.area.drop(sequence.key)
            sequence.kept = 0
        sequence.genuine = sequence.computed

    def load(self, sequence: Sequence) -> None:
        """Blocks are reserved: bring back what the pool did not have."""
        runs: list[SwapRun] = []
        blocks = self._memory.spec.blocks_for(sequence.kept)
        for group, (copy, table) in enumerate(
            zip(self.area.copies[sequence.key], sequence.tables, strict=True)
        ):
            begin = max(sequence.published[group], sequence.trimmed[group])
            assert copy.at <= begin and blocks <= copy.end, f"{sequence.key}: the host has not what it kept"
            self.counts.found += begin - copy.at
            runs += self._runs(group, table[begin:blocks], copy.blocks[begin - copy.at : blocks - copy.at])
        self._begin(Job(sequence, True, sequence.kept), runs)

    # Both

    def ended(self, event: Swapped) -> tuple[Sequence, bool] | None:
        """All copies of a swap have ended. A sequence that was to be LOADED, and whether it is; None: there is nothing else to do."""
        job = self._jobs.pop(event.swap)
        self._scheduler.copying = len(self._jobs)
        sequence = job.sequence
        key = sequence.key
        del self._busy[key]
        self.counts.failed += not event.ok
        if not job.back:
            if event.ok:
                self.area.commit(key, job.tokens // self._memory.spec.block_size)
                sequence.kept = job.tokens
                self.counts.out += 1
            else:
                self.area.drop(key)
            return None
        if sequence.status is not Status.LOADING:
            return None
        if not (event.ok and self._reuse):
            self.area.drop(key)
        self.counts.back += event.ok
        if event.ok:
            sequence.scheduled = sequence.computed = job.tokens
        return sequence, event.ok

    def settle(self) -> None:
        """Does somebody wait for blocks that are being copied?"""
        if self._jobs and any(self._memory.need):
            for job in self._jobs.values():
                self.counts.conflicts += not (job.back or job.awaited)
                job.awaited |= not job.back

    def forget(self, key: SequenceKey) -> None:
        """It has left."""
        assert key not in self._busy
        self.area.drop(key)
        self._decided.pop(key, None)

    def _runs(self, group: int, device: list[int], host: list[int]) -> list[SwapRun]:
        if not self._grouped:
            return [SwapRun(group, d, h, 1) for d, h in zip(device, host, strict=True)]
        return [SwapRun(group, m.source, m.target, m.count) for m in merge(device, host, 1)]

    def _begin(self, job: Job, runs: list[SwapRun]) -> None:
        self._number += 1
        swap, key = SwapId(self._number), job.sequence.key
        self._jobs[swap] = job
        self._busy[key] = None
        self._scheduler.copying = len(self._jobs)
        self._scheduler.changed = True
        self.counts.copies += len(runs)
        self.counts.blocks += sum(run.count for run in runs)
        self._out(SwapIn(swap, key, tuple(runs)) if job.back else SwapOut(swap, key, tuple(runs)))
