"""Fits: what was put in comes out, and the quality says when it does not."""

import os
from pathlib import Path

import numpy as np
import pytest

from headrace.types.errors import ConfigError
from headrace.types.trace import Trace, make_trace
from headrace.workload.arrivals import Windows, instants
from headrace.workload.fit import fit, fit_windows, ks_distance, length_fit
from headrace.workload.generators import generate
from headrace.workload.mix import stream
from headrace.workload.traces import read


def synthetic(**config: object) -> Trace:
    return generate("synthetic", {"requests": 40_000, **config}, 3)


def test_windows_are_recovered():
    process = Windows(window_s=500.0, rates_per_s=(20.0, 5.0, 40.0), shapes=(0.3, 1.0, 3.0))
    arrival = instants(process, 32_500, stream(1, "test"))
    found = fit_windows(arrival, 500.0)
    assert [window.begin_s for window in found] == [0, 500, 1000]
    assert [window.rate_per_s for window in found] == pytest.approx([20, 5, 40], rel=0.05)
    assert [window.shape for window in found] == pytest.approx([0.3, 1.0, 3.0], rel=0.1)
    for window in found:
        assert window.cv == pytest.approx(window.shape**-0.5)
        assert window.scale_s * window.shape * window.rate_per_s == pytest.approx(1)


def test_a_fitted_trace_is_like_its_trace():
    trace = synthetic(arrivals={"kind": "gamma", "rate_per_s": 12, "shape": 0.4})
    found = fit(trace, window_s=600.0)
    assert found.generator == "synthetic"
    judged = found.quality
    assert judged.gap_ks < 0.02 and abs(judged.cv_error) < 0.05 and abs(judged.rate_error) < 0.05
    assert judged.prompt_ks < 0.02 and judged.output_ks < 0.02
    again = generate(found.generator, found.settings, 9)
    assert len(again) == len(trace)
    assert again.prompt.mean() == pytest.approx(trace.prompt.mean(), rel=0.03)
    assert ks_distance(np.diff(again.arrival_ns), np.diff(trace.arrival_ns)) < 0.02


def test_a_poor_fit_says_so():
    two = np.where(np.arange(40_000) % 2, 10, 10_000)
    trace = synthetic()
    trace = make_trace("two lengths", trace.arrival_ns, two, trace.output)
    assert fit(trace).quality.prompt_ks < 0.02
    poor = fit(trace, lengths="lognormal")
    assert poor.quality.prompt_ks > 0.2 and poor.prompt.lognormal_ks > 0.2


def test_lognormal_lengths_are_recovered():
    trace = synthetic(prompt={"kind": "lognormal", "median": 300, "sigma": 0.7})
    found = length_fit(trace.prompt)
    assert found.lognormal_median == pytest.approx(300, rel=0.02)
    assert found.lognormal_sigma == pytest.approx(0.7, rel=0.02)
    assert found.lognormal_ks < 0.01
    assert length_fit(np.full(10, 7)).lognormal_ks < 0.01


def test_empirical_lengths_keep_the_mean_of_a_heavy_tail():
    prompt = np.ones(30_000, dtype=np.int64)
    prompt[:3] = 1_000_000
    trace = make_trace("tail", np.arange(30_000) * 10**9, prompt, prompt)
    values = np.array(fit(trace).settings["prompt"]["values"])
    assert values.mean() == pytest.approx(prompt.mean(), rel=0.01)


def test_categories_become_classes():
    trace = synthetic(classes=[{"category": "a", "weight": 1}, {"category": "b", "weight": 4}])
    classes = {part["category"]: part["weight"] for part in fit(trace).settings["classes"]}
    assert classes["b"] / classes["a"] == pytest.approx(4, rel=0.1)


def test_conversations_are_fitted_where_known():
    trace = generate("conversations", {"conversations": 3000, "system": {"kind": "constant", "value": 64}}, 3)
    found = fit(trace)
    assert found.generator == "conversations"
    again = generate(found.generator, found.settings, 5)
    assert len(again) == pytest.approx(len(trace), rel=0.1)
    assert (again.follows >= 0).mean() == pytest.approx((trace.follows >= 0).mean(), abs=0.05)
    assert again.output.mean() == pytest.approx(trace.output.mean(), rel=0.05)
    assert fit(trace, sessions=False).generator == "synthetic"
    assert any("shared prefixes are not fitted" in note for note in fit(trace, sessions=False).notes)


def test_impossible_fits_are_errors():
    plain = make_trace("plain", np.arange(5) * 10**9, np.ones(5), np.ones(5))
    with pytest.raises(ConfigError, match="a fit needs a rate"):
        fit(make_trace("one", np.zeros(1), np.ones(1), np.ones(1)))
    with pytest.raises(ConfigError, match="a fit needs a rate"):
        fit(make_trace("instant", np.zeros(5), np.ones(5), np.ones(5)))
    with pytest.raises(ConfigError, match="a window of 0"):
        fit(plain, window_s=0)
    with pytest.raises(ConfigError, match="fit without sessions"):
        fit(plain, sessions=True)


@pytest.mark.parametrize(
    "times", [[0, 1], [0, 0, 5], [0, 5000, 9000], list(range(20)), [0] * 19 + [3]], ids=str
)
def test_small_traces_are_fitted(times: list[int]):
    rows = len(times)
    found = fit(make_trace("small", np.array(times) * 10**9, np.arange(1, rows + 1), np.ones(rows)))
    assert len(generate(found.generator, found.settings, 1)) == rows
    assert sum(window.requests for window in found.windows) in (rows, rows - 1)


def test_ks_distance():
    assert ks_distance(np.arange(10), np.arange(10)) == 0.0
    assert ks_distance(np.zeros(3), np.ones(3)) == 1.0
    assert ks_distance(np.array([1, 2, 3, 4]), np.array([1, 2, 5, 6])) == 0.5
    assert ks_distance(np.zeros(0), np.ones(3)) == 1.0


def test_azure_is_fitted_well():
    if not os.environ.get("HEADRACE_DATA"):
        pytest.skip("set HEADRACE_DATA to the folder of public traces")
    trace, _ = read(Path(os.environ["HEADRACE_DATA"]) / "azure2023/AzureLLMInferenceTrace_conv.csv")
    judged = fit(trace).quality
    assert judged.gap_ks < 0.03 and judged.prompt_ks < 0.02 and judged.output_ks < 0.02
    assert abs(judged.cv_error) < 0.05 and abs(judged.rate_error) < 0.05
