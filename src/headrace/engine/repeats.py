"""Plans that may run more than once unchanged.

A step of decodes is followed by the same step until something happens. An executor that keeps no block tables may therefore run a plan up
to `repeat_max` times on its own, and tell of many repetitions at once; everything then is as if each had been a plan of its own:
 1. A plan with `repeat_max` > 1 is *open*: it stands for all plans that would be in flight, and none is issued behind it.
 2. When a sequence ends, when the limit is near, or when an event reaches the instance, the executor says how many repetitions have run
    and how many are `left`: those that would be in flight now. From then on the plan is an ordinary one (or two) in flight.
 3. If the plan before an open one retires, and something has changed since the open one was made, the next plan is issued behind it: the
    open one then runs once.
Growth of block tables inside repetitions is applied in the order (repetition, row), as separate plans would have done it.
"""

from dataclasses import dataclass

from headrace.engine.memory import Memory
from headrace.engine.sequence import Sequence
from headrace.types.plan import StepPlan, StepResult


@dataclass(slots=True)
class Issued:
    """A plan in flight."""

    plan: StepPlan
    rows: list[Sequence]
    """The sequences of `plan.work`."""
    repeats: int = 0
    """Repetitions that were reported."""
    left: int = 1
    """Repetitions in flight, as far as they are fixed."""
    open: bool = False
    """More may follow."""
    slack: int = 0
    """Repetitions for which the rows' tables have room, beyond those that are fixed."""

    @property
    def last_step(self) -> int:
        """Number of the last repetition that is fixed."""
        return self.plan.step + self.repeats + self.left - 1


def repeat_max(rows: list[Sequence], horizon: int, memory: Memory, *, overheard: bool, watched: bool) -> int:
    """How often a plan of decodes may run before its instance would say or ask anything but tokens. Rows count this plan's first run.

    `overheard`: what is published concerns others (they share the pool, or windows give blocks back), so a filled block ends it.
    `watched`: something waits for memory, and what it lacks is worked out anew whenever some is used.
    """
    size = memory.spec.block_size
    bound, least = horizon, horizon
    free: list[int] = []
    for row in rows:
        bound = min(bound, row.emit_limit - row.emitted - row.pending + 1)
        left = memory.covered(row) - row.scheduled
        least = min(least, left)
        free.append(left)
    if overheard:
        # A block is filled at its edge; a window leaves one when the token that follows needs it no more.
        edges = [0, *(g.window - 1 for g in memory.spec.groups if g.window)]
        bound = min(bound, *((edge - row.scheduled) % size + 1 for edge in edges for row in rows))
    room = 0 if watched else memory.headroom()
    if bound <= 1 or room < 0:
        return 1
    if least >= bound - 1:
        return bound
    if _blocks(free, bound, size) <= room:
        return bound
    low, high = 1, bound
    while high - low > 1:
        middle = (low + high) // 2
        if _blocks(free, middle, size) <= room:
            low = middle
        else:
            high = middle
    return low


def slack(rows: list[Sequence], memory: Memory) -> int:
    """Further tokens of every row for which no table need grow."""
    return min(memory.covered(row) - row.scheduled for row in rows)


def _blocks(free: list[int], repeats: int, size: int) -> int:
    """Blocks that rows with so many `free` token slots in their tables lack after that many runs, the first included in `free`."""
    return sum(-((f - repeats + 1) // size) for f in free if f < repeats - 1)


def settle_repeats(issued: Issued, result: StepResult, memory: Memory) -> int:
    """Take in how often a plan has run and will yet run; the number of repetitions that nobody knew of before."""
    more = result.repeats + result.left - issued.left
    assert more == 0 or issued.open, "only an open plan runs more often than was said"
    if more:
        issued.slack -= more
        if issued.slack < 0:
            _grow(issued.rows, more, memory)
        for row in issued.rows:
            row.scheduled += more
            row.pending += more
            row.last_step += more
        if issued.slack < 0:
            issued.slack = slack(issued.rows, memory)
    issued.repeats += result.repeats
    issued.left = result.left
    issued.open = False
    return more


def _grow(rows: list[Sequence], repeats: int, memory: Memory) -> None:
    """Append the blocks of so many further tokens of every row, in the order in which separate plans would have."""
    size = memory.spec.block_size
    edges = [
        (at, order)
        for order, row in enumerate(rows)
        for at in range(memory.covered(row) - row.scheduled, repeats, size)
    ]
    edges.sort()
    for _, order in edges:
        memory.extend(rows[order])
