"""What a simulated fleet looks like over time, sampled while it runs."""

import numpy as np

from headrace.nodes.instance import Instance
from headrace.nodes.router import Router
from headrace.sim.flows import Flows
from headrace.sim.shell import Shell
from headrace.types.outcomes import Series

SAMPLES_MAX = 1000
COLUMNS = ("kv_used", "waiting", "running", "receiving")


class Samples:
    """One row every `period_ns`, from `begin_ns` on, while requests are unfinished. As of each instance's last step that was told."""

    def __init__(self, shell: Shell, flows: Flows, period_ns: int, begin_ns: int) -> None:
        self._shell = shell
        self._flows = flows
        self._period_ns = period_ns
        self._begin_ns = begin_ns
        self._at_ns: list[int] = []
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._fleet: dict[str, list[float]] = {}
        self._columns: dict[str, int] = {}
        """By name: all are up when the trace begins, and keep their column while they are down."""
        shell.loop.at(begin_ns, self._sample)

    def series(self) -> Series:
        values = {name: np.array(rows, dtype=np.float32) for name, rows in self._rows.items()}
        values |= {name: np.array(column) for name, column in self._fleet.items()}
        return Series(np.array(self._at_ns, dtype=np.int64), values)

    def _sample(self) -> None:
        shell = self._shell
        if not shell.clients.unfinished:
            return
        live = [worker for worker in shell.workers.values() if worker.alive]
        for worker in live:
            self._columns.setdefault(worker.address.name, len(self._columns))
        table = np.zeros((len(COLUMNS), len(self._columns)), dtype=np.float32)
        for worker in live:
            core = worker.core
            assert isinstance(core, Instance)
            table[:, self._columns[worker.address.name]] = core.gauges()
        self._at_ns.append(shell.loop.now_ns - self._begin_ns)
        for name, column in zip(COLUMNS, table, strict=True):
            self._rows[name].append(column)
        self._fleet.setdefault("bytes_in_flight", []).append(self._flows.bytes_in_flight)
        router = shell.router.state
        assert isinstance(router, Router)
        leanings = router.fleet.view(shell.loop.now_ns).leanings
        for leaning in ("prefill", "decode", "mixed"):
            self._fleet.setdefault(f"leaning_{leaning}", []).append(leanings.count(leaning))
        if len(self._at_ns) >= SAMPLES_MAX:
            self._thin()
        shell.loop.at(shell.loop.now_ns + self._period_ns, self._sample)

    def _thin(self) -> None:
        """A run that lasts longer than its trace: every second sample goes, and the next ones are half as dense."""
        self._period_ns *= 2
        self._at_ns = self._at_ns[::2]
        self._rows = {name: rows[::2] for name, rows in self._rows.items()}
        self._fleet = {name: column[::2] for name, column in self._fleet.items()}
