from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import registry
from headrace.types.views import Wait
from tests.cluster.columns import Held, PlainCosts, ask, chain, fleet_of

PROMPT = chain(10)
"""Of 100 tokens, in blocks of 10."""
ROOMY = {"blocks_total": 1e6, "block_size": 10}


def load(**config: Any) -> Any:
    return registry.load("cluster.placement", "prompt_tree", config)


def held(*blocks: int, leanings: Sequence[str] = (), **columns: Any) -> Any:
    """Mixed rows that hold so many blocks of `PROMPT`."""
    return fleet_of(leanings or ["mixed"] * len(blocks), prefixes=Held(*blocks), **(ROOMY | columns))


def place(view: Any, total: int = 100, serial: int = 0, **config: Any) -> Any:
    return load(**config).place(ask(total, hashes=PROMPT, serial=serial), view)


def test_the_longest_prefix_wins_at_equal_load():
    placed = place(held(2, 5, 4))
    assert placed.prefill.name == placed.decode.name == "n1" and placed.fetch is None
    assert placed.reasons == {
        "rule": "prompt_tree",
        "time": 50,
        "unit": "tokens",
        "held": 50,
        "held_most": 50,
    }


def test_a_queue_weighs_as_much_as_the_prefix_saves():
    assert place(held(5, 0, assigned_tokens=[49, 0])).prefill.name == "n0"
    assert place(held(5, 0, assigned_tokens=[51, 0])).prefill.name == "n1"


def test_what_is_prefilled_already_is_no_queue_where_the_router_knows():
    assigned = {"assigned_tokens": [900, 800]}
    assert place(held(5, 0, assigned_prefill=np.array([49.0, 0.0]), **assigned)).prefill.name == "n0"
    assert place(held(5, 0, assigned_prefill=np.array([51.0, 0.0]), **assigned)).prefill.name == "n1"
    assert place(held(5, 0, **assigned)).prefill.name == "n1"


def test_one_token_at_least_is_computed():
    """A prompt that is held to its end still needs its last token's logits, so its last block is no hit."""
    assert place(held(10, 9, assigned_tokens=[1, 0])).prefill.name == "n1"
    assert place(held(10, 9, assigned_tokens=[1, 0]), total=105).prefill.name == "n0"


def test_ties_go_to_the_lightest_and_then_in_turn():
    running = {"assigned_tokens": [7, 3, 3], "assigned_prefill": np.zeros(3)}
    assert [place(held(0, 0, 0, **running), serial=n).prefill.name for n in range(4)] == [
        "n1",
        "n2",
        "n1",
        "n2",
    ]


def test_a_row_without_room_comes_last():
    assert place(held(5, 0, blocks_total=[4, 10])).prefill.name == "n1"
    assert place(held(5, 0, blocks_total=[5, 10])).prefill.name == "n0"
    assert place(held(5, 0, blocks_total=[4, 9])).prefill.name == "n0"
    running = {"assigned_tokens": [20, 0], "assigned_prefill": np.zeros(2)}
    assert place(held(5, 0, blocks_total=[6, 10], **running)).prefill.name == "n1"
    assert place(held(5, 0, blocks_total=[7, 10], **running)).prefill.name == "n0"


def test_without_an_index_it_is_the_shortest_queue():
    view = fleet_of(["mixed"] * 3, assigned_tokens=[9, 2, 5], **ROOMY)
    assert place(view).prefill.name == "n1"


@pytest.mark.parametrize(("byte_ns", "fetches"), [(99.0, True), (100.0, True), (101.0, False)])
def test_a_prefix_is_fetched_where_that_is_no_slower_than_computing_it(byte_ns: float, fetches: bool):
    """40 missing tokens of 10 bytes take 400 bytes' time to fetch, and 40 tokens' time to compute."""
    costs = (PlainCosts(token_ns=1000, byte_ns=byte_ns),) * 2
    view = held(2, 6, leanings=["prefill", "decode"], costs=costs, block_bytes=100)
    placed = place(view)
    assert (placed.prefill.name, placed.decode.name) == ("n0", "n1")
    assert placed.fetch == (view.addresses[1] if fetches else None)
    assert place(view, fetch=False).fetch is None
    assert (
        placed.reasons["time"] == pytest.approx(40_000 + 400 * min(byte_ns, 100))
        and placed.reasons["unit"] == "ns"
    )


def test_an_idle_row_that_fetches_beats_a_busy_holder():
    costs = (PlainCosts(byte_ns=1.0),) * 2
    view = held(9, 0, costs=costs, block_bytes=100, assigned_tokens=[50, 0])
    placed = place(view)
    assert placed.prefill.name == "n1" and placed.fetch == view.addresses[0]
    assert place(view, fetch=False).prefill.name == "n0"


def test_who_drains_sends_nothing_and_equal_holders_take_turns():
    costs = (PlainCosts(byte_ns=0.0),) * 4
    leanings = ["prefill", "decode", "decode", "decode"]
    view = held(0, 8, 6, 6, leanings=leanings, draining=[1], costs=costs, block_bytes=100)
    assert [place(view, serial=n).fetch.name for n in range(4)] == ["n2", "n3", "n2", "n3"]


def test_slower_hardware_counts():
    fast, slow = PlainCosts(token_ns=1000), PlainCosts(token_ns=4000)
    assert place(held(5, 0, costs=(slow, fast))).prefill.name == "n1"
    assert place(held(8, 0, costs=(slow, fast))).prefill.name == "n0"
    assert place(held(0, 0, costs=(slow, fast), assigned_tokens=[0, 500])).prefill.name == "n0"
    assert place(held(5, 0, costs=(slow, None))).reasons["unit"] == "tokens"


def test_other_costs_are_noticed():
    fast, slow = PlainCosts(token_ns=1000), PlainCosts(token_ns=4000)
    policy, request = load(), ask(hashes=PROMPT)
    names = [
        policy.place(request, held(0, 0, costs=costs)).prefill.name for costs in ((slow, fast), (fast, slow))
    ]
    assert names == ["n1", "n0"]


def test_decode_goes_to_the_prefix_if_the_transfer_saved_is_worth_it():
    leanings = ["prefill", "decode", "decode"]
    assert place(held(0, 0, 5, leanings=leanings, assigned_tokens=[0, 0, 40])).decode.name == "n2"
    assert place(held(0, 0, 5, leanings=leanings, assigned_tokens=[0, 0, 60])).decode.name == "n1"
    slow_link = (PlainCosts(context_ns=1, byte_ns=10.0),) * 3
    columns = {"leanings": leanings, "assigned_tokens": [0, 0, 600], "block_bytes": 100}
    # 500 bytes less take 5000 ns less; 8 steps over 600 tokens more take 4800 ns more.
    assert place(held(0, 0, 5, costs=slow_link, **columns)).decode.name == "n2"
    columns["assigned_tokens"] = [0, 0, 650]
    assert place(held(0, 0, 5, costs=slow_link, **columns)).decode.name == "n1"


def test_decode_can_be_left_open():
    view = held(0, 0, 5, leanings=["prefill", "decode", "decode"])
    assert place(view, bind="late").decode is None
    assert load(bind="late").bind(ask(hashes=PROMPT), view, view.addresses[0]).name == "n2"
    assert isinstance(load().bind(ask(), held(0, draining=[0]), view.addresses[0]), Wait)


@st.composite
def fleets(draw: st.DrawFn) -> Any:
    rows = draw(st.integers(1, 6))
    kinds = (PlainCosts(byte_ns=draw(st.sampled_from([1.0, 60.0, 200.0]))), PlainCosts(token_ns=3000))
    queue = [draw(st.integers(0, 90)) for _ in range(rows)]
    return held(
        *(draw(st.integers(0, 10)) for _ in range(rows)),
        costs=tuple(draw(st.sampled_from(kinds)) for _ in range(rows)),
        block_bytes=100,
        assigned_tokens=[tokens + draw(st.integers(0, 90)) for tokens in queue],
        assigned_prefill=np.array(queue, dtype=np.float64),
        draining=[i for i in range(1, rows) if draw(st.integers(0, 3)) == 0],
    )


@given(view=fleets(), total=st.integers(95, 130), fetch=st.booleans())
def test_no_other_choice_would_have_been_faster(view: Any, total: int, fetch: bool):
    """Against every row and every source, one by one."""
    takers = [i for i in range(len(view.addresses)) if not view.draining[i]]
    have = [10 * min(int(h), (total - 1) // 10) for h in view.prefixes.hits(PROMPT)]

    def time(row: int, source: int | None) -> float:
        costs = view.costs[row]
        got = have[row] if source is None else max(have[row], have[source])
        queue = view.assigned_prefill[row]
        sent = costs.transfer_ns(10 * (got - have[row]))
        return (queue + total - got) * costs.token_ns + sent

    sources = [None, *takers] if fetch else [None]
    best = min(time(row, source) for row in takers for source in sources)
    placed = place(view, total, fetch=fetch)
    row = view.addresses.index(placed.prefill)
    source = view.addresses.index(placed.fetch) if placed.fetch else None
    assert row in takers and time(row, source) == pytest.approx(best) == placed.reasons["time"]
