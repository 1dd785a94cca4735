"""Figures of a load, from outcomes whose times are known."""

from io import StringIO

import msgspec
import pytest
from rich.console import Console

from headrace.workload.load import Goals, LoadConfig
from headrace.workload.report import LoadReport, Outcome, Spread, progress_bar, render, summarize


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
    outcome(11.0, error="http 503"),
]


def report(goals: Goals | None = None) -> LoadReport:
    config = LoadConfig(goals=goals or Goals(), api_key="secret")
    return summarize(config, "m", OUTCOMES, duration_s=2.0)


def shown(made: LoadReport) -> str:
    console = Console(width=100, file=StringIO())
    with console.capture() as capture:
        console.print(render(made))
    return capture.get()


def test_counts_and_rates() -> None:
    made = report()
    assert (made.completed, made.failed) == (2, 3)
    assert made.errors == {"http 503": 2, "stream error: lost": 1}
    assert (made.input_tokens, made.output_tokens, made.cached_tokens) == (200, 4, 50)
    assert (made.requests_per_s, made.output_tokens_per_s, made.total_tokens_per_s) == (1.0, 2.0, 102.0)
    assert made.goodput_per_s is None


def test_latencies_of_what_succeeded() -> None:
    made = report()
    assert made.ttft_ms is not None
    assert made.tpot_ms is not None
    assert made.itl_ms is not None
    assert made.e2e_ms is not None
    assert made.ttft_ms.mean == pytest.approx(300)
    assert made.tpot_ms.mean == made.tpot_ms.p99 == pytest.approx(150), "one token has no tpot"
    assert (made.itl_ms.mean, made.itl_ms.max) == (pytest.approx(150), pytest.approx(200))
    assert made.e2e_ms.max == pytest.approx(510)


@pytest.mark.parametrize(
    ("goals", "met"),
    [
        (Goals(ttft_ms=250), 1),
        (Goals(ttft_ms=450), 2),
        (Goals(ttft_ms=450, tpot_ms=140), 1),
        (Goals(e2e_ms=1), 0),
    ],
)
def test_goodput(goals: Goals, met: int) -> None:
    made = report(goals)
    assert made.goodput_per_s == met / 2
    assert made.goodput_share == met / 5


def test_spread() -> None:
    made = Spread.of([i / 1000 for i in range(101)])
    assert made is not None
    assert msgspec.structs.astuple(made) == pytest.approx((50, 50, 90, 99, 100))
    assert Spread.of([]) is None


def test_json_keeps_no_secret() -> None:
    raw = report().to_json()
    assert b"secret" not in raw
    decoded = msgspec.json.decode(raw)
    assert decoded["completed"] == 2
    assert decoded["config"]["request_rate"] is None


def test_table() -> None:
    text = shown(report(Goals(ttft_ms=450)))
    for part in ("Time to first token", "300.00", "http 503", "1.00 /s (40.0%)"):
        assert part in text


def test_nothing_came_back() -> None:
    made = summarize(LoadConfig(), "m", [outcome(1.0, error="timeout")], 1.0)
    assert made.ttft_ms is None
    assert "timeout" in shown(made)


def test_progress() -> None:
    with progress_bar(Console(quiet=True)) as progress:
        progress(1, 2)
