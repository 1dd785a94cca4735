"""Decides what an instance runs next: admission, memory, preemption, and the plan of a step as a difference to the one before.

Two plans may be in flight, executed in order. So a sequence that ends, is preempted or cancelled keeps its blocks until the last plan that
names it has retired (`Sequence.last_step`), and a token that a plan in flight will emit counts as `pending`.
"""

from collections import deque
from collections.abc import Callable

from headrace.engine.memory import Memory
from headrace.engine.policies import FINISHED_MAX, FOREVER, AdmissionView, EnginePolicies, Moment, StepView
from headrace.engine.repeats import Issued, repeat_max, settle_repeats, slack
from headrace.engine.sequence import Sequence, Status
from headrace.engine.shares import Shares
from headrace.engine.wishes import Wishes
from headrace.types.ids import SequenceKey, StepId
from headrace.types.kv import table_runs
from headrace.types.messages import Report, Role
from headrace.types.plan import Elsewhere, Growth, SequenceStart, StepPlan, StepResult, Work

MATCHES_AHEAD = 16
"""Prefix look-ups asked for before their sequence can start: hides the round trip, and bounds what waiting sequences lock."""


class Scheduler:
    """Queue, running set and plans of one instance."""

    def __init__(
        self,
        policies: EnginePolicies,
        memory: Memory,
        tokens_max: int,
        sequences_max: int,
        depth: int,
        repeats_max: int = 1,
        *,
        layered: bool = False,
    ) -> None:
        """`layered`: steps that prefill for another instance tell of each layer."""
        assert depth in (1, 2), "plans in flight: 1 or 2"
        self.policies = policies
        self.memory = memory
        self.wishes = Wishes()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.receiving: list[Sequence] = []
        self.loading: list[Sequence] = []
        self.copying = 0
        """Copies to and from host memory that have not ended."""
        self.stopping: list[Sequence] = []
        self.inflight: deque[Issued] = deque()
        self.steps = 0
        self.retired = 0
        """Number of the last plan whose result is in."""
        self.finished: deque[int] = deque(maxlen=FINISHED_MAX)
        """New tokens of the sequences that ended here."""
        self.shares = Shares() if policies.ordering.reads_served else None
        self.preemptions = 0
        self.force = False
        """Another holder needs what our lowest-ranked sequence has."""
        self._tokens_max = tokens_max
        self._sequences_max = sequences_max
        self._depth = depth
        self._repeats_max = repeats_max
        self._layered = layered
        self.overheard = any(g.window for g in memory.spec.groups)
        """Others are concerned when a block is published: they share the pool, or windows give blocks back."""
        self.changed = False
        """Something has happened since the last plan that may change the next."""
        self.refused = False
        """The first that waits would fit and was not let in: once memory is used it will not fit, and be asked for."""
        self.oldest: tuple[int, SequenceKey] | None = None
        """Nobody younger is started: what is free is for one of this age, elsewhere (`nodes.lending`)."""
        self._unripe = False
        """Somebody would be stopped for it who has to draw a token first."""
        self.once: list[StepId] = []
        """Plans that were open and are to run once, not said yet."""
        self._retired_now = False
        swapping = policies.preemption.swapping
        self._halts = swapping is not None and not swapping.background
        """No step is planned while copies are under way."""
        self._sorted = False
        """Queue and running set are in order, and ranks do not change by themselves."""
        self._ends: list[SequenceKey] = []
        self._growth: list[Growth] = []
        self._elsewhere: list[Elsewhere] = []

    def report(self, now_ns: int, held: int, sending: int, draining: bool) -> Report:
        """The counts that others may know. `held` sequences are not in any of its lists."""
        active, memory = self.waiting + self.running, self.memory
        first = self.waiting[0] if self.waiting else None
        free = sum(s.total + f for s, f in zip(memory.spare, memory.pool_free, strict=True))
        return Report(
            observed_at_ns=now_ns,
            waiting=len(self.waiting),
            running=len(self.running) + len(self.loading),
            held=held,
            receiving=len(self.receiving),
            tokens_waiting=sum(max(0, s.total - s.scheduled) for s in active),
            blocks_total=sum(memory.blocks_total),
            blocks_free=min(free, sum(memory.blocks_total)),
            steps=self.retired,
            draining=draining,
            sending=sending,
            blocks_demand=sum(memory.missing_at_start(first, self._tokens_max)) if first else 0,
            tokens_running=sum(s.total for s in self.running),
            urgent=sum(s.priority < 0 for s in self.running),
            preemptions=self.preemptions,
        )

    # Entry and exit

    def enqueue(self, sequence: Sequence) -> None:
        """To the queue. What has no block that could be cached, or is not to be, is not looked up."""
        self.changed, self._sorted = True, False
        sequence.status = Status.WAITING
        if not (sequence.hashes and sequence.caches):
            sequence.status = Status.MATCHED
            sequence.recomputed += max(0, sequence.lost - sequence.kept)
            sequence.lost = 0
            if sequence.role is Role.DECODE or sequence.kept:
                # The source has trimmed, too, what windows have passed. Nothing is published yet, so the pool need not know.
                self.memory.trim(sequence, sequence.kept or sequence.total)
        self.waiting.append(sequence)

    def join(self, sequence: Sequence) -> None:
        """A sequence whose blocks are here (admitted, received, or held until now) runs from now on."""
        self.changed, self._sorted = True, False
        if sequence.status is Status.RECEIVING:
            self.receiving.remove(sequence)
        elif sequence.status is Status.LOADING:
            self.loading.remove(sequence)
        sequence.kept, sequence.resumed = 0, sequence.emitted
        sequence.status = Status.RUNNING
        self.running.append(sequence)

    def hold(self, sequence: Sequence) -> None:
        """A prefilled sequence leaves the running set and keeps its blocks. No plan names it any more, as it may emit no more."""
        assert sequence.last_step <= self.retired
        self.changed = True
        # The step in which it drew its token may have been its last before a preemption: no longer.
        (self.stopping if sequence.status is Status.STOPPING else self.running).remove(sequence)
        sequence.status = Status.HELD

    def stop(self, sequence: Sequence, *, ends: bool) -> None:
        """Take it out of planning; `drained` returns it once no plan in flight names it. `ends` may be added later, never removed."""
        if sequence.status is Status.STOPPING:
            sequence.ends = sequence.ends or ends
            return
        self.changed = True
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.RECEIVING:
            self.receiving.remove(sequence)
        elif sequence.status is Status.LOADING:
            self.loading.remove(sequence)
        elif sequence.status in (Status.WAITING, Status.MATCHING, Status.MATCHED):
            self.waiting.remove(sequence)
        sequence.status = Status.STOPPING
        sequence.ends = ends
        self.stopping.append(sequence)

    def drained(self, busy: Callable[[SequenceKey], bool]) -> list[Sequence]:
        """Stopped sequences that no plan in flight names and that are not `busy` (being sent): the caller frees their blocks now."""
        if not self.stopping:
            return []
        done = [s for s in self.stopping if s.last_step <= self.retired and not busy(s.key)]
        for sequence in done:
            self.stopping.remove(sequence)
            self.leave(sequence, closes=sequence.ends)
        return done

    def leave(self, sequence: Sequence, *, closes: bool) -> None:
        """No plan names it for now: the next one tells the executor to drop its table, unless `closes` (then `Close` tells it)."""
        self._growth = [g for g in self._growth if g.key != sequence.key]
        self._elsewhere = [e for e in self._elsewhere if e.key != sequence.key]
        if closes:
            self._ends = [key for key in self._ends if key != sequence.key]
        elif sequence.started:
            self._ends.append(sequence.key)
        sequence.started = False

    def move_out(self, elsewhere: Elsewhere) -> None:
        """The next plan says that these blocks are read at a holder."""
        self.changed = True
        self._elsewhere.append(elsewhere)

    def requeue(self, sequence: Sequence) -> None:
        """Start over after preemption; its blocks are freed already."""
        sequence.lost += sequence.computed
        self.preemptions += 1
        sequence.start_over()
        assert sequence.pending == 0
        self.enqueue(sequence)

    def unload(self, sequence: Sequence) -> None:
        """Its KV does not come back from host memory: start over; its blocks are freed already."""
        self.loading.remove(sequence)
        sequence.lost, sequence.kept = sequence.lost + sequence.kept, 0
        sequence.start_over()
        self.enqueue(sequence)

    def retire(self, result: StepResult) -> Issued:
        """Take in that the oldest plan has run, so many times; the plan as it was issued."""
        issued = self.inflight[0]
        assert issued.plan.step == result.step, "results come in the order of plans"
        more = settle_repeats(issued, result, self.memory)
        self.steps += more
        if more and self.shares is not None:
            for row in issued.rows:
                self.shares.serve(row, more)
        self.retired = issued.last_step - issued.left
        if not issued.left:
            self.inflight.popleft()
            self._retired_now = True
        return issued

    def _full(self) -> bool:
        """Are as many plans in flight as may be?"""
        if not self.inflight:
            return False
        last = self.inflight[-1]
        if last.open:
            # Behind another one it stands for the next plan only; at the head it may have begun just now.
            if len(self.inflight) > 1 or not (self._retired_now and self.changed):
                return True
            last.open = False
            self.once.append(last.plan.step)
        return sum(issued.left for issued in self.inflight) >= self._depth

    # Planning

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next step, or None if there is nothing to run or two are in flight. Leaves in `memory.need` what work waits for."""
        if self._full() or (self._halts and (self.copying or self.loading)):
            self._look_ahead()
            return None
        moment = self._moment(now_ns)
        self._sort(moment)
        self.refused = self._unripe = False
        if self.force and self._stop_for(None, list(self.running)) is not None:
            self.force = False
        lacking = self._secure()
        if lacking:
            self.memory.need = [sum(column) for column in zip(*lacking.values(), strict=True)]
            self.memory.since_ns = next(s.arrival_ns for s in self.running if s.key in lacking)
        else:
            self.memory.need = [0] * len(self.memory.spare)
            if self.waiting and not self.memory.pressed:
                self._admit(moment)
                if self._halts and self.loading:
                    return None
        view = self._view(moment, lacking)
        self._sorted = self.policies.ordering.horizon(view) >= FOREVER
        work = self.policies.batching.plan(view)
        return self._issue(work, view, lacking=bool(lacking)) if work else None

    def settled(self) -> None:
        """The instant is over."""
        self._retired_now = False

    def _moment(self, now_ns: int) -> Moment:
        if self.shares is None:
            return Moment(now_ns, self.steps)
        self.shares.begin()
        return Moment(now_ns, self.steps, self.shares.served)

    def _sort(self, moment: Moment) -> None:
        if self._sorted:
            return
        rank = self.policies.ordering.rank
        # Where memory is borrowed age decides, on all instances alike (see `nodes.lending`).
        aged = any(s.long for s in self.waiting) or any(s.long for s in self.running)
        for queue in (self.waiting, self.running):
            queue.sort(key=lambda s: s.age if aged else rank(s, moment))

    def _view(self, moment: Moment, lacking: dict[SequenceKey, list[int]]) -> StepView:
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            remaining = sequence.remaining
            if remaining > 0 and not (lacking and sequence.key in lacking):
                # As `Sequence.prefilling` says.
                begun = remaining == 1 and sequence.emitted + sequence.pending > 0
                (decodes if begun else prefills).append(sequence)
        return StepView(
            now_ns=moment.now_ns,
            decodes=decodes,
            prefills=prefills,
            waiting=self.waiting,
            tokens_max=self._tokens_max,
            sequences_max=self._sequences_max,
            moment=moment,
        )

    # Memory

    def _secure(self) -> dict[SequenceKey, list[int]]:
        """Give every running sequence the blocks of its next step, in order; what is lacking, by sequence.

        Behind one that lacks some nobody is given any, so the first in order cannot be starved by those behind it.
        """
        lacking: dict[SequenceKey, list[int]] = {}
        needy: Sequence | None = None
        memory, tokens_max = self.memory, self._tokens_max
        for sequence in self.running:
            tokens = sequence.scheduled + min(sequence.remaining, tokens_max)
            if tokens <= memory.covered(sequence):
                continue
            missing = memory.missing(sequence, tokens)
            if needy is None and memory.covers(missing):
                before = [len(table) for table in sequence.tables]
                memory.grow(sequence, missing)
                if sequence.started and self._repeats_max == 1:
                    tables = enumerate(zip(sequence.tables, before, strict=True))
                    runs = [run for group, (table, at) in tables for run in table_runs(group, at, table[at:])]
                    self._growth.append(Growth(sequence.key, tuple(runs)))
                continue
            needy = needy or sequence
            lacking[sequence.key] = missing
        if needy is not None and self.memory.short and not self.stopping and not self.unlock_waiting():
            victim = self._stop_for(needy, self.running[self.running.index(needy) + 1 :])
            if victim is not None:
                lacking.pop(victim.key, None)
        return lacking

    def _stop_for(self, needy: Sequence | None, candidates: list[Sequence]) -> Sequence | None:
        victim = self.policies.preemption.victim(needy, candidates)
        if victim is not None:
            self.stop(victim, ends=False)
        return victim

    def recalled(self, *, on: bool, force: bool) -> None:
        """Another holder is short, or nobody is any more; `force`: it needs what our lowest-ranked sequence has. What is on its way in
        when that is heard gets on by a step first: else two holders could stop each other's in turn, for ever."""
        self.memory.pressed = on
        self.force = on and (self.force or (force and bool(self.running)))
        if on:
            self.unlock_waiting()

    def unlock_waiting(self, but: Sequence | None = None) -> bool:
        """Send waiting sequences back to before their prefix look-up: what they lock is wanted by others. True if there were any."""
        matched = [
            s for s in self.waiting if s is not but and s.status is Status.MATCHED and any(map(len, s.tables))
        ]
        for sequence in matched:
            self.unmatch(sequence)
        return bool(matched)

    def unmatch(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        sequence.start_over()
        self.wishes.unlock.append(sequence)

    # Admission

    def _admit(self, moment: Moment) -> None:
        """Start what may start, in order, and ask for the prefixes of what comes next."""
        room = self._room()
        if room <= 0:
            self._displace(self.waiting[0], moment)
        for sequence in self.waiting[: max(0, room)]:
            if sequence.status is not Status.MATCHED or (self.oldest and sequence.age > self.oldest):
                break
            if sequence.long and any(s.long for s in self.running):
                # One at a time, or they would stop each other in turn.
                continue
            missing = self.memory.missing_at_start(sequence, self._tokens_max)
            receiving = self.receiving + self.loading
            view = AdmissionView.of(self.memory, missing, self.running, receiving, self.finished, self.steps)
            fits = all(n <= f for n, f in zip(missing, view.blocks_free, strict=True))
            if fits and not sequence.long and not self.policies.admission.admit(view, sequence):
                self.refused = True
                break
            if not self.memory.covers(missing):
                # What is free in the pool is only known from its last answer: asking is how to hear of more.
                self.memory.need = missing
                self.memory.since_ns = sequence.arrival_ns
                if self.memory.short:
                    # What those behind it lock may be all it lacks.
                    unlocked = self.unlock_waiting(but=sequence)
                    if not unlocked and not self.memory.awaits:
                        self._displace(sequence, moment)
                break
            self.waiting.remove(sequence)
            self.memory.grow(sequence, missing)
            if sequence.role is Role.DECODE:
                sequence.status = Status.RECEIVING
                self.receiving.append(sequence)
                self.wishes.receive.append(sequence)
            elif sequence.kept > sequence.computed:
                sequence.status = Status.LOADING
                self.loading.append(sequence)
                self.wishes.load.append(sequence)
            else:
                self.join(sequence)
        self._look_ahead()
        self._sort(moment)

    def _room(self) -> int:
        """Sequences that may still be started."""
        return self._sequences_max - len(self.running) - len(self.receiving) - len(self.loading)

    def _displace(self, sequence: Sequence, moment: Moment) -> None:
        """Stop one that runs for one that waits, if the order wants it; one after another. What admission refuses displaces nobody.

        Who has begun draws a token first: else sequences whose ranks change could take turns without getting on.
        """
        ordering = self.policies.ordering
        if not ordering.displaces or self.stopping or sequence.status is not Status.MATCHED:
            return
        rank = ordering.rank(sequence, moment)
        behind = [s for s in self.running if ordering.rank(s, moment) > rank]
        ripe = [s for s in behind if s.emitted + s.pending > s.resumed]
        self._unripe = len(ripe) < len(behind)
        if ripe:
            self._stop_for(sequence, ripe)

    def _look_ahead(self) -> None:
        """Ask for the prefixes of what comes next, even while no plan can be made, but lock nothing that somebody is short of."""
        if not self.waiting or self.memory.pressed or self.memory.short:
            return
        # Where those that wait may displace others the first is looked up in any case.
        room = max(self._room(), int(self.policies.ordering.displaces))
        for sequence in self.waiting[: max(0, min(room, MATCHES_AHEAD))]:
            if sequence.status is Status.WAITING:
                sequence.status = Status.MATCHING
                self.wishes.match.append(sequence)

    # The plan

    def _issue(self, work: list[tuple[Sequence, int]], view: StepView, *, lacking: bool) -> StepPlan:
        self.steps += 1
        starts: list[SequenceStart] = []
        items: list[Work] = []
        rows: list[Sequence] = []
        for sequence, count in work:
            if not sequence.started:
                starts.append(self._start(sequence))
            first = sequence.scheduled
            emits = first + count == sequence.total + sequence.pending
            items.append(Work(sequence.key, first, count, emits))
            rows.append(sequence)
            sequence.scheduled = first + count
            sequence.pending += emits
            sequence.last_step = self.steps
        plan = StepPlan(
            step=StepId(self.steps),
            base=StepId(self.steps - 1),
            ends=tuple(self._ends),
            starts=tuple(starts),
            growth=tuple(self._growth),
            elsewhere=tuple(self._elsewhere),
            work=tuple(items),
            layered=self._layered and any(s.role is Role.PREFILL for s in rows),
            repeat_max=1 if lacking else self._repeats(rows, items, view),
        )
        if self.shares is not None:
            # Only now: the plan's horizon is that of the counts before it.
            for sequence, count in work:
                self.shares.serve(sequence, count)
        self._ends.clear()
        self._growth.clear()
        self._elsewhere.clear()
        opened = plan.repeat_max > 1
        self.inflight.append(Issued(plan, rows, open=opened, slack=slack(rows, self.memory) if opened else 0))
        self.changed = False
        return plan

    def _repeats(self, rows: list[Sequence], items: list[Work], view: StepView) -> int:
        """How often the plan may run."""
        if self._repeats_max == 1 or any(w.count > 1 or not w.emits for w in items):
            return 1
        if self._unripe or (self._halts and any(not s.ends for s in self.stopping)):
            # Who is unripe may be stopped in the next step; when a victim's copies begin no further step is planned.
            return 1
        memory = self.memory
        if memory.short and not any(memory.need):
            # It is about to tell the pool so, and then looks ahead again.
            return 1
        if self.refused and memory.exceeds():
            # What goes back is what the refused one would have fitted into: it will be asked for.
            return 1
        horizon = min(self._repeats_max, self.policies.horizon(view))
        watched = self.refused or any(self.memory.need)
        return repeat_max(rows, horizon, self.memory, overheard=self.overheard, watched=watched)

    def _start(self, sequence: Sequence) -> SequenceStart:
        sequence.started = True
        if self._repeats_max > 1:
            return SequenceStart(sequence.key, sequence.total, sequence.scheduled, len(sequence.hashes), ())
        runs = [run for group, blocks in enumerate(sequence.tables) for run in table_runs(group, 0, blocks)]
        return SequenceStart(
            key=sequence.key,
            total=sequence.total,
            computed=sequence.scheduled,
            hashed=len(sequence.hashes),
            table=tuple(runs),
        )
