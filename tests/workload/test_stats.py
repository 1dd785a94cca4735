"""Student's t against printed tables, intervals by hand, and Holm's procedure."""

import math

import numpy as np
import pytest

from headrace.workload.stats import estimate, holm, t_quantile, t_within


@pytest.mark.parametrize(
    ("within", "freedom", "t"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 3, 3.1824),
        (0.95, 4, 2.7764),
        (0.95, 9, 2.2622),
        (0.95, 30, 2.0423),
        (0.99, 4, 4.6041),
        (0.99, 5, 4.0321),
        (0.999, 2, 31.599),
    ],
)
def test_t_as_in_printed_tables(within: float, freedom: int, t: float) -> None:
    assert t_quantile(within, freedom) == pytest.approx(t, rel=2e-5)
    assert t_within(t, freedom) == pytest.approx(within, abs=1e-5)


def test_t_becomes_normal() -> None:
    assert t_within(1.96, 10_000) == pytest.approx(math.erf(1.96 / math.sqrt(2)), abs=1e-4)
    assert t_within(0.0, 7) == 0.0


def test_estimate_by_hand() -> None:
    made = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert made is not None
    reach = 2.7764 * math.sqrt(2.5 / 5)
    assert (made.count, made.mean) == (5, 3.0)
    assert (made.low, made.high) == pytest.approx((3 - reach, 3 + reach), rel=1e-4)
    assert made.p == pytest.approx(0.0132, abs=1e-4)


def test_estimate_without_noise_or_seeds() -> None:
    assert estimate([1.0, 2.0]) is None
    same, apart = estimate([0.0] * 4), estimate([0.3] * 4)
    assert same is not None
    assert apart is not None
    assert (same.p, apart.p, apart.low, apart.high) == (1.0, 0.0, 0.3, 0.3)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(0.7, 2.0, (4_000, 5))
    made = [estimate(row) for row in draws.tolist()]
    covered = np.mean([each is not None and each.low <= 0.7 <= each.high for each in made])
    assert covered == pytest.approx(0.95, abs=0.01)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
