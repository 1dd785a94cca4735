"""What goes wrong in a run, and when. Everything here ends at `heal_ns`: from then on the network is good and nobody dies.

Here stand the faults that strike at some moment; how late or unreliable messages and writes are all the time stands in `sim.network`.
An ambush waits for the k-th message of some kind and strikes soon after, as it is in the midst of something that instances depend on each
other.
What the tiers below a pool do wrong stands in `sim.tiers`. One fault there is not: the router and the pools live in one process with the
API, whose death is the end of the service, which nobody survives who could notice.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from headrace.nodes.router import Router
from headrace.sim.network import Partition
from headrace.sim.nodes import Node, Worker
from headrace.sim.rng import Draws
from headrace.sim.shell import Shell
from headrace.types.events import DrainAsked
from headrace.types.ids import RequestId
from headrace.types.messages import AnyMessage
from headrace.types.swaps import SwapIn, SwapOut
from headrace.types.weights import Committed, Completed, Running, SwitchAsked, SwitchDropped


class Victim(Enum):
    SENDER = "sender"
    RECEIVER = "receiver"
    CLIENT = "client"
    """Of the sequence that the message is about: it leaves."""
    SESSION = "session"
    """Between sender and receiver: it breaks."""
    WAY = "way"
    """Between sender and receiver: nothing passes."""


@dataclass(frozen=True, slots=True)
class Ambush:
    message: str
    """Name of a kind of message, or `SwapOut` or `SwapIn`."""
    count: int
    """The how many-th of its kind in the run, from 1."""
    victim: Victim
    delay_ns: int
    lasts_ns: int = 1
    """Of a session or a way: until it is good again."""


@dataclass(frozen=True, slots=True)
class Break:
    """All sessions between nodes of `left` and of `right` break, and are resumed at `until_ns`."""

    at_ns: int
    until_ns: int
    left: tuple[str, ...]
    right: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Steps of an instance that begin from `start_ns` on and before `end_ns` take `factor` times as long."""

    start_ns: int
    end_ns: int
    name: str
    factor: float


@dataclass(frozen=True, slots=True)
class NewWeights:
    """The service gets another version of its weights."""

    at_ns: int
    running: Running
    hold_ns: int
    dropped_ns: int = 0
    """So long after, whoever pushes gives up; 0: never."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    kills: tuple[tuple[int, str], ...] = ()
    """(When, name)."""
    drains: tuple[tuple[int, str], ...] = ()
    """(When, name)."""
    leaves: tuple[tuple[int, RequestId, int | None], ...] = ()
    """Clients that leave: (when, request, choice or all)."""
    ambushes: tuple[Ambush, ...] = ()
    breaks: tuple[Break, ...] = ()
    partitions: tuple[Partition, ...] = ()
    slowdowns: tuple[Slowdown, ...] = ()
    doomed: dict[RequestId, int] = field(default_factory=dict[RequestId, int])
    """Requests that fail at so many new tokens, wherever they run."""
    switches: tuple[NewWeights, ...] = ()
    heal_ns: int = 0


class Faults:
    """Carries a plan out; `trace` is told what strikes, and `Shell.counts` counts it."""

    def __init__(self, shell: Shell, plan: FaultPlan, trace: Callable[[str], None] | None = None) -> None:
        self._shell = shell
        self._plan = plan
        self._trace = trace
        self._said: Counter[str] = Counter()
        network = shell.network
        shell.clients.doomed.update(plan.doomed)
        for cut in plan.partitions:
            network.part(cut)
        # The process that serves tells of births and deaths: who is cut off from it hears of them later.
        shell.when_heard = lambda to, at_ns: network.open_ns(shell.router, to, at_ns)
        if plan.ambushes:
            network.on_send = shell.on_swap = self._sent
        for at_ns, name in plan.kills:
            self._at(at_ns, "kills", name, self._kill, name)
        for at_ns, name in plan.drains:
            self._at(at_ns, "drains", name, self._drain, name)
        for at_ns, request, choice in plan.leaves:
            self._at(at_ns, "clients that leave", f"request {request}", shell.withdraw, request, choice)
        for cut in plan.breaks:
            self._at(cut.at_ns, "breaks", str(cut), network.break_sessions, cut.left, cut.right, cut.until_ns)
        for cut in plan.partitions:
            self._at(cut.start_ns, "partitions", str(cut))
        for slow in plan.slowdowns:
            self._at(slow.start_ns, "slowdowns", str(slow), self._slow, slow.name, slow.factor)
            self._at(slow.end_ns, "", f"{slow.name} is as fast again", self._slow, slow.name, 1 / slow.factor)
        self._versions = 0
        for push in plan.switches:
            self._at(push.at_ns, "pushes of weights", str(push), self._push, push)
        shell.switched = self._switched
        self._at(plan.heal_ns, "", "the network is good from now on", network.heal)

    def _at(
        self, at_ns: int, kind: str, what: str, action: Callable[..., object] | None = None, *arguments: Any
    ) -> None:
        self._shell.loop.at(at_ns, self._strike, kind, what, action, arguments)

    def _strike(
        self, kind: str, what: str, action: Callable[..., object] | None, arguments: tuple[Any, ...]
    ) -> None:
        if kind:
            self._shell.counts[kind] += 1
        if self._trace is not None:
            self._trace(f"{self._shell.loop.now_ns:>12,} {'faults':>12} ! {kind} {what}")
        if action is not None:
            action(*arguments)

    def _kill(self, name: str) -> None:
        for address in list(self._shell.workers):
            if address.name == name:
                self._shell.kill(address)

    def _drain(self, name: str) -> None:
        shell = self._shell
        for worker in shell.workers.values():
            if worker.address.name == name and worker.alive:
                shell.router.receive(DrainAsked(worker.address), shell.loop.now_ns)

    def _push(self, push: NewWeights) -> None:
        shell, router = self._shell, self._shell.router.state
        assert isinstance(router, Router)
        if router.switching.holds:
            return
        self._versions += 1
        asked = SwitchAsked(self._versions, push.running, push.hold_ns)
        shell.router.receive(asked, shell.loop.now_ns)
        if push.dropped_ns:
            dropped = SwitchDropped(self._versions)
            self._at(shell.loop.now_ns + push.dropped_ns, "", str(dropped), self._tell_router, dropped)

    def _tell_router(self, event: SwitchDropped) -> None:
        self._shell.router.receive(event, self._shell.loop.now_ns)

    def _switched(self, command: Committed | Completed) -> None:
        if isinstance(command, Committed):
            self._shell.counts["kept over a push"] += command.kept
            self._shell.counts["recomputed by a push"] += command.recomputed

    def _slow(self, name: str, factor: float) -> None:
        self._shell.slow[name] *= factor

    def _sent(self, source: Node, target: Node, message: AnyMessage | SwapOut | SwapIn) -> None:
        name = type(message).__name__
        self._said[name] += 1
        for ambush in self._plan.ambushes:
            due = ambush.message == name and ambush.count == self._said[name]
            if due and self._shell.loop.now_ns < self._plan.heal_ns:
                self._spring(ambush, source, target, message)

    def _spring(
        self, ambush: Ambush, source: Node, target: Node, message: AnyMessage | SwapOut | SwapIn
    ) -> None:
        shell, heal_ns = self._shell, self._plan.heal_ns
        at_ns = min(shell.loop.now_ns + ambush.delay_ns, heal_ns)
        what = f"{ambush.victim.value} of {message} from {source.address} to {target.address}"
        match ambush.victim:
            case Victim.SENDER | Victim.RECEIVER:
                node = source if ambush.victim is Victim.SENDER else target
                if isinstance(node, Worker):
                    self._at(at_ns, "ambushes", what, shell.kill, node.address)
            case Victim.CLIENT:
                key = getattr(message, "key", None)
                if key is not None:
                    self._at(at_ns, "ambushes", what, shell.withdraw, key.request, key.choice)
            case Victim.SESSION | Victim.WAY:
                until_ns = max(at_ns + 1, min(at_ns + ambush.lasts_ns, heal_ns))
                names = (source.address.name,), (target.address.name,)
                if ambush.victim is Victim.SESSION:
                    self._at(at_ns, "ambushes", what, shell.network.break_sessions, *names, until_ns)
                else:
                    self._at(at_ns, "ambushes", what, shell.network.part, Partition(at_ns, until_ns, *names))


def early(draws: Draws, heal_ns: int) -> int:
    """A time before healing, the earlier the likelier: there is most to do in the beginning."""
    return 1 + int(draws.uniform() ** 2 * (heal_ns - 1))


def draw_switches(draws: Draws, heal_ns: int, share: float) -> tuple[NewWeights, ...]:
    """In such a share of the worlds."""
    if not draws.chance(share):
        return ()
    pushes: list[NewWeights] = []
    for _ in range(draws.between(1, 3)):
        at_ns, hold_ns = early(draws, heal_ns), draws.pick((1, 50, 500, 3000)) * 1000
        dropped_ns = draws.between(1, 2 * hold_ns) if draws.chance(0.2) else 0
        pushes.append(NewWeights(at_ns, draws.pick(tuple(Running)), hold_ns, dropped_ns))
    return tuple(pushes)
