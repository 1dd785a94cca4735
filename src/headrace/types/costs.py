"""What work costs, as policies and simulated executors ask for it."""

from collections.abc import Sequence
from typing import Protocol

import msgspec


class DecodeCost(msgspec.Struct, frozen=True):
    """Steps of one batch of decodes, while their contexts sum to less than `until`: `fixed_ps + slope_ps * context` picoseconds each."""

    fixed_ps: int
    slope_ps: int
    until: int
    """Tokens, exclusive; more than the context that was asked for."""


class Costs(Protocol):
    """Durations of one instance's steps, and of transfers. Monotone in every argument; integers, so that sums are exact."""

    def decode(self, rows: int, context: int) -> DecodeCost:
        """Of steps in which `rows` sequences give one token each, their contexts summing to `context` tokens. The bucket that holds it."""
        ...

    def step_ps(self, prefills: Sequence[tuple[int, int]], rows: int, context: int) -> int:
        """Of one step: chunks as (tokens, context before them), beside `rows` decodes as above. Without chunks it is what `decode` says."""
        ...

    def transfer_ns(self, nbytes: int) -> int:
        """Of that many bytes of KV between two instances, alone on the link that usually joins them."""
        ...
