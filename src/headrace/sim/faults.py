"""What goes wrong in a run, and when. Everything here ends at `heal_ns`: from then on the network is good and nobody dies.

An ambush waits for a handover to begin, as that is when instances depend on each other: it strikes some time after the k-th `Dispatch`.
"""

from dataclasses import dataclass, field
from enum import Enum

from headrace.sim.shell import Shell
from headrace.types.events import DrainAsked
from headrace.types.ids import Address, RequestId
from headrace.types.messages import Dispatch


class Victim(Enum):
    SOURCE = "source"
    TARGET = "target"
    CLIENT = "client"
    """Of the sequence that is handed over: it leaves."""


@dataclass(frozen=True, slots=True)
class Ambush:
    dispatch: int
    """The how many-th of the run, from 1."""
    victim: Victim
    delay_ns: int


@dataclass(frozen=True, slots=True)
class FaultPlan:
    kills: tuple[tuple[int, str], ...] = ()
    """(When, name)."""
    drains: tuple[tuple[int, str], ...] = ()
    """(When, name)."""
    leaves: tuple[tuple[int, RequestId, int | None], ...] = ()
    """Clients that leave: (when, request, choice or all)."""
    ambushes: tuple[Ambush, ...] = ()
    doomed: dict[RequestId, int] = field(default_factory=dict[RequestId, int])
    """Requests that fail at so many new tokens, wherever they run."""
    heal_ns: int = 0


class Faults:
    """Carries a plan out."""

    def __init__(self, shell: Shell, plan: FaultPlan) -> None:
        self._shell = shell
        self._plan = plan
        self._dispatches = 0
        loop = shell.loop
        shell.clients.doomed.update(plan.doomed)
        shell.on_dispatch = self._dispatched
        for at_ns, name in plan.kills:
            loop.at(at_ns, self._kill, name)
        for at_ns, name in plan.drains:
            loop.at(at_ns, self._drain, name)
        for at_ns, request, choice in plan.leaves:
            loop.at(at_ns, shell.withdraw, request, choice)
        loop.at(plan.heal_ns, shell.network.heal)

    def _kill(self, name: str) -> None:
        for address in list(self._shell.workers):
            if address.name == name:
                self._shell.kill(address)

    def _drain(self, name: str) -> None:
        shell = self._shell
        for worker in shell.workers.values():
            if worker.address.name == name and worker.alive:
                shell.router.receive(DrainAsked(worker.address), shell.loop.now_ns)

    def _dispatched(self, target: Address, source: Address, message: Dispatch) -> None:
        """The target asks the source for KV."""
        self._dispatches += 1
        for ambush in self._plan.ambushes:
            if ambush.dispatch == self._dispatches and self._shell.loop.now_ns < self._plan.heal_ns:
                self._spring(ambush, target, source, message)

    def _spring(self, ambush: Ambush, target: Address, source: Address, message: Dispatch) -> None:
        shell = self._shell
        at_ns = shell.loop.now_ns + ambush.delay_ns
        match ambush.victim:
            case Victim.SOURCE:
                shell.loop.at(at_ns, shell.kill, source)
            case Victim.TARGET:
                shell.loop.at(at_ns, shell.kill, target)
            case Victim.CLIENT:
                shell.loop.at(at_ns, shell.withdraw, message.key.request, message.key.choice)
