"""The page of one run: whole, self-contained, and small for a large fleet."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from headrace.types.outcomes import RunData, Series
from headrace.workload.html import (
    flattened,
    fleet,
    instance_loads,
    latency,
    load_over_time,
    run_html,
    thinned,
)
from tests.workload.runs import drawn_run

TITLES = (
    "Time to first token",
    "Time per output token, after the first",
    "End to end",
    "Time to first token over time",
    "Rate of requests",
    "Requests under way",
    "KV use",
    "Queues",
    "KV under way",
    "Roles",
    "Failed requests",
    "Load by instance",
)


@pytest.fixture(scope="module")
def html() -> str:
    return run_html(drawn_run("a & <b> $x$", rows=400, goals=True))


def test_every_plot_has_a_title_units_and_a_reading(html: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(figures) == len(TITLES)
    for title, figure in zip(TITLES, figures, strict=True):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
        assert title in texts
        assert len(re.findall(r"<figcaption>[A-Z].{20,}\.</figcaption>", figure)) == 1, title
        svg = figure[figure.index("<svg") : figure.index("</svg>") + 6]
        ElementTree.fromstring(svg)


def test_loads_nothing_and_runs_nothing(html: str) -> None:
    assert "<script" not in html
    assert not re.search(r'(?:src|href)="(?!#)(?!http://www\.w3\.org)', html)
    assert "@import" not in html
    assert "url(http" not in html


def test_names_are_escaped(html: str) -> None:
    assert "<h1>a &amp; &lt;b&gt; $x$</h1>" in html
    assert html.count("<b>") == html.count('class="card"'), "no bold but the headline figures"


def test_says_what_it_is(html: str) -> None:
    assert html.index("Simulated, on a virtual clock. Cost model: catalogue H100") < html.index("<svg")


def test_goals_are_drawn(html: str) -> None:
    assert "goal 400 ms" in html
    assert "goal 30 ms" in html
    assert "completed within goals" in html
    many = latency("TTFT", np.linspace(0.1, 0.3, 50), np.arange(50) * 1_000_000)
    assert "Of 50 different goals the 4 tightest are drawn" in many


def test_readable_on_dark_pages(html: str) -> None:
    assert "currentColor" in html
    assert "#010203" not in html
    assert "prefers-color-scheme:dark" in html


def test_the_same_run_gives_the_same_page() -> None:
    assert load_over_time(drawn_run(rows=60)) == load_over_time(drawn_run(rows=60))


def bare(rows: int) -> RunData:
    """As a client has it: no series, no instances."""
    run = drawn_run(rows=rows)
    run.series = Series(at_ns=np.zeros(0, dtype=np.int64))
    run.outcomes.instances = ()
    return run


def test_a_live_run_without_what_only_a_simulation_knows() -> None:
    run = bare(50)
    run.clock, run.facts = "wall", {"model": "m"}
    html = run_html(run)
    assert html.index("Live, on the wall clock.") < html.index("<svg")
    for absent in ("KV use", "Queues", "Instances", "Roles"):
        assert absent not in html


def test_nothing_succeeded_and_nothing_was_asked() -> None:
    run = bare(5)
    run.outcomes.first_ns[:] = 0
    run.outcomes.finished_ns[:] = 0
    run.outcomes.error[:] = 0
    for row in range(5):
        run.outcomes.fail(row, "<crash>")
    html = run_html(run)
    assert "&lt;crash&gt;" in html
    assert "100.00%" in html
    assert "No request failed" in run_html(bare(0))


def test_series_of_the_whole_fleet_or_by_instance() -> None:
    run = drawn_run(rows=50)
    run.series.values = {"kv_used": np.linspace(0, 1, 120), "waiting": np.ones(120)}
    html = fleet(run)
    assert html.count("<svg") == 2
    assert "KV under way" not in html


def test_busiest_and_idlest() -> None:
    """50 prefill, with one that does most; one decodes everything."""
    run = drawn_run(rows=2_000, instances=100)
    run.outcomes.prefill[:1_000] = 33
    run.outcomes.decode[:] = 77
    html = instance_loads(run)
    prefill, decode = re.findall(r"<table>.*?</table>", html)
    assert "Prefill: 50 of 100 instances" in prefill
    assert re.findall("instance-[0-9]+|…", prefill)[0] == "instance-33"
    assert (prefill.count("<tr>"), prefill.count("…")) == (12, 1), "heads, 5 at either end, and a gap"
    assert "Decode: 1 of 100 instances" in decode
    assert re.search("instance-77</td><td>[0-9,]+</td><td>[0-9,]+</td><td>1.00<", decode)


def test_a_large_fleet_is_a_small_page() -> None:
    """The samples of 1,024 instances; rows are few here, and thinned the same."""
    run = drawn_run(rows=20_000, rate=3_000.0, instances=1_024, samples=600, goals=True)
    html = run_html(run, (1.0, 2.0))
    assert len(html) < 1_000_000
    assert "leave out the first 1 s and the last 2 s" in html


def test_thinned() -> None:
    assert thinned(3).tolist() == [0, 1, 2]
    assert (len(thinned(10_000)), thinned(10_000)[-1]) == (400, 9_999)
    assert thinned(0).tolist() == []


def test_flattened() -> None:
    assert dict(flattened({"a": {"b": 1, "c": {}}, "d": None})) == {"a.b": 1, "a.c": {}, "d": None}
