"""What a batch of decodes costs by its rows and its contexts' sum: a sum of ramps, exact in integers.

Every ramp grows with rows and with context, so their sum does. Between the points where a ramp bends, the sum is affine in context with
an integer slope: the buckets of `types.costs.DecodeCost`. At a bend the two sides agree, so the function is continuous.
"""

from itertools import pairwise

import msgspec

from headrace.types.costs import DecodeCost

ENDLESS = 2**62


class Ramp(msgspec.Struct, frozen=True):
    """`ps` picoseconds per token of context, as far as it counts: see `tokens`."""

    ps: int
    window: int = 0
    """A row counts as at most so many tokens; 0: all."""
    least: int = 0
    """A row counts as at least so many tokens."""
    first: int = 0
    """Only so many tokens of the batch count; 0: all."""

    def tokens(self, rows: int, context: int) -> int:
        """That count, of `rows` rows whose contexts sum to `context`."""
        if self.window:
            context = min(context, rows * self.window)
        context = max(context, rows * self.least)
        return min(context, self.first) if self.first else context

    def bends(self, rows: int) -> tuple[int, int, int]:
        """Contexts at which the slope may change."""
        return rows * self.window, rows * self.least, self.first


def buckets(ramps: tuple[Ramp, ...], rows: int, fixed_ps: int) -> tuple[DecodeCost, ...]:
    """`fixed_ps` plus the ramps of `rows` rows, for every context: each bucket begins where the last one ends, the first at 0."""
    bends = sorted({0, ENDLESS, *(bend for ramp in ramps for bend in ramp.bends(rows))})
    found: list[DecodeCost] = []
    for start, until in pairwise(bends):
        value = sum(ramp.ps * ramp.tokens(rows, start) for ramp in ramps)
        slope = sum(ramp.ps * ramp.tokens(rows, start + 1) for ramp in ramps) - value
        found.append(DecodeCost(fixed_ps + value - slope * start, slope, until))
    return tuple(found)


def bucket(costs: tuple[DecodeCost, ...], context: int) -> DecodeCost:
    """The one that holds `context`."""
    for cost in costs:
        if context < cost.until:
            return cost
    raise ValueError(f"a context of {context} tokens is beyond every bucket")
