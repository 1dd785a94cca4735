"""Least load: the instance with the fewest tokens assigned, prefill and decode chosen alike; ties by name.

Load is what the router has assigned and not seen end, which it knows without delay, so a burst does not pile onto one instance as it would
with the instances' own, stale reports. With `bind: late` the decode instance is chosen when the prefill has ended.
Leaves out: cached prefixes, memory, distance.
"""

from typing import Literal

import msgspec
import numpy as np

from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Wait


class Config(msgspec.Struct, frozen=True):
    bind: Literal["early", "late"] = "early"


class Policy:
    reads_reports = False
    reads_prefixes = False

    def __init__(self, config: Config) -> None:
        self._late = config.bind == "late"

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        if not len(view.rows_for("prefill")):
            return Wait("no instance takes work")
        prefill = _lightest(view, "prefill")
        whole = view.takes(prefill, "decode")
        decode = prefill if whole else _lightest(view, "decode")
        reasons = {"rule": "least_load", "assigned_tokens": float(view.assigned_tokens[prefill])}
        if self._late and not whole:
            return Placement(view.addresses[prefill], None, reasons)
        return Placement(view.addresses[prefill], view.addresses[decode], reasons)

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        if not len(view.rows_for("decode")):
            return Wait("no instance takes work")
        return view.addresses[_lightest(view, "decode")]

    def horizon(self, view: ClusterView) -> int:
        return 1


def _lightest(view: ClusterView, leaning: str) -> int:
    rows = view.rows_for(leaning)
    return int(rows[np.argmin(view.assigned_tokens[rows])])
