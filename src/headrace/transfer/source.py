"""The sending half of a transfer session, at the prefill instance.

Life cycle:
 1. opened by `Dispatch`, perhaps before the prefill has begun, perhaps long after it has ended (late binding);
 2. `advance` after each chunk: writes of the blocks that it finished, as whole runs merged on both sides;
 3. the tail, when the first token is drawn;
 4. `done` when the tail is sent and every write is acknowledged: only then are the source's blocks free.
Cancelled or failed sessions issue nothing more and are `quiet` when their writes in flight are acknowledged. A write that failed fails the
session: a retry is a new attempt with a new slot, as a doubled write would be counted twice.
A session whose sequence runs on here (`nodes.migrating`) goes by stages: the target's table is extended, and the tail comes when every
write is acknowledged.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.transfer.runs import merge
from headrace.types.events import Write
from headrace.types.ids import Address, WriteId
from headrace.types.kv import KVSpec, TableRun
from headrace.types.messages import Dispatch


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
        self.extend(self.dispatch.table)

    def extend(self, table: tuple[TableRun, ...]) -> None:
        """The target wants these, too; in each group they follow those before."""
        for run in sorted(table):
            self.wanted[run.group].extend((run.at + i, run.first + i) for i in range(run.count))

    def advance(self, tables: list[list[int]], ready: int, next_id: Callable[[], WriteId]) -> list[Write]:
        """Writes for the wanted blocks before logical block `ready` that are not sent yet."""
        if self.stopped or self.dispatch.shared:
            return []
        writes: list[Write] = []
        for group, wanted in enumerate(self.wanted):
            sources: list[int] = []
            targets: list[int] = []
            while wanted and wanted[0][0] < ready:
                at, block = wanted.popleft()
                if self.moving and tables[group][at] < 0:
                    self.skipped += len(self.spec.groups[group].layers)
                    continue
                sources.append(tables[group][at])
                targets.append(block)
            assert -1 not in sources, "a wanted block has been trimmed"
            moves = merge(sources, targets, len(self.spec.groups[group].layers))
            writes += [self._write(group, m.source, m.target, m.count, next_id()) for m in moves]
        return writes

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

    def _write(self, group: int, source: int, target: int, count: int, write: WriteId) -> Write:
        self.inflight[write] = None
        self.blocks += count
        self.bytes += count * self.spec.block_bytes(group)
        self.writes += 1
        return Write(
            write=write,
            target=self.target,
            slot=self.dispatch.slot,
            group=group,
            source_first=source,
            target_first=target,
            count=count,
            weight=count * len(self.spec.groups[group].layers),
        )
