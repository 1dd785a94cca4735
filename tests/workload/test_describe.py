"""Descriptions: figures against slow and simple counts, and those that publishers give of their traces."""

import os
from collections import OrderedDict
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from headrace.types.errors import ConfigError
from headrace.types.trace import Trace, make_trace
from headrace.workload.describe import Description, describe, tables
from headrace.workload.generators import generate
from headrace.workload.reuse import Reuse, reuse
from headrace.workload.trace_page import trace_page
from headrace.workload.traces import read

S = 1_000_000_000


def hits_one_by_one(trace: Trace, cache_blocks: int) -> int:
    """A cache that is really kept: leading blocks found, then used from the last to the first."""
    cache: OrderedDict[int, None] = OrderedDict()
    found = 0
    for row in range(len(trace)):
        ids = trace.hashes(row).tolist()
        for block in ids:
            if block not in cache:
                break
            found += 1
        for block in reversed(ids):
            cache.pop(block, None)
            cache[block] = None
        while len(cache) > cache_blocks:
            cache.popitem(last=False)
    return found


def data(name: str) -> Path:
    if not os.environ.get("HEADRACE_DATA"):
        pytest.skip("set HEADRACE_DATA to the folder of public traces")
    path = Path(os.environ["HEADRACE_DATA"]) / name
    if not path.exists():
        pytest.skip(f"{name} is not in HEADRACE_DATA")
    return path


def test_lru_hits_of_every_size_are_exact():
    config = {
        "conversations": 60,
        "tenants": 2,
        "system": {"kind": "constant", "value": 200},
        "block_size": 64,
    }
    trace = generate("conversations", config, 2)
    found = reuse(trace)
    assert found.blocks == len(trace.hash_ids) and found.different == len(np.unique(trace.hash_ids))
    for size in (1, 2, 3, 5, 17, 50, 200, 1000, found.different):
        assert found.hits(size) == hits_one_by_one(trace, size), size
    assert found.hits() == hits_one_by_one(trace, 10**9) == found.blocks - found.different
    sizes, rates = found.curve()
    assert (np.diff(rates) >= 0).all() and rates[-1] == found.token_rate() == found.token_rate(int(sizes[-1]))


def test_no_reuse():
    trace = make_trace(
        "t",
        np.array([0, 1]),
        np.array([8, 8]),
        np.array([1, 1]),
        block_size=4,
        hash_ids=np.arange(4),
        hash_starts=np.array([0, 2, 4]),
    )
    found = reuse(trace)
    assert found.hits() == 0 == found.block_rate(3) and len(found.curve()[0])
    assert reuse(make_trace("n", np.array([0]), np.array([8]), np.array([1]))).block_rate() == 0.0


@pytest.mark.parametrize(
    ("name", "published", "blocks", "tokens"),
    [("conversation", 0.366, 0.3819, 0.3734), ("synthetic", 0.640, 0.6594, 0.6504)],
)
def test_ideal_hit_rates_of_mooncake(name: str, published: float, blocks: float, tokens: float):
    """The publisher counts all ids, those of partly filled blocks too; only full blocks can be shared."""
    path = data(f"mooncake/{name}_trace.jsonl")
    padded = reuse(read(path, pad=True)[0])
    assert padded.block_rate() == padded.token_rate() == pytest.approx(published, abs=0.0005)
    full = reuse(read(path)[0])
    assert full.block_rate() == pytest.approx(blocks, abs=0.0001)
    assert full.token_rate() == pytest.approx(tokens, abs=0.0001)


def test_figures():
    trace = make_trace(
        "t",
        np.array([0, 10, 70, 71, 130]) * S,
        np.array([1, 2, 3, 4, 100]),
        np.array([5, 5, 5, 5, 5]),
        session=np.array([0, 1, 0, -1, 0]),
        category=np.array([1, 1, 0, 0, 0]),
        categories=("x", "y"),
        hidden=np.array([5, 0, 0, 0, 0]),
    )
    found = describe(trace)
    assert (found.requests, found.duration_s) == (5, 130.0)
    assert found.rates.mean_per_s == pytest.approx(4 / 130) and found.rates.peak_per_minute == 2
    gaps = np.array([10, 60, 1, 59])
    assert found.rates.gap_cv == pytest.approx(gaps.std() / gaps.mean())
    counts = np.bincount(np.array([0, 10, 70, 71, 130]) // 10, minlength=14)[:13]
    assert found.rates.dispersion["10"] == pytest.approx(counts.var() / counts.mean())
    assert "60" not in found.rates.dispersion  # two minutes are too few
    assert (found.prompt.p50, found.prompt.max, found.prompt.total, found.prompt.mean) == (3, 100, 110, 22.0)
    assert found.hidden_share == pytest.approx(5 / 25)
    assert found.sessions is not None and (found.sessions.sessions, found.sessions.requests) == (1, 3)
    assert found.sessions.turns.max == 3 and found.sessions.wait_s["p50"] == 65
    assert found.categories["x"].requests == 3 and found.categories["y"].prompt_mean == 1.5
    assert found.prefixes is None
    with pytest.raises(ConfigError, match="has no requests"):
        describe(make_trace("none", np.zeros(0), np.zeros(0), np.zeros(0)))


def test_poisson_has_cv_and_dispersion_of_one():
    found = describe(generate("synthetic", {"requests": 50_000, "arrivals": {"rate_per_s": 10}}, 1)).rates
    assert found.gap_cv == pytest.approx(1, abs=0.02)
    assert found.dispersion["1"] == pytest.approx(1, abs=0.1)
    assert found.dispersion["10"] == pytest.approx(1, abs=0.25)


def test_one_instant():
    found = describe(make_trace("t", np.zeros(3), np.ones(3), np.ones(3)))
    assert found.rates.mean_per_s == 0.0 and found.rates.peak_per_minute == 3 and found.rates.dispersion == {}


def printed(found: Description) -> str:
    console = Console(width=160, file=StringIO())
    console.print(tables(found))
    return console.file.getvalue()  # type: ignore[attr-defined]


def page_of(trace: Trace) -> str:
    known: Reuse | None = reuse(trace) if len(trace.hash_ids) else None
    return trace_page(trace, describe(trace, known), known, None)


def test_tables_page_and_json_say_the_same():
    classes = [{"category": "<b>chat"}, {"category": "[b]code"}]
    trace = generate("conversations", {"conversations": 100, "classes": classes}, 2)
    found = describe(trace)
    assert found.prefixes is not None
    rate = f"{found.prefixes.token_rate:.1%}"
    text = printed(found)
    for word in (f"{found.requests:,}", rate, "<b>chat", "[b]code", "sessions of several turns"):
        assert word in text, word
    page = page_of(trace)
    assert page.count("<svg") == 7 and rate in page and "&lt;b&gt;chat" in page and "<b>chat" not in page
    assert 'href="http' not in page and "src=" not in page and "<script" not in page
    again = msgspec.json.decode(msgspec.json.encode(found), type=Description)
    assert again == found


@pytest.mark.parametrize(
    "trace",
    [
        make_trace("one", np.zeros(1), np.ones(1), np.ones(1)),
        make_trace("instant", np.zeros(3), np.array([1, 5, 9]), np.ones(3)),
        make_trace("two", np.array([0, 5]), np.array([3, 3]), np.array([3, 3])),
    ],
    ids=lambda trace: trace.name,
)
def test_small_traces_have_a_page(trace: Trace):
    assert "<svg" in page_of(trace)
