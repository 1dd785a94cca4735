"""Peers of the transfer benchmarks: absent ones are said to be absent, failing ones too, and pieces never touch."""

import json
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

_peers: Any = import_module("_peers")
_places: Any = import_module("peers.places")

SHAPES = {"one run": (1, 4096), "scattered": (8, 64)}
FAKE = """
import json, sys
print(json.dumps({"ready": {"fake": "1"}}), flush=True)
for line in sys.stdin:
    shape = json.loads(line)
    if shape["pieces"] > 1 and %(fails)s:
        sys.exit("no such path")
    print(json.dumps({"seconds": shape["piece_bytes"] / 1e6}), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(*, fails: bool) -> None:
        (tmp_path / "fake.py").write_text(FAKE % {"fails": fails})
        monkeypatch.setattr(_peers, "PYTHON", Path(sys.executable))
        monkeypatch.setattr(_peers, "FOLDER", tmp_path)
        monkeypatch.setattr(_peers, "PEERS", {"fake": ("fake.py", {})})

    return make


def test_without_the_environment_every_peer_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_peers, "PYTHON", tmp_path / "python")
    figures = _peers.measure(SHAPES, 2)
    assert figures == {name: {"absent": _peers.ABSENT} for name in _peers.PEERS}


def test_a_peer_that_works_has_seconds_of_every_shape(fake):
    fake(fails=False)
    figures = _peers.measure(SHAPES, 3)
    assert figures["fake"]["versions"] == {"fake": "1"}
    assert figures["fake"]["one run"] == {"seconds": [0.004096] * 3, "gb_per_s": pytest.approx(0.001)}
    assert figures["fake"]["scattered"]["gb_per_s"] == pytest.approx(0.008)


def test_a_peer_that_fails_says_why_and_has_no_figure(fake):
    fake(fails=True)
    assert _peers.measure(SHAPES, 2) == {"fake": {"absent": "ended with status 1: no such path"}}
    json.dumps(_peers.measure(SHAPES, 1))


def test_pieces_touch_on_neither_side():
    for pieces, size in ((2, 16), (2048, 32768)):
        sides = [_places.places(pieces, size, target=target) for target in (False, True)]
        assert sides[0] != sides[1]
        for offsets in sides:
            ordered = sorted(offsets)
            assert all(b - a >= 2 * size for a, b in pairwise(ordered))
            assert ordered[0] >= 0 and ordered[-1] + size <= _places.memory_bytes([(pieces, size)])
    assert _places.places(1, 4096, target=True) == [0]
