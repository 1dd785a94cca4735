import pytest

from tests.cluster.columns import fleet_of


@pytest.mark.parametrize(
    ("leanings", "draining", "prefill", "decode"),
    [
        (["prefill", "decode", "mixed"], [], [0, 2], [1, 2]),
        (["prefill", "decode", "mixed"], [2], [0], [1]),
        (["prefill", "decode", "decode"], [0], [1, 2], [1, 2]),
        (["prefill", "prefill"], [], [0, 1], [0, 1]),
        (["mixed", "mixed"], [0, 1], [], []),
        ([], [], [], []),
    ],
)
def test_work_goes_to_its_leaning_or_to_whoever_is_left(
    leanings: list[str], draining: list[int], prefill: list[int], decode: list[int]
):
    view = fleet_of(leanings, draining=draining)
    for leaning, rows in (("prefill", prefill), ("decode", decode)):
        assert view.rows_for(leaning).tolist() == rows
        assert view.candidates(leaning) == rows
        usable = [i for i in range(len(leanings)) if i not in draining]
        assert [i for i in usable if view.takes(i, leaning)] == rows


def test_a_fleet_may_show_again_what_was_found():
    view = fleet_of(["mixed", "decode"])
    again = fleet_of(["mixed", "decode"], takers=view.takers)
    found = view.rows_for("prefill")
    assert again.rows_for("prefill") is found
    assert fleet_of(["mixed", "decode"]).rows_for("prefill") is not found
