"""Generators: the seed decides all, moments are as asked, prefixes grow as the texts do."""

import os
from importlib import import_module
from pathlib import Path

import msgspec
import numpy as np
import pytest

from headrace.types.errors import ConfigError
from headrace.types.trace import Trace
from headrace.workload.arrivals import Arrivals, Diurnal, Gamma, OnOff, Poisson, Regular, Windows, instants
from headrace.workload.generators import generate, names
from headrace.workload.lengths import Constant, Empirical, Lengths, Lognormal, Uniform, Zipf, draw
from headrace.workload.mix import stream

COLUMNS = (
    "arrival_ns",
    "prompt",
    "output",
    "hash_ids",
    "hash_starts",
    "follows",
    "session",
    "tenant",
    "goal",
    "hidden",
)


def rng() -> np.random.Generator:
    return stream(3, "test")


def gaps(process: Arrivals, rows: int = 100_000) -> np.ndarray:
    return np.diff(instants(process, rows, rng())) * 1e-9


def check(trace: Trace) -> None:
    """What every trace keeps to."""
    rows = len(trace)
    assert rows and (np.diff(trace.arrival_ns) >= 0).all() and trace.arrival_ns[0] >= 0
    assert (trace.prompt >= 1).all() and (trace.output >= 1).all()
    assert (trace.hidden >= 0).all() and (trace.hidden < trace.output).all()
    assert (trace.follows < np.arange(rows)).all()
    for name in COLUMNS:
        assert getattr(trace, name).dtype == np.int64, name
    assert trace.hash_starts[0] == 0 and trace.hash_starts[-1] == len(trace.hash_ids)
    if trace.block_size:
        assert np.array_equal(np.diff(trace.hash_starts), trace.prompt // trace.block_size)


@pytest.mark.parametrize("name", names())
def test_the_seed_decides_all(name: str):
    first, again, other = (generate(name, {}, seed) for seed in (1, 1, 2))
    check(first)
    for column in COLUMNS:
        assert np.array_equal(getattr(first, column), getattr(again, column)), column
    assert not np.array_equal(first.prompt, other.prompt)
    module = import_module(f"headrace.workload.generators.{name}")
    assert issubclass(module.Config, msgspec.Struct) and module.Config.__struct_config__.frozen
    assert module.__doc__ and "Leaves out:" in module.__doc__


@pytest.mark.parametrize("name", names())
def test_wrong_settings_are_errors(name: str):
    with pytest.raises(ConfigError, match=rf"generator {name} has no setting 'no_such'"):
        generate(name, {"no_such": 1}, 0)
    with pytest.raises(ConfigError, match="kind"):
        generate(name, {"arrivals": {"kind": "never"}}, 0)
    with pytest.raises(ConfigError, match="rate_per_s"):
        generate(name, {"arrivals": {"rate_per_s": float("nan")}}, 0)
    count = next(iter(import_module(f"headrace.workload.generators.{name}").Config.__struct_fields__))
    with pytest.raises(ConfigError, match=count):
        generate(name, {count: 0}, 0)


def test_unknown_generators_are_errors():
    with pytest.raises(ConfigError, match="no trace generator 'x'; there are: agents, conversations"):
        generate("x", {}, 0)


def test_poisson():
    found = gaps(Poisson(rate_per_s=20))
    assert found.mean() == pytest.approx(1 / 20, rel=0.01)
    assert found.std() / found.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gamma_recovers_its_shape_by_moments(shape: float):
    for process in (Gamma(rate_per_s=5, shape=shape), Gamma(rate_per_s=5, cv=shape**-0.5)):
        found = gaps(process)
        assert found.mean() == pytest.approx(1 / 5, rel=0.02)
        assert found.mean() ** 2 / found.var() == pytest.approx(shape, rel=0.05)


def test_regular():
    assert instants(Regular(rate_per_s=4), 3, rng()).tolist() == [0, 250_000_000, 500_000_000]


def test_on_off_has_its_rates():
    process = OnOff(on_rate_per_s=30, off_rate_per_s=2, on_s=5, off_s=15, fixed=True)
    at = instants(process, 100_000, rng()) * 1e-9
    on = (at % 20 < 5).sum()
    whole = at[-1] // 20
    assert on / (whole * 5) == pytest.approx(30, rel=0.02)
    assert (len(at) - on) / (whole * 15) == pytest.approx(2, rel=0.03)
    drawn = instants(OnOff(on_rate_per_s=10, on_s=2, off_s=3), 100_000, rng()) * 1e-9
    assert len(drawn) / drawn[-1] == pytest.approx(10 * 2 / 5, rel=0.03)


def test_diurnal_follows_the_day():
    at = instants(Diurnal(rate_per_s=10, swing=0.5, period_s=100), 200_000, rng()) * 1e-9
    counts = np.bincount((at % 100 // 25).astype(int)) / (at[-1] / 100 * 25)
    assert len(at) / at[-1] == pytest.approx(10, rel=0.01)
    middle = 10 * (1 + 0.5 * 2 / np.pi)  # the mean of the cosine over the middle quarter on each side
    assert counts == pytest.approx([20 - middle, middle, middle, 20 - middle], rel=0.02)
    shifted = instants(Diurnal(rate_per_s=10, swing=0.5, period_s=100, phase=0.5), 200_000, rng()) * 1e-9
    assert (
        np.bincount((shifted % 100 // 25).astype(int))[0]
        > 1.5 * np.bincount((shifted % 100 // 25).astype(int))[1]
    )


def test_diurnal_by_table():
    at = instants(Diurnal(rate_per_s=10, period_s=40, table=(0, 1, 3)), 100_000, rng()) * 1e-9
    counts = np.bincount((at % 40 // (40 / 3)).astype(int), minlength=3) / len(at)
    assert counts == pytest.approx([0, 0.25, 0.75], abs=0.01)
    ahead = instants(Diurnal(rate_per_s=10, period_s=40, table=(0, 1, 3), phase=2 / 3), 100_000, rng()) * 1e-9
    first = np.bincount((ahead % 40 // (40 / 3)).astype(int), minlength=3) / len(ahead)
    assert first == pytest.approx([0.75, 0, 0.25], abs=0.01)


def test_windows_have_each_its_rate_and_shape():
    process = Windows(window_s=500, rates_per_s=(40, 0, 10), shapes=(0.3, 1, 4))
    at = instants(process, 200_000, rng()) * 1e-9
    number = (at // 500).astype(int) % 3
    rounds = at[-1] / 1500
    rates = np.bincount(number, minlength=3) / (rounds * 500)
    assert rates == pytest.approx([40, 0, 10], rel=0.03, abs=1e-9)
    for window, shape in ((0, 0.3), (2, 4.0)):
        inside = np.diff(at)[(number[:-1] == window) & (np.diff(at) < 400)]
        assert inside.mean() ** 2 / inside.var() == pytest.approx(shape, rel=0.06)


@pytest.mark.parametrize(
    "process",
    [
        Poisson(rate_per_s=0),
        Gamma(shape=-1),
        Gamma(cv=0),
        OnOff(on_rate_per_s=0),
        OnOff(on_s=0),
        Diurnal(swing=1.5),
        Diurnal(table=(0, 0)),
        Diurnal(table=(1, -1)),
        Windows(rates_per_s=(1, 2), shapes=(1,)),
        Windows(rates_per_s=(0,), shapes=(1,)),
        Windows(window_s=0),
        Windows(rates_per_s=(1,), shapes=(0,)),
    ],
    ids=str,
)
def test_impossible_arrivals_are_errors(process: Arrivals):
    with pytest.raises(ConfigError, match="arrivals: "):
        instants(process, 10, rng())


def test_lengths():
    assert draw(Constant(value=7), 3, rng()).tolist() == [7, 7, 7]
    uniform = draw(Uniform(low=3, high=5), 30_000, rng())
    assert np.bincount(uniform)[3:] / 30_000 == pytest.approx([1 / 3] * 3, abs=0.02)
    zipf = np.bincount(draw(Zipf(exponent=1.1, max=1023), 200_000, rng()))
    assert len(zipf) == 1024 and zipf[1] / zipf[2] == pytest.approx(2**1.1, rel=0.03)
    assert zipf[1] / zipf[10] == pytest.approx(10**1.1, rel=0.06)
    drawn = draw(Lognormal(median=200, sigma=0.8), 100_000, rng())
    assert np.median(drawn) == pytest.approx(200, rel=0.02) and np.log(drawn).std() == pytest.approx(
        0.8, rel=0.02
    )
    clipped = draw(Lognormal(median=200, sigma=2, min=50, max=300), 10_000, rng())
    assert (clipped.min(), clipped.max()) == (50, 300)
    assert set(draw(Empirical(values=(2, 5, 5)), 100, rng()).tolist()) == {2, 5}


@pytest.mark.parametrize(
    "lengths",
    [
        Constant(value=0),
        Uniform(low=5, high=4),
        Uniform(low=0),
        Zipf(max=0),
        Zipf(max=2**30),
        Lognormal(median=-1),
        Lognormal(min=9, max=3),
        Empirical(),
        Empirical(values=(0, 3)),
        Empirical(file="x.csv"),
    ],
    ids=str,
)
def test_impossible_lengths_are_errors(lengths: Lengths):
    with pytest.raises(ConfigError, match="lengths: "):
        draw(lengths, 10, rng())


def test_lengths_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "t.csv").write_text("timestamp_s,input_tokens,output_tokens\n0,10,1\n1,20,2\n")
    (tmp_path / "l.csv").write_text("num_prefill_tokens,other\n3,x\n4,y\n")
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path))
    assert set(draw(Empirical(file="t.csv", column="output"), 50, rng()).tolist()) == {1, 2}
    assert set(draw(Empirical(file="l.csv", column="num_prefill_tokens"), 50, rng()).tolist()) == {3, 4}
    with pytest.raises(ConfigError, match="other is not a number"):
        draw(Empirical(file="l.csv", column="other"), 50, rng())
    with pytest.raises(ConfigError, match="needs the column 'none'"):
        draw(Empirical(file="l.csv", column="none"), 50, rng())
    trace = generate("synthetic", {"requests": 100, "file": "t.csv"}, 0)
    assert set(zip(trace.prompt.tolist(), trace.output.tolist(), strict=True)) == {(10, 1), (20, 2)}


def test_another_length_moves_no_arrival():
    first = generate("synthetic", {"requests": 500}, 1)
    other = generate("synthetic", {"requests": 500, "prompt": {"kind": "constant", "value": 3}}, 1)
    assert np.array_equal(first.arrival_ns, other.arrival_ns) and np.array_equal(first.output, other.output)


def test_a_part_keeps_its_kind():
    trace = generate("synthetic", {"requests": 2000, "arrivals": {"rate_per_s": 50}}, 1)
    assert 2000 / (trace.duration_ns * 1e-9) == pytest.approx(50, rel=0.1)


def test_classes_are_mixed_by_weight():
    classes = [
        {"weight": 1, "category": "chat", "tenant": "x", "ttft_ms": 200, "tpot_ms": 50.0},
        {"weight": 3, "category": "batch", "tenant": "y", "priority": 5},
    ]
    trace = generate("synthetic", {"requests": 20_000, "classes": classes}, 1)
    assert trace.categories == ("chat", "batch") and trace.tenants == ("x", "y")
    chat = trace.category == 0
    assert chat.mean() == pytest.approx(0.25, abs=0.01)
    assert np.array_equal(trace.tenant == 0, chat) and np.array_equal(trace.priority == 5, ~chat)
    goal = trace.goals[trace.goal[np.flatnonzero(chat)[0]]]
    assert (goal.ttft_ns, goal.tpot_ns) == (200_000_000, 50_000_000)
    with pytest.raises(ConfigError, match="classes: no weight is negative"):
        generate("synthetic", {"classes": [{"weight": -1}]}, 0)
    with pytest.raises(ConfigError, match="wieght"):
        generate("synthetic", {"classes": [{"wieght": 1}]}, 0)


def test_a_session_is_of_one_class():
    classes = [{"category": "a"}, {"category": "b"}]
    trace = generate("conversations", {"conversations": 200, "classes": classes}, 1)
    for session in range(200):
        assert len(set(trace.category[trace.session == session].tolist())) == 1
    assert len(trace.tenants) == 4  # classes name none, so the tenants stay


@pytest.mark.parametrize("name", ["conversations", "agents"])
def test_a_turn_begins_with_the_turn_before_and_its_answer(name: str):
    trace = generate(name, {}, 4)
    check(trace)
    later = np.flatnonzero(trace.follows >= 0)
    earlier = trace.follows[later]
    assert len(later) > len(trace) / 2
    assert (trace.session[later] == trace.session[earlier]).all()
    assert (trace.prompt[later] > trace.prompt[earlier] + trace.output[earlier]).all()
    assert (trace.arrival_ns[later] > trace.arrival_ns[earlier] + trace.output[earlier] * 30_000_000).all()
    for row in later[:300].tolist():
        before = trace.hashes(int(trace.follows[row]))
        assert np.array_equal(trace.hashes(row)[: len(before)], before)
    heads = np.flatnonzero(trace.follows < 0)
    assert len(heads) == len(np.unique(trace.session))


def test_only_the_system_prompt_is_shared():
    config = {
        "conversations": 60,
        "tenants": 3,
        "system": {"kind": "constant", "value": 100},
        "block_size": 16,
    }
    trace = generate("conversations", config, 4)
    owners: dict[int, set[tuple[int, int]]] = {}
    for row in range(len(trace)):
        for place, block in enumerate(trace.hashes(row).tolist()):
            owner = int(trace.tenant[row]) if place < 100 // 16 else int(trace.session[row]) + 1000
            owners.setdefault(block, set()).add((owner, place))
    assert all(len(found) == 1 for found in owners.values())
    assert len({owner for found in owners.values() for owner, _ in found if owner < 1000}) == 3


def test_conversations_end_at_the_limit():
    trace = generate("conversations", {"conversations": 200, "context_max": 2000}, 4)
    assert int((trace.prompt + trace.output).max()) <= 2000
    cut = generate("conversations", {"conversations": 200, "end_s": 60}, 4)
    whole = generate("conversations", {"conversations": 200}, 4)
    assert cut.arrival_ns[-1] <= 60_000_000_000 and len(cut) == (whole.arrival_ns <= 60_000_000_000).sum()
    with pytest.raises(ConfigError, match="give no request"):
        generate("conversations", {"context_max": 5}, 4)


def test_reasoning_is_hidden_and_bounded():
    trace = generate("reasoning", {"requests": 20_000, "share": 0.7, "budget": 512}, 4)
    check(trace)
    assert (trace.hidden > 0).mean() == pytest.approx(0.7, abs=0.02)
    assert trace.hidden.max() == 512
    free = generate("reasoning", {"requests": 20_000}, 4)
    assert free.hidden.sum() > 3 * (free.output - free.hidden).sum()


def test_azure_lengths_are_drawn_together():
    if not os.environ.get("HEADRACE_DATA"):
        pytest.skip("set HEADRACE_DATA to the folder of public traces")
    file = "azure2023/AzureLLMInferenceTrace_conv.csv"
    trace = generate("synthetic", {"requests": 200_000, "arrivals": {"rate_per_s": 3000}, "file": file}, 0)
    assert trace.prompt.mean() == pytest.approx(1154.7, rel=0.01)
    assert trace.output.mean() == pytest.approx(211.1, rel=0.01)
    assert (len(trace) - 1) / (trace.duration_ns * 1e-9) == pytest.approx(3000, rel=0.01)
