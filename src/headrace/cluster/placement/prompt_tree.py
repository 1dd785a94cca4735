"""Prompt tree: work goes to where its prefix lies, if that pays (MemServe, arXiv 2406.17565, sec. 5 and 6).

A row's time is its queue plus the computation of what its pool does not hold of the prompt; the least time wins, ties go to the fewest
assigned tokens, then in turn. Where another row holds more of the prompt and sending it takes no longer than the computation it saves, that
row sends it first (`fetch`): MemServe's transfer(y' - y) <= exec(x, y) - exec(x, y'). The paper takes the longest prefix and leaves load
open; here both are one sum. The queue is what was assigned and is still to prefill, which the router knows without delay. Rows without room
for the prompt beside what they were assigned come last. Where costs are not known a token counts 1, and nothing is fetched.
Decode goes to the fewest assigned tokens, or to who holds most of the prefix, if the transfer saved is worth more than its slower steps.
Leaves out: the load of links, tails of prompts that are no full blocks, which tier of a pool a block is in, decode's share of mixed steps.
"""

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.costs import Costs
from headrace.types.ids import Address
from headrace.types.views import ClusterView, Column, Decline, Placement, PlacementRequest, Rows, Wait

Flags = NDArray[np.bool_]

CHUNK = 1024
"""A queue's tokens are priced as chunks of so many."""


class Config(msgspec.Struct, frozen=True):
    fetch: bool = True
    bind: Literal["early", "late"] = "early"


class Policy:
    reads_reports = False
    reads_prefixes = True

    def __init__(self, config: Config) -> None:
        self._fetch = config.fetch
        self._late = config.bind == "late"
        self._prices = Prices(())

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        rows = view.rows_for("prefill")
        if not len(rows):
            return Wait("no instance takes work")
        prices, held = self._priced(view), _held(request, view)
        holder = _holder(held, view, request.serial)
        queue = view.assigned_tokens if view.assigned_prefill is None else view.assigned_prefill
        most = held.item(holder)
        work, fetched = prices.work(request.total, held, most if self._fetch else 0, view)
        time = prices.queues(queue) + work
        room = view.blocks_total * view.block_size - view.assigned_tokens + held
        fits = rows[~(room < request.total)[rows]]
        row = _least(fits if len(fits) else rows, time, view, request.serial)
        reasons = {
            "rule": "prompt_tree",
            "time": time.item(row),
            "unit": "ns" if prices.known else "tokens",
            "held": held.item(row),
            "held_most": most,
        }
        fetch = view.addresses[holder] if fetched.item(row) else None
        return Placement(view.addresses[row], self._partner(row, request, view, held), reasons, fetch)

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        if not len(view.rows_for("decode")):
            return Wait("no instance takes work")
        return self._decode(request, view, _held(request, view))

    def horizon(self, view: ClusterView) -> int:
        return 1

    def _priced(self, view: ClusterView) -> "Prices":
        if self._prices.costs is not view.costs:
            self._prices = Prices(view.costs)
        return self._prices

    def _partner(self, row: int, request: PlacementRequest, view: ClusterView, held: Rows) -> Address | None:
        if view.takes(row, "decode"):
            return view.addresses[row]
        return None if self._late else self._decode(request, view, held)

    def _decode(self, request: PlacementRequest, view: ClusterView, held: Rows) -> Address:
        """The lightest row, or the lightest of those that hold most, whichever costs less in all."""
        rows, prices = view.rows_for("decode"), self._priced(view)
        load, here = view.assigned_tokens[rows], held[rows]
        light = rows.item(int(np.argmin(load)))
        near = rows.item(int(np.argmin(np.where(here == here.max(), load, np.inf))))
        if near != light:
            costs = [prices.decode(request, view, held.item(row), row) for row in (near, light)]
            light = near if costs[0] <= costs[1] else light
        return view.addresses[light]


class Prices:
    """What the rows' hardware takes, nanoseconds; tokens where it is not known of every row. Equal hardware is asked once."""

    def __init__(self, costs: tuple[Costs | None, ...]) -> None:
        self.costs = costs
        self.known = bool(costs) and all(c is not None for c in costs)
        self._different: list[Costs] = []
        kinds: list[int] = []
        for cost in costs if self.known else ():
            kind = next((k for k, other in enumerate(self._different) if other is cost), -1)
            if kind < 0 and cost is not None:
                kind = len(self._different)
                self._different.append(cost)
            kinds.append(kind)
        self._kinds = np.array(kinds, dtype=np.int64)
        rates = [cost.step_ps([(CHUNK, 0)], 0, 0) / 1000 / CHUNK for cost in self._different]
        self._rates = np.array(rates)[self._kinds] if self.known else 1.0

    def queues(self, tokens: Column) -> Column:
        """To prefill so many tokens, each row."""
        return tokens * self._rates

    def work(self, total: int, held: Rows, most: int, view: ClusterView) -> tuple[Column, Flags]:
        """To compute what a row does not hold of a prompt; or, where that is flagged and no slower, to fetch up to `most` first."""
        if not self.known:
            return (total - held).astype(np.float64), np.zeros(len(held), dtype=np.bool_)
        count, block_size = len(self._different), view.block_size
        keys = held // block_size * count + self._kinds
        times = np.zeros(keys.max() + 1)
        fetched, present = np.zeros((2, len(times)), dtype=np.bool_)
        present[keys] = True
        for key in np.flatnonzero(present).tolist():
            costs, here = self._different[key % count], key // count * block_size
            times[key] = _compute(costs, total, here)
            if most > here and view.block_bytes:
                sent = costs.transfer_ns((most - here) // block_size * view.block_bytes)
                other = sent + _compute(costs, total, most)
                fetched[key] = other <= times[key]
                times[key] = min(other, times[key])
        return times[keys], fetched[keys]

    def decode(self, request: PlacementRequest, view: ClusterView, held: int, row: int) -> float:
        """To send what a row does not hold, and to give every token that the request may give, at the row's present load."""
        missing, context = request.total - held, int(view.assigned_tokens.item(row)) + request.total
        costs = view.costs[row] if self.known and view.block_bytes else None
        if costs is None:
            return missing + context
        step = costs.decode(int(view.assigned.item(row)) + 1, context)
        steps_ns = request.request.tokens_max * (step.fixed_ps + step.slope_ps * context) / 1000
        return costs.transfer_ns(missing * view.block_bytes // view.block_size) + steps_ns


def _compute(costs: Costs, total: int, held: int) -> float:
    """Of a prompt whose first `held` tokens are there, nanoseconds."""
    return costs.step_ps([(total - held, held)], 0, 0) / 1000


def _held(request: PlacementRequest, view: ClusterView) -> Rows:
    """Leading tokens that each row holds, in full blocks; one token at least is always computed."""
    if view.prefixes is None:
        return np.zeros(len(view.addresses), dtype=np.int64)
    hits = view.prefixes.hits(request.request.hashes).astype(np.int64)
    return np.minimum(hits, (request.total - 1) // view.block_size) * view.block_size


def _holder(held: Rows, view: ClusterView, serial: int) -> int:
    """Who could send the most: rows that hold equally much take turns."""
    able = np.where(view.draining, -1, held)
    most = np.flatnonzero(able == able.max())
    return most.item(serial % len(most))


def _least(rows: Rows, time: Column, view: ClusterView, serial: int) -> int:
    tied = rows[time[rows] == time[rows].min()]
    if len(tied) > 1:
        load = view.assigned_tokens[tied]
        tied = tied[load == load.min()]
    return tied.item(serial % len(tied))
