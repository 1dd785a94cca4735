"""`headrace simulate`: the same words as serve, a trace from anywhere, and files that can be used."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.cli import main as cli
from headrace.cli.options import ClusterOptions, resolve
from headrace.cli.perfetto import KINDS, spans
from headrace.cli.simulate import play
from headrace.cli.workload import Workload, check_lengths, draw, load, part, variety
from headrace.types.errors import ConfigError
from headrace.types.outcomes import RunData
from headrace.workload import transform

HEAD = "timestamp_s,input_tokens,output_tokens\n"
SMALL = ["--hardware", "h100-sxm", "--model", "llama-3.1-8b"]
TRACE = "synthetic:rate=20,requests=60,prompt=300,output.kind=constant,output.value=20"


def headrace(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def simulated(trace: str = TRACE, **settings: Any) -> RunData:
    options = resolve(ClusterOptions, None, {"model": "llama-3.1-8b", "hardware": "h100-sxm", **settings})
    workload = Workload(trace)
    return play(options, part(workload, load(workload)[0]), 0, "test")


def csv(tmp_path: Path, rows: str) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(HEAD + rows)
    return str(path)


def test_it_writes_figures_a_page_and_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pair.yaml"
    file.write_text("model: llama-3.1-8b\nhardware: h100-sxm\nprefill: 1\ndecode: 1\n")
    written = [tmp_path / name for name in ("run.json", "run.html", "run.perfetto")]
    flags = [
        flag
        for pair in zip(("--json", "--html", "--perfetto"), map(str, written), strict=True)
        for flag in pair
    ]
    goals = ["--ttft-ms", "500", "--tpot-ms", "50"]
    assert (
        headrace(monkeypatch, "simulate", str(file), "--trace", TRACE, *flags, *goals, "--max-num-seqs", "9")
        == 0
    )
    said = capsys.readouterr().out
    assert "pair, seed 0" in said and "Goodput" in said and "Simulated, on a virtual clock" in said
    report = json.loads(written[0].read_bytes())
    assert report["completed"] == 60 and report["output_tokens"] == 1200 and report["clock"] == "virtual"
    assert report["goodput_share"] == 1 and report["bytes_moved"] > 0
    assert report["settings"]["trace"] == TRACE and report["settings"]["max-num-seqs"] == 9
    assert written[1].read_text().startswith("<!DOCTYPE html>")
    assert len(json.loads(written[2].read_bytes())["traceEvents"]) > 180


def test_a_file_may_name_the_trace_and_flags_win_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pair.yaml"
    file.write_text(
        f"model: llama-3.1-8b\nhardware: h100-sxm\nprefill: 1\ndecode: 1\ntrace: '{TRACE}'\nport: 1\n"
    )
    assert headrace(monkeypatch, "simulate", str(file), "--instances", "3") == 0
    assert "on 3 instances" in capsys.readouterr().out


def test_every_step_is_the_same_to_the_bit() -> None:
    options = resolve(ClusterOptions, None, {"model": "llama-3.1-8b", "hardware": "h100-sxm"})
    trace, _ = load(Workload(TRACE))
    fast, slow = (play(options, trace, 3, "test", every_step=every).outcomes for every in (False, True))
    for name in ("first_ns", "finished_ns", "placed_ns", "decode", "bytes_moved"):
        assert (getattr(fast, name) == getattr(slow, name)).all(), name


def test_a_sample_shows_where_each_request_was() -> None:
    run = simulated()
    found = msgspec.json.decode(spans(run, 30))
    slices = [event for event in found["traceEvents"] if event["ph"] == "X"]
    requests = {event["args"]["request"] for event in slices}
    assert len(requests) == 30 and found["otherData"]["requests"] == "30 of 60"
    names = {
        event["pid"]: event["args"]["name"]
        for event in found["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names == {0: "prefill0", 1: "decode0"}
    assert {event["cat"] for event in slices} <= set(KINDS)
    for request in requests:
        mine = sorted(
            (event["ts"], event["ts"] + event["dur"])
            for event in slices
            if event["args"]["request"] == request
        )
        row = request - 1
        assert mine[0][0] == pytest.approx(run.outcomes.arrival_ns[row] / 1e3)
        assert mine[-1][1] == pytest.approx(run.outcomes.finished_ns[row] / 1e3)
        assert all(end == pytest.approx(begin) for (_, end), (begin, _) in pairwise(mine))
    by_row: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in slices:
        by_row.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for each in by_row.values():
        each.sort()
        assert all(end <= begin + 1e-3 for (_, end), (begin, _) in pairwise(each))


def test_faults_slow_and_limits_reach_the_simulation() -> None:
    calm = simulated(instances=2)
    slow = simulated(instances=2, faults={"slow": {"worker0": 3.0}})
    assert np.nanmean(slow.outcomes.tpot_s()) > 1.5 * np.nanmean(calm.outcomes.tpot_s())
    killed = simulated(instances=2, faults={"kills": [{"at": 1, "instance": "worker0"}], "restart": 1})
    assert (
        killed.facts["deaths"] == 1 and killed.outcomes.succeeded.all() and killed.outcomes.attempts.max() > 1
    )
    late = simulated(instances=1, max_num_seqs=1, deadline=0.2)
    assert 0 < late.outcomes.succeeded.sum() < 60


def test_traces_come_from_files_and_generators(tmp_path: Path) -> None:
    path = csv(tmp_path, "".join(f"{i},10,{i + 1}\n" for i in range(10)))
    workload = Workload(path, requests=4, rate=2.0, ttft_ms=10)
    trace = part(workload, load(workload)[0])
    assert trace.output.tolist() == [1, 2, 3, 4] and trace.duration_ns == 1_500_000_000
    assert trace.goals[trace.goal[0]].ttft_ns == 10_000_000
    assert len(part(Workload(path, requests=25), load(Workload(path))[0])) == 25
    assert part(Workload(path, speedup=2), load(Workload(path))[0]).duration_ns == 4_500_000_000
    made, _ = load(Workload("synthetic:rate=5,output.kind=uniform,output.high=3", requests=50), 7)
    assert len(made) == 50 and made.output.max() <= 3
    table, _ = load(Workload("synthetic:requests=8,arrivals.kind=diurnal,arrivals.table=[1, 2, 3]"))
    assert len(table) == 8
    lengths, _ = load(Workload("synthetic:requests=5,file=trace.csv", data=tmp_path))
    assert set(lengths.prompt.tolist()) == {10}


def test_seeds_draw_other_requests_and_say_which(tmp_path: Path) -> None:
    path, seeds = csv(tmp_path, "".join(f"{i},{i + 1},10\n" for i in range(100))), range(4)
    sliced = Workload(path, requests=20)
    assert [int(draw(sliced, seeds, seed).prompt[0]) for seed in seeds] == [1, 27, 54, 81]
    assert "do not overlap" in variety(sliced, seeds)
    assert "they overlap" in variety(Workload(path, requests=50), seeds)
    halves = [draw(Workload(path), seeds, seed) for seed in seeds]
    assert len({tuple(half.prompt.tolist()) for half in halves}) == 4
    for half in halves:
        assert 30 < len(half) < 70 and half.arrival_ns[0] == 0
        assert (len(half) - 1) * 1e9 / half.duration_ns == pytest.approx(1, rel=1e-6)
    assert "another half" in variety(Workload(path), seeds)
    assert len(draw(Workload(path), range(1), 0)) == 100
    assert (draw(Workload(TRACE), seeds, 1).prompt != draw(Workload(TRACE), seeds, 2).prompt).any()


def test_requests_that_are_too_long_are_named() -> None:
    trace = transform.take(load(Workload(TRACE))[0], [0, 1])
    check_lengths(trace, int((trace.prompt + trace.output).max()))
    with pytest.raises(ConfigError, match="2 of 2 requests are longer than a sequence may be"):
        check_lengths(trace, 20)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "what is it to serve"),
        (["--trace", "nothing.csv"], "no trace nothing.csv"),
        (["--trace", "synthetic:rats=3"], "no setting 'rats'"),
        (["--trace", "synthetic:rate"], "is no key=value"),
        (["--trace", TRACE, "--rate", "1", "--speedup", "2"], "give one"),
        (["--trace", TRACE, "--placement", "best"], "there are: "),
        (["--trace", TRACE, "--model", "llama-3.1-70b"], "GiB more than there is"),
        (["--trace", TRACE, "--max-model-len", "100"], "longer than a sequence may be"),
        (["--trace", TRACE, "--kv-memory", "20MiB"], "do not fit any instance's KV memory"),
        (["--trace", TRACE, "--faults", '{"kills": [{"at": 1, "instance": "x"}]}'], "no instance 'x'"),
        (["--trace", TRACE, "--faults", '{"kills": '], "is a JSON object"),
        (["--trace", TRACE, "--html", "no/such/folder.html"], "--html"),
        (["--trace", TRACE, "--skip", "100", "100"], "nothing is left"),
        (["no-such-example", "--trace", TRACE], "h100-1p1d"),
    ],
)
def test_bad_input_ends_with_a_message(
    flags: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert headrace(monkeypatch, "simulate", *SMALL, *flags) == 2
    said = capsys.readouterr().err
    assert named in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("5,10,10\n3,10,10\n", "is before that of the row above"),
        ("-5,10,10\n", "its time is negative"),
        ("1,0,10\n", "input_tokens is zero"),
        ("1,900000,10\n", "longer than a sequence may be"),
    ],
)
def test_bad_traces_end_with_a_message(
    rows: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert headrace(monkeypatch, "simulate", *SMALL, "--trace", csv(tmp_path, rows)) == 2
    said = capsys.readouterr()
    assert named in said.err and "Traceback" not in said.err + said.out


def test_all_are_killed_and_none_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "doomed.yaml"
    file.write_text("instances: 1\nfaults: {restart: 100000, kills: [{at: 0.5, instance: worker0}]}\n")
    assert headrace(monkeypatch, "simulate", str(file), *SMALL, "--trace", TRACE) == 2
    assert "every instance is killed" in capsys.readouterr().err
