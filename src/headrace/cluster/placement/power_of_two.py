"""Power of two choices (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).

Of two rows drawn at random the one with fewer assigned tokens takes the work, the first drawn on a tie: nearly as even as asking all, at a
cost that does not grow with the fleet, and without the herd that follows one stale minimum. Decode is drawn alike, unless the prefill
instance may decode: then the sequence stays whole. With `bind: late` the decode instance is drawn when the prefill has ended.
Leaves out: cached prefixes, memory, distance.
"""

from typing import Literal

import msgspec

from headrace.types.draws import bits
from headrace.types.ids import Address
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Rows, Wait

BITS = 64


class Config(msgspec.Struct, frozen=True):
    seed: int = 0
    bind: Literal["early", "late"] = "early"


class Policy:
    reads_reports = False
    reads_prefixes = False

    def __init__(self, config: Config) -> None:
        self._seed = config.seed
        self._late = config.bind == "late"

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        rows = view.rows_for("prefill")
        if not len(rows):
            return Wait("no instance takes work")
        row, other, rest = _lighter(view, rows, self._drawn(request))
        reasons = {
            "rule": "power_of_two",
            "assigned_tokens": view.assigned_tokens.item(row),
            "other": view.addresses[other].name,
            "other_tokens": view.assigned_tokens.item(other),
        }
        decode = row
        if not view.takes(row, "decode"):
            if self._late:
                return Placement(view.addresses[row], None, reasons)
            decode = _lighter(view, view.rows_for("decode"), rest)[0]
        return Placement(view.addresses[row], view.addresses[decode], reasons)

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        rows = view.rows_for("decode")
        if not len(rows):
            return Wait("no instance takes work")
        return view.addresses[_lighter(view, rows, self._drawn(request))[0]]

    def horizon(self, view: ClusterView) -> int:
        return 1

    def _drawn(self, request: PlacementRequest) -> int:
        return bits(self._seed, "power_of_two", request.serial)


def _lighter(view: ClusterView, rows: Rows, drawn: int) -> tuple[int, int, int]:
    """The lighter of two different rows, the other one (the same if there is but one), and what is left of the 64 drawn bits."""
    first, drawn = _pick(len(rows), drawn)
    one = two = rows.item(first)
    if len(rows) > 1:
        second, drawn = _pick(len(rows) - 1, drawn)
        two = rows.item(second + (second >= first))
    tokens = view.assigned_tokens
    return (one, two, drawn) if tokens.item(one) <= tokens.item(two) else (two, one, drawn)


def _pick(count: int, drawn: int) -> tuple[int, int]:
    """One of `count`, from the leading of 64 random bits, and the others moved to the front."""
    product = drawn * count
    return product >> BITS, product & ((1 << BITS) - 1)
