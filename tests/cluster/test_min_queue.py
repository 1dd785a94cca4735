"""Shortest queue, and decode that pulls only while it has room."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from headrace import registry
from headrace.types.ids import PoolId
from headrace.types.views import ClusterView, Wait
from tests.cluster.test_placement_contract import question, view_of

POLICY = registry.load("cluster.placement", "min_queue")


def changed(view: ClusterView, row: int, **values: float) -> ClusterView:
    """The view with some columns' values of one row changed."""
    columns: dict[str, Any] = {}
    for name, value in values.items():
        columns[name] = getattr(view, name).copy()
        columns[name][row] = value
    return replace(view, **columns)


def pair(**decode: float) -> ClusterView:
    """A prefill row and a decode row (64 blocks of 16 tokens, 8 sequences) that has nothing, but for what is said."""
    view = replace(view_of([("prefill", False, 0), ("decode", False, 0)]), block_size=16)
    return changed(view, 1, **({"blocks_free": 64} | decode))


def bound(view: ClusterView, total: int = 40) -> Any:
    return POLICY.bind(question(total=total), view, view.addresses[0])


def test_a_prompt_goes_to_the_shortest_queue_and_decode_stays_open():
    view = view_of(
        [("decode", False, 0), ("prefill", False, 4), ("prefill", False, 2), ("prefill", False, 2)]
    )
    placed = POLICY.place(question(), view)
    assert (placed.prefill, placed.decode) == (view.addresses[2], None)
    assert placed.reasons["queue_tokens"] == 20


def test_what_is_prefilled_already_is_no_queue():
    view = view_of([("prefill", False, 3), ("prefill", False, 2), ("decode", False, 0)])
    view = replace(view, assigned_prefill=np.array([9.0, 11, 0]))
    assert POLICY.place(question(), view).prefill == view.addresses[0]


def test_a_queue_is_what_was_given_not_what_was_reported():
    view = changed(
        view_of([("prefill", False, 3), ("prefill", False, 2), ("decode", False, 0)]), 0, tokens_waiting=0
    )
    assert POLICY.place(question(), view).prefill == view.addresses[1]


def test_the_lightest_with_room_pulls():
    rows = [("prefill", False, 0), ("decode", False, 2), ("decode", False, 1), ("decode", False, 3)]
    view = replace(view_of(rows), blocks_free=np.array([0.0, 60, 2, 60]), block_size=16)
    view = changed(view, 2, tokens_running=61 * 16)
    assert bound(view) == view.addresses[1], "the third is lighter, but its memory is used up"


LARGE = {"assigned": 2, "assigned_tokens": 640, "blocks_total": 1000}
"""Two sequences of 20 blocks each were given to it, and are not in its report."""


@pytest.mark.parametrize(
    ("full", "room"),
    [
        ({"assigned": 8, "running": 8, "assigned_tokens": 80}, {"assigned": 7, "running": 7}),
        (
            {"running": 2, "assigned": 2, "blocks_free": 2, "tokens_running": 60 * 16},
            {"running": 2, "assigned": 2, "blocks_free": 3, "tokens_running": 60 * 16},
        ),
        # What it reports as free may be too low: what runs there says better.
        (
            {"running": 2, "assigned": 2, "blocks_free": 2, "tokens_running": 59 * 16 + 1},
            {"running": 2, "assigned": 2, "blocks_free": 2, "tokens_running": 59 * 16},
        ),
        # Two were given to it since it reported 44 blocks free: 20 each.
        (
            LARGE | {"blocks_free": 42, "tokens_running": 958 * 16},
            LARGE | {"blocks_free": 43, "tokens_running": 958 * 16},
        ),
        # What waits takes 40 blocks, a twentieth or more.
        (
            LARGE | {"blocks_total": 800, "blocks_free": 800},
            LARGE | {"blocks_total": 801, "blocks_free": 801},
        ),
        ({"assigned": 1, "running": float("nan")}, {"assigned": 0, "running": float("nan")}),
    ],
    ids=["sequences", "blocks", "context", "blocks given since", "waiting", "unknown"],
)
def test_it_pulls_only_while_it_has_room(full: dict[str, float], room: dict[str, float]):
    assert isinstance(bound(pair(**full)), Wait)
    view = pair(**room)
    assert bound(view) == view.addresses[1]


def test_whoever_has_nothing_takes_anything():
    """It says by itself if it can never hold it; else the sequence would wait for ever."""
    view = pair(blocks_free=10)
    assert bound(view, total=99999) == view.addresses[1]


def test_what_lies_in_its_own_pool_needs_no_memory():
    """Else both would wait for each other where one pool is full of prompts that nobody decodes."""
    used_up = {"running": 1, "blocks_free": 0, "tokens_running": 63 * 16}
    for state in (used_up, {"assigned_tokens": 999}, {"running": float("nan")}):
        apart = pair(**{"assigned": 1} | state)
        assert isinstance(bound(apart), Wait)
        beside = replace(apart, pools=(PoolId(0), PoolId(0)))
        assert bound(beside) == beside.addresses[1]
    full = replace(pair(assigned=8, running=8), pools=(PoolId(0), PoolId(0)))
    assert isinstance(bound(full), Wait)


def test_who_prefilled_decodes_if_nobody_else_is_left():
    view = view_of([("prefill", False, 9), ("decode", True, 0), ("prefill", False, 1)])
    assert bound(view) == view.addresses[0]


def test_a_prefill_instance_that_has_gone_is_no_reason_to_wait():
    view = pair()
    other = view_of([("prefill", False, 0)] * 3).addresses[2]
    assert POLICY.bind(question(), view, other) == view.addresses[1]


def test_the_waiting_share_is_a_setting():
    view = pair(assigned=2, assigned_tokens=640, blocks_total=800, blocks_free=800)
    assert isinstance(bound(view), Wait)
    patient = registry.load("cluster.placement", "min_queue", {"waiting_share": 0.1})
    assert patient.bind(question(), view, view.addresses[0]) == view.addresses[1]
