"""Load states (FlowKV, arXiv 2504.03775, section 4): when one half of the work is overloaded and the other is not, idle instances turn.

Every row's load is scored as in `placement.load_aware` and smoothed (an exponential moving average); a side's load is the mean over the
rows that lean to it.
 NORMAL        nothing turns.
 *_SHORT       one side is at or over `high` while the other is at or under `low`. The idlest rows of the other turn, `turns_max` a period,
               one always left. It lasts until the one side is at or under `low` or the other at or over `high`.
 OVERLOADED    both sides at or over `high`, or
 IDLE          both at or under `low`, for `extreme_periods`: told in `state`; to add or remove instances is not for this axis.
A row that has turned stays so for at least `stay_periods` (the paper's few scheduling cycles), then goes home as soon as the state is over;
into the opposite state it goes home at once. Running work stays where it is: a leaning only says who is preferred for new work.
The paper's weights, thresholds and windows are not published; these are chosen.
Leaves out: scaling; instances that lean to both, which count for neither side and never turn.
"""

from enum import Enum
from typing import Annotated

import msgspec
import numpy as np

from headrace.cluster.placement.load_aware import DecodeWeights, PrefillWeights
from headrace.types.ids import Address
from headrace.types.views import ClusterView, Column

SIDES = ("prefill", "decode")

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class State(Enum):
    NORMAL = "normal"
    PREFILL_SHORT = "prefill_short"
    DECODE_SHORT = "decode_short"
    OVERLOADED = "overloaded"
    IDLE = "idle"


SHORT = (State.PREFILL_SHORT, State.DECODE_SHORT)
"""By index into `SIDES`."""


class Config(msgspec.Struct, frozen=True):
    period_ns: Count = 500_000_000
    smoothing: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.3
    """Weight of the newest score in the average."""
    high: Share = 0.4
    low: Share = 0.2
    stay_periods: Count = 4
    turns_max: Count = 1
    """Rows that turn in one period."""
    extreme_periods: Count = 8
    prefill: PrefillWeights = PrefillWeights()
    decode: DecodeWeights = DecodeWeights()


class Policy:
    def __init__(self, config: Config) -> None:
        self.period_ns = config.period_ns
        self.state = State.NORMAL
        self._config = config
        self._addresses: tuple[Address, ...] = ()
        self._leanings: tuple[str, ...] = ()
        self._rows: dict[Address, int] = {}
        self._sides = np.zeros(0, dtype=np.int64)
        """Index into `SIDES` of each row's leaning; -1: it leans to both."""
        self._loads = np.zeros((0, 2))
        """Smoothed scores, [row, side]."""
        self._homes: dict[Address, str] = {}
        self._away: dict[Address, int] = {}
        """Rows that have turned, and for how many periods."""
        self._extreme = 0
        """Periods in which both sides were at one extreme."""

    def turn(self, view: ClusterView) -> dict[Address, str]:
        self._look(view)
        loads = self._smooth(view)
        rows = [np.flatnonzero((self._sides == side) & ~view.draining).tolist() for side in (0, 1)]
        if not all(rows):
            self.state = State.NORMAL
            return self._home()
        load = [float(loads[rows[side], side].mean()) for side in (0, 1)]
        self.state = self._next(load)
        turned = self._home()
        for side in (0, 1):
            # More turn only while it is as bad as it was.
            if self.state is SHORT[side] and self._is_short(load, side):
                turned |= self._lend(view, rows[1 - side], loads[:, 1 - side], SIDES[side], turned)
        for side in (0, 1):
            leaving = [view.addresses[i] for i in rows[side] if view.addresses[i] in turned]
            if len(leaving) == len(rows[side]):
                # Somebody has to be left.
                del turned[leaving[-1]]
        self._away |= {a: 0 for a, leaning in turned.items() if leaning != self._homes[a]}
        return turned

    def _look(self, view: ClusterView) -> None:
        """Who is there, who is away, and where everybody is at home: as first seen, or as somebody else has said since."""
        if view.addresses != self._addresses:
            before, rows = self._loads, self._rows
            self._rows = {a: row for row, a in enumerate(view.addresses)}
            kept = [rows.get(a, -1) for a in view.addresses]
            fresh = self._scores(view)
            self._loads = np.array([before[k] if k >= 0 else fresh[i] for i, k in enumerate(kept)]).reshape(
                -1, 2
            )
        leanings = {a: view.leanings[self._rows[a]] for a in self._away if a in self._rows}
        self._away = {a: self._away[a] + 1 for a, leaning in leanings.items() if leaning != self._homes[a]}
        if view.addresses != self._addresses or view.leanings != self._leanings:
            now = zip(view.addresses, view.leanings, strict=True)
            self._homes = {a: self._homes[a] if a in self._away else leaning for a, leaning in now}
            sides = [SIDES.index(leaning) if leaning in SIDES else -1 for leaning in view.leanings]
            self._sides = np.array(sides, dtype=np.int64)
            self._addresses, self._leanings = view.addresses, view.leanings

    def _scores(self, view: ClusterView) -> Column:
        return np.stack([self._config.prefill.score(view), self._config.decode.score(view)], axis=1)

    def _smooth(self, view: ClusterView) -> Column:
        """Scores of all rows, [row, side], each averaged with what it was."""
        self._loads = self._loads + self._config.smoothing * (self._scores(view) - self._loads)
        return self._loads

    def _is_short(self, load: list[float], side: int) -> bool:
        return load[side] >= self._config.high and load[1 - side] <= self._config.low

    def _next(self, load: list[float]) -> State:
        high, low = self._config.high, self._config.low
        over, under = min(load) >= high, max(load) <= low
        self._extreme = self._extreme + 1 if over or under else 0
        for side, state in enumerate(SHORT):
            lasts = self.state is state and load[side] > low and load[1 - side] < high
            if lasts or self._is_short(load, side):
                return state
        if self._extreme >= self._config.extreme_periods:
            return State.OVERLOADED if over else State.IDLE
        return State.NORMAL

    def _home(self) -> dict[Address, str]:
        """Who goes home now."""
        back: dict[Address, str] = {}
        for address, periods in self._away.items():
            home = self._homes[address]
            opposite = self.state is SHORT[SIDES.index(home)]
            over = self.state not in SHORT and periods >= self._config.stay_periods
            if opposite or over:
                back[address] = home
        return back

    def _lend(
        self, view: ClusterView, rows: list[int], loads: Column, side: str, turned: dict[Address, str]
    ) -> dict[Address, str]:
        """The idlest rows that turn to `side`. Who has just been told to go home counts as one that turns."""
        idle = sorted((float(loads[i]), i) for i in rows if loads[i] <= self._config.low)
        count = self._config.turns_max - len(turned)
        free = [view.addresses[i] for _, i in idle if view.addresses[i] not in turned]
        return dict.fromkeys(free[: max(0, count)], side)
