"""What the router knows of the instances, kept as columns so that a placement never walks objects."""

import numpy as np

from headrace.types.ids import Address
from headrace.types.messages import InstanceInfo, Report
from headrace.types.views import ClusterView

UNKNOWN = float("nan")
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
)
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
    """Rows ordered by name. The arrays of a view are the fleet's own: a policy reads them at once and keeps none."""

    def __init__(self) -> None:
        self._infos: dict[Address, InstanceInfo] = {}
        self._rows: dict[Address, int] = {}
        self._columns = {name: np.empty(0) for name in FLOATS}
        self._draining = np.zeros(0, dtype=np.bool_)

    def __contains__(self, address: Address) -> bool:
        return address in self._rows

    def addresses(self) -> list[Address]:
        return list(self._infos)

    def add(self, address: Address, info: InstanceInfo) -> None:
        before = {a: [float(self._columns[n][row]) for n in FLOATS] for a, row in self._rows.items()}
        self._rebuild({**self._infos, address: info}, before)
        row = self._rows[address]
        self._columns["assigned"][row] = 0
        self._columns["assigned_tokens"][row] = 0
        self._columns["blocks_total"][row] = sum(info.blocks_total)
        self._columns["sequences_max"][row] = info.sequences_max

    def remove(self, address: Address) -> None:
        before = {a: [float(self._columns[n][row]) for n in FLOATS] for a, row in self._rows.items()}
        self._rebuild({a: i for a, i in self._infos.items() if a != address}, before)

    def drain(self, address: Address) -> None:
        if address in self._rows:
            self._draining[self._rows[address]] = True

    def report(self, address: Address, report: Report) -> None:
        row = self._rows[address]
        columns = self._columns
        for name in REPORTED:
            columns[name][row] = getattr(report, name)
        columns["blocks_free"][row] = report.blocks_free if report.blocks_free >= 0 else UNKNOWN
        self._draining[row] |= report.draining

    def assign(self, address: Address, sequences: int, tokens: int) -> None:
        """Count work given (or, negative, ended). Instances that are gone need no count."""
        row = self._rows.get(address)
        if row is not None:
            self._columns["assigned"][row] += sequences
            self._columns["assigned_tokens"][row] += tokens

    def view(self, now_ns: int) -> ClusterView:
        return ClusterView(
            now_ns=now_ns,
            addresses=tuple(self._infos),
            pools=tuple(i.pool for i in self._infos.values()),
            leanings=tuple(i.leaning for i in self._infos.values()),
            draining=self._draining,
            **self._columns,  # pyright: ignore[reportArgumentType]
        )

    def _rebuild(self, infos: dict[Address, InstanceInfo], before: dict[Address, list[float]]) -> None:
        drained = {a for a, row in self._rows.items() if self._draining[row]}
        self._infos = dict(sorted(infos.items()))
        self._rows = {a: row for row, a in enumerate(self._infos)}
        unknown = [UNKNOWN] * len(FLOATS)
        table = np.array([before.get(a, unknown) for a in self._infos], dtype=np.float64).reshape(
            -1, len(FLOATS)
        )
        self._columns = {name: table[:, i].copy() for i, name in enumerate(FLOATS)}
        self._draining = np.array([a in drained for a in self._infos], dtype=np.bool_)
