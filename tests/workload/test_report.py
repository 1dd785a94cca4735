"""Figures of a run, live and simulated, from outcomes whose times are known."""

import time
from io import StringIO

import msgspec
import numpy as np
import pytest
from rich.console import Console

from headrace.types.errors import ConfigError
from headrace.types.outcomes import RunData
from headrace.workload.client import Outcome, as_run
from headrace.workload.load import Goals, LoadConfig
from headrace.workload.report import RunReport, Spread, progress_bar, render, summarize
from tests.workload.runs import drawn_run


def outcome(begun: float, *tokens: float, error: str = "") -> Outcome:
    """Tokens at these instants; the stream ends 10 ms after the last."""
    made = Outcome(begun_s=begun, input_tokens=100, output_tokens=len(tokens), cached_tokens=25, error=error)
    for instant in tokens:
        made.token(instant)
    made.ended_s = (tokens[-1] if tokens else begun) + 0.01
    return made


OUTCOMES = [
    outcome(10.0, 10.2, 10.3, 10.5),
    outcome(10.0, 10.4),
    outcome(11.0, 11.1, 11.2, error="stream error: lost"),
    outcome(11.0, error="http 503"),
    outcome(11.99, error="http 503"),
]


def live(goals: Goals | None = None) -> RunData:
    """2 seconds."""
    return as_run(LoadConfig(goals=goals or Goals(), api_key="secret"), "m", OUTCOMES, 9.0)


def shown(made: RunReport) -> str:
    console = Console(width=100, file=StringIO())
    with console.capture() as capture:
        console.print(render(made))
    return capture.get()


def test_counts_and_rates() -> None:
    made = summarize(live())
    assert made.duration_s == pytest.approx(2.0)
    assert (made.completed, made.failed, made.unfinished, made.retries) == (2, 3, 0, 0)
    assert made.errors == {"http 503": 2, "stream error: lost": 1}
    assert (made.input_tokens, made.output_tokens, made.cached_tokens) == (200, 4, 50)
    rates = (made.requests_per_s, made.output_tokens_per_s, made.total_tokens_per_s)
    assert rates == pytest.approx((1.0, 2.0, 102.0))
    assert made.concurrency == pytest.approx((0.5 + 0.4 + 0.21 + 0.01 + 0.01) / 2)
    assert made.goodput_per_s is None


def test_latencies_of_what_succeeded() -> None:
    made = summarize(live())
    assert made.ttft_ms is not None
    assert made.tpot_ms is not None
    assert made.itl_ms is not None
    assert made.e2e_ms is not None
    assert made.ttft_ms.mean == pytest.approx(300)
    assert made.tpot_ms.mean == made.tpot_ms.p99 == pytest.approx(150), "one token has no tpot"
    assert (made.itl_ms.mean, made.itl_ms.max) == (pytest.approx(150), pytest.approx(200))
    assert made.e2e_ms.max == pytest.approx(500), "to the last token, not to the end of the stream"


@pytest.mark.parametrize(
    ("goals", "met"),
    [
        (Goals(ttft_ms=250), 1),
        (Goals(ttft_ms=450), 2),
        (Goals(ttft_ms=450, tpot_ms=140), 1),
        (Goals(tpot_ms=1), 1),
    ],
)
def test_goodput(goals: Goals, met: int) -> None:
    made = summarize(live(goals))
    assert made.goodput_per_s == pytest.approx(met / 2)
    assert made.goodput_share == met / 5


def test_goals_differ_by_request() -> None:
    run = live()
    none = np.full(5, -1)
    run.goals = (np.array([100, -1, -1, -1, -1]) * 1_000_000, none)
    assert summarize(run).goodput_share == 1 / 5
    run.goals = (none, none)
    assert summarize(run).goodput_share is None


def test_spread() -> None:
    made = Spread.of([i / 1000 for i in range(101)])
    assert made is not None
    assert msgspec.structs.astuple(made) == pytest.approx((50, 50, 90, 99, 100))
    assert Spread.of([]) is Spread.of([np.nan]) is None


def test_skips_warm_up_and_drain() -> None:
    """One arrival a second for 10 s, each takes 2 s: the middle has two under way at any time."""
    run = drawn_run(rows=10, rate=1.0)
    columns = run.outcomes
    columns.arrival_ns[:] = np.arange(10) * 1_000_000_000
    columns.first_ns[:] = columns.arrival_ns + 1_000_000_000
    columns.finished_ns[:] = columns.arrival_ns + 2_000_000_000
    columns.output[:] = 11
    columns.error[:] = 0
    run.duration_s = 11.0
    made = summarize(run, skip_s=(2.5, 3.0))  # [2.5 s, 8 s]
    assert made.ttft_ms is not None
    assert (made.completed, made.ttft_ms.mean, made.unfinished) == (6, 1000.0, 0), "ends at 3, 4, ... 8 s"
    assert made.concurrency == pytest.approx(2.0)
    assert made.requests_per_s == pytest.approx(6 / 5.5)
    for skip_s in ((6.0, 5.0), (-1.0, 0.0)):
        with pytest.raises(ConfigError, match="nothing is left"):
            summarize(run, skip_s=skip_s)


def test_unfinished_and_failed() -> None:
    run = drawn_run(rows=4, rate=1.0)
    run.outcomes.finished_ns[3] = 0
    run.outcomes.fail(2, "lost")
    made = summarize(run)
    assert (made.completed, made.failed, made.unfinished) == (2, 1, 1)


def test_json_keeps_no_secret() -> None:
    raw = summarize(live()).to_json()
    assert b"secret" not in raw
    decoded = msgspec.json.decode(raw)
    assert decoded["completed"] == 2
    assert decoded["settings"]["request_rate"] is None


def test_json_of_numpy_facts() -> None:
    run = drawn_run(rows=4)
    run.facts["events"] = np.int64(7)
    run.facts["path"] = object
    assert msgspec.json.decode(summarize(run).to_json())["facts"]["events"] == 7


def test_table() -> None:
    text = shown(summarize(live(Goals(ttft_ms=450))))
    assert text.startswith("Live")
    for part in ("Time to first token", "300.00", "http 503", "1.00 /s (40.0%)"):
        assert part in text


def test_a_simulated_run_says_so() -> None:
    run = drawn_run(rows=50)
    run.facts |= {"cost_model": "catalogue [H100]", "cost_error": {"prefill": 0.041, "decode": 0.03}}
    text = " ".join(shown(summarize(run)).split())
    assert text.startswith("Simulated")
    assert "catalogue [H100]" in text
    assert "prefill 4.1%, decode 3.0%" in text
    del run.facts["cost_error"]
    assert "not measured" in shown(summarize(run))


def test_nothing_came_back() -> None:
    made = summarize(as_run(LoadConfig(), "m", [outcome(1.0, error="timeout")], 1.0))
    assert made.ttft_ms is None
    assert "timeout" in shown(made)


def test_no_requests_at_all() -> None:
    made = summarize(drawn_run(rows=0))
    assert (made.completed, made.ttft_ms, made.concurrency) == (0, None, 0.0)


def test_a_million_rows() -> None:
    """Ten times as many take some ten times as long, not a hundred times."""
    runs = [drawn_run(rows=rows, rate=3_000.0) for rows in (100_000, 1_000_000)]
    took_s: list[float] = []
    for run in runs:
        begun = time.process_time()
        made = summarize(run)
        took_s.append(time.process_time() - begun)
    assert made.completed > 900_000
    assert took_s[1] < 40 * took_s[0]


def test_progress() -> None:
    with progress_bar(Console(quiet=True)) as progress:
        progress(1, 2)
