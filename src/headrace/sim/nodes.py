"""Nodes as the simulation runs them: a core, its place in the order of settling, and (instances) an executor that takes virtual time."""

from collections import deque
from collections.abc import Callable
from typing import Any

from headrace.nodes.journal import Journaled, Record
from headrace.ports import Core
from headrace.sim.executors import ContentExecutor, Step
from headrace.sim.loop import Loop
from headrace.sim.memory import Memory
from headrace.sim.swaps import Lane, Outlook, copy_runs
from headrace.types.events import Command, Event, LayersDone, StepDone
from headrace.types.ids import Address, RequestId, SequenceKey, StepId
from headrace.types.messages import InstanceInfo, Report, Start, Tail, Tokens
from headrace.types.payload import Emission
from headrace.types.plan import Elsewhere, StepPlan
from headrace.types.swaps import SwapIn, SwapOut, Swapped
from headrace.types.weights import UseWeights, WeightsReady

Watch = Callable[["Node", int, Event | None, list[Command] | None], None]
"""Told of every event, and of every settle's commands."""


class Node:
    """One incarnation of a router, a pool or an instance."""

    def __init__(self, index: int, address: Address, core: Core, loop: Loop, *, journal: bool = True) -> None:
        self.index = index
        self.address = address
        self.state = core
        """For checkers, which may look inside."""
        self.journal: list[Record] = []
        self.core: Core = Journaled(core, self.journal.append) if journal else core
        self.loop = loop
        self.alive = True
        self.died_ns = 0
        self.found_ns = 0
        """When the others begin to hear of its death."""
        self.carry: Callable[[Node, list[Command]], None]
        """Set by the shell: carry out what the core asks for."""
        self.watch: Watch | None = None

    @property
    def digest(self) -> str:
        """Of all events and commands, if they are kept."""
        return self.core.digest if isinstance(self.core, Journaled) else ""

    def receive(self, event: Event, now_ns: int) -> None:
        if self.alive:
            if self.watch is not None:
                self.watch(self, now_ns, event, None)
            self.core.handle(event, now_ns)
            self.loop.touch(self)

    def wake(self, now_ns: int) -> None:
        """It asked to settle now."""
        self.loop.touch(self)

    def settle(self, now_ns: int) -> None:
        commands = self.core.settle(now_ns)
        if self.watch is not None:
            self.watch(self, now_ns, None, commands)
        if commands:
            self.carry(self, commands)

    def die(self, now_ns: int, found_ns: int) -> None:
        self.alive = False
        self.died_ns, self.found_ns = now_ns, found_ns
        self.loop.forget(self)


class Worker(Node):
    """An instance, with an executor that takes virtual time."""

    def __init__(
        self,
        index: int,
        address: Address,
        core: Core,
        loop: Loop,
        info: InstanceInfo,
        *,
        journal: bool = True,
    ) -> None:
        super().__init__(index, address, core, loop, journal=journal)
        self.info = info
        self.joined = False
        """The others have been told of it."""
        self.lost_peers: dict[Address, None] = {}
        """Dead peers that it has heard of."""

    def observe(self, now_ns: int) -> Report | None:
        """What others may know of it now."""
        return self.core.observe(now_ns)

    def execute(self, plan: StepPlan, now_ns: int) -> None:
        """Run it after those already given."""
        raise TypeError("a kind of worker says how it runs plans")

    def once(self, step: StepId) -> None:
        """That plan, which may repeat, is to end with the run it is in."""

    def use_weights(self, version: int, now_ns: int) -> None:
        """Plans given from now on are computed with these."""
        raise TypeError("a kind of worker says how it changes its weights")

    def close(self, key: SequenceKey) -> None:
        """Forget the sequence once the plans given so far have run."""
        raise TypeError("a kind of worker says what it keeps")

    def swap(self, command: SwapOut | SwapIn) -> None:
        """Copy to or from host memory, behind those copies that are under way."""
        raise TypeError("a kind of worker says how it copies")

    def attach(self, message: Tail | Tokens) -> Any:
        """What the message carries beside what cores see."""
        return None

    def accept(self, message: Start | Tail, attachment: Any) -> None:
        """A message with what it carries has come."""


class ContentWorker(Worker):
    """Its plans run one at a time, in the order given, each once, on the tags of a pool's memory."""

    def __init__(
        self,
        index: int,
        address: Address,
        core: Core,
        loop: Loop,
        info: InstanceInfo,
        *,
        memory: Memory,
        duration_ns: Callable[[int, StepPlan], int],
        depth: int,
        broken: dict[RequestId, int],
        switch_ns: int = 1,
        host_blocks: tuple[int, ...] = (),
        outlook: Callable[[int, SwapOut | SwapIn], Outlook] = lambda index, command: Outlook(1),
        holder: Callable[[Address], Memory | None] = lambda _: None,
    ) -> None:
        """`switch_ns`: how long a change of weights takes."""
        super().__init__(index, address, core, loop, info)
        self.memory = memory
        self.host = Memory(memory.spec, host_blocks)
        """Ends with it."""
        self._lane = Lane(loop)
        self._outlook = outlook
        self._swaps: dict[int, SwapOut | SwapIn] = {}
        """Under way."""
        self.executor = ContentExecutor(memory, broken, holder)
        self._duration_ns = duration_ns
        self._depth = depth
        self._switch_ns = switch_ns
        self._queue: deque[StepPlan | UseWeights] = deque()
        self._switching = False
        self._step: Step | None = None
        self._closing: deque[tuple[StepId, SequenceKey]] = deque()

    @property
    def given(self) -> int:
        """Plans given and not answered."""
        return sum(isinstance(given, StepPlan) for given in self._queue) + (self._step is not None)

    def reads(self) -> list[Elsewhere]:
        """What plans in flight may read at holders."""
        told, reads = self.executor.elsewhere(), list[Elsewhere]()
        if self._step is not None:
            named = [work.key for work in self._step.plan.work]
            reads += [moved for moved in told if moved.key in named]
        for plan in self._queue:
            if not isinstance(plan, StepPlan):
                continue
            told = [moved for moved in told if moved.key not in plan.ends] + list(plan.elsewhere)
            reads += [moved for moved in told if any(work.key == moved.key for work in plan.work)]
        return reads

    def execute(self, plan: StepPlan, now_ns: int) -> None:
        self._queue.append(plan)
        assert self.given <= self._depth, f"{self.address}: {self.given} plans in flight"
        self._go_on(now_ns)

    def use_weights(self, version: int, now_ns: int) -> None:
        self._queue.append(UseWeights(version))
        self._go_on(now_ns)

    def close(self, key: SequenceKey) -> None:
        """Once the plans given so far have run."""
        plans = [given for given in self._queue if isinstance(given, StepPlan)]
        if plans:
            self._closing.append((plans[-1].step, key))
        elif self._step is not None:
            self._closing.append((self._step.plan.step, key))
        else:
            self.executor.close(key)

    def attach(self, message: Tail | Tokens) -> tuple[Emission, ...]:
        match message:
            case Tail(key, _, emitted):
                held = self.executor.opened[key]
                first = len(held.token_ids) - held.prompt - emitted
                return (self.executor.tokens(key, first, emitted),)
            case Tokens(runs):
                return tuple(self.executor.tokens(r.key, r.first, r.count) for r in runs if r.count)

    def accept(self, message: Start | Tail, attachment: Any) -> None:
        match message:
            case Start(key):
                self.executor.open(key, attachment)
            case Tail(key):
                if key in self.executor.opened:
                    self.executor.append(attachment[0])

    def die(self, now_ns: int, found_ns: int) -> None:
        super().die(now_ns, found_ns)
        if self._step is not None:
            self.executor.abort(self._step, share=(now_ns % 5) / 4)
        for command in self._swaps.values():
            copy_runs(command, self.memory, self.host, share=(now_ns % 3) / 2)

    def swap(self, command: SwapOut | SwapIn) -> None:
        outlook = self._outlook(self.index, command)
        self._swaps[command.swap] = command
        self.loop.at(self._lane.take(outlook.duration_ns), self._swapped, command, outlook.ok)

    def _swapped(self, command: SwapOut | SwapIn, ok: bool) -> None:
        """All is read and written at the very end: what was given to others too early is no longer what it was."""
        if self.alive:
            del self._swaps[command.swap]
            copy_runs(command, self.memory, self.host, share=1 if ok else 0.5)
            self.receive(Swapped(command.swap, ok), self.loop.now_ns)

    def _go_on(self, now_ns: int) -> None:
        """Begin what is next, if nothing runs."""
        if self._step is None and not self._switching and self._queue:
            given = self._queue.popleft()
            if isinstance(given, StepPlan):
                self._begin(given, now_ns)
            else:
                self._switching = True
                self.loop.at(now_ns + self._switch_ns, self._switched, given.version)

    def _switched(self, version: int) -> None:
        if self.alive:
            self._switching = False
            self.executor.version = version
            self.receive(WeightsReady(version), self.loop.now_ns)
            self._go_on(self.loop.now_ns)

    def _begin(self, plan: StepPlan, now_ns: int) -> None:
        self._step = self.executor.begin(plan)
        duration_ns, layers = self._duration_ns(self.index, plan), self.memory.layers
        if plan.layered:
            for done in range(1, layers):
                self.loop.at(now_ns + duration_ns * done // layers, self._layers_done, plan.step, done)
        self.loop.at(now_ns + duration_ns, self._end, now_ns)

    def _layers_done(self, step: StepId, layers: int) -> None:
        if self.alive:
            assert self._step is not None and self._step.plan.step == step
            self.executor.layers(self._step, layers)
            self.receive(LayersDone(step, layers), self.loop.now_ns)

    def _end(self, started_ns: int) -> None:
        if not self.alive:
            return
        now_ns = self.loop.now_ns
        assert self._step is not None
        result, _ = self.executor.end(self._step, started_ns, now_ns)
        self._step = None
        while self._closing and self._closing[0][0] <= result.step:
            self.executor.close(self._closing.popleft()[1])
        self._go_on(now_ns)
        self.receive(StepDone(result), now_ns)
