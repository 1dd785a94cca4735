"""Least squares with non-negative constants, on relative error."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TOLERANCE = 1e-10
ROUNDS = 15
NEAR = 0.02
"""Relative errors below this weigh alike: there the rounds would chase noise."""


def nnls(matrix: Array, target: Array) -> Array:
    """x >= 0 that minimises |matrix x - target|: the active-set method of Lawson and Hanson (1974), chapter 23.

    `matrix`: [samples, features]; columns may differ in scale by any factor.
    """
    scale = np.sqrt((matrix * matrix).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    gram, pull = scaled.T @ scaled, scaled.T @ target
    features = matrix.shape[1]
    free = np.zeros(features, dtype=bool)
    x = np.zeros(features)
    for _ in range(10 * features):
        gradient = pull - gram @ x
        gradient[free] = -np.inf
        enter = int(np.argmax(gradient))
        if gradient[enter] <= TOLERANCE * max(1.0, float(np.abs(pull).max())):
            break
        free[enter] = True
        x = _step(scaled, target, x, free)
    return x / scale


def _step(matrix: Array, target: Array, x: Array, free: npt.NDArray[np.bool_]) -> Array:
    """Least squares over the free features; those that would turn negative are fixed at 0, one after another. Changes `free`."""
    while True:
        trial = np.zeros(len(x))
        trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        bad = free & (trial <= 0)
        if not bad.any():
            return trial
        x = x + float((x[bad] / (x[bad] - trial[bad])).min()) * (trial - x)
        free &= x > 1e-14
        x[~free] = 0.0


def fit_relative(features: Array, seconds: Array) -> Array:
    """Non-negative constants whose median relative error is small: least squares reweighted towards absolute errors.

    `features`: [samples, features]; `seconds`: [samples], all positive.
    """
    weights = np.ones(len(seconds))
    constants = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        constants = nnls(features * (weights / seconds)[:, None], weights)
        missed = np.abs(features @ constants / seconds - 1.0)
        weights = 1.0 / np.sqrt(np.maximum(missed, NEAR))
    return constants


def summary(predicted: Array, seconds: Array) -> dict[str, float]:
    """Median, 90th percentile and bias (median, signed) of the relative error, and how many samples."""
    error = predicted / seconds - 1.0
    if not len(error):
        return {"samples": 0}
    return {
        "samples": len(error),
        "median": round(float(np.median(np.abs(error))), 4),
        "p90": round(float(np.quantile(np.abs(error), 0.9)), 4),
        "bias": round(float(np.median(error)), 4),
    }


def columns(found: Sequence[Sequence[float]]) -> Array:
    """[samples, features] from one row of numbers per sample."""
    return np.array(found, dtype=np.float64)
