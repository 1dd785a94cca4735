"""The content executor: runs every step on tags instead of on a model, and reads all that a real step would read.

A step reads memory when it begins and writes it when it ends, so a block that is freed and reused while a plan in flight names it is
damaged, or damages its new owner. A sequence that had finished before its plan was issued is skipped, but its slot is scribbled on: until
that plan has retired nobody else may own it.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.sim.memory import MASK, Memory, audit, draw, extend, finish_of, salts, seen_from
from headrace.types.hashing import block_hash
from headrace.types.ids import Address, BlockHash, RequestId, SequenceKey, StepId
from headrace.types.kv import TableRun, table_runs
from headrace.types.payload import Emission, SamplingParams, SequencePayload
from headrace.types.plan import Elsewhere, Output, SequenceStart, StepPlan, StepResult, Work
from headrace.types.request import FinishReason

Stored = tuple[int, list[int], int, "array[int]"]
"""Group, table, first position, tags: to be written when the step ends."""


@dataclass(slots=True)
class Opened:
    """What the executor keeps of one sequence."""

    root: BlockHash
    token_ids: list[int]
    prompt: int
    sampling: SamplingParams
    salts: list[int]
    version: int = 0
    """Of the weights under whose root it began."""
    tables: list[list[int]] | None = None
    """None while no plan names it."""
    hashed: int = 0
    hashes: list[BlockHash] = field(default_factory=list[BlockHash])
    finished: bool = False
    weights: dict[int, int] = field(default_factory=dict[int, int])
    """The newest version that had part in a token, by its index among the new ones."""
    elsewhere: dict[Address, list[list[int]]] = field(default_factory=dict[Address, list[list[int]]])
    """By holder: its blocks for this sequence, by group and logical block; -1 where it has none."""
    lost: bool = False
    """A holder was not there: nothing comes of it until it starts over."""


@dataclass(slots=True)
class Step:
    """A step between its begin and its end."""

    plan: StepPlan
    outputs: list[Output] = field(default_factory=list[Output])
    emissions: list[Emission] = field(default_factory=list[Emission])
    stored: list[Stored] = field(default_factory=list[Stored])


class ContentExecutor:
    """Implements `ports.Executor`; a shell with virtual time calls `begin` and `end` in place of `execute`."""

    def __init__(
        self,
        memory: Memory,
        broken: dict[RequestId, int] | None = None,
        holder: Callable[[Address], Memory | None] = lambda _: None,
    ) -> None:
        """`holder`: the memory of a peer that lends, if it answers."""
        self.memory = memory
        self._holder = holder
        self.broken = broken or {}
        """Requests that cannot be computed beyond so many tokens."""
        self.last = StepId(0)
        self.opened: dict[SequenceKey, Opened] = {}
        self.version = 0
        """Of the weights."""
        self.computed = 0
        """Tokens computed."""
        self._running = False

    def open(self, key: SequenceKey, payload: SequencePayload) -> None:
        assert key not in self.opened, f"{key} is opened twice"
        groups = len(self.memory.spec.groups)
        self.opened[key] = Opened(
            payload.root,
            list(payload.token_ids),
            payload.prompt,
            payload.sampling,
            salts(payload.root, groups),
            payload.version,
        )

    def append(self, emission: Emission) -> None:
        sequence = self.opened[emission.key]
        if emission.first != len(sequence.token_ids) - sequence.prompt:
            raise ValueError(f"{emission.key}: token {emission.first} does not continue what is known")
        sequence.token_ids += emission.token_ids

    def tokens(self, key: SequenceKey, first: int, count: int) -> Emission:
        """Token ids of a sequence by their index among its new tokens."""
        sequence = self.opened[key]
        start = sequence.prompt + first
        assert start + count <= len(sequence.token_ids), f"{key}: no token {first + count - 1} was drawn"
        versions = [sequence.weights.get(index, sequence.version) for index in range(first, first + count)]
        weights = sequence.version, max(versions, default=sequence.version)
        return Emission(key, first, tuple(sequence.token_ids[start : start + count]), weights=weights)

    def execute(
        self, plan: StepPlan, layers_done: Callable[[int], None] | None = None
    ) -> tuple[StepResult, tuple[Emission, ...]]:
        step = self.begin(plan)
        if plan.layered and layers_done is not None:
            for layers in range(1, self.memory.layers + 1):
                self.layers(step, layers)
                layers_done(layers)
        return self.end(step, 0, 0)

    def close(self, key: SequenceKey) -> None:
        self.opened.pop(key, None)

    def begin(self, plan: StepPlan) -> Step:
        """Read memory and compute."""
        if plan.base != self.last:
            raise ValueError(f"plan {plan.step} continues {plan.base}, but {self.last} was executed last")
        assert not self._running
        self._running = True
        self.last = plan.step
        for key in plan.ends:
            if key in self.opened:
                self._end(self.opened[key])
        for start in plan.starts:
            self._start(start)
        for growth in plan.growth:
            tables = self.opened[growth.key].tables
            assert tables is not None, f"{growth.key} grows before it starts"
            _place(tables, growth.table)
        for moved in plan.elsewhere:
            self._move_out(self.opened[moved.key], moved)
        step = Step(plan)
        for work in plan.work:
            self._work(step, work)
        return step

    def end(self, step: Step, started_ns: int, ended_ns: int) -> tuple[StepResult, tuple[Emission, ...]]:
        """Write memory."""
        self._running = False
        for group, table, first, tags in step.stored:
            self.memory.write(group, table, first, tags, version=self.version)
        result = StepResult(step.plan.step, tuple(step.outputs), started_ns, ended_ns)
        return result, tuple(step.emissions)

    def layers(self, step: Step, layers: int) -> None:
        """Write memory of the model's first so many layers."""
        for group, table, first, tags in step.stored:
            until = bisect_left(self.memory.spec.groups[group].layers, layers)
            self.memory.write(group, table, first, tags, until, self.version)

    def abort(self, step: Step, share: float) -> None:
        """The process dies within the step: a share of its writes has reached memory."""
        for group, table, first, tags in step.stored[: int(len(step.stored) * share)]:
            self.memory.write(group, table, first, tags, version=self.version)

    def _end(self, sequence: Opened) -> None:
        sequence.tables, sequence.lost = None, False
        sequence.elsewhere.clear()

    def _move_out(self, sequence: Opened, moved: Elsewhere) -> None:
        assert sequence.tables is not None, f"{moved.key} has no blocks"
        there = sequence.elsewhere.setdefault(moved.holder, [[] for _ in self.memory.groups])
        _place(there, moved.table)
        for run in moved.table:
            sequence.tables[run.group][run.at : run.at + run.count] = [-1] * run.count

    def elsewhere(self) -> list[Elsewhere]:
        """All that it knows to be at holders."""
        return [
            Elsewhere(key, holder, tuple(run for g, t in enumerate(tables) for run in table_runs(g, 0, t)))
            for key, sequence in self.opened.items()
            for holder, tables in sequence.elsewhere.items()
        ]

    def _read(
        self, sequence: Opened, group: int, first: int, count: int
    ) -> "tuple[array[int], bytearray] | None":
        """Tags and their versions, here and at holders; None if one of these is not there."""
        assert sequence.tables is not None
        if not sequence.elsewhere:
            table = sequence.tables[group]
            tags = self.memory.read(group, table, first, count)
            return tags, self.memory.read_versions(group, table, first, count)
        size = self.memory.spec.block_size
        tags, versions = array("Q"), bytearray()
        for at in range(first // size, -(-(first + count) // size)):
            places = [
                (self._holder(h), t[group][at]) for h, t in sequence.elsewhere.items() if at < len(t[group])
            ]
            places.append((self.memory, sequence.tables[group][at]))
            places = [place for place in places if place[1] >= 0]
            assert len(places) == 1, f"logical block {at} is in {len(places)} places"
            memory, block = places[0]
            if memory is None:
                return None
            low, high = max(first, at * size), min(first + count, (at + 1) * size)
            tags += memory.read(group, [block], low - at * size, high - low)
            versions += memory.read_versions(group, [block], low - at * size, high - low)
        return tags, versions

    def _start(self, start: SequenceStart) -> None:
        sequence = self.opened[start.key]
        assert sequence.tables is None, f"{start.key} starts twice"
        assert start.total <= len(sequence.token_ids), f"{start.key}: the core miscounts its tokens"
        # What a preempted sequence drew beyond is drawn again.
        del sequence.token_ids[start.total :]
        del sequence.hashes[start.total // self.memory.spec.block_size :]
        sequence.finished = False
        sequence.tables = [[] for _ in self.memory.groups]
        sequence.hashed = start.hashed
        _place(sequence.tables, start.table)

    def _work(self, step: Step, work: Work) -> None:
        sequence = self.opened[work.key]
        tables = sequence.tables
        assert tables is not None, f"{work.key} is worked on before it starts"
        if sequence.lost:
            step.outputs.append(Output(work.key, 0, lost=True))
            return
        if sequence.finished:
            self._scribble(step, tables, work)
            step.outputs.append(Output(work.key, 0, discarded=True))
            return
        end = work.first + work.count
        known = len(sequence.token_ids)
        if known - sequence.prompt >= self.broken.get(work.key.request, known):
            step.outputs.append(Output(work.key, 0, error="the logits are not finite"))
            return
        assert work.count > 0 and end <= known, f"{work.key}: positions {work.first}..{end - 1} of {known}"
        assert work.emits == (end == known), f"{work.key}: emits={work.emits} at {end} of {known}"
        self.computed += work.count
        seen: list[array[int]] = []
        newest = self.version
        for group, g in enumerate(self.memory.spec.groups):
            low = seen_from(g.window, work.first)
            found = self._read(sequence, group, low, work.first - low)
            if found is None:
                sequence.lost = True
                step.outputs.append(Output(work.key, 0, lost=True))
                return
            tags, versions = found
            newest = max(newest, self._check(work, group, tags, versions))
            extend(
                tags,
                work.first,
                sequence.token_ids[work.first : end],
                g.window,
                sequence.salts[group],
                self.version,
            )
            step.stored.append((group, list(tables[group]), work.first, tags[len(tags) - work.count :]))
            seen.append(tags[seen_from(g.window, end - 1) - low :])
        hashes = self._hashes(sequence, end)
        finish: FinishReason | None = None
        if work.emits:
            index = known - sequence.prompt
            token = draw(seen, sequence.sampling, work.key.choice, index)
            finish = finish_of(token, sequence.sampling, index)
            sequence.token_ids.append(token)
            sequence.finished = finish is not None
            step.emissions.append(Emission(work.key, index, (token,), weights=(sequence.version, newest)))
            sequence.weights[index] = newest
        step.outputs.append(Output(work.key, int(work.emits), hashes, finish))

    def _check(self, work: Work, group: int, tags: "array[int]", versions: bytearray) -> int:
        """KV that is read must be of the version under which the sequence began, or of a later one; the latest that is."""
        sequence, window = self.opened[work.key], self.memory.spec.groups[group].window
        oldest, newest = min(versions, default=sequence.version), max(versions, default=sequence.version)
        assert oldest >= sequence.version, (
            f"{work.key} of version {sequence.version} reads KV of version {oldest}"
        )
        if newest != sequence.version or self.version != sequence.version:
            # No lone sequence says what it must read: so each tag is looked at for itself.
            low = work.first - len(tags)
            audit(tags, versions, low, sequence.token_ids, window, sequence.salts[group])
        return newest

    def _hashes(self, sequence: Opened, end: int) -> tuple[BlockHash, ...]:
        """Of the blocks full at `end` that the core cannot name yet."""
        size = self.memory.spec.block_size
        blocks = end // size
        while len(sequence.hashes) < blocks:
            at = len(sequence.hashes)
            parent = sequence.hashes[-1] if at else sequence.root
            sequence.hashes.append(block_hash(parent, sequence.token_ids[at * size : (at + 1) * size]))
        new = tuple(sequence.hashes[sequence.hashed : blocks])
        sequence.hashed = max(sequence.hashed, blocks)
        return new

    def _scribble(self, step: Step, tables: list[list[int]], work: Work) -> None:
        garbage = array("Q", [(step.plan.step * 0x9E3779B97F4A7C15) & MASK] * work.count)
        for group, table in enumerate(tables):
            step.stored.append((group, list(table), work.first, garbage))


def _place(tables: list[list[int]], runs: tuple[TableRun, ...]) -> None:
    for run in runs:
        table = tables[run.group]
        if len(table) < run.at + run.count:
            table += [-1] * (run.at + run.count - len(table))
        table[run.at : run.at + run.count] = range(run.first, run.first + run.count)
