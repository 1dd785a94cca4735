"""Headrace's own form: what is written is read again, answers tell who goes on from whom."""

import json
from pathlib import Path

import numpy as np
import pytest

from headrace.types.errors import ConfigError
from headrace.types.request import Slo
from headrace.types.trace import Trace
from headrace.workload.generators import generate
from headrace.workload.traces import read
from headrace.workload.traces.recorded import line_of, lines_of


def record(folder: Path, *lines: bytes) -> Path:
    path = folder / "recorded.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def request(arrival_ns: int, prompt_blocks: list[int], output_blocks: list[int], **fields: object) -> bytes:
    known: dict[str, object] = {
        "arrival_ns": arrival_ns,
        "prompt": 16 * len(prompt_blocks) + 3,
        "output": (40,),
        "block_size": 16,
        "prompt_blocks": prompt_blocks,
        "output_blocks": (output_blocks,),
        "finish": ("stop",),
    }
    return line_of(**{**known, **fields})  # type: ignore[arg-type]


def test_every_column_comes_back(tmp_path: Path):
    goal = Slo(ttft_ns=300_000_000)
    path = record(
        tmp_path,
        request(5, [1, 2], [3], category="chat", tenant="a", priority=2, goal=goal, session=9, hidden=7),
        request(8, [-4], [], tenant="b"),
    )
    trace, report = read(path)
    assert report.format == "recorded" and report.kept == 2
    assert trace.arrival_ns.tolist() == [0, 3]
    assert trace.prompt.tolist() == [35, 19] and trace.output.tolist() == [40, 40]
    assert [trace.categories[i] for i in trace.category] == ["chat", ""]
    assert [trace.tenants[i] for i in trace.tenant] == ["a", "b"]
    assert [trace.goals[i] for i in trace.goal] == [goal, Slo()]
    assert (
        trace.priority.tolist() == [2, 0]
        and trace.session.tolist() == [9, -1]
        and trace.hidden.tolist() == [7, 0]
    )
    assert trace.hashes(1).tolist() == [-4] and trace.block_size == 16


def test_a_prompt_follows_the_latest_answer_in_it(tmp_path: Path):
    path = record(
        tmp_path,
        request(0, [1], [2, 3]),
        request(1, [1, 2, 3], [4]),
        request(2, [1, 2, 3, 4, 5], []),
        request(3, [1, 2, 3, 6], []),
        request(4, [1], []),
    )
    assert read(path)[0].follows.tolist() == [-1, 0, 1, 0, -1]


def test_choices_are_rows_and_failed_ones_are_left_out(tmp_path: Path):
    path = record(
        tmp_path,
        request(0, [1], [], output=(5, 0, 9), finish=("stop", "error", "length")).replace(
            b"[[]]", b"[[],[],[2]]"
        ),
        request(1, [1, 2], []),
        b"{}\n",
        request(2, [1], [], output=()),
    )
    trace, report = read(path)
    assert trace.output.tolist() == [5, 9, 40] and trace.follows.tolist() == [-1, -1, 1]
    assert (report.rows, report.kept, report.failed, report.bad_count) == (6, 3, 2, 1)
    assert next(iter(report.bad.values())).lines == [3]
    trace, report = read(path, failed=True)
    assert trace.output.tolist() == [5, 1, 9, 40, 1] and report.failed == 0


def test_two_block_sizes_are_an_error(tmp_path: Path):
    path = record(tmp_path, request(0, [1], []), request(1, [], [], block_size=32))
    with pytest.raises(ConfigError, match="blocks of 16 and 32 tokens"):
        read(path)


def test_more_blocks_than_the_prompt_fills_are_bad(tmp_path: Path):
    _, report = read(record(tmp_path, request(0, [1], []), request(1, [1, 2], [], prompt=20)))
    assert report.bad["it has more prompt_blocks than full blocks"].lines == [2]


def test_file_order_is_arrival_order(tmp_path: Path):
    path = record(tmp_path, request(5, [1], []), request(4, [1], []))
    with pytest.raises(ConfigError, match="line 2"):
        read(path)
    assert read(path, sort=True)[0].arrival_ns.tolist() == [0, 1]


def test_a_line_has_no_text_and_is_json():
    found = json.loads(request(0, [1], [2]))
    assert found["prompt_blocks"] == [1] and found["output_blocks"] == [[2]] and found["output"] == [40]
    assert "text" not in found and "tokens" not in found


def test_generated_traces_come_back(tmp_path: Path):
    classes = [
        {"weight": 1, "category": "a"},
        {"weight": 2, "category": "b", "ttft_ms": 200.0, "priority": 1},
    ]
    trace = generate("agents", {"tasks": 30, "classes": classes}, 5)
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"".join(lines_of(trace)))
    again, report = read(path)
    assert report.bad_count == 0
    for name in ("prompt", "output", "session", "priority", "hidden", "hash_ids", "hash_starts"):
        assert np.array_equal(getattr(trace, name), getattr(again, name)), name
    assert np.array_equal(trace.arrival_ns - trace.arrival_ns[0], again.arrival_ns)
    assert [trace.categories[i] for i in trace.category] == [again.categories[i] for i in again.category]
    assert [trace.goals[i] for i in trace.goal] == [again.goals[i] for i in again.goal]
    assert np.array_equal(again.follows, [latest_filled(trace, row) for row in range(len(trace))])


def latest_filled(trace: Trace, row: int) -> int:
    """The latest of the turns before whose answer fills a block."""
    before = int(trace.follows[row])
    while before >= 0:
        prompt, size = int(trace.prompt[before]), trace.block_size
        if (prompt + int(trace.output[before])) // size > prompt // size:
            return before
        before = int(trace.follows[before])
    return -1
