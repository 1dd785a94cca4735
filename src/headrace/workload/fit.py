"""Settings of a generator from a trace, and how well what it generates is like the trace.

Arrivals: in each window the rate, and the shape of Gamma gaps by moments, a = mean^2 / variance, scale b = variance / mean (BurstGPT fits
windows of about 20 minutes). Lengths: the values themselves (means of groups by size where there are many), or a lognormal. With sessions:
first messages, later messages, turns, and times from turn to turn. The fit is judged by a trace generated from it.
"""

from math import erf
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.errors import ConfigError
from headrace.types.trace import Ints, Trace
from headrace.workload.generators import generate

Floats = NDArray[np.float64]

PARTS = 2000
"""Into which many lengths are put by size, each part standing for its mean."""
GAPS_MIN = 8
"""A window with fewer gaps is taken for Poisson."""
SHAPES = (0.01, 1000.0)
"""Least and largest: gaps that are all equal, or nearly all zero, have no shape."""
SESSIONS_MIN = 0.1
"""Share of requests that go on from an earlier one, from which on conversations are fitted."""


class Window(msgspec.Struct, frozen=True):
    """Arrivals of one stretch of time."""

    begin_s: float
    requests: int
    rate_per_s: float
    shape: float
    scale_s: float
    cv: float
    """Of the gaps: standard deviation / mean."""


class LengthFit(msgspec.Struct, frozen=True):
    """One column of lengths."""

    mean: float
    lognormal_median: float
    lognormal_sigma: float
    lognormal_ks: float
    """Largest distance between the column's distribution and the lognormal's."""


class Quality(msgspec.Struct, frozen=True):
    """A trace generated from the fit beside the one it was fitted from."""

    gap_ks: float
    """Largest distance between the distributions of gaps, 0..1."""
    gap_cv: float
    generated_cv: float
    rate_error: float
    """Relative."""
    prompt_ks: float
    output_ks: float
    prompt_mean_error: float
    output_mean_error: float

    @property
    def cv_error(self) -> float:
        """Relative."""
        return self.generated_cv / self.gap_cv - 1 if self.gap_cv else 0.0


class Fit(msgspec.Struct, frozen=True):
    generator: str
    settings: dict[str, Any]
    """As `generate(fit.generator, fit.settings, seed)` takes them."""
    windows: list[Window]
    prompt: LengthFit
    output: LengthFit
    quality: Quality
    notes: list[str]


def fit(
    trace: Trace,
    *,
    window_s: float = 1200.0,
    lengths: Literal["empirical", "lognormal"] = "empirical",
    sessions: bool | None = None,
    seed: int = 0,
) -> Fit:
    """A generator for traces like this one.

    `sessions`: fit `conversations` in place of `synthetic`; None: if at least a tenth of the requests go on from an earlier one.
    `seed`: of the trace by which the fit is judged. Raises ConfigError for a trace with too few requests, or without known sessions.
    """
    if len(trace) < 2 or not trace.duration_ns:
        raise ConfigError(
            f"{trace.name}: has {len(trace)} requests within {trace.duration_ns} ns; a fit needs a rate"
        )
    if not window_s > 0:
        raise ConfigError(f"a window of {window_s} s is impossible; give a number above 0")
    later = trace.follows >= 0
    if sessions is None:
        sessions = bool(later.mean() >= SESSIONS_MIN)
    if sessions and not later.any():
        raise ConfigError(
            f"{trace.name}: it is not known which request goes on from which; fit without sessions"
        )
    notes: list[str] = []
    if sessions:
        generator, settings, windows = "conversations", *_conversations(trace, window_s, lengths)
        notes.append(
            f"{later.mean():.1%} of the requests go on from an earlier one; blocks shared in other ways are not fitted"
        )
    else:
        generator, settings, windows = "synthetic", *_synthetic(trace, window_s, lengths)
        apart = np.corrcoef(np.argsort(np.argsort(trace.prompt)), np.argsort(np.argsort(trace.output)))[0, 1]
        notes.append(f"prompt and output are drawn apart; in the trace their ranks correlate by {apart:.2f}")
        if len(trace.hash_ids):
            notes.append("shared prefixes are not fitted")
    poor = sum(window.requests <= GAPS_MIN for window in windows)
    if poor:
        notes.append(
            f"{poor} of {len(windows)} windows have at most {GAPS_MIN} requests and are taken for Poisson"
        )
    together = float((np.diff(trace.arrival_ns) == 0).mean())
    if together > 0.05:
        notes.append(
            f"{together:.1%} of the requests come at the instant of the one before: times are coarse, and so is the fit of gaps"
        )
    return Fit(
        generator=generator,
        settings=settings,
        windows=windows,
        prompt=length_fit(trace.prompt),
        output=length_fit(trace.output),
        quality=quality(trace, generate(generator, settings, seed)),
        notes=notes,
    )


def fit_windows(arrival_ns: Ints, window_s: float) -> list[Window]:
    """Rate and shape of every window from the first arrival to the last. A gap counts where it begins."""
    seconds = (arrival_ns - arrival_ns[0]) * 1e-9
    gaps = np.diff(seconds)
    found: list[Window] = []
    for number in range(int(seconds[-1] // window_s) + 1):
        begin = number * window_s
        span = min(window_s, float(seconds[-1]) - begin)
        low, high = np.searchsorted(seconds, (begin, begin + window_s))
        if not span:  # the last arrival is at a window's begin
            break
        count = int(high - low)
        rate = count / span if number * window_s + window_s <= seconds[-1] else max(count - 1, 0) / span
        inside = gaps[low:high]
        mean, variance = (float(inside.mean()), float(inside.var())) if len(inside) > GAPS_MIN else (1.0, 1.0)
        shape = float(np.clip(mean**2 / variance if variance else np.inf, *SHAPES)) if mean else 1.0
        scale = 1.0 / (rate * shape) if rate else 0.0
        found.append(Window(begin, count, rate, shape, scale, shape**-0.5))
    return found


def length_fit(values: Ints) -> LengthFit:
    """The lognormal of greatest likelihood, and how far it is from the values."""
    logs = np.log(values)
    middle, sigma = float(logs.mean()), float(logs.std())
    different, counts = np.unique(values, return_counts=True)
    share = np.cumsum(counts) / len(values)
    edges = np.log(different + 0.5)  # a length is a rounded number
    within = np.array([_normal(edge - middle, sigma) for edge in edges])
    distance = float(np.abs(share - within).max())
    return LengthFit(float(values.mean()), float(np.exp(middle)), sigma, distance)


def quality(trace: Trace, generated: Trace) -> Quality:
    """How like `trace` a generated trace is."""
    gaps, others = (np.diff(t.arrival_ns).astype(np.float64) for t in (trace, generated))
    return Quality(
        gap_ks=ks_distance(gaps, others),
        gap_cv=variation(gaps),
        generated_cv=variation(others),
        rate_error=float(gaps.mean() / others.mean() - 1) if len(others) and others.any() else -1.0,
        prompt_ks=ks_distance(trace.prompt, generated.prompt),
        output_ks=ks_distance(trace.output, generated.output),
        prompt_mean_error=float(generated.prompt.mean() / trace.prompt.mean() - 1),
        output_mean_error=float(generated.output.mean() / trace.output.mean() - 1),
    )


def ks_distance(first: Ints | Floats, second: Ints | Floats) -> float:
    """Kolmogorov and Smirnov's: the largest difference between two samples' distribution functions."""
    if not len(first) or not len(second):
        return 1.0
    places = np.unique(np.concatenate((first, second)))
    shares = [np.searchsorted(np.sort(column), places, "right") / len(column) for column in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def variation(values: Ints | Floats) -> float:
    """Standard deviation / mean; 0 for no values."""
    return float(values.std() / values.mean()) if len(values) and values.any() else 0.0


def _normal(distance: float, sigma: float) -> float:
    if not sigma:
        return float(distance >= 0)
    return 0.5 * (1 + erf(distance / (sigma * 2**0.5)))


def _synthetic(trace: Trace, window_s: float, lengths: str) -> tuple[dict[str, Any], list[Window]]:
    windows = fit_windows(trace.arrival_ns, window_s)
    settings = {
        "requests": len(trace),
        "arrivals": _arrivals(windows, window_s),
        "prompt": _lengths(trace.prompt, lengths),
        "output": _lengths(trace.output, lengths),
    }
    if len(trace.categories) > 1:
        counts = np.bincount(trace.category, minlength=len(trace.categories)).tolist()
        pairs = zip(trace.categories, counts, strict=True)
        settings["classes"] = [{"category": name, "weight": float(count)} for name, count in pairs if count]
    return settings, windows


def _conversations(trace: Trace, window_s: float, lengths: str) -> tuple[dict[str, Any], list[Window]]:
    """Each request that follows none begins a conversation. What an answer takes is not in a trace: it is part of the time to think."""
    begins = np.flatnonzero(trace.follows < 0)
    later = np.flatnonzero(trace.follows >= 0)
    earlier = trace.follows[later]
    windows = fit_windows(trace.arrival_ns[begins], window_s)
    head = np.arange(len(trace))
    for row, before in zip(later.tolist(), earlier.tolist(), strict=True):
        head[row] = head[before]
    turns = np.bincount(head, minlength=len(trace))[begins]
    new = np.maximum(trace.prompt[later] - trace.prompt[earlier] - trace.output[earlier], 1)
    wait_ms = np.maximum((trace.arrival_ns[later] - trace.arrival_ns[earlier]) // 1_000_000, 1)
    return {
        "conversations": len(begins),
        "arrivals": _arrivals(windows, window_s),
        "turns": _lengths(turns, "empirical"),
        "tenants": 1,
        "system": {"kind": "constant", "value": 1},
        "first": _lengths(trace.prompt[begins], lengths),
        "message": _lengths(new, lengths),
        "output": _lengths(trace.output, lengths),
        "think_ms": _lengths(wait_ms, lengths),
        "token_ms": 0.0,
        "context_max": int((trace.prompt + trace.output).max()),
        "block_size": max(trace.block_size, 1),
        "end_s": float(trace.arrival_ns[-1]) * 1e-9,
    }, windows


def _arrivals(windows: list[Window], window_s: float) -> dict[str, Any]:
    return {
        "kind": "windows",
        "window_s": window_s,
        "rates_per_s": [window.rate_per_s for window in windows],
        "shapes": [window.shape for window in windows],
    }


def _lengths(values: Ints, kind: str) -> dict[str, Any]:
    if kind == "lognormal":
        found = length_fit(values)
        ends = {"min": int(values.min()), "max": int(values.max())}
        return {"kind": kind, "median": found.lognormal_median, "sigma": found.lognormal_sigma, **ends}
    parts = min(len(values), PARTS)
    bounds = np.arange(parts + 1) * len(values) // parts
    means = np.add.reduceat(np.sort(values), bounds[:-1]) / np.diff(
        bounds
    )  # they keep the mean, and with it the tail's weight
    return {"kind": "empirical", "values": np.maximum(np.rint(means), 1).astype(int).tolist()}
