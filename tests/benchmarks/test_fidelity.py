"""What the fidelity benchmarks compute around their runs."""

import csv
import gzip
import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.cli.cluster import cluster_of
from headrace.cli.options import ClusterOptions
from headrace.sim.cluster import run
from headrace.types.outcomes import Outcomes, RunData, Series
from headrace.types.recording import RecordedChoice, RecordedRequest
from headrace.types.trace import make_trace

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

_fidelity: Any = import_module("_fidelity")
public: Any = import_module("fidelity_llmservingsim")

SIZES = _fidelity.Sizes(100, 40, 0.5, seconds=10.0, repeats=5, alone=6, requests_max=50, burst=8)
SHARES = _fidelity.Shares(calibration=0.65, held_out=(0.5, 0.8, 1.1))


def of_ends(ended_s: list[float]) -> RunData:
    outcomes = Outcomes.empty(len(ended_s))
    outcomes.finished_ns[:] = [round(s * 1e9) for s in ended_s]
    return RunData("", 0, "wall", outcomes, Series(np.zeros(0, dtype=np.int64)), {}, max(ended_s))


def test_loads_are_shares_of_the_capacity():
    loads = _fidelity.loads_of(SHARES, 4.0, SIZES)
    assert [load.name for load in loads] == [_fidelity.ALONE, "50%", "65%", "80%", "110%"]
    assert [load.rate for load in loads[1:]] == pytest.approx([2.0, 2.6, 3.2, 4.4])
    assert [load.requests for load in loads] == [6, 20, 26, 32, 44]
    assert [load.repeats for load in loads] == [5, 5, 2, 5, 5]
    assert [load.sample for load in loads if load.sample != "held out"] == [
        "in sample of the profile",
        "in sample of the calibration",
    ]


def test_no_load_has_more_requests_than_it_may():
    assert max(load.requests for load in _fidelity.loads_of(SHARES, 1000.0, SIZES)) == SIZES.requests_max


def test_repeats_have_the_same_times_and_lengths_and_other_tokens():
    load = _fidelity.Load("50%", 2.0, 30, 5)
    first, again, other = (_fidelity.plan(load, SIZES, repeat, 1000) for repeat in (0, 0, 1))
    assert first == again
    assert [(r.at_s, len(r.prompt), r.output_tokens) for r in first] == [
        (r.at_s, len(r.prompt), r.output_tokens) for r in other
    ]
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))
    assert all(50 <= len(r.prompt) <= 150 and 20 <= r.output_tokens <= 60 for r in first)
    assert first[0].at_s == 0.0 and first[-1].at_s == pytest.approx(29 / load.rate, rel=0.5)


def test_requests_without_a_rate_are_all_there_at_once():
    assert {r.at_s for r in _fidelity.plan(_fidelity.Load("burst", 0.0, 8, 1), SIZES, 0, 1000)} == {0.0}


def test_the_capacity_is_the_rate_of_a_whole_burst():
    nearly_all_at_once = [9.0, 9.5, 9.6, 9.7, 9.8, 9.9, 9.95, 10.0]
    assert _fidelity.capacity_of(of_ends(nearly_all_at_once)) == pytest.approx(8 / 10.0)


def test_the_service_view_counts_from_its_first_request():
    lines = [
        RecordedRequest(
            number=i + 1,
            arrival_ns=1_000 + 10 * i,
            prompt=7,
            output=(3,),
            block_size=32,
            prompt_blocks=(),
            output_blocks=((),),
            finish=("length",),
            tokens_max=3,
            choices=(RecordedChoice(first_ns=1_100 + i, finished_ns=1_300 + i),),
        )
        for i in range(2)
    ]
    view = _fidelity.service_view(lines)
    assert view.outcomes.arrival_ns.tolist() == [0, 10]
    assert view.outcomes.first_ns.tolist() == [100, 101]
    assert view.outcomes.finished_ns.tolist() == [300, 301]
    assert view.outcomes.succeeded.all()
    assert view.duration_s == pytest.approx(301e-9)


def test_calibration_finds_the_factor_by_which_steps_are_longer():
    cluster = cluster_of(
        ClusterOptions.model_validate({"model": "llama-3.1-8b", "hardware": "h100-sxm", "instances": 1})
    )
    rng = np.random.default_rng(0)
    arrival_ns = np.cumsum(rng.exponential(0.2e9, 40)).astype(np.int64)
    trace = make_trace("", arrival_ns, rng.integers(100, 900, 40), rng.integers(5, 50, 40))
    live = run(_fidelity.slowed(cluster, 1.37), trace)
    factor = _fidelity.calibrated(cluster, trace, [live])
    assert factor == pytest.approx(1.37, rel=0.005)
    with_it = run(_fidelity.slowed(cluster, factor), trace)
    assert with_it.outcomes.e2e_s().mean() == pytest.approx(live.outcomes.e2e_s().mean(), rel=0.01)


# The public run


def write_live(folder: Path) -> None:
    """Two requests; the engine's clock is 100 s behind the client's, and the second request waited 0.25 s to be taken in."""
    names = ["request_id", "input_toks", "output_toks", "arrival_time", "queued_ts", "scheduled_ts"]
    names += ["first_token_ts", "last_token_ts"]
    rows = [
        ["bench-0", 20, 5, 500.0, 400.0, 400.0, 400.5, 402.0],
        ["bench-1", 40, 6, 501.0, 401.25, 401.3, 401.5, 403.0],
    ]
    with (folder / f"{public.LIVE}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def test_the_live_run_arrives_when_the_client_says_on_the_engines_clock(tmp_path: Path):
    write_live(tmp_path)
    live = public.read_live(tmp_path)
    assert live.outcomes.arrival_ns.tolist() == [0, 1_000_000_000]
    assert live.outcomes.ttft_s().tolist() == pytest.approx([0.5, 0.5])
    assert live.outcomes.e2e_s().tolist() == pytest.approx([2.0, 2.0])
    assert live.duration_s == pytest.approx(3.0)


def test_requests_are_the_traces_with_live_arrivals(tmp_path: Path):
    write_live(tmp_path)
    live = public.read_live(tmp_path)
    rows = [
        {"timestamp": 7.0, "input_length": 20, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 9.0, "input_length": 40, "output_length": 6, "hash_ids": [1, 2, 3]},
    ]
    trace = tmp_path / public.TRACE
    trace.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = public.read_requests(tmp_path, live)
    assert found.arrival_ns.tolist() == [0, 1_000_000_000]
    assert found.follows.tolist() == [-1, -1]
    other = replace(live, outcomes=replace(live.outcomes, prompt=live.outcomes.prompt + 1))
    with pytest.raises(SystemExit, match="not of the same requests"):
        public.read_requests(tmp_path, other)


def test_the_public_run_is_met_as_far_as_the_catalogue_knows_the_device():
    data = os.environ.get("HEADRACE_DATA")
    if data is None or not (Path(data) / public.FOLDER / f"{public.LIVE}.csv").is_file():
        pytest.skip(f"set HEADRACE_DATA to a folder with {public.FOLDER}")
    folder = Path(data) / public.FOLDER
    live = public.read_live(folder)
    simulated = run(public.deployment(folder), public.read_requests(folder, live))
    errors = public.errors(public.fidelity([live], simulated))
    assert abs(errors["tpot_mean_ms"]) < 0.08
    assert abs(errors["e2e_mean_ms"]) < 0.10
    assert abs(errors["output_tokens_per_s"]) < 0.06
    assert abs(public.unqueued(live, simulated, 10.0)["error"]) < 0.05
