"""The timing executor: no tokens, only how long steps take and when sequences end. It runs unchanged batches many steps at once, exactly.

A step's time is affine in the context of its decodes (`types.costs`), so the end of the j-th repetition of a plan is a polynomial in j, in
integer picoseconds: any of them can be told, and found by time, without running those before. See `engine.repeats` for the other half.

Life of a plan here:
 1. It begins when the one before has ended, at that very picosecond if it was given in time.
 2. One that may repeat is *open* until something calls for its end: a row's last token, the plan's own limit, an event for the instance
    (`interrupt`), or another plan behind it. Then as many repetitions are left as would be in flight if each were a plan of its own.
 3. `StepDone` is told where the core must decide: at those points, and at the end of each repetition that is left.
Workers of one host slow each other down: a step runs at the pace that the kinds of steps beside it at its begin allow.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt

from headrace.ports import Core
from headrace.sim.loop import Loop
from headrace.sim.nodes import Worker
from headrace.sim.swaps import Lane
from headrace.types.costs import Costs
from headrace.types.events import Event, LayersDone, Received, StepDone
from headrace.types.ids import Address, BlockHash, SequenceKey, StepId
from headrace.types.messages import InstanceInfo, Report, Start, Tail
from headrace.types.plan import Output, StepPlan, StepResult, Work
from headrace.types.request import FinishReason
from headrace.types.swaps import SwapIn, SwapOut, Swapped

PERMILLE = 1000
TELLINGS = 8
"""Parts of a layered step, each told of when it is done."""


@dataclass(frozen=True, slots=True)
class Script:
    """What one choice of a request will say."""

    output: int
    """New tokens in all."""
    stops: bool
    """It ends by itself, before its limit."""
    name: Callable[[int], BlockHash] | None
    """The hash of its i-th full block, prompt included; None: nothing of it can be shared."""


@dataclass(slots=True, eq=False)
class Spoken:
    """One opened sequence."""

    script: Script
    left: int
    """Tokens that it will still draw."""
    hashed: int = 0
    """Leading blocks whose hash the core knows."""
    begun: bool = False
    """It has drawn a token since it was started last."""
    finished: bool = False


@dataclass(slots=True, eq=False)
class Host:
    """Workers that share a machine, and what each runs."""

    slowdown: Callable[[str, tuple[str, ...]], float]
    """Of a step of one kind beside others of these kinds."""
    workers: list["TimingWorker"] = field(default_factory=list["TimingWorker"])

    def pace(self, worker: "TimingWorker", at_ps: int) -> int:
        """Thousandths of the lone duration that a step begun now takes. What begins in the same instant does not count yet."""
        beside = tuple(
            kind for other in self.workers if other is not worker and (kind := other.kind_before(at_ps))
        )
        return int(self.slowdown(worker.kind, beside) * PERMILLE) if beside else PERMILLE

    def steady(self, worker: "TimingWorker", at_ps: int) -> bool:
        """Nothing beside it begins or ends just now."""
        return all(other.kind_since_ps < at_ps for other in self.workers if other is not worker)


@dataclass(slots=True, eq=False)
class Running:
    """A plan between its begin and its end. Repetitions are counted from 1."""

    plan: StepPlan
    rows: list[Spoken]
    live: list[Spoken]
    """Those that still draw tokens."""
    context: int
    """Of the live rows, in the first repetition."""
    repeats: int = 1
    """How many there will be, as far as is known."""
    open: bool = False
    silent: bool = False
    """It is not open any more, and the core was not told."""
    told: int = 0
    """Repetitions that the core knows of,"""
    next: int = 1
    """and the one at whose end it is told of more."""
    begun: int = 0
    """Repetitions before this segment of equal pace and cost bucket;"""
    begun_ps: int = 0
    """when it begins,"""
    first_ps: int = 0
    """how long its first repetition takes,"""
    growth_ps: int = 0
    """by how much each next one takes longer,"""
    until: int = 1
    """and the last repetition that is in it."""

    def end_ps(self, repeat: int) -> int:
        """When this repetition of the segment ends."""
        n = repeat - self.begun
        return self.begun_ps + n * self.first_ps + self.growth_ps * (n * (n - 1) // 2)

    def ended_by(self, at_ps: int) -> int:
        """The last repetition of the segment that has ended then."""
        span = at_ps - self.begun_ps
        if span < self.first_ps:
            return self.begun
        if self.growth_ps == 0:
            n = span // self.first_ps if self.first_ps else self.until - self.begun
        else:
            b = 2 * self.first_ps - self.growth_ps
            n = (isqrt(b * b + 8 * self.growth_ps * span) - b) // (2 * self.growth_ps)
        return min(self.begun + n, self.until)


class TimingWorker(Worker):
    """An instance whose executor keeps time only."""

    def __init__(
        self,
        index: int,
        address: Address,
        core: Core,
        loop: Loop,
        info: InstanceInfo,
        *,
        costs: Costs,
        depth: int,
        block_size: int,
        layers: int = 1,
        pace: int = PERMILLE,
        host: Host | None = None,
        copies: Callable[[SwapOut | SwapIn], int] = lambda command: 1,
    ) -> None:
        super().__init__(index, address, core, loop, info, journal=False)
        self.costs = costs
        self.kind = ""
        """"prefill" | "decode" while a step runs."""
        self.steps = 0
        self.pace = pace
        """Thousandths of the usual duration that every step takes here."""
        self.kind_since_ps = 0
        self._kind_before = ""
        self._depth = depth
        self._size = block_size
        self._layers = layers
        self._host = host
        self._copies = copies
        """How long a swap takes, nanoseconds."""
        self._lane = Lane(loop)
        self._spoken: dict[SequenceKey, Spoken] = {}
        self._queue: deque[StepPlan] = deque()
        self._running: Running | None = None
        self._closing: deque[tuple[StepId, SequenceKey]] = deque()
        self._last_step = 0
        self._free_ps = 0
        """When the last step ended."""
        self._timer = 0
        """Number of the timer that counts; older ones are dead."""
        if host is not None:
            host.workers.append(self)

    # What the shell calls

    def receive(self, event: Event, now_ns: int) -> None:
        """Tell the core first how far its steps have come. A `Start` that asks the pool for nothing only queues, and need not know."""
        message = event.message if isinstance(event, Received) else None
        self._interrupt(now_ns, tell=not isinstance(message, Start) or bool(message.hashes))
        super().receive(event, now_ns)

    def wake(self, now_ns: int) -> None:
        self._interrupt(now_ns, tell=True)
        super().wake(now_ns)

    def observe(self, now_ns: int) -> Report | None:
        self._interrupt(now_ns, tell=True)
        return super().observe(now_ns)

    def execute(self, plan: StepPlan, now_ns: int) -> None:
        self._queue.append(plan)
        if self._running is None:
            self._begin(self._free_ps if now_ns == _ns(self._free_ps) else now_ns * 1000)

    def once(self, step: StepId) -> None:
        running = self._running
        if running is not None and running.plan.step == step and running.open:
            assert running.told == 0, "only a plan that has just begun is cut to one run"
            running.open, running.repeats, running.next = False, 1, 1
            self._arm(running)

    def close(self, key: SequenceKey) -> None:
        if self._queue:
            self._closing.append((self._queue[-1].step, key))
        elif self._running is not None:
            self._closing.append((self._running.plan.step, key))
        else:
            self._spoken.pop(key, None)

    def swap(self, command: SwapOut | SwapIn) -> None:
        self.loop.at(self._lane.take(self._copies(command)), self._swapped, command)

    def _swapped(self, command: SwapOut | SwapIn) -> None:
        if self.alive:
            self.receive(Swapped(command.swap, True), self.loop.now_ns)

    def accept(self, message: Start | Tail, attachment: tuple[Script, int] | None) -> None:
        match message:
            case Start(key):
                assert attachment is not None
                script, history = attachment
                self._spoken[key] = Spoken(script, script.output - history)
            case Tail(key):
                spoken = self._spoken.get(key)
                if spoken is not None:
                    spoken.left -= message.emitted

    def die(self, now_ns: int, found_ns: int) -> None:
        """What it would have told by now it has told."""
        self._interrupt(now_ns, tell=True)
        self.settle(now_ns)
        super().die(now_ns, found_ns)
        self._set_kind("", now_ns * 1000)
        self._running = None
        self._queue.clear()

    def kind_before(self, at_ps: int) -> str:
        """What it ran just before that time."""
        return self._kind_before if self.kind_since_ps >= at_ps else self.kind

    # Plans

    def _begin(self, at_ps: int) -> None:
        plan = self._queue.popleft()
        for start in plan.starts:
            row = self._spoken[start.key]
            row.hashed, row.begun = start.hashed, False
        rows = [self._spoken[work.key] for work in plan.work]
        chunks: list[tuple[int, int]] = []
        live: list[Spoken] = []
        context = 0
        for work, row in zip(plan.work, rows, strict=True):
            if row.finished:
                continue
            if work.count > 1:
                chunks.append((work.count, work.first))
            else:
                context += work.first + 1
            live.append(row)
        running = Running(plan, rows, live, context)
        self._running = running
        self._set_kind("prefill" if chunks else "decode", at_ps)
        if plan.repeat_max > 1 and not self._queue and len(live) == len(rows):
            self._open(running)
        if chunks or not live:
            running.begun_ps, running.until = at_ps, 1
            decodes = len(live) - len(chunks)
            running.first_ps = self._paced(self.costs.step_ps(chunks, decodes, context) if live else 0, at_ps)
            if plan.layered:
                self._tell_layers(running)
        else:
            self._segment(running, at_ps)
        self._arm(running)

    def _tell_layers(self, running: Running) -> None:
        """All layers take the same time. Many are told of in a few tellings."""
        for done in range(1, TELLINGS):
            layers, at_ps = self._layers * done // TELLINGS, running.first_ps * done // TELLINGS
            at_ns = max(_ns(running.begun_ps + at_ps), self.loop.now_ns + 1)
            if layers and at_ns < _ns(running.end_ps(1)):
                self.loop.at(at_ns, self._layers_done, running, layers)

    def _layers_done(self, running: Running, layers: int) -> None:
        if self.alive and self._running is running:
            super().receive(LayersDone(running.plan.step, layers), self.loop.now_ns)

    def _open(self, running: Running) -> None:
        """It repeats until a row ends, or until the core must plan what follows its limit."""
        behind = self._depth - 1
        running.next = min(*(row.left for row in running.live), running.plan.repeat_max - behind)
        running.repeats = running.next + behind
        running.open = True

    def _segment(self, running: Running, at_ps: int) -> None:
        """From the next repetition on: its pace and its cost, and how long both stay as they are."""
        rows = len(running.live)
        context = running.context + rows * running.begun
        running.begun_ps = at_ps
        if not rows:
            running.first_ps, running.growth_ps, running.until = 0, 0, running.repeats
            return
        cost = self.costs.decode(rows, context)
        # The coefficients are paced, so that a sum of rounded steps is what one of rounded coefficients says.
        slope_ps = self._paced(cost.slope_ps, at_ps)
        running.first_ps = self._paced(cost.fixed_ps, at_ps) + slope_ps * context
        running.growth_ps = slope_ps * rows
        steady = self._host is None or self._host.steady(self, at_ps)
        running.until = running.begun + (max(1, -((context - cost.until) // rows)) if steady else 1)

    def _paced(self, duration_ps: int, at_ps: int) -> int:
        beside = self._host.pace(self, at_ps) if self._host is not None else PERMILLE
        return duration_ps * self.pace * beside // (PERMILLE * PERMILLE)

    def _arm(self, running: Running) -> None:
        """Wake at the next point where something must be done: a repetition to tell of, or the segment's end."""
        self._timer += 1
        at_ns = _ns(running.end_ps(min(running.next, running.until)))
        self.loop.at(max(at_ns, self.loop.now_ns + 1), self._awake, self._timer, first=True)

    def _awake(self, timer: int) -> None:
        running = self._running
        if timer != self._timer or running is None or not self.alive:
            return
        if running.until < running.next:
            self._next_segment(running, running.until)
            self._arm(running)
        else:
            running.open = False
            self._tell(running, running.next)

    def _next_segment(self, running: Running, after: int) -> None:
        at_ps = running.end_ps(after)
        running.begun = after
        self._segment(running, at_ps)

    def _tell(self, running: Running, repeat: int) -> None:
        """A result up to this repetition, the last of which ends now."""
        ended_ps = running.end_ps(repeat)
        result = self._result(running, repeat)
        if repeat == running.repeats:
            self._end(running, ended_ps)
        else:
            if len(result.outputs) and any(row.finished for row in running.live):
                # The run that is left goes on without them.
                rows = zip(running.plan.work, running.rows, strict=True)
                running.context = sum(work.first + 1 for work, row in rows if not row.finished)
                running.live = [row for row in running.live if not row.finished]
                self._next_segment(running, repeat)
            elif repeat == running.until:
                self._next_segment(running, repeat)
            self._arm(running)
        super().receive(StepDone(result), self.loop.now_ns)

    def _end(self, running: Running, ended_ps: int) -> None:
        self.steps += running.repeats
        self._free_ps = ended_ps
        self._running = None
        while self._closing and self._closing[0][0] <= running.plan.step:
            self._spoken.pop(self._closing.popleft()[1], None)
        if self._queue:
            self._begin(ended_ps)
        else:
            self._set_kind("", ended_ps)

    def _result(self, running: Running, repeat: int) -> StepResult:
        """What all repetitions since the last result have come to."""
        count = repeat - running.told
        outputs: list[Output] = []
        for work, row in zip(running.plan.work, running.rows, strict=True):
            if row.finished:
                outputs.append(Output(work.key, 0, discarded=True))
                continue
            computed = work.first + work.count * repeat
            new = row.script.name is not None and computed // self._size > row.hashed
            if row.begun and row.left > count and not new:
                row.left -= count
                continue
            outputs.append(self._output(work, row, count, computed))
        plain = len(outputs) < len(running.rows)
        running.told, running.next, running.silent = repeat, repeat + 1, False
        return StepResult(
            running.plan.step,
            tuple(outputs),
            repeats=count,
            each=count if plain else 0,
            left=running.repeats - repeat,
        )

    def _output(self, work: Work, row: Spoken, count: int, computed: int) -> Output:
        """Of a row with something to tell: its first token, its end, or hashes."""
        hashes = self._hashes(row, computed) if row.script.name is not None else ()
        if not work.emits:
            return Output(work.key, 0, hashes)
        row.begun = count > 0
        row.left -= count
        row.finished = row.left == 0
        finish = FinishReason.STOP if row.finished and row.script.stops else None
        return Output(work.key, count, hashes, finish)

    def _hashes(self, row: Spoken, computed: int) -> tuple[BlockHash, ...]:
        assert row.script.name is not None
        blocks = computed // self._size
        hashes = tuple(row.script.name(i) for i in range(row.hashed, blocks))
        row.hashed = max(row.hashed, blocks)
        return hashes

    # Interruptions

    def _interrupt(self, now_ns: int, *, tell: bool) -> None:
        """Something happens: the open plan runs on only as long as plans in flight would, and the core hears how far it has come."""
        running = self._running
        if running is None or not self.alive or not (running.open or running.silent):
            return
        if running.silent:
            if tell:
                self._tell(running, running.next - 1)
            return
        now_ps = now_ns * 1000
        while running.until < running.next and running.end_ps(running.until) <= now_ps:
            self._next_segment(running, running.until)
        done = running.ended_by(now_ps)
        at_edge = _ns(running.end_ps(done)) == now_ns
        if done == 0 and at_edge:
            # It begins in this instant: the core has yet to decide what follows it.
            return
        running.open = False
        running.repeats = min(done + self._depth - at_edge, running.repeats)
        if not tell and not at_edge:
            running.silent, running.next = True, done + 1
            self._arm(running)
        else:
            self._tell(running, done)

    def _set_kind(self, kind: str, at_ps: int) -> None:
        if self._host is None or kind == self.kind:
            self.kind = kind
            return
        if at_ps > self.kind_since_ps:
            self._kind_before, self.kind_since_ps = self.kind, at_ps
        self.kind = kind
        for other in self._host.workers:
            if other is not self:
                other.repace(at_ps)

    def repace(self, at_ps: int) -> None:
        """What runs beside it has changed: from the next repetition on it goes at another pace."""
        running = self._running
        until = running.ended_by(at_ps) + 1 if running is not None else 0
        if running is not None and until < running.until:
            due = min(running.next, running.until)
            running.until = until
            if min(running.next, until) != due:
                self._arm(running)


def _ns(at_ps: int) -> int:
    """The first nanosecond at which it has happened."""
    return -(-at_ps // 1000)
