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
        prefills, decodes = view.candidates("prefill"), view.candidates("decode")
        if not prefills:
            return Wait("no instance takes work")
        prefill = _lightest(view, prefills)
        whole = prefill in decodes
        decode = (
            None
            if self._late and not whole
            else view.addresses[prefill if whole else _lightest(view, decodes)]
        )
        loads = {str(view.addresses[i]): float(view.assigned_tokens[i]) for i in range(len(view.addresses))}
        return Placement(view.addresses[prefill], decode, {"rule": "least_load", "assigned_tokens": loads})

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        decodes = view.candidates("decode")
        return view.addresses[_lightest(view, decodes)] if decodes else Wait("no instance takes work")

    def horizon(self, view: ClusterView) -> int:
        return 1


def _lightest(view: ClusterView, rows: list[int]) -> int:
    return rows[int(np.argmin(view.assigned_tokens[rows]))]
