"""The router's policies that are asked every so often: who leans where (roles), and what moves (rebalancing).

Neither is asked while no request is unfinished, so that a fleet at rest stays at rest.
"""

from collections.abc import Callable

from headrace.cluster.policies import RebalancePolicy, RolesPolicy
from headrace.nodes.fleet import Fleet
from headrace.types.ids import Address
from headrace.types.messages import Migrate
from headrace.types.request import NEVER_NS

Send = Callable[[Address, Migrate], None]
Count = Callable[[str], None]


class Control:
    def __init__(
        self,
        fleet: Fleet,
        roles: RolesPolicy | None,
        rebalance: RebalancePolicy | None,
        send: Send,
        count: Count,
    ) -> None:
        self._fleet = fleet
        self._roles = roles
        self._rebalance = rebalance
        self._send = send
        self._count = count
        self._roles_ns = 0
        """When to ask next; 0: not before there is work."""
        self._rebalance_ns = 0

    def settle(self, now_ns: int, *, busy: bool) -> None:
        """Ask who is due."""
        if self._roles is not None:
            if busy and 0 < self._roles_ns <= now_ns:
                self._turn(self._roles, now_ns)
            self._roles_ns = _next_ns(self._roles_ns, self._roles.period_ns, now_ns, busy=busy)
        if self._rebalance is not None:
            if busy and 0 < self._rebalance_ns <= now_ns:
                self._move(self._rebalance, now_ns)
            self._rebalance_ns = _next_ns(self._rebalance_ns, self._rebalance.period_ns, now_ns, busy=busy)

    def due_ns(self) -> int:
        """When somebody is to be asked; 0: never."""
        due = [at_ns for at_ns in (self._roles_ns, self._rebalance_ns) if at_ns]
        return min(due, default=0)

    def _turn(self, roles: RolesPolicy, now_ns: int) -> None:
        for address, leaning in roles.turn(self._fleet.view(now_ns)).items():
            if self._fleet.turn(address, leaning):
                self._count("roles_turned")

    def _move(self, rebalance: RebalancePolicy, now_ns: int) -> None:
        for move in rebalance.moves(self._fleet.view(now_ns)):
            if move.source in self._fleet and move.target in self._fleet and move.source != move.target:
                self._send(move.source, Migrate(move.target))


def _next_ns(due_ns: int, period_ns: int, now_ns: int, *, busy: bool) -> int:
    if not busy or period_ns >= NEVER_NS:
        return 0
    return due_ns if due_ns > now_ns else now_ns + period_ns
