"""A recording, simulated as it was served and otherwise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.cli.cluster import cluster_of
from headrace.cli.flags import RecordingSource
from headrace.cli.options import ClusterOptions, resolve
from headrace.cli.replay import SIMULATED, live_run, read_recording, replay
from headrace.cli.simulate import Outputs
from headrace.types.errors import ConfigError
from headrace.workload.report import summarize
from tests.cli.recordings import profile_file, recording


def options_of(folder: Path, **given: Any) -> ClusterOptions:
    file, called = RecordingSource().file(folder)
    return resolve(ClusterOptions, file, given, called)


def test_what_was_recorded_is_a_run(tmp_path: Path) -> None:
    run = live_run(*read_recording(recording(tmp_path / "rec")))
    outcomes = run.outcomes
    assert len(outcomes) == 39 and run.clock == "wall" and outcomes.instances == ("worker0", "worker1")
    assert (np.diff(outcomes.arrival_ns) > 0).all()
    assert outcomes.errors == ["", "cancelled"] and outcomes.error[0] == 1 and outcomes.succeeded.sum() == 38
    report = summarize(run)
    assert report.ttft_ms is not None and report.ttft_ms.mean == pytest.approx(9)
    assert report.tpot_ms is not None and 3 < report.tpot_ms.mean < 3.5
    assert (report.completed, report.failed, report.errors) == (38, 1, {"cancelled": 1})


def test_a_replay_tells_its_error_and_what_if(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    folder = recording(tmp_path / "rec")
    outputs = Outputs(json=tmp_path / "replay.json", html=tmp_path / "replay.html")
    options = options_of(folder, profile=profile_file(tmp_path))
    answer = replay(options, folder, ["cluster.placement=least_load,round_robin"], outputs, seeds=3, jobs=1)
    said = capsys.readouterr().out
    assert "the largest error is" in said and "recorded, live" in said and "half of the trace's" in said
    assert list(answer.what_if) == [SIMULATED, "round_robin"]
    assert answer.comparison is not None and answer.comparison.variants == [SIMULATED, "round_robin"]
    assert answer.comparison.seeds == [0, 1, 2] and answer.comparison.seeds_matter
    simulated, live = answer.simulated.outcomes, answer.live.outcomes
    assert (simulated.prompt == live.prompt).all() and (simulated.output == live.output).all()
    assert (simulated.arrival_ns - simulated.arrival_ns[0] == live.arrival_ns - live.arrival_ns[0]).all()
    assert (simulated.ttft_s() > 0.002).all() and set(simulated.decode.tolist()) == {0, 1}
    written = json.loads((tmp_path / "replay.json").read_bytes())
    assert written["fidelity"]["live_runs"] == 1 and set(written["what_if"]) == {SIMULATED, "round_robin"}
    assert "How well the simulation matches" in (tmp_path / "replay.html").read_text()


def test_the_recorded_deployment_is_the_simulated_one(tmp_path: Path) -> None:
    folder = recording(tmp_path / "rec")
    made, _ = read_recording(folder)
    cluster = cluster_of(options_of(folder, profile=profile_file(tmp_path)), made.config)
    assert cluster.spec == made.spec
    assert [(m.name, m.leaning, m.blocks) for m in cluster.members] == [
        (instance.name, instance.leaning, made.pools[instance.pool]) for instance in made.instances
    ]
    assert cluster.instance.sequences_max == 8 and cluster.router.choices_max == 4096


def test_without_a_profile_it_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recording(tmp_path / "rec")
    answer = replay(options_of(folder), folder, [], Outputs())
    assert "without --profile" in capsys.readouterr().out.replace("\n", " ")
    assert answer.comparison is None and not answer.what_if
    assert "epyc-2core" in answer.simulated.facts["cost_model"]


def test_a_profile_of_other_threads_is_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recording(tmp_path / "rec")
    answer = replay(
        options_of(folder, profile=profile_file(tmp_path, threads=2)), folder, [], Outputs(), speedup=3.0
    )
    assert "of 2 threads a worker" in capsys.readouterr().out.replace("\n", " ")
    faster = answer.what_if[SIMULATED]
    assert faster.outcomes.arrival_ns[-1] < answer.simulated.outcomes.arrival_ns[-1] / 2


def test_what_is_no_recording_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no cluster\.yaml"):
        options_of(tmp_path)
    folder = recording(tmp_path / "rec")
    (folder / "meta.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no recording"):
        read_recording(folder)
