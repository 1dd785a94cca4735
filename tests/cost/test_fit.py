import numpy as np
import pytest

from headrace.cost.fit import fit_relative, nnls, summary
from headrace.types.draws import uniform


def drawn(*shape):
    count = int(np.prod(shape))
    return np.array([uniform(3, "fit", i) for i in range(count)]).reshape(shape)


def test_exact_constants_are_found():
    matrix = drawn(40, 5) * [1, 1e3, 1e-6, 10, 1e9]
    truth = np.array([2.0, 0.0, 5e3, 0.5, 1e-8])
    assert nnls(matrix, matrix @ truth) == pytest.approx(truth, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_optimality(seed):
    """No constant is negative, and no step that is allowed makes the error smaller (Karush, Kuhn, Tucker)."""
    matrix = drawn(30 + seed, 8)
    target = drawn(2, 30 + seed)[1] - 0.3
    x = nnls(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert gradient[x > 0] == pytest.approx(0, abs=1e-8)
    assert (gradient[x == 0] <= 1e-8).all()


def test_relative_error_lets_small_times_count():
    features = np.stack([np.ones(20), np.arange(1, 21.0)], axis=1)
    seconds = features @ np.array([1e-3, 1.0])
    seconds[-1] *= 3  # one outlier, the largest
    start, slope = fit_relative(features, seconds)
    assert slope == pytest.approx(1.0, rel=0.01)
    assert start < 0.02


def test_summary():
    found = summary(np.array([1.1, 0.8, 1.0]), np.ones(3))
    assert found["samples"] == 3
    assert found["median"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(0.0)
    assert summary(np.array([]), np.array([])) == {"samples": 0}
