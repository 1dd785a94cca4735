"""Variants over seeds: differences that are there are found, and those that are not are not."""

from collections.abc import Iterable, Iterator
from io import StringIO

import msgspec
import numpy as np
import pytest
from rich.console import Console

from headrace.types.errors import ConfigError
from headrace.types.outcomes import RunData
from headrace.workload.compare import Comparison, MetricComparison, compare, render_comparison, verdicts
from headrace.workload.compare_html import comparison_html
from headrace.workload.fidelity import fidelity, render_fidelity
from tests.workload.runs import drawn_run


def runs(seeds: int, wobble: float = 0.01, rows: int = 300, **slower: float) -> Iterator[RunData]:
    """Variants with the same requests by seed; each is slower by its factor, and by chance."""
    for i, (name, factor) in enumerate(slower.items()):
        for seed in range(seeds):
            chance = 1 + wobble * np.random.default_rng([seed, i]).normal()
            yield drawn_run(name, seed, rows, slower=factor * chance)


def renamed(made: Iterable[RunData]) -> Iterator[RunData]:
    for run in made:
        run.name += "<1>"
        yield run


def metric(made: Comparison, key: str) -> MetricComparison:
    return next(each for each in made.metrics if each.key == key)


def said(made: Comparison) -> str:
    return " ".join(verdicts(made))


def shown(part: object) -> str:
    console = Console(width=200, file=StringIO())
    with console.capture() as capture:
        console.print(part)
    return capture.get()


def test_a_difference_is_found() -> None:
    made = compare(runs(5, a=1.0, b=0.8))
    ttft = metric(made, "ttft_mean_ms")
    difference = made.against_baseline(ttft, "b")
    assert difference is not None
    assert difference.relative is not None
    assert (ttft.winner, difference.verdict, difference.seeds) == ("b", "better", 5)
    assert difference.relative[0] == pytest.approx(-0.2, abs=0.03)
    assert difference.relative[1] < difference.relative[0] < difference.relative[2] < 0
    assert made.against_baseline(ttft, "a") is None
    assert "b wins beyond noise on: TTFT (mean, P50, P99)" in said(made)


def test_pairs_see_what_the_requests_hide() -> None:
    """Means differ from seed to seed far more than the variants do."""
    made = compare(runs(5, wobble=0.001, rows=50, a=1.0, b=0.97))
    ttft = metric(made, "ttft_mean_ms")
    assert np.std([v for v in ttft.values["a"] if v is not None]) / (ttft.means["a"] or 1) > 0.03
    assert ttft.winner == "b"


def test_noise_has_no_winner() -> None:
    made = compare(runs(5, wobble=0.05, a=1.0, b=1.0))
    assert all(each.winner is None for each in made.metrics)
    assert "wins" not in said(made)
    assert "noise decides between a and b" in said(made)


def test_false_winners_are_as_rare_as_claimed() -> None:
    """Over many comparisons of the same with the same, at most 5% name any winner."""
    wrong = 0
    for trial in range(60):
        pairs = [
            drawn_run(name, seed, 40, slower=float(np.random.default_rng([trial, seed, i]).normal(1, 0.05)))
            for i, name in enumerate(("a", "b"))
            for seed in range(trial * 10, trial * 10 + 4)
        ]
        wrong += any(each.winner for each in compare(pairs).metrics)
    assert wrong <= 6, "60 trials at 5%: more than 6 has a chance of 2%"


def test_the_best_must_beat_all() -> None:
    made = compare(runs(5, wobble=0.02, a=1.0, b=0.7, c=0.7))
    ttft = metric(made, "ttft_p99_ms")
    assert ttft.winner is None
    assert set(ttft.leaders) == {"b", "c"}
    assert "noise decides between b and c" in said(made)
    assert compare(runs(5, a=1.0, b=0.7, c=0.5)).metrics[0].winner == "c"


def test_same_and_tie() -> None:
    made = compare(runs(4, wobble=0.0, a=1.0, b=1.0, c=1.2))
    ttft = metric(made, "ttft_mean_ms")
    assert (ttft.winner, ttft.leaders) == (None, ["a", "b"])
    assert "a and b are the same, and ahead of the others beyond noise, on: TTFT" in said(made)
    assert "No difference at all on: Failed or unfinished, Prompt tokens cached" in said(made)


def test_more_can_be_better() -> None:
    def cached() -> Iterator[RunData]:
        for run in runs(4, a=1.0, b=1.0):
            if run.name == "b":
                run.outcomes.cached[:] = run.outcomes.prompt
            yield run

    assert metric(compare(cached()), "cached_share").winner == "b"


def test_too_few_seeds() -> None:
    made = compare(runs(2, a=1.0, b=0.5))
    assert metric(made, "ttft_mean_ms").winner is None
    assert "Not enough seeds" in said(made)
    assert "wins" not in said(made)


def test_seeds_that_change_nothing() -> None:
    """Five times the same figures are one observation."""
    same = [(name, seed, slower) for name, slower in (("a", 1.0), ("b", 0.5)) for seed in range(5)]
    made_runs = []
    for name, seed, slower in same:
        run = drawn_run(name, 0, 100, slower=slower)
        run.seed = seed
        made_runs.append(run)
    made = compare(made_runs)
    assert not made.seeds_matter
    assert all(each.winner is None for each in made.metrics)
    assert "seeds changed nothing" in said(made)


def test_lost_requests_are_warned_of() -> None:
    made_runs = list(runs(3, a=1.0, b=0.9))
    for run in made_runs:
        if run.name == "b":
            for row in range(60):
                run.outcomes.fail(row, "shed")
    assert "were lost" in said(compare(made_runs))


def test_a_variant_without_any_success() -> None:
    made_runs = list(runs(3, a=1.0, b=0.9))
    for run in made_runs:
        if run.name == "b":
            run.outcomes.error[:] = 1
            run.outcomes.errors[1:] = ["crash"]
    made = compare(made_runs)
    assert metric(made, "ttft_mean_ms").winner is None
    assert metric(made, "lost_share").winner == "a"
    assert "Too few runs have a figure" in said(made)
    assert "crash" not in comparison_html(made)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        compare(runs(3, a=1.0))
    with pytest.raises(ConfigError, match="seed 0 twice"):
        compare([drawn_run("a", rows=5), drawn_run("a", rows=5)])


def test_terminal_and_json() -> None:
    made = compare(runs(5, a=1.0, b=0.8, c=1.0))
    text = shown(render_comparison(made))
    assert text.startswith("Simulated")
    assert "catalogue H100" in text.splitlines()[0]
    assert "↓ -20" in text
    decoded = msgspec.json.decode(made.to_json())
    assert decoded["metrics"][0]["winner"] == "b"
    assert len(decoded["curves"]["ttft"]["a"]) == len(decoded["levels"])


def test_page() -> None:
    made = compare(renamed(runs(5, a=1.0, b=0.8)))
    live = [drawn_run("live", rows=200), drawn_run("live", rows=200, slower=1.02)]
    html = comparison_html(made, fidelity(live, drawn_run("sim", rows=200, slower=1.1)))
    assert html.index("Simulated") < html.index("wins beyond noise") < html.index("<svg")
    assert "b&lt;1&gt;" in html
    assert "b<1>" not in html
    assert html.count("<svg") == 4
    assert "What differs" in html
    assert "live deployment" in html


def test_fidelity() -> None:
    live = [drawn_run("live", rows=500, slower=slower) for slower in (1.0, 1.05, 0.96)]
    made = fidelity(live, drawn_run("sim", rows=500, slower=1.1))
    ttft = made.figure("ttft_p99_ms")
    assert ttft is not None
    assert (ttft.error, ttft.spread) == pytest.approx((0.10, 0.09), abs=1e-6)
    assert ttft.within(0.05), "twice the spread is more"
    assert not msgspec.structs.replace(ttft, spread=0.01).within(0.05)
    assert made.figure("output_tokens_per_s") is not None
    assert len(made.figures) == 13
    text = shown(render_fidelity(made))
    assert "+10.0%" in text
    assert "3 live runs" in text
    assert msgspec.json.decode(made.to_json())["live_runs"] == 3


def test_fidelity_of_one_run_and_of_none() -> None:
    made = fidelity([drawn_run(rows=50)], drawn_run(rows=50))
    assert {(each.error, each.spread) for each in made.figures} == {(0.0, None)}
    assert "one run" in shown(render_fidelity(made))
    assert fidelity([drawn_run(rows=0)], drawn_run(rows=50)).figures == []
    assert "no figure" in shown(render_fidelity(fidelity([drawn_run(rows=0)], drawn_run(rows=5))))
    with pytest.raises(ConfigError, match="no live run"):
        fidelity([], drawn_run(rows=50))
