from collections import Counter
from typing import Any

import pytest

from headrace import registry
from headrace.types.views import Wait
from tests.cluster.columns import ask, fleet_of


def load(**config: Any) -> Any:
    return registry.load("cluster.placement", "power_of_two", config)


def test_the_lighter_of_two_drawn_rows_takes_the_work():
    view = fleet_of(["mixed"] * 9, assigned_tokens=range(9))
    drawn: Counter[str] = Counter()
    for serial in range(2000):
        placed = load().place(ask(serial=serial), view)
        reasons = placed.reasons
        assert placed.prefill == placed.decode and placed.prefill.name != reasons["other"]
        assert reasons["assigned_tokens"] == float(placed.prefill.name[1:]) < reasons["other_tokens"]
        drawn.update([placed.prefill.name, reasons["other"]])
    assert set(drawn) == {f"n{i}" for i in range(9)}
    assert max(drawn.values()) < 1.3 * min(drawn.values())


def test_draws_follow_the_seed_and_the_serial_only():
    view = fleet_of(["mixed"] * 64)
    first = [load(seed=1).place(ask(serial=n), view) for n in range(50)]
    assert first == [load(seed=1).place(ask(serial=n), view) for n in range(50)]
    assert first != [load(seed=2).place(ask(serial=n), view) for n in range(50)]
    assert len({p.prefill for p in first}) > 25


def test_two_rows_are_told_apart_and_one_row_needs_no_draw():
    pair = fleet_of(["mixed", "mixed"], assigned_tokens=[5, 2])
    assert {load().place(ask(serial=n), pair).prefill.name for n in range(20)} == {"n1"}
    assert load().place(ask(), fleet_of(["mixed"])).prefill.name == "n0"
    assert isinstance(load().place(ask(), fleet_of(["mixed"], draining=[0])), Wait)


def test_the_decode_half_is_drawn_for_itself():
    view = fleet_of(["prefill"] * 16 + ["decode"] * 16)
    placed = [load().place(ask(serial=n), view) for n in range(200)]
    assert {p.prefill.name for p in placed} == {f"n{i}" for i in range(16)}
    assert {p.decode.name for p in placed} == {f"n{i}" for i in range(16, 32)}
    together = sum(int(p.prefill.name[1:]) + 16 == int(p.decode.name[1:]) for p in placed)
    assert together < 40


def test_decode_can_be_left_open():
    view = fleet_of(["prefill", "decode", "decode"], assigned_tokens=[0, 9, 2])
    assert load(bind="late").place(ask(), view).decode is None
    assert load(bind="late").bind(ask(), view, view.addresses[0]) == view.addresses[2]
    mixed = fleet_of(["mixed", "mixed"])
    placed = load(bind="late").place(ask(), mixed)
    assert placed.prefill == placed.decode


@pytest.mark.parametrize("rows", [8, 256])
def test_it_spreads_better_than_one_draw(rows: int):
    """Balls into bins: with two choices the fullest of n bins after n balls has about log2 log2 n + 2 of them."""
    tokens = [0.0] * rows
    for serial in range(rows):
        view = fleet_of(["mixed"] * rows, assigned_tokens=tokens)
        tokens[int(load().place(ask(serial=serial), view).prefill.name[1:])] += 1
    assert max(tokens) <= 4
