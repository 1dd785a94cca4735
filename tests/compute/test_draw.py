"""Draws against brute force in exact arithmetic: weights are multiples of 1/64, so no sum is rounded."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compute.draw import FEW, draw, invert, nucleus, reached, uniform

UNIT = 64


def kept_words(weights: list[int], top_k: int, top_p: Fraction, min_p: Fraction) -> list[int]:
    """What the filters keep, by their definition. Weights in units of 1/UNIT of the heaviest."""
    ranked = sorted(range(len(weights)), key=lambda word: (-weights[word], word))
    floor = min_p * max(weights)
    kept = [word for word in ranked if weights[word] >= floor][: top_k or None]
    target, mass, count = top_p * sum(weights[word] for word in kept), 0, 0
    while mass < target:
        mass += weights[kept[count]]
        count += 1
    return sorted(kept if top_p == 1 else kept[:count])


def brute_force(weights: list[int], u: Fraction, **filters) -> int:
    words = kept_words(weights, **filters)
    target, mass = u * sum(weights[word] for word in words), 0
    for word in words:
        mass += weights[word]
        if mass > target:
            return word
    raise AssertionError("u is less than 1")


def as_weights(integers: list[int]) -> np.ndarray:
    return np.array(integers, dtype=np.float32) / np.float32(UNIT)


small = st.lists(st.integers(0, UNIT), min_size=1, max_size=40).map(lambda w: [*w, UNIT])
filters = st.fixed_dictionaries(
    {
        "top_k": st.integers(0, 45),
        "top_p": st.integers(1, 16).map(lambda n: Fraction(n, 16)),
        "min_p": st.sampled_from([Fraction(0), Fraction(1, 64), Fraction(1, 4), Fraction(1)]),
    }
)


@given(small, filters, st.integers(0, 2**20 - 1))
def test_small_vocabularies(weights, filters, u):
    expected = brute_force(weights, Fraction(u, 2**20), **filters)
    floats = {name: float(value) if name != "top_k" else value for name, value in filters.items()}
    assert draw(as_weights(weights), u / 2**20, **floats) == expected


@given(small, filters)
def test_the_whole_distribution(weights, filters):
    """Every kept word owns its share of [0, 1), in the order of the ids; boundaries belong to the next word."""
    words = kept_words(weights, **filters)
    floats = {name: float(value) if name != "top_k" else value for name, value in filters.items()}
    total, start = sum(weights[word] for word in words), 0
    for word in words:
        if not weights[word]:
            continue
        # A little inside, since start / total is rounded.
        first, last = Fraction(start, total), Fraction(start + weights[word], total)
        for u in (first + Fraction(1, 2**30), last - Fraction(1, 2**30)):
            assert draw(as_weights(weights), float(u), **floats) == word
        start += weights[word]


@pytest.mark.parametrize("spread", [1, 3, 60])
@pytest.mark.parametrize("vocab", [600, 1500, 20_000])
def test_large_vocabularies(vocab, spread):
    """Long ties, flat and peaked rows, cuts inside and beyond the window."""
    random = np.random.default_rng(vocab + spread)
    weights = np.minimum(random.geometric(1 / spread, vocab), UNIT).tolist()
    weights[vocab // 3] = UNIT
    row = as_weights(weights)
    for top_k in (0, 1, 257, 5000):
        for top_p in (Fraction(1, 16), Fraction(15, 16), Fraction(1)):
            for min_p in (Fraction(0), Fraction(1, 32)):
                words = kept_words(weights, top_k, top_p, min_p)
                owners = np.repeat(words, [weights[word] for word in words])
                for u in [*random.random(5).tolist(), 0.0, 1 - 2.0**-53]:
                    found = draw(row, u, top_k=top_k, top_p=float(top_p), min_p=float(min_p))
                    assert found == owners[int(u * len(owners))]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    """transformers' and vLLM's boundary: a word is kept if those before it weigh less than p."""
    weights = as_weights([16, 64, 32, 16])
    picks = {
        top_p: {draw(weights, u / 100, top_p=top_p) for u in range(100)} for top_p in (0.5, 0.51, 0.75, 0.76)
    }
    assert picks == {0.5: {1}, 0.51: {1, 2}, 0.75: {1, 2}, 0.76: {0, 1, 2}}


def test_ties_at_a_cut_go_to_lower_ids():
    weights = np.ones(10_000, dtype=np.float32)
    assert {draw(weights, u / 50, top_k=3) for u in range(50)} == {0, 1, 2}
    assert max(draw(weights, u / 50, top_p=0.1) for u in range(50)) == 980
    assert draw(weights, 1 - 2.0**-53, top_p=0.1) == 999


def test_a_share_of_nothing_keeps_the_first_word():
    assert draw(np.ones(10_000, dtype=np.float32), 0.9, top_p=0.0) == 0
    assert draw(as_weights([3, UNIT, UNIT]), 0.9, top_p=0.0) == 1


def test_words_of_weight_zero_are_never_drawn():
    weights = np.zeros(1000, dtype=np.float32)
    weights[[300, 700]] = 1
    assert {draw(weights, u) for u in (0.0, 0.499, 0.5, 1 - 2.0**-53)} == {300, 700}
    assert draw(weights, 0.0) == 300
    assert draw(weights, 1 - 2.0**-53, top_k=900) == 700


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(0, 10))
def test_reached(length, count, seed):
    count = min(count, length)
    values = np.random.default_rng(seed).integers(0, 50, length).astype(np.float32)
    assert np.count_nonzero(values >= reached(values, count)) >= count


@given(st.integers(1, 4 * FEW), st.floats(0, 1), st.integers(0, 10))
def test_nucleus(length, share, seed):
    values = np.random.default_rng(seed).integers(1, 9, length).astype(np.float32)
    ranked = np.sort(values)[::-1].cumsum(dtype=np.float64)
    expected = min(int(ranked.searchsorted(share * ranked[-1])), length - 1) + 1
    assert nucleus(values, share * ranked[-1]) == (expected, np.sort(values)[::-1][expected - 1])


def test_inverse_never_leaves_the_row():
    """Weights whose sums round differently by order."""
    random = np.random.default_rng(0)
    for length in (1, 127, 128, 129, 1000, 4097):
        weights = (10 ** random.uniform(-20, 0, length)).astype(np.float32)
        for u in (0.0, 0.5, 1 - 2.0**-53):
            assert 0 <= invert(weights, u) < length


def test_uniform_is_keyed():
    """Known answers: another release must draw the same words for the same seeds."""
    assert uniform(0, 0, 0) == uniform(0, 0, 0)
    assert len({uniform(s, c, p) for s in range(5) for c in range(5) for p in range(5)}) == 125
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    assert [round(uniform(42, c, p), 6) for c, p in ((0, 0), (0, 1), (1, 0))] == KNOWN


KNOWN = [0.127801, 0.248091, 0.244255]


def test_frequencies():
    """20,000 draws from 40 words: chi-square below the 99.99% quantile for 39 degrees of freedom."""
    random = np.random.default_rng(7)
    weights = np.exp(random.normal(0, 1, 40)).astype(np.float32)
    weights /= weights.max()
    count = 20_000
    seen = Counter(draw(weights, uniform(seed, 0, seed % 7)) for seed in range(count))
    expected = weights / weights.sum() * count
    assert sum((seen[word] - e) ** 2 / e for word, e in enumerate(expected)) < 80.0
