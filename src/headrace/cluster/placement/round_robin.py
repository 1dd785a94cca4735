"""Round robin: the n-th placement takes the n-th instance of each leaning (the rule of every HTTP balancer).

When the prefill instance could decode as well (both lean the same way, or it is the only one), the sequence stays whole.
Leaves out: load, cache, distance.
"""

import msgspec

from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Wait


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    reads_reports = False
    reads_prefixes = False

    def __init__(self, config: Config) -> None:
        pass

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        prefills, decodes = view.candidates("prefill"), view.candidates("decode")
        if not prefills:
            return Wait("no instance takes work")
        prefill = prefills[request.serial % len(prefills)]
        decode = prefill if prefill in decodes else decodes[request.serial % len(decodes)]
        return Placement(
            view.addresses[prefill],
            view.addresses[decode],
            {
                "rule": "round_robin",
                "turn": request.serial,
                "prefill_of": len(prefills),
                "decode_of": len(decodes),
            },
        )

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        decodes = view.candidates("decode")
        return (
            view.addresses[decodes[request.serial % len(decodes)]]
            if decodes
            else Wait("no instance takes work")
        )

    def horizon(self, view: ClusterView) -> int:
        return 2**31
