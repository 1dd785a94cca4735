"""Views of a fleet from the few columns that a test is about, and plain costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from headrace.types.costs import DecodeCost
from headrace.types.ids import Address, BlockHash, PoolId, RequestId
from headrace.types.request import Request
from headrace.types.views import ClusterView, PlacementRequest

OTHERS = frozenset({"now_ns", "addresses", "pools", "leanings", "draining"})
COLUMNS = [f.name for f in msgspec.structs.fields(ClusterView) if f.required and f.name not in OTHERS]


def fleet_of(leanings: Sequence[str], *, draining: Sequence[int] = (), **columns: Any) -> ClusterView:
    """Rows n0, n1, ... that say 0 in every column but those given (a number for all, or one a row)."""
    rows = len(leanings)
    given = {name: columns.pop(name) for name in COLUMNS if name in columns}
    filled = {
        name: np.broadcast_to(np.asarray(given.get(name, 0.0), dtype=np.float64), rows) for name in COLUMNS
    }
    return ClusterView(
        now_ns=0,
        addresses=tuple(Address(f"n{i}") for i in range(rows)),
        pools=tuple(PoolId(i) for i in range(rows)),
        leanings=tuple(leanings),
        draining=np.isin(np.arange(rows), list(draining)),
        **filled,
        **columns,
    )


def ask(
    total: int = 100,
    *,
    hashes: tuple[BlockHash, ...] = (),
    serial: int = 0,
    tokens_max: int = 8,
    priority: int = 0,
) -> PlacementRequest:
    request = Request(RequestId(1), total, hashes, tokens_max, priority=priority)
    return PlacementRequest(request, total, 0, serial)


def chain(blocks: int, of: int = 0) -> tuple[BlockHash, ...]:
    """Names of a prompt's blocks; prompts of another `of` share none."""
    return tuple(BlockHash(of.to_bytes(8, "little") + i.to_bytes(8, "little")) for i in range(blocks))


@dataclass(frozen=True, eq=False)
class PlainCosts:
    """`token_ns` a prefilled token, `context_ns` a token of a decode's context, `byte_ns` a byte sent."""

    token_ns: int = 1000
    context_ns: int = 1
    byte_ns: float = 0.1

    def decode(self, rows: int, context: int) -> DecodeCost:
        return DecodeCost(1000 * rows, 1000 * self.context_ns, context + 1)

    def step_ps(self, prefills: Sequence[tuple[int, int]], rows: int, context: int) -> int:
        decode = self.decode(rows, context)
        return (
            1000 * self.token_ns * sum(t for t, _ in prefills) + decode.fixed_ps + decode.slope_ps * context
        )

    def transfer_ns(self, nbytes: int) -> int:
        return round(nbytes * self.byte_ns)


class Held:
    """A prefix view that says: each row holds so many leading blocks, of any prompt."""

    def __init__(self, *blocks: int) -> None:
        self._blocks = np.array(blocks, dtype=np.float64)

    def hits(self, hashes: tuple[BlockHash, ...]) -> Any:
        return np.minimum(self._blocks, len(hashes))
