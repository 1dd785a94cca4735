"""The engine's state of one sequence: counters, not phases.

Life cycle on an instance (`status`):
 1. WAITING    in the queue; holds nothing.
 2. MATCHING   the pool was asked for its cached prefix.
 3. MATCHED    the prefix is locked; waits for admission.
 4. RUNNING    has blocks; named by plans while it has work.
 5. HELD       (PREFILL) prompt computed, first token drawn; waits for its KV to be fetched.
 6. RECEIVING  (DECODE, after 3) blocks reserved, expectation registered; then RUNNING.
 7. STOPPING   preempted or ended, but a plan in flight, or a write, still uses its blocks.
 8. FENCING    gave up receiving; waits until the source can write no more.
 9. LOADING    (after 3, swapped out before) blocks reserved; its KV is on the way back from host memory; then RUNNING.
Before all that, FETCHING: in no queue yet, as its prefix is fetched from another instance (`nodes.fetching`); it goes on as MATCHED.
Preemption leads from STOPPING back to WAITING, with `kept` tokens in host memory if they were swapped out (`nodes.swapping`); all else
leads out of the instance.
"""

from dataclasses import dataclass
from enum import Enum

from headrace.types.ids import Address, BlockHash, SequenceKey
from headrace.types.messages import Role, Start


class Status(Enum):
    WAITING = "waiting"
    MATCHING = "matching"
    MATCHED = "matched"
    RUNNING = "running"
    HELD = "held"
    RECEIVING = "receiving"
    STOPPING = "stopping"
    FENCING = "fencing"
    FETCHING = "fetching"
    LOADING = "loading"


@dataclass(slots=True, eq=False)
class Sequence:
    """One owner: the instance that it runs on. Policies read it and never write it. Lengths are tokens."""

    key: SequenceKey
    role: Role
    arrival_ns: int
    deadline_ns: int
    priority: int
    history: int
    """Tokens emitted before it came here."""
    emits_max: int
    """New tokens at most, here."""
    source: Address | None
    total: int
    """Known tokens: prompt, history, and what was emitted here."""
    hashes: list[BlockHash]
    tables: list[list[int]]
    """Block ids per group, by logical block; -1 where a window has passed."""
    published: list[int]
    """Leading logical blocks per group that the pool owns (locked by this sequence); later ones are of the instance's lease."""
    trimmed: list[int]
    """Leading logical blocks per group that were given back."""
    status: Status = Status.WAITING
    emitted: int = 0
    pending: int = 0
    """Tokens that plans in flight will emit."""
    scheduled: int = 0
    """Leading tokens whose KV exists once all plans in flight have run."""
    computed: int = 0
    """Leading tokens whose KV exists."""
    last_step: int = 0
    """The last plan that names it."""
    started: bool = False
    """The executor has its table."""
    ends: bool = False
    """With STOPPING: it leaves the instance (else it is preempted)."""
    told: int = 0
    """Emitted tokens that the router was told of,"""
    told_hashes: int = 0
    """and leading block hashes that it knows."""
    paused: bool = False
    """It leaves the batch: no further plan names it."""
    begun: bool = False
    """`Begun` was told."""
    lost: int = 0
    """Tokens whose KV was dropped by preemption."""
    recomputed: int = 0
    caches: bool = True
    """Its prefix is looked up, and its full blocks are published."""
    prefiller: Address | None = None
    """Whose pool gets what is generated here when the sequence ends."""
    kept: int = 0
    """While it does not run: leading tokens whose KV lies in host memory, so that they need not be computed again."""
    genuine: int | None = None
    """Leading tokens whose KV is of the weights under whose root it began; None: all. What newer weights make of the rest has no name: it
    is not published."""
    resumed: int = 0
    """Emitted tokens when it began to run, or to run again."""
    tenant: str = ""
    long: bool = False
    """This pool alone cannot hold it: its first partitions go to peers. They are `trimmed`; nothing of it is shared or published."""

    @property
    def age(self) -> tuple[int, SequenceKey]:
        """The lowest is the oldest, on all instances alike."""
        return self.arrival_ns, self.key

    def start_over(self) -> None:
        """Nothing of it is computed but what is `kept`."""
        self.scheduled = self.computed = 0
        if self.genuine is not None:
            self.genuine = min(self.genuine, self.kept)

    def outlive(self) -> None:
        """What plans from now on compute is of newer weights."""
        if self.genuine is None:
            self.genuine = max(self.scheduled, self.kept)

    @property
    def emit_limit(self) -> int:
        """A PREFILL sequence draws one token and is held."""
        return 1 if self.role is Role.PREFILL else self.emits_max

    @property
    def remaining(self) -> int:
        """Tokens that can be scheduled now; 0 while its last token is on the way or its limit is reached."""
        if self.paused or self.emitted + self.pending >= self.emit_limit:
            return 0
        return self.total + self.pending - self.scheduled

    @property
    def prefilling(self) -> bool:
        """More than the newest token lacks KV."""
        return self.remaining > 1 or (self.emitted + self.pending == 0 and self.remaining > 0)


def sequence_from(start: Start, groups: int) -> Sequence:
    return Sequence(
        key=start.key,
        role=start.role,
        arrival_ns=start.arrival_ns,
        deadline_ns=start.deadline_ns,
        priority=start.priority,
        history=start.history,
        emits_max=start.emits_max,
        source=start.source,
        total=start.total,
        hashes=list(start.hashes),
        told_hashes=len(start.hashes),
        tables=[[] for _ in range(groups)],
        published=[0] * groups,
        trimmed=[0] * groups,
        tenant=start.tenant,
    )
