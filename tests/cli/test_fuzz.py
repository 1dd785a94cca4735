import re
from pathlib import Path

import msgspec
import pytest

from headrace.cli import fuzz as command
from headrace.cli.fuzz import fuzz, parse_seeds
from headrace.sim.fuzz import Fuzzer
from headrace.types.errors import ConfigError
from tests.sim.mutants import MUTANTS


def test_seeds():
    assert parse_seeds("5:9") == range(5, 9)
    assert parse_seeds("9") == parse_seeds(":9") == range(9)
    for text in ("", "a:b", "3:", "9:5", "5:5", "-3:5", "1:2:3"):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


def test_bad_flags_say_what_is_wrong(tmp_path: Path):
    with pytest.raises(ConfigError, match="--seed N"):
        fuzz(trace=True)
    with pytest.raises(ConfigError, match="--jobs 0"):
        fuzz(jobs=0)
    with pytest.raises(ConfigError, match="the folder does not exist"):
        fuzz(json=tmp_path / "nowhere" / "o.json")
    with pytest.raises(ConfigError, match="--seed -1"):
        fuzz(seed=-1)


def test_a_good_run_ends_with_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fuzz("0:20", 1, json=tmp_path / "o.json") == 0
    assert re.search(r"20 of 20 seeds in .* a second\): none failed", capsys.readouterr().out)
    summary = msgspec.json.decode((tmp_path / "o.json").read_bytes())
    assert summary["seeds"] == [0, 20] and summary["done"] == 20 and summary["failed"] == []
    assert summary["kinds"]["break"] > 0 and summary["counts"]["steps"] > 100
    assert summary["seeds_per_second"] > 0


def test_a_failure_is_named_with_the_command_that_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    MUTANTS["transfer_counts_calls"][0](monkeypatch)
    assert fuzz("0:200", 1, json=tmp_path / "o.json") == 1
    said = capsys.readouterr().out
    [failed] = msgspec.json.decode((tmp_path / "o.json").read_bytes())["failed"]
    assert failed["reason"] in said and f"headrace fuzz --seed {failed['seed']} --trace" in said
    assert fuzz(seed=failed["seed"], trace=True) == 1
    assert failed["reason"] in capsys.readouterr().out


def test_one_seed_shows_everything_or_only_its_end(capsys: pytest.CaptureFixture[str]):
    assert fuzz(seed=5) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) == 2 and "seed 5 passed" in short
    assert fuzz(seed=5, trace=True) == 0
    full = capsys.readouterr().out
    assert full.splitlines()[-1] == short.splitlines()[-1]
    assert "StepPlan" in full and "Submitted" in full and "PeerUp" in full


def test_ctrl_c_shows_what_was_done_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Interrupted(Fuzzer):
        def run(self, progress=None):
            super().run(lambda done, total: None)
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "Fuzzer", Interrupted)
    assert fuzz("0:3", 1) == 130
    assert "3 of 3 seeds" in capsys.readouterr().out
