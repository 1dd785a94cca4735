"""Drawing one word of one row: a uniform per (seed, choice, position), and the inverse of the filtered distribution.

A draw sees its own row only, so it cannot depend on the batch; and its uniform is keyed, never "the next number", so
a failover, another worker or another batch draws the same word from the same logits.

Weights are multiples of 2^-35 and at most 1, so f64 holds every sum of up to 2^18 of them exactly: in whatever order they are
added, by numpy here or by the native kernel (ops/choice.py), the same word comes out.

Words are ranked by weight, heaviest first, ties by lower id. Every filter keeps the first words of this ranking:
- min-p (Nguyen et al. 2024, arXiv:2407.01082): those with at least `min_p` times the heaviest word's weight;
- top-k: at most k;
- top-p (Holtzman et al. 2019, arXiv:1904.09751): of what these two left, the fewest whose share reaches p.
The kept words are then laid out in the order of their ids, and the uniform picks one. Nothing is sorted but the few
hundred words around the cut.
"""

from hashlib import blake2b
from math import ceil
from struct import pack

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
"""Unnormalised probabilities of all words, the heaviest 1: exp((logit - largest logit) / temperature), rounded."""

FEW = 512
"""Values that are cheaper to sort than to divide further."""

WINDOW = 256
"""Heaviest values that a nucleus is first looked for in; most fit."""

BLOCK = 128
"""Words summed together in the first level of the inverse."""


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1), 53 bits, that depends on its key alone. `position`: of the word in the choice's output."""
    key = pack("<QQQ", seed % 2**64, choice, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1,
        6.931472028550421e-1, 1.0)  # fmt: skip
"""Coefficients of 2^f for f in -0.5..0.5, highest power first (Cephes exp2f); relative error about 2e-7."""

EXACT_MAX = 1 << 18
"""Words whose sums of weights are exact."""


def sharpness(temperature: float) -> np.float32:
    """What a logit's distance from the largest is multiplied by, to be a power of 2."""
    return np.float32(min(1.4426950408889634 / temperature, 1e30))


def weigh(logits: NDArray[np.float32], largest: np.float32, factor: np.float32) -> Weights:
    """2^((logit - largest) * factor), to multiples of 2^-35: in f32 multiplications and additions, each rounded for itself, so that
    every machine finds the same bits."""
    with np.errstate(over="ignore"):
        power = np.maximum((logits - largest) * factor, np.float32(-60))
    whole = np.rint(power)
    power -= whole
    found = np.full_like(power, EXP2[0])
    for coefficient in EXP2[1:]:
        found *= power
        found += np.float32(coefficient)
    found = np.ldexp(found, whole.astype(np.int32))
    step = np.float32(2**-12)
    return np.where(found < step, (found + step) - step, found)


def draw(weights: Weights, u: float, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """The word that `u` in [0, 1) picks. `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing."""
    top_k = min(top_k, len(weights)) or len(weights)
    if top_k == len(weights) and top_p >= 1 and not min_p:
        return invert(weights, u)
    values = np.compress(weights >= np.float32(min_p), weights) if min_p else weights
    if top_k < len(values):
        values = np.compress(values >= reached(values, top_k), values)
        values = np.partition(values, len(values) - top_k)[len(values) - top_k :]
    count, lightest = len(values), values.min()
    if top_p < 1:
        count, lightest = nucleus(values, top_p * values.sum(dtype=np.float64))
    words = np.flatnonzero(weights >= lightest)
    if excess := len(words) - count:
        ties = np.flatnonzero(weights[words] == lightest)
        words = np.delete(words, ties[-excess:])
    return int(words[invert(weights[words], u)])


def reached(values: Weights, count: int) -> np.float32:
    """A value that at least `count` of `values` reach, and few more than that.

    The `count`-th largest of the maxima of disjoint sets is reached in `count` of the sets.
    """
    columns = max(2 * count, len(values) // 64)
    rows = len(values) // columns
    if rows < 2:
        return np.partition(values, len(values) - count)[len(values) - count]
    maxima = values[: rows * columns].reshape(rows, columns).max(0)
    return np.partition(maxima, columns - count)[columns - count]


def nucleus(values: Weights, target: float) -> tuple[int, np.float32]:
    """How many of `values`, largest first, it takes for their sum to reach `target` (at least one), and the smallest of those.

    A quickselect by sum: divide at a pivot, go on in the part where the target is reached.
    """
    count, mass = 0, 0.0
    smallest = values.min()
    pivot = reached(values, min(WINDOW, len(values)))
    while len(values) > FEW:
        upper = np.compress(values > pivot, values)
        with_upper = mass + upper.sum(dtype=np.float64)
        if len(upper) and with_upper >= target:
            values = upper
        else:
            ties = int(np.count_nonzero(values == pivot))
            with_ties = with_upper + ties * float(pivot)
            if with_ties >= target:
                needed = ceil((target - with_upper) / float(pivot))
                # The quotient is rounded, the sums are not.
                needed -= with_upper + (needed - 1) * float(pivot) >= target
                needed += with_upper + needed * float(pivot) < target
                return count + len(upper) + max(needed, 1), pivot
            count, mass = count + len(upper) + ties, with_ties
            values = np.compress(values < pivot, values)
        if len(values) > FEW:
            sample = values[:: len(values) // FEW]
            pivot = np.partition(sample, len(sample) // 2)[len(sample) // 2]
    ranked = np.sort(values)[::-1]
    last = int((mass + ranked.cumsum(dtype=np.float64)).searchsorted(target))
    if last == len(ranked):
        # Sums of more words than are exact, in another order, fall short of the target: it is everything.
        return count + len(ranked), smallest
    return count + last + 1, ranked[last]


def invert(weights: Weights, u: float) -> int:
    """The first index whose cumulated weight exceeds `u` times the total; never one of weight 0.

    Sums are in f64 in the order of the indices: over blocks of 128 first, then inside the block that is hit.
    """
    wide = weights.astype(np.float64)
    cumulated = np.add.reduceat(wide, np.arange(0, len(wide), BLOCK)).cumsum()
    target = min(u * cumulated[-1], np.nextafter(cumulated[-1], 0))
    block = int(cumulated.searchsorted(target, side="right"))
    inside = wide[block * BLOCK : (block + 1) * BLOCK]
    before = cumulated[block - 1] if block else 0.0
    index = int((before + inside.cumsum()).searchsorted(target, side="right"))
    if index == len(inside):
        # The block's sum, of more words than are exact, was a little larger.
        index = int(np.flatnonzero(inside)[-1])
    return block * BLOCK + index
