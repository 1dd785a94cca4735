"""What the router knows of the instances, kept as columns so that a placement never walks objects."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.cluster.prefixes import Prefixes
from headrace.types.costs import Costs
from headrace.types.ids import Address, PoolId
from headrace.types.messages import Indexed, InstanceInfo, Report
from headrace.types.views import ClusterView, Rows

UNKNOWN = float("nan")
Scalar = TypeVar("Scalar", np.float64, np.bool_)
FLOATS = (
    "observed_at_ns",
    "waiting",
    "running",
    "blocks_total",
    "blocks_free",
    "assigned",
    "assigned_tokens",
    "tokens_waiting",
    "tokens_running",
    "held",
    "receiving",
    "sending",
    "blocks_demand",
    "urgent",
    "preemptions",
    "sequences_max",
    "assigned_prefill",
)
COUNTED = ("assigned", "assigned_tokens", "assigned_prefill")
"""Columns that the router counts itself."""
REPORTED = (
    "observed_at_ns",
    "waiting",
    "running",
    "blocks_total",
    "tokens_waiting",
    "tokens_running",
    "held",
    "receiving",
    "sending",
    "blocks_demand",
    "urgent",
    "preemptions",
)
"""Columns that are fields of a report."""


class Fleet:
    """Rows ordered by name. The arrays of a view are the fleet's own: a policy reads them at once and keeps none.

    `costs`: what steps and transfers cost, by an instance's name. `prefixes`: where the pools' messages are kept; None: nobody wants them.
    """

    def __init__(self, costs: Mapping[str, Costs] | None = None, prefixes: Prefixes | None = None) -> None:
        self.version = 0
        """Another one whenever something has changed that a view shows."""
        self._costs = costs
        self._prefixes = prefixes
        self._infos: dict[Address, InstanceInfo] = {}
        self._leanings: dict[Address, str] = {}
        self._rows: dict[Address, int] = {}
        self._columns = {name: np.empty(0) for name in FLOATS}
        self._draining = np.zeros(0, dtype=np.bool_)
        self._pools: dict[Address, PoolId] = {}
        """Every pool that an instance has named."""
        self._indexed: dict[Address, int] = {}
        """Number of a pool's last message about its prefix index."""
        self._away: dict[str, int] = {}
        """Names of instances that have ended, and until when they may be back."""
        self._fields: tuple[Any, ...] = ()
        """Of a view, but the time; empty: to be made."""
        self._view: ClusterView | None = None
        """The latest, as long as it is the same."""

    def __contains__(self, address: Address) -> bool:
        return address in self._rows

    def addresses(self) -> list[Address]:
        return list(self._infos)

    def takes(self, address: Address) -> bool:
        """Is it there, and may it be given work?"""
        row = self._rows.get(address)
        return row is not None and not self._draining[row]

    def has_pool(self, address: Address) -> bool:
        return address in self._pools

    def awaits(self, now_ns: int) -> bool:
        """Has somebody ended who may come back?"""
        self._away = {name: until_ns for name, until_ns in self._away.items() if until_ns > now_ns}
        return bool(self._away)

    # What changes

    def add(self, address: Address, info: InstanceInfo) -> None:
        self._away.pop(address.name, None)
        self._leanings[address] = info.leaning
        self._pools[info.pool_address] = info.pool
        self._rebuild({**self._infos, address: info})
        row = self._rows[address]
        for name in COUNTED:
            self._columns[name][row] = 0
        self._columns["blocks_total"][row] = sum(info.blocks_total)
        self._columns["sequences_max"][row] = info.sequences_max

    def remove(self, address: Address, until_ns: int = 0) -> None:
        """Until then it may come back."""
        self._away[address.name] = until_ns
        del self._leanings[address]
        self._rebuild({a: i for a, i in self._infos.items() if a != address})

    def drain(self, address: Address) -> None:
        row = self._rows.get(address)
        if row is not None and not self._draining[row]:
            self._draining[row] = True
            self._renew()

    def touch(self) -> None:
        """Whoever was told to wait is to be asked for again."""
        self.version += 1

    def turn(self, address: Address, leaning: str) -> bool:
        """From now on it leans there. False if it did, or is not known."""
        if self._leanings.get(address, leaning) == leaning:
            return False
        self._leanings[address] = leaning
        self._renew()
        return True

    def report(self, address: Address, report: Report) -> None:
        row = self._rows[address]
        columns = self._columns
        for name in REPORTED:
            columns[name][row] = getattr(report, name)
        columns["blocks_free"][row] = report.blocks_free if report.blocks_free >= 0 else UNKNOWN
        self.version += 1
        if report.draining:
            self.drain(address)

    def assign(self, address: Address, sequences: int, tokens: int, prefill: int = 0) -> None:
        """Count work given (or, negative, ended), `prefill` tokens of it still to prefill. Instances that are gone need no count."""
        row = self._rows.get(address)
        if row is None:
            return
        columns = self._columns
        columns["assigned"][row] += sequences
        columns["assigned_tokens"][row] += tokens
        if prefill:
            columns["assigned_prefill"][row] += prefill
        self.version += 1

    # Pools

    def indexed(self, pool: Address, message: Indexed) -> None:
        """What entered and left a pool's prefix index. After a gap nothing that was known of it is sure."""
        if self._prefixes is None:
            return
        number = self._pools[pool]
        if message.number != self._indexed.get(pool, 0) + 1:
            self._prefixes.forget(number)
        self._indexed[pool] = message.number
        self._prefixes.stored(number, message.stored)
        self._prefixes.removed(number, message.removed)
        self.version += 1

    def lost_pool(self, pool: Address) -> None:
        """The pool has ended."""
        number = self._pools.pop(pool, None)
        self._indexed.pop(pool, None)
        if number is not None and self._prefixes is not None:
            self._prefixes.forget(number)
            self.version += 1

    # What is shown

    def view(self, now_ns: int) -> ClusterView:
        view = self._view
        if view is None or view.now_ns != now_ns:
            if not self._fields:
                self._fields = self._show()
            view = self._view = ClusterView(now_ns, *self._fields)
        return view

    def _show(self) -> tuple[Any, ...]:
        """Fields of a view in their order, all but the first."""
        infos, costs = self._infos.values(), self._costs
        takers: dict[str, Rows] = {}
        view = ClusterView(
            now_ns=0,
            addresses=tuple(self._infos),
            pools=tuple(i.pool for i in infos),
            leanings=tuple(self._leanings[a] for a in self._infos),
            draining=self._draining,
            block_size=max((i.block_size for i in infos), default=1),
            block_bytes=max((i.block_bytes for i in infos), default=0),
            prefixes=self._prefixes,
            costs=() if costs is None else tuple(costs.get(a.name) for a in self._infos),
            takers=takers,
            **self._columns,  # pyright: ignore[reportArgumentType]
        )
        return tuple(getattr(view, name) for name in view.__struct_fields__[1:])

    def _renew(self) -> None:
        """What views share is not as it was."""
        self.version += 1
        self._fields = ()
        self._view = None

    def _rebuild(self, infos: dict[Address, InstanceInfo]) -> None:
        self._infos = dict(sorted(infos.items()))
        before = np.array([self._rows.get(a, -1) for a in self._infos], dtype=np.int64)
        self._rows = {a: row for row, a in enumerate(self._infos)}
        self._columns = {name: _reordered(c, before, UNKNOWN) for name, c in self._columns.items()}
        self._draining = _reordered(self._draining, before, False)
        if self._prefixes is not None:
            self._prefixes.map_rows([i.pool for i in self._infos.values()])
        self._renew()


def _reordered(column: NDArray[Scalar], before: NDArray[np.int64], unknown: float | bool) -> NDArray[Scalar]:
    """Row i is what stood at row `before[i]`; at -1 nothing did."""
    rows = np.full(len(before), unknown, dtype=column.dtype)
    old = before >= 0
    rows[old] = column[before[old]]
    return rows
