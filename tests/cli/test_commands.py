"""The command line's own words: what is wrong names the flag and ends with exit code 2."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def headrace(*arguments: str, given: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"COLUMNS": "200"} | variables,
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["no/such/folder"], "MODEL"),
        (["--kv-memory", "lots"], "--kv-memory"),
        (["--kv-memory", "1MiB"], "--max-model-len"),
        (["--kv-memory", "900TiB"], "--kv-memory"),
        (["--max-model-len", "999999"], "--max-model-len"),
        (["--block-size", "17"], "--block-size"),
        (["--memory", "magic"], "--memory"),
        (["--placement", "best"], "round_robin"),
        (["--placement", '{"name": "least_load", "bind": "soon"}'], "bind"),
        (["--instances", "1", "--prefill", "1"], "--instances"),
        (["--prefill", "0", "--decode", "0"], "--decode"),
        (["--config", "no/such.yaml"], "--config"),
    ],
)
def test_what_is_wrong_names_the_flag(flags: list[str], named: str) -> None:
    done = headrace("serve", "--port", "0", *flags)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_found_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = headrace("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "--port" in done.stderr


def test_flags_win_over_variables_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("kv-memory: 3 elephants\nblock-size: 18\n")
    assert "--config: kv-memory" in headrace("serve", "--config", str(config)).stderr
    told = headrace("serve", "--config", str(config), "--kv-memory", "1GiB", HEADRACE_BLOCK_SIZE="19").stderr
    assert "--block-size" in told and "elephants" not in told
    config.write_text("kv_memories: 1GiB\n")
    assert "kv-memories is not a setting" in headrace("serve", "--config", str(config)).stderr


def test_generate_completes_prompts_and_loses_none_to_a_bad_one(tmp_path: Path) -> None:
    given = 'def main():\n{"prompt": "x = ", "n": 2, "max_tokens": 3}\n\n{"prompt": 7}\n'
    output = tmp_path / "answers.jsonl"
    done = headrace("generate", "--instances", "1", "--max-tokens", "5", "--output", str(output), given=given)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["def main():", "x = ", 7]
    assert lines[0]["usage"]["completion_tokens"] == 5 and len(lines[1]["choices"]) == 2
    assert "prompt" in lines[2]["error"]


def test_generate_without_prompts_says_so() -> None:
    done = headrace("generate", given="\n")
    assert done.returncode == 2 and "--prompts" in done.stderr
