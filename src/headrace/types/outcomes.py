"""What became of the requests of one run, live or simulated, as columns. Every metric is defined here, once.

`ttft` = first token - arrival; `e2e` = last token - arrival; `tpot` = (e2e - ttft) / (tokens - 1), for more than one token (AIPerf calls it
ITL); goodput counts requests that met all goals.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.types.request import Slo

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TIMES = ("arrival_ns", "placed_ns", "prefill_ns", "first_ns", "joined_ns", "finished_ns")
COUNTS = ("prompt", "output", "cached", "bytes_moved", "recomputed", "attempts", "prefill", "decode", "error")


@dataclass(slots=True, eq=False)
class Outcomes:
    """One row a request. Instants are on one clock, nanoseconds; 0 has not happened (`arrival_ns` may be 0)."""

    arrival_ns: Ints
    placed_ns: Ints
    prefill_ns: Ints
    """Its first chunk was planned."""
    first_ns: Ints
    """Its first token reached the client's side."""
    joined_ns: Ints
    """The decode instance held all KV."""
    finished_ns: Ints
    prompt: Ints
    output: Ints
    """Tokens delivered."""
    cached: Ints
    """Prompt tokens found in the prefill instance's cache."""
    bytes_moved: Ints
    recomputed: Ints
    attempts: Ints
    prefill: Ints
    """Index into `instances`; -1 unknown."""
    decode: Ints
    error: Ints
    """Index into `errors`; 0: it succeeded."""
    errors: list[str] = field(default_factory=lambda: [""])
    instances: tuple[str, ...] = ()

    @classmethod
    def empty(cls, rows: int, instances: tuple[str, ...] = ()) -> "Outcomes":
        columns = {name: np.zeros(rows, dtype=np.int64) for name in TIMES + COUNTS}
        columns["prefill"] -= 1
        columns["decode"] -= 1
        return cls(instances=instances, **columns)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def fail(self, row: int, reason: str) -> None:
        if reason not in self.errors:
            self.errors.append(reason)
        self.error[row] = self.errors.index(reason)

    @property
    def succeeded(self) -> NDArray[np.bool_]:
        return (self.error == 0) & (self.finished_ns > 0)

    def ttft_s(self) -> Floats:
        """NaN where no token came."""
        return np.where(self.first_ns > 0, (self.first_ns - self.arrival_ns) * 1e-9, np.nan)

    def e2e_s(self) -> Floats:
        """NaN for what did not succeed."""
        return np.where(self.succeeded, (self.finished_ns - self.arrival_ns) * 1e-9, np.nan)

    def tpot_s(self) -> Floats:
        """NaN for one token, and for what did not succeed."""
        steps = np.maximum(self.output - 1, 1)
        return np.where(self.output > 1, (self.e2e_s() - self.ttft_s()) / steps, np.nan)

    def meets(self, ttft_ns: Ints, tpot_ns: Ints) -> NDArray[np.bool_]:
        """It succeeded within its goals, given by row; -1: no goal. A single token has no `tpot` to miss."""
        ttft, tpot = self.ttft_s() * 1e9, self.tpot_s() * 1e9
        return (
            self.succeeded
            & ((ttft_ns < 0) | (ttft <= ttft_ns))
            & ((tpot_ns < 0) | np.isnan(tpot) | (tpot <= tpot_ns))
        )


def goal_columns(goal: Ints, goals: tuple[Slo, ...]) -> tuple[Ints, Ints]:
    """The goals of each row as `Outcomes.meets` takes them."""
    ttft = np.array([-1 if g.ttft_ns is None else g.ttft_ns for g in goals], dtype=np.int64)
    tpot = np.array([-1 if g.tpot_ns is None else g.tpot_ns for g in goals], dtype=np.int64)
    return ttft[goal], tpot[goal]


@dataclass(slots=True, eq=False)
class Series:
    """What a fleet looked like over time: one row a sample, at `at_ns`."""

    at_ns: Ints
    values: dict[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    """By name: [samples] for the whole fleet, or [samples, instances].

    Names: kv_used (share of the pool, 0..1), waiting, running, receiving (sequences), bytes_in_flight (KV under way), leaning_prefill,
    leaning_decode, leaning_mixed (instances that lean so).
    """


@dataclass(slots=True, eq=False)
class RunData:
    """Everything that a report of one run needs."""

    name: str
    """What tells it from others it is compared with: "placement=power_of_two", seed 3."""
    seed: int
    clock: str
    """"wall" | "virtual"."""
    outcomes: Outcomes
    series: Series
    counters: dict[str, int]
    """As in `types.service.ServiceStatus.counters`."""
    duration_s: float
    """From the first arrival to the last end, on the run's own clock."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the cluster, as the user wrote them."""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """How it was made: CPU seconds, events, steps, instances, cost model and its measured error, digest."""
    goals: tuple[Ints, Ints] | None = None
    """By request, as `goal_columns` gives them; None: no request has any."""
    gaps_s: Floats | None = None
    """Between tokens of requests that succeeded, where a client saw them arrive."""
