from typing import Any

from headrace import registry
from headrace.types.views import ClusterView
from tests.cluster.columns import ask, fleet_of

NAN = float("nan")


def load(**config: Any) -> Any:
    return registry.load("cluster.placement", "freeness", config)


def mixed(rows: int, **columns: Any) -> ClusterView:
    return fleet_of(["mixed"] * rows, **({"blocks_total": 1000, "block_size": 10} | columns))


def chosen(view: ClusterView, priority: int = 0, **config: Any) -> str:
    return load(**config).place(ask(priority=priority), view).prefill.name


def test_the_most_room_for_each_sequence_wins():
    assert chosen(mixed(3, blocks_free=[600, 400, 700], assigned=[4, 2, 6])) == "n1"


def test_what_is_queued_there_is_usage_reported_or_not():
    running = {"assigned": 4, "assigned_tokens": 2000, "blocks_free": [500, 450]}
    assert chosen(mixed(2, running=4, **running)) == "n0"
    assert chosen(mixed(2, running=4, tokens_waiting=[600, 0], **running)) == "n1"
    assert chosen(mixed(2, running=[3, 4], **running)) == "n0"
    assert chosen(mixed(2, running=[2, 4], **running)) == "n1"
    assert chosen(mixed(2, running=[2, 4], held=[2, 0], **running)) == "n0"


def test_the_longest_queue_is_not_the_smallest_lack():
    """-900 / 90 would be more than -100 / 5."""
    queued = {"tokens_waiting": [10_000, 2000], "assigned": [90, 5]}
    assert chosen(mixed(2, blocks_free=100, running=[90, 5], **queued)) == "n1"


def test_who_was_not_heard_is_as_empty_as_its_assignments_allow():
    unheard = {"blocks_free": [NAN, 900], "running": [NAN, 1], "tokens_waiting": [NAN, 0]}
    assert chosen(mixed(2, assigned=[0, 1], assigned_tokens=[0, 1000], **unheard)) == "n0"
    assert chosen(mixed(2, assigned=[2, 1], assigned_tokens=[4000, 1000], **unheard)) == "n1"


def test_ties_go_to_the_fewest_tokens_and_then_by_name():
    full = {"blocks_free": 0, "assigned": 2, "running": 2}
    assert chosen(mixed(3, assigned_tokens=[90, 70, 70], **full)) == "n1"


def test_urgent_sequences_come_together_and_others_stay_away():
    view = mixed(3, blocks_free=[900, 700, 850], assigned=2, urgent=[0, 1, 0])
    assert chosen(view) == "n0"
    assert chosen(view, priority=-1) == "n1"
    assert chosen(view, priority=-1, urgent_tokens=0) == "n0"
    crowded = mixed(2, blocks_free=[700, 950], assigned=2, urgent=[0, 1])
    assert chosen(crowded) == "n0" and chosen(crowded, urgent_tokens=0) == "n1"


def test_both_halves_go_by_freeness():
    view = fleet_of(
        ["prefill", "prefill", "decode", "decode"],
        blocks_total=1000,
        blocks_free=[500, 600, 300, 200],
        assigned=[1, 1, 2, 1],
    )
    placed = load().place(ask(), view)
    assert (placed.prefill.name, placed.decode.name) == ("n1", "n3")
    assert load().bind(ask(), view, view.addresses[0]) == view.addresses[3]
