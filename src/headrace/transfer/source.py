"""The sending half of a transfer session, at the prefill instance.

Life cycle:
 1. opened by `Dispatch`, perhaps before the prefill has begun, perhaps long after it has ended (late binding);
 2. `advance` after each chunk: writes of the blocks that it finished, as whole runs merged on both sides; or while the chunk runs, of the
    layers that are there so far, and after it of those that are left;
 3. the tail, when the first token is drawn;
 4. `done` when the tail is sent and every write is acknowledged: only then are the source's blocks free.
Cancelled or failed sessions issue nothing more and are `quiet` when their writes in flight are acknowledged. A write that failed fails the
session: a retry is a new attempt with a new slot, as a doubled write would be counted twice.
A session whose sequence runs on here (`nodes.migrating`) goes by stages: the target's table is extended, and the tail comes when every
write is acknowledged.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.transfer.runs import Move, merge
from headrace.types.events import Write
from headrace.types.ids import Address, WriteId
from headrace.types.kv import KVSpec, TableRun
from headrace.types.messages import Dispatch


class Begun(NamedTuple):
    """A block of which some layers are sent."""

    at: int
    target: int
    layers: int
    """The first so many of its group."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """One session. `dispatch.table` says which logical blocks the target wants, and where."""

    dispatch: Dispatch
    target: Address
    spec: KVSpec
    moving: bool = False
    """The sequence, if it is one, runs on meanwhile: what its windows pass need not be sent."""
    wanted: list[deque[tuple[int, int]]] = field(init=False)
    """Per group: (logical block, target's block id) of what is not sent yet, ascending."""
    begun: list[list[Begun]] = field(init=False)
    """Per group, in order."""
    inflight: dict[WriteId, None] = field(default_factory=dict[WriteId, None])
    tail_sent: bool = False
    stopped: bool = False
    blocks: int = 0
    bytes: int = 0
    writes: int = 0
    skipped: int = 0
    """Block-layers that were not there any more."""

    def __post_init__(self) -> None:
        self.wanted = [deque() for _ in self.spec.groups]
        self.begun = [[] for _ in self.spec.groups]
        self.extend(self.dispatch.table)

    def extend(self, table: tuple[TableRun, ...]) -> None:
        """The target wants these, too; in each group they follow those before."""
        for run in sorted(table):
            self.wanted[run.group].extend((run.at + i, run.first + i) for i in range(run.count))

    def advance(
        self, tables: list[list[int]], ready: int, next_id: Callable[[], WriteId], layers: int | None = None
    ) -> list[Write]:
        """Writes for what is wanted of the blocks before logical block `ready` and is not sent yet: of the first `layers` layers, or
        (None) of all.
        """
        if self.stopped or self.dispatch.shared:
            return []
        writes: list[Write] = []
        for group, g in enumerate(self.spec.groups):
            until = len(g.layers) if layers is None else bisect_left(g.layers, layers)
            for first, blocks in self._due(group, tables[group], ready, until).items():
                sources = [tables[group][at] for at, _ in blocks]
                assert -1 not in sources, "a wanted block has been trimmed"
                moves = merge(sources, [target for _, target in blocks], until - first)
                writes += [self._write(group, move, first, until, next_id()) for move in moves]
                if until < len(g.layers):
                    self.begun[group] += [Begun(at, target, until) for at, target in blocks]
        return writes

    def _due(self, group: int, table: list[int], ready: int, until: int) -> dict[int, list[tuple[int, int]]]:
        """Take out what lacks layers before `until`: (logical block, target) by the layers that are sent of it."""
        due: dict[int, list[tuple[int, int]]] = {}
        begun, wanted = self.begun[group], self.wanted[group]
        for block in begun:
            if block.at < ready and block.layers < until:
                due.setdefault(block.layers, []).append((block.at, block.target))
        if due:
            self.begun[group] = [b for b in begun if b.at >= ready or b.layers >= until]
        while until and wanted and wanted[0][0] < ready:
            at, target = wanted.popleft()
            if self.moving and table[at] < 0:
                self.skipped += len(self.spec.groups[group].layers)
            else:
                due.setdefault(0, []).append((at, target))
        return due

    def drop_rest(self) -> None:
        """What is wanted and was not sent will not be."""
        for group, wanted in zip(self.spec.groups, self.wanted, strict=True):
            self.skipped += len(wanted) * len(group.layers)
            wanted.clear()

    def acknowledge(self, write: WriteId) -> None:
        del self.inflight[write]

    def stop(self) -> None:
        """Issue nothing more."""
        self.stopped = True

    @property
    def quiet(self) -> bool:
        return not self.inflight

    @property
    def done(self) -> bool:
        return self.tail_sent and not self.inflight

    def _write(self, group: int, move: Move, first: int, until: int, write: WriteId) -> Write:
        layers = len(self.spec.groups[group].layers)
        self.inflight[write] = None
        if until == layers:
            self.blocks += move.count
        self.bytes += move.count * self.spec.block_bytes(group) * (until - first) // layers
        self.writes += 1
        return Write(
            write=write,
            target=self.target,
            slot=self.dispatch.slot,
            group=group,
            source_first=move.source,
            target_first=move.target,
            count=move.count,
            weight=move.count * (until - first),
            layer=first,
            layers=0 if until - first == layers else until - first,
        )
