"""`headrace trace`: the commands as users give them, and every mistake with a message."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from headrace.cli.trace import app
from headrace.types.errors import ConfigError
from headrace.workload.traces import read

CSV = "timestamp_s,input_tokens,output_tokens\n" + "".join(f"{i},{10 + i},{1 + i % 7}\n" for i in range(40))


def run(*arguments: str) -> Result:
    """A finished command; raises what it raised."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "t.csv").write_text(CSV)
    return tmp_path


def test_describe(data: Path):
    text = run(
        "describe",
        "t.csv",
        "--data",
        str(data),
        "--json",
        str(data / "d.json"),
        "--html",
        str(data / "d.html"),
    ).output
    assert "servegen: 40 rows, 40 kept, 0 failed" in text and "1.000 requests/s" in text
    assert json.loads((data / "d.json").read_bytes())["prompt"]["max"] == 49
    assert "<svg" in (data / "d.html").read_text()


def test_describe_names_bad_rows_and_order(data: Path):
    (data / "bad.csv").write_text(CSV + "5,3,3\n41,x,3\n")
    with pytest.raises(ConfigError, match="line 42: its time is before"):
        run("describe", str(data / "bad.csv"))
    text = run("describe", str(data / "bad.csv"), "--sort").output
    assert "1 bad: input_tokens is not a number (line 43)" in text and "rows were put in order" in text


def test_generate_fit_and_generate_again(data: Path):
    out = str(data / "g.jsonl.gz")
    settings = [
        "--set",
        "requests=500",
        "--set",
        "arrivals.rate_per_s=9",
        "--set",
        "prompt.kind=constant",
        "--set",
        "prompt.value=64",
    ]
    text = run("generate", "synthetic", *settings, "--seed", "3", "--out", out).output
    assert "wrote 500 requests" in text
    trace, _ = read(out)
    assert set(trace.prompt.tolist()) == {64} and 500 / (trace.duration_ns * 1e-9) == pytest.approx(
        9, rel=0.2
    )
    text = run("fit", out, "--json", str(data / "f.json")).output
    assert "KS of gaps" in text and "headrace trace generate synthetic --config" in text
    again = str(data / "again.jsonl")
    run("generate", "synthetic", "--config", str(data / "f.json"), "--set", "requests=50", "--out", again)
    assert len(read(again)[0]) == 50
    with pytest.raises(ConfigError, match="settings of the generator synthetic, not of agents"):
        run("generate", "agents", "--config", str(data / "f.json"), "--out", again)


def test_generate_finds_files_in_the_data_folder(data: Path):
    out = str(data / "g.jsonl")
    run(
        "generate",
        "synthetic",
        "--set",
        "file=t.csv",
        "--set",
        "requests=20",
        "--data",
        str(data),
        "--out",
        out,
    )
    prompt = ["--set", "prompt.kind=empirical", "--set", "prompt.file=t.csv", "--set", "prompt.column=prompt"]
    run("generate", "synthetic", *prompt, "--data", str(data), "--out", out)
    assert read(out)[0].prompt.max() <= 49


def test_convert_changes_as_asked(data: Path):
    out = str(data / "c.jsonl")
    source = str(data / "t.csv")
    run("convert", source, "--out", out, "--begin", "10", "--end", "20", "--rate", "5", "--prompt-max", "22")
    trace, report = read(out)
    assert report.format == "recorded" and len(trace) == 10
    assert trace.duration_ns == pytest.approx(9 / 5 * 1e9) and trace.prompt.tolist() == [20, 21] + [22] * 8
    run("convert", source, "--out", out, "--rows", "100")
    assert len(read(out)[0]) == 100
    run("convert", source, "--out", out, "--rows", "7", "--add", source)
    assert read(out)[0].arrival_ns.tolist() == [0, 0, 10**9, 10**9, 2 * 10**9, 2 * 10**9, 3 * 10**9]
    run("convert", source, "--out", out, "--sample", "0.5")
    assert 5 < len(read(out)[0]) < 35


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["describe", "nothing.csv"], "no trace nothing.csv"),
        (["describe", "{}/t.csv", "--format", "azur"], "no trace format 'azur'"),
        (["describe", "{}/t.csv", "--set", "x=1"], "format servegen has no setting 'x'"),
        (["describe", "{}/t.csv", "--set", "x"], "--set x: give key=value"),
        (["describe", "{}/t.csv", "--json", "{}/no/folder"], "cannot write"),
        (["generate", "nobody", "--out", "{}/o"], "no trace generator 'nobody'"),
        (["generate", "synthetic", "--out", "{}/o", "--set", "reqests=1"], "did you mean 'requests'"),
        (["generate", "synthetic", "--out", "{}/o", "--set", "requests=many"], "requests"),
        (
            ["generate", "synthetic", "--out", "{}/o", "--set", "arrivals=1", "--set", "arrivals.kind=gamma"],
            "value of its own",
        ),
        (["generate", "synthetic", "--out", "{}/o", "--config", "{}/t.csv"], "--config"),
        (["generate", "synthetic", "--out", "{}/o", "--set", "file=none.csv"], "no trace none.csv"),
        (["fit", "{}/t.csv", "--lengths", "normal"], "--lengths normal"),
        (["fit", "{}/t.csv", "--sessions"], "fit without sessions"),
        (["convert", "{}/t.csv", "--out", "{}/o", "--begin", "100"], "nothing arrives"),
        (["convert", "{}/t.csv", "--out", "{}/o", "--rate", "0"], "give a number above 0"),
        (["convert", "{}/t.csv", "--out", "{}/o", "--sample", "2"], "a sample of 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_have_messages(data: Path, arguments: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        run(*(argument.replace("{}", str(data)) for argument in arguments))
