from typing import Any

import numpy as np
import pytest

from headrace import registry
from headrace.cluster.usage import freeness
from headrace.types.errors import ConfigError
from headrace.types.views import ClusterView
from tests.cluster.columns import fleet_of

NAN = float("nan")


def load(**config: Any) -> Any:
    return registry.load("cluster.rebalance", "virtual_usage", config)


def pairs(view: ClusterView, **config: Any) -> list[tuple[str, str]]:
    return [(move.source.name, move.target.name) for move in load(**config).moves(view)]


def mixed(rows: int, **columns: Any) -> ClusterView:
    return fleet_of(["mixed"] * rows, **({"blocks_total": 1000, "block_size": 16} | columns))


def test_freeness_is_room_for_each_running_sequence():
    view = mixed(6, blocks_free=[100, 10, 40, 100, 70, NAN], running=[4, 5, 0, 2, 7, NAN], draining=[4])
    free = freeness(view, queued=True, urgent_tokens=0)
    np.testing.assert_array_equal(free, [25, 2, 40, 50, -np.inf, NAN])


def test_a_demand_and_a_headroom_are_usage():
    view = mixed(2, blocks_free=[900, 60], running=[2, 4], blocks_demand=[0, 80], urgent=[1, 0])
    # 1,000 blocks less the 100 that hold 1,600 tokens are kept free beside the urgent one.
    np.testing.assert_array_equal(freeness(view, queued=True, urgent_tokens=1600), [0, -5])
    np.testing.assert_array_equal(freeness(view, queued=False, urgent_tokens=0), [450, 15])


def test_the_fullest_gives_to_the_freest():
    view = mixed(6, blocks_free=[2, 500, 8, 300, 0, 12], running=[4, 1, 4, 2, 5, 4])
    # F: 0.5, 500, 2, 150, 0, 3; three are short, two have room, and 3 is neither.
    assert pairs(view) == [("n4", "n1"), ("n0", "n3")]


def test_equal_rows_go_by_name():
    assert pairs(mixed(4, blocks_free=[4, 4, 90, 90], running=4)) == [("n0", "n2"), ("n1", "n3")]


def test_the_threshold_is_three_and_not_minus_three():
    """A default of -3 stands in published code whose metric has changed its sign since."""
    assert pairs(mixed(2, blocks_free=[8, 400], running=4)) == [("n0", "n1")]
    assert pairs(mixed(2, blocks_free=[12, 400], running=4)) == []
    assert pairs(mixed(2, blocks_free=[12, 400], running=4), out=3.5, into=50) == [("n0", "n1")]


def test_who_waits_makes_others_leave():
    """Each has 40 blocks free, but the first sequence in line of n0 asks for 60: others flee until it fits."""
    view = mixed(2, blocks_free=40, running=4, waiting=[1, 0], blocks_demand=[60, 0])
    assert pairs(view) == [("n0", "n1")]
    assert pairs(view, defragment=False) == []


def test_others_leave_an_urgent_sequence():
    view = mixed(2, blocks_free=[880, 500], running=[3, 3], urgent=[1, 0])
    assert pairs(view) == [("n0", "n1")]
    assert pairs(view, urgent_tokens=0) == []
    assert pairs(mixed(2, blocks_free=[950, 500], running=[3, 3], urgent=[1, 0])) == []


def test_an_instance_that_drains_gives_everything_away_and_takes_nothing():
    assert pairs(mixed(3, blocks_free=900, running=[1, 2, 1], draining=[1])) == [("n1", "n0")]
    assert pairs(mixed(2, blocks_free=900, running=1, draining=[0, 1])) == []
    assert pairs(mixed(2, blocks_free=900, running=[0, 1], draining=[0])) == []


def test_who_was_not_heard_is_neither_source_nor_target():
    assert pairs(mixed(2, blocks_free=[4, NAN], running=[4, NAN])) == []
    assert pairs(mixed(2, blocks_free=[NAN, 400], running=[NAN, 4], draining=[0])) == []


def test_sequences_that_decode_stay_where_decoding_is_done():
    leanings = ["prefill", "decode", "decode", "prefill"]
    view = fleet_of(leanings, blocks_total=1000, blocks_free=[900, 4, 500, 4], running=4)
    assert pairs(view) == [("n1", "n2")]


def test_wrong_settings_are_explained():
    with pytest.raises(ConfigError, match="make out the smaller one"):
        load(out=5, into=3)
    with pytest.raises(ConfigError, match="period_s is 0; it must be above 0"):
        load(period_s=0)
    with pytest.raises(ConfigError, match="urgent_tokens is -1"):
        load(urgent_tokens=-1)
    assert load(period_s=0.25).period_ns == 250_000_000
