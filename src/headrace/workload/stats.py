"""Statistics of few repeats: Student's t, paired differences, and Holm's correction for many metrics at once."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

SEEDS_MIN = 3
"""Fewer differences say nothing of their noise."""


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom: the finite series of Abramowitz and Stegun 26.7.3 and
    26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    # Odd: cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 ...; even: 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 ...
    term, total, k = (cosine, 0.0, 1) if odd else (1.0, 0.0, 0)
    while k <= freedom - 2:
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
        k += 2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(within: float, freedom: int) -> float:
    """The t of which `t_within` is `within` (0 to less than 1)."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < within:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < within else (low, middle)
    return high


class Estimate(msgspec.Struct, frozen=True):
    """A mean difference, its 95% confidence interval, and how likely chance alone gives one so large."""

    count: int
    mean: float
    low: float
    high: float
    p: float


def estimate(differences: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """By a paired t-test, two-sided; None for fewer than SEEDS_MIN differences. Differences that are all alike have no noise: p is 0, or 1
    where they are 0."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < SEEDS_MIN:
        return None
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error <= 1e-12 * abs(mean):
        return Estimate(len(values), mean, mean, mean, 1.0 if mean == 0 else 0.0)
    freedom = len(values) - 1
    reach = t_quantile(confidence, freedom) * error
    p = max(0.0, 1.0 - t_within(abs(mean) / error, freedom))
    return Estimate(len(values), mean, mean - reach, mean + reach, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted so that calling all below alpha significant is wrong in at most a share alpha of such families (Holm 1979)."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
