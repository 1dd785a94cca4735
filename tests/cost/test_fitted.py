"""The catalogue's constants are those that the fit reports, and the fit is as good as it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from headrace.cli import catalogue

ROOT = Path(__file__).parent.parent.parent
RESULT = json.loads((ROOT / "benchmarks" / "results" / "cost_fit.json").read_text())
ERRORS_MAX = {
    "products, bf16": 0.085,
    "products, fp8": 0.15,
    "decode attention": 0.12,
    "prefill attention": 0.08,
    "elementwise": 0.17,
}


@pytest.mark.parametrize("name", sorted(RESULT["figures"]["constants"]))
def test_the_catalogue_holds_what_was_fitted(name):
    found = msgspec.to_builtins(catalogue.hardware(name).efficiency, str_keys=True)
    assert found == RESULT["figures"]["constants"][name]


def test_errors_held_out_are_within_bounds():
    fitted = [row for row in RESULT["figures"]["tables"] if row["in_sample"]["samples"]]
    checked = [row for row in fitted if row["what"] in ERRORS_MAX]
    assert len(checked) >= 13
    for row in checked:
        assert row["held_out"]["median"] <= ERRORS_MAX[row["what"]], row
        assert row["held_out"]["samples"] >= 20


@pytest.mark.skipif("HEADRACE_DATA" not in os.environ, reason="HEADRACE_DATA names no folder with profiles/")
def test_a_new_fit_gives_the_same(tmp_path):
    out = tmp_path / "fit.json"
    command = [sys.executable, str(ROOT / "tools" / "fit_cost.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text())["figures"]["constants"]
    for name, constants in RESULT["figures"]["constants"].items():
        for kind, found in again[name]["gemm"].items():
            assert found == pytest.approx(constants["gemm"][kind], rel=0.05)
        for part in ("prefill", "decode", "elementwise"):
            assert again[name][part] == pytest.approx(constants[part], rel=0.05, abs=1e-12)


def test_without_tables_it_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "fit_cost.py"), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert "--data DIR" in done.stderr and "Traceback" not in done.stderr
