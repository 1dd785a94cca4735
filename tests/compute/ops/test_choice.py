"""Every backend draws the word that numpy draws by the rule of compute/draw.py, whose own tests are in exact arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compute import ops
from headrace.compute.draw import EXACT_MAX, EXP2, sharpness, weigh
from headrace.compute.ops import Choice, choose
from headrace.compute.ops.choice import Logits

BACKENDS = ops.available()
NATIVE = [name for name in BACKENDS if name != "torch"]
LAST = 1 - 2.0**-53


def same_everywhere(rows: list[Logits], choices: list[Choice]) -> list[int]:
    expected = choose(rows, choices, threads=1, backend="torch")
    for backend in NATIVE:
        for threads in (1, 3):
            assert choose(rows, choices, threads=threads, backend=backend) == expected, backend
    return expected


lengths = st.one_of(st.integers(1, 300), st.sampled_from([511, 512, 513, 4096, 5000, 20_000]))
choices = st.builds(
    Choice,
    temperature=st.sampled_from([0.0, 1e-30, 0.1, 0.7, 1.0, 1.5, 50.0]),
    u=st.one_of(st.sampled_from([0.0, 0.5, LAST]), st.floats(0, LAST)),
    top_k=st.one_of(st.just(0), st.integers(1, 400), st.just(100_000)),
    top_p=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
)


@given(
    lengths,
    st.lists(choices, min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 3.0, 20.0]),
)
def test_every_backend_draws_the_same(length: int, asked: list[Choice], seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    rows = [random.normal(0, spread, length).astype(np.float32) for _ in asked]
    if seed % 3 == 0:  # many ties, as bf16 logits have
        rows = [np.round(row * 4) / np.float32(4) for row in rows]
    if seed % 5 == 0:
        for row in rows:
            row[random.random(length) < 0.5] = -np.inf
            row[seed % length] = 1.0
    same_everywhere(rows, asked)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 8.0])
def test_large_vocabulary(spread: float) -> None:
    """Flat rows, whose nucleus needs the histogram, and peaked ones."""
    random = np.random.default_rng(int(spread * 10))
    row = random.normal(0, spread, 151_936).astype(np.float32)
    asked = [
        Choice(temperature, u, top_k, top_p, min_p)
        for temperature in (0.0, 1.0)
        for top_k in (0, 50, 3000, 70_000)
        for top_p in (0.2, 0.95, 1.0)
        for min_p in (0.0, 0.01)
        for u in (random.random(), LAST)
    ]
    same_everywhere([row] * len(asked), asked)


@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 4.0]))
def test_sums_of_weights_are_exact(seed: int, temperature: float) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, 3000).astype(np.float32)
    weights = weigh(logits, logits.max(), sharpness(temperature))
    assert weights.max() == 1.0
    units = weights.astype(np.float64) * 2.0**35
    assert (units == np.rint(units)).all()
    exact = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    np.testing.assert_allclose(weights, exact, rtol=4e-6, atol=2.0**-35)
    assert len(EXP2) == 7
    assert 2.0**35 * EXACT_MAX == 2.0**53, "the greatest sum, in units, is still one of f64's whole numbers"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 5, 17, 1025, 4000])
def test_greedy(length: int, backend: str) -> None:
    random = np.random.default_rng(length)
    for _ in range(20):
        row = random.integers(-40, 40, length).astype(np.float32)
        assert choose([row], [Choice(0.0)], threads=1, backend=backend) == [int(row.argmax())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 3, 1023, 1024, 2059])
def test_rows_that_are_no_distribution(place: int, backend: str) -> None:
    row = np.random.default_rng(0).normal(0, 1, 2060).astype(np.float32)
    for bad in (np.nan, np.inf):
        broken = row.copy()
        broken[place] = bad
        broken[-1] = -np.inf if place != 2059 else broken[-1]
        for choice in (Choice(0.0), Choice(1.0, 0.3, 5, 0.9)):
            assert choose([broken], [choice], threads=1, backend=backend) == [place]
    nothing = np.full(100, -np.inf, dtype=np.float32)
    assert choose([nothing], [Choice(1.0)], threads=1, backend=backend) == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_finite_is_drawn(backend: str) -> None:
    row = np.full(5000, -np.inf, dtype=np.float32)
    row[[77, 4999]] = 0.0
    drawn = [choose([row], [Choice(1.0, u / 10)], threads=1, backend=backend)[0] for u in range(10)]
    assert drawn == [77] * 5 + [4999] * 5


def test_more_words_than_are_exact_are_left_to_numpy() -> None:
    row = np.random.default_rng(0).normal(0, 2, EXACT_MAX + 3).astype(np.float32)
    asked = Choice(1.0, 0.7, 0, 0.9)
    assert same_everywhere([row], [asked])[0] < len(row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_and_choices_are_refused(backend: str) -> None:
    row = np.zeros(30, dtype=np.float32)
    bad: list[tuple[list[Logits], list[Choice]]] = [
        ([row], []),
        ([row, row[:20]], [Choice(1.0)] * 2),
        ([row.astype(np.float64)], [Choice(1.0)]),
        ([row[::2]], [Choice(1.0)]),
        ([row[:0]], [Choice(1.0)]),
        ([row], [Choice(-1.0)]),
        ([row], [Choice(1.0, 1.0)]),
        ([row], [Choice(1.0, -0.1)]),
        ([row], [Choice(1.0, top_k=-1)]),
        ([row], [Choice(1.0, min_p=1.5)]),
    ]
    for rows, asked in bad:
        with pytest.raises(ValueError, match=r".+"):
            choose(rows, asked, threads=1, backend=backend)
    assert choose([], [], threads=1, backend=backend) == []
