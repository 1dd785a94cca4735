"""Hand-made sequences, a scheduler with the default policies, and an executor that says yes."""

from headrace.engine.admission import aggressive
from headrace.engine.batching import splitfuse
from headrace.engine.memory import Memory
from headrace.engine.ordering import fcfs
from headrace.engine.policies import Batching, EnginePolicies, Ordering
from headrace.engine.preemption import recompute
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, Status, sequence_from
from headrace.types.ids import Address, BlockHash, PoolId, RequestId, SequenceKey
from headrace.types.kv import BlockRun, GroupKind, KVGroup, KVSpec
from headrace.types.messages import Leased, Role, Start
from headrace.types.plan import StepPlan, StepResult
from headrace.types.request import NEVER_NS

SIZE = 4
FULL = KVGroup(GroupKind.FULL, (0,), 1, 8)
WINDOW = KVGroup(GroupKind.WINDOW, (1,), 1, 8, window=8)
PLAIN = KVSpec((FULL,), SIZE, "float32")
MIXED = KVSpec((FULL, WINDOW), SIZE, "float32")


def policies_of(batching: Batching | None = None, ordering: Ordering | None = None) -> EnginePolicies:
    return EnginePolicies(
        batching or splitfuse.Policy(splitfuse.Config()),
        aggressive.Policy(aggressive.Config()),
        ordering or fcfs.Policy(fcfs.Config()),
        recompute.Policy(recompute.Config()),
    )


def memory_of(*spare: int, spec: KVSpec = PLAIN, lease_blocks: int = 0, total: int = 64) -> Memory:
    """A share with blocks 0, 1, ... of each group in hand."""
    memory = Memory(spec, PoolId(0), (total,) * len(spec.groups), lease_blocks)
    give(memory, *spare)
    return memory


def give(memory: Memory, *counts: int, first: int = 0, short: bool = False) -> None:
    runs = tuple(BlockRun(PoolId(0), g, first, n) for g, n in enumerate(counts) if n)
    memory.leased(Leased(runs, short, tuple(memory.pool_free)))


def hashes(n: int, blocks: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(bytes([n, i])) for i in range(blocks))


def sequence_of(
    n: int,
    total: int,
    *,
    role: Role = Role.WHOLE,
    emits_max: int = 100,
    priority: int = 0,
    groups: int = 1,
    arrival_ns: int | None = None,
) -> Sequence:
    start = Start(
        key=SequenceKey(RequestId(n)),
        role=role,
        total=total,
        history=0,
        emits_max=emits_max,
        hashes=hashes(n, total // SIZE),
        arrival_ns=n if arrival_ns is None else arrival_ns,
        deadline_ns=NEVER_NS,
        priority=priority,
        source=Address("p") if role is Role.DECODE else None,
    )
    return sequence_from(start, groups)


def scheduler_of(
    memory: Memory,
    *,
    tokens_max: int = 16,
    sequences_max: int = 8,
    depth: int = 1,
    policies: EnginePolicies | None = None,
) -> Scheduler:
    return Scheduler(policies or policies_of(), memory, tokens_max, sequences_max, depth)


def matched(scheduler: Scheduler, *sequences: Sequence) -> None:
    """Queue sequences whose look-up has found nothing."""
    for sequence in sequences:
        scheduler.enqueue(sequence)
        sequence.status = Status.MATCHED


def retire(scheduler: Scheduler, sequences: list[Sequence]) -> StepPlan:
    """The oldest plan in flight has run, and every `emits` drew one token."""
    plan = scheduler.inflight[0].plan
    scheduler.retire(StepResult(plan.step, ()))
    scheduler.settled()
    known = {s.key: s for s in sequences}
    for work in plan.work:
        sequence = known[work.key]
        sequence.pending -= work.emits
        if not sequence.ends:
            sequence.computed = work.first + work.count
            sequence.emitted += work.emits
            sequence.total += work.emits
    return plan


def reap(scheduler: Scheduler) -> list[Sequence]:
    """What the instance does with stopped sequences: free their blocks; those preempted start over."""
    done = scheduler.drained(lambda key: False)
    for sequence in done:
        scheduler.memory.free(sequence)
        if not sequence.ends:
            scheduler.requeue(sequence)
    return done


def numbers(sequences: list[Sequence]) -> list[int]:
    return [s.key.request for s in sequences]


def shape(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    """(request, first, count, emits) per work."""
    assert plan is not None
    return [(w.key.request, w.first, w.count, w.emits) for w in plan.work]
