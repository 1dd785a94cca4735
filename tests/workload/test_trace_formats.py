"""Readers: each format's own columns, bad rows by reason and line, order in time."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from headrace.types.errors import ConfigError
from headrace.workload.traces import find, names, read

BURST_NEW = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,s1,2.5,ChatGPT,472,18,490,Conversation log
45,,0.5,ChatGPT,1087,230,1317,API log
118,s1,3,GPT-4,417,0,417,Conversation log
200,s2,1,GPT-4,600,7,607,Conversation log
"""
BURST_OLD = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,API log
118,GPT-4,417,0,417,Conversation log
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:50.9951690,396,109\r
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def lines(*rows: dict[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(timestamp: float, prompt: int, output: int, ids: list[int]) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": ids}


def data(name: str) -> Path:
    if not os.environ.get("HEADRACE_DATA"):
        pytest.skip("set HEADRACE_DATA to the folder of public traces")
    path = Path(os.environ["HEADRACE_DATA"]) / name
    if not path.exists():
        pytest.skip(f"{name} is not in HEADRACE_DATA")
    return path


def test_the_folder_is_the_registry():
    assert names() == ["azure", "burstgpt", "mooncake", "recorded", "servegen", "sharegpt"]


def test_burstgpt_with_sessions(tmp_path: Path):
    trace, report = read(write(tmp_path, "b.csv", BURST_NEW))
    assert report.format == "burstgpt"
    assert (report.rows, report.kept, report.failed, report.bad_count) == (4, 3, 1, 0)
    assert trace.arrival_ns.tolist() == [0, 40_000_000_000, 195_000_000_000]
    assert trace.prompt.tolist() == [472, 1087, 600] and trace.output.tolist() == [18, 230, 7]
    assert trace.session.tolist() == [0, -1, 1]
    kinds = [trace.categories[i] for i in trace.category]
    assert kinds == ["ChatGPT, Conversation log", "ChatGPT, API log", "GPT-4, Conversation log"]
    assert trace.block_size == 0 and trace.hash_starts.tolist() == [0, 0, 0, 0]


def test_burstgpt_without_sessions_and_with_failed_requests(tmp_path: Path):
    path = write(tmp_path, "b.csv", BURST_OLD)
    trace, report = read(path)
    assert (report.failed, trace.session.tolist()) == (1, [-1, -1])
    trace, report = read(path, failed=True)
    assert (report.failed, report.kept, trace.output.tolist()) == (0, 3, [18, 230, 1])
    assert "1 failed requests are kept" in " ".join(report.lines())


def test_azure_times_are_of_a_calendar(tmp_path: Path):
    trace, report = read(write(tmp_path, "a.csv", AZURE))
    assert report.format == "azure"
    assert trace.arrival_ns.tolist() == [0, 4_314_579_000]
    zoned = AZURE.replace("6805900", "680590+00:00").replace("9951690", "995169+00:00")
    assert read(write(tmp_path, "z.csv", zoned))[0].arrival_ns.tolist() == [0, 4_314_579_000]


def test_azure_with_a_time_that_is_none(tmp_path: Path):
    trace, report = read(write(tmp_path, "a.csv", AZURE + "yesterday,5,6\n"))
    assert len(trace) == 2
    assert report.bad["TIMESTAMP is not a date and time"].lines == [4]


def test_bad_rows_are_counted_and_named(tmp_path: Path):
    rows = [
        "0,10,5",
        "1,ten,5",
        "2,10,0",
        "3,-4,5",
        "4,10.5,5",
        "5,10",
        "6,inf,5",
        "",
        "7,10,5",
        "8,0,5",
        "nan,3,4",
    ]
    text = "timestamp_s,input_tokens,output_tokens\n" + "\n".join(rows) + "\n"
    trace, report = read(write(tmp_path, "s.csv", text))
    assert len(trace) == 2 == report.kept and report.rows == 10
    assert {reason: bad.lines for reason, bad in report.bad.items()} == {
        "it has not 3 fields": [7],
        "timestamp_s is not a number": [12],
        "input_tokens is not a number": [3, 8],
        "input_tokens is not a whole number": [6],
        "input_tokens is negative": [5],
        "input_tokens is zero": [10 + 1],
        "output_tokens is zero": [4],
    }
    assert report.rows == report.kept + report.failed + report.bad_count
    assert "2 bad: input_tokens is not a number (line 3, 8)" in report.lines()


def test_first_bad_lines_are_named_and_all_are_counted(tmp_path: Path):
    text = "timestamp_s,input_tokens,output_tokens\n0,1,1\n" + "1,x,1\n" * 100
    _, report = read(write(tmp_path, "s.csv", text))
    bad = report.bad["input_tokens is not a number"]
    assert bad.count == 100 and bad.lines == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("times", "line", "words"),
    [([0, 5, 3, 4], 4, "before that of the row above"), ([-2, 0, 1], 2, "negative")],
)
def test_times_that_go_back_are_an_error_unless_sorted(
    tmp_path: Path, times: list[int], line: int, words: str
):
    rows = "".join(f"{t},{100 + t},1\n" for t in times)
    path = write(tmp_path, "s.csv", "timestamp_s,input_tokens,output_tokens\n" + rows)
    with pytest.raises(ConfigError, match=rf"line {line}: its time is {words}.*--sort") as caught:
        read(path)
    assert str(path) in str(caught.value)
    trace, report = read(path, sort=True)
    assert trace.arrival_ns.tolist() == [(t - min(times)) * 1_000_000_000 for t in sorted(times)]
    assert trace.prompt.tolist() == [100 + t for t in sorted(times)]
    assert report.moved == sum(a != b for a, b in zip(times, sorted(times), strict=True))


def test_a_bad_row_does_not_count_for_the_order(tmp_path: Path):
    text = "timestamp_s,input_tokens,output_tokens\n0,1,1\n99,x,1\n1,1,1\n"
    assert len(read(write(tmp_path, "s.csv", text))[0]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins like no known trace"),
        ("hello,world\n1,2\n", "give --format, one of: azure, burstgpt"),
        ("timestamp_s,input_tokens,output_tokens\n", "no good row"),
        ("timestamp_s,input_tokens,output_tokens\n1,0,0\n", r"no good row.*input_tokens is zero \(line 2\)"),
    ],
)
def test_files_without_a_good_row_are_errors(tmp_path: Path, text: str, words: str):
    with pytest.raises(ConfigError, match=words):
        read(write(tmp_path, "x.csv", text))


def test_wrong_formats_settings_and_files_are_errors(tmp_path: Path):
    path = write(tmp_path, "a.csv", AZURE)
    with pytest.raises(ConfigError, match="no trace format 'azur'; there are: azure"):
        read(path, "azur")
    with pytest.raises(ConfigError, match="as burstgpt it needs the column 'Timestamp'"):
        read(path, "burstgpt")
    with pytest.raises(ConfigError, match="format azure has no setting 'blocks'"):
        read(path, blocks=3)
    with pytest.raises(ConfigError, match=r"no trace .*nothing\.csv.*fetch_data"):
        read(tmp_path / "nothing.csv")
    with pytest.raises(ConfigError, match="is not text"):
        (tmp_path / "raw").write_bytes(b"\xff\xfe\x00\x80")
        read(tmp_path / "raw")
    with pytest.raises(ConfigError, match="cannot be read"):
        (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
        read(tmp_path / "cut.gz")


def test_gzip_is_read(tmp_path: Path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    trace, _ = read(path)
    assert len(trace) == 2 and trace.name == "a.csv"


def test_find_looks_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, "a.csv", AZURE)
    assert find("a.csv", tmp_path) == path and find(path, None) == path
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path))
    assert find("a.csv") == path
    with pytest.raises(
        ConfigError, match=r"no trace b.csv, not in .*`--data DIR` or HEADRACE_DATA.*tools/fetch_data.py"
    ):
        find("b.csv", tmp_path)
    monkeypatch.delenv("HEADRACE_DATA")
    with pytest.raises(ConfigError, match="no data folder is given"):
        find("b.csv")


def test_mooncake_keeps_full_blocks(tmp_path: Path):
    text = lines(row(0, 1300, 5, [7, 8, 9]), row(1000, 1024, 5, [7, 8]), row(1000, 100, 5, [1]))
    trace, report = read(write(tmp_path, "m.jsonl", text))
    assert report.format == "mooncake" and trace.block_size == 512
    assert [trace.hashes(i).tolist() for i in range(3)] == [[7, 8], [7, 8], []]
    assert trace.arrival_ns.tolist() == [0, 1_000_000_000, 1_000_000_000]


def test_mooncake_padded(tmp_path: Path):
    text = lines(row(0, 1300, 5, [7, 8, 9]), row(1000, 1024, 5, [7, 8]))
    trace, report = read(write(tmp_path, "m.jsonl", text), pad=True)
    assert trace.prompt.tolist() == [1536, 1024]
    assert trace.hashes(0).tolist() == [7, 8, 9]
    assert any("rounded up" in note for note in report.notes)


def test_block_size_is_found_from_lengths_or_given(tmp_path: Path):
    path = write(
        tmp_path, "l.jsonl", lines(row(0.5, 100, 5, list(range(6))), row(2, 170, 5, list(range(10, 20))))
    )
    trace, report = read(path)
    assert trace.block_size == 16 and "blocks of 16 tokens" in report.notes[0]
    assert trace.arrival_ns.tolist() == [0, 1_500_000]
    with pytest.raises(ConfigError, match=r"no good row.*fewer hash_ids than full blocks of 8"):
        read(path, block_size=8)
    with pytest.raises(ConfigError, match="give block_size"):
        read(write(tmp_path, "odd.jsonl", lines(row(0, 3000, 5, [1]), row(0, 3000, 5, list(range(3000))))))


def test_mooncake_bad_lines(tmp_path: Path):
    text = lines(row(0, 1024, 5, [1, 2])) + "{not json\n\n" + lines(row(1, 0, 5, []), row(2, 1024, 0, [1, 2]))
    text += '{"timestamp": 3, "input_length": "x", "output_length": 1, "hash_ids": []}\n' + lines(
        row(4, 9000, 1, [3])
    )
    text += lines({"timestamp": 5, "output_length": 1})
    trace, report = read(write(tmp_path, "m.jsonl", text), block_size=512)
    assert len(trace) == 1 and report.rows == 7
    found = {reason: bad.lines for reason, bad in report.bad.items()}
    assert found["it is not JSON"] == [2]
    assert found["input_length is zero"] == [4] and found["output_length is zero"] == [5]
    assert found["it has fewer hash_ids than full blocks of 512 tokens"] == [7]
    assert found["input_length is not a number"] == [8]
    assert [6] in found.values()


def test_mooncake_without_ids(tmp_path: Path):
    trace, _ = read(write(tmp_path, "m.jsonl", lines(row(0, 1024, 5, []))))
    assert trace.block_size == 0 and len(trace.hash_ids) == 0


def test_ids_that_stand_after_different_blocks_are_told_apart(tmp_path: Path):
    text = lines(row(0, 32, 5, [1, 2]), row(1, 32, 5, [3, 2]), row(2, 32, 5, [1, 2]))
    trace, report = read(write(tmp_path, "m.jsonl", text), block_size=16)
    first, second, third = (trace.hashes(i).tolist() for i in range(3))
    assert first == third and first[1] != second[1]
    assert any("1 hash ids stood after different blocks" in note for note in report.notes)


def test_follows_is_the_turn_whose_answer_is_in_the_prompt(tmp_path: Path):
    text = lines(
        row(0, 40, 30, [1, 2]),  # 70 tokens: blocks 0..3 are its
        row(1, 100, 20, [1, 2, 3, 4, 5, 6]),  # goes on from row 0: its blocks 2 and 3 hold the answer
        row(2, 100, 20, [1, 2, 9, 8, 7, 6 + 10]),  # another text after the same prompt
        row(3, 60, 20, [1, 2, 3]),  # shorter than row 0 with its answer
        row(4, 140, 20, [1, 2, 3, 4, 5, 6, 20, 21]),  # goes on from row 1, the longest
        row(5, 140, 20, [1, 2, 3, 4, 30, 31, 32, 33]),  # shares row 0's answer, then another message
        row(6, 33, 1, [50, 51]),
        row(7, 64, 1, [50, 51, 52, 53]),  # row 6's answer does not fill a block
    )
    trace, _ = read(write(tmp_path, "m.jsonl", text), block_size=16)
    assert trace.follows.tolist() == [-1, 0, -1, -1, 1, 0, -1, -1]


def test_sharegpt_lengths_are_estimated_and_said_so(tmp_path: Path):
    def said(*texts: str) -> dict[str, object]:
        sides = ("human", "gpt")
        return {"conversations": [{"from": sides[i % 2], "value": text} for i, text in enumerate(texts)]}

    items = [
        said("a" * 40, "b" * 20, "c" * 8, "d" * 12),
        said("only a question"),
        {"id": 3},
        said("e" * 8, "f" * 400),
    ]
    path = write(tmp_path, "s.json", json.dumps(items))
    trace, report = read(path)
    assert report.format == "sharegpt" and (report.rows, report.kept) == (4, 2)
    assert trace.prompt.tolist() == [10, 2] and trace.output.tolist() == [5, 100]
    assert trace.name == "s.json, tokens estimated at 4 characters each"
    assert report.bad["it has no question with an answer"].lines == [2]
    assert report.bad["it has neither token counts nor a conversation"].lines == [3]
    trace, _ = read(path, turns="all", characters_per_token=2.0, block_size=4)
    order = np.lexsort((trace.arrival_ns, trace.session))
    assert trace.prompt[order].tolist() == [20, 20 + 10 + 4, 4] and trace.output[order].tolist() == [
        10,
        6,
        200,
    ]
    assert int((trace.follows >= 0).sum()) == 1


def test_sharegpt_token_counts_are_taken(tmp_path: Path):
    text = lines(
        {"prompt": "x", "prompt_len": 7, "output_len": 3}, {"prompt": "y", "prompt_len": 9, "output_len": 0}
    )
    trace, report = read(write(tmp_path, "v.jsonl", text))
    assert (trace.prompt.tolist(), trace.output.tolist(), trace.name) == ([7], [3], "v.jsonl")
    assert report.bad_count == 1


@pytest.mark.parametrize(
    ("name", "rows", "block_size"),
    [
        ("azure2023/AzureLLMInferenceTrace_conv.csv", 19_366, 0),
        ("mooncake/conversation_trace.jsonl", 12_031, 512),
        ("mooncake/synthetic_trace.jsonl", 3_993, 512),
        ("servegen/servegen_m-small_rate20_3600s_seed0.csv", 71_977, 0),
        ("servegen/servegen_deepseek-r1_rate5_3600s_seed0.csv", 17_962, 0),
        ("llmservingsim/sharegpt-llama-3.1-8b-300.block16.jsonl.gz", 300, 16),
    ],
)
def test_public_traces_are_read_whole(name: str, rows: int, block_size: int):
    trace, report = read(data(name))
    assert (len(trace), report.rows, report.bad_count, report.failed) == (rows, rows, 0, 0)
    assert trace.block_size == block_size
    assert trace.arrival_ns[0] == 0 and (np.diff(trace.arrival_ns) >= 0).all()
    assert (np.diff(trace.hash_starts) <= trace.prompt // max(block_size, 1)).all()
