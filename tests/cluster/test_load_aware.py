"""Load-aware placement: least time to the first token, then least time to move the KV, then least load."""

from collections.abc import Sequence

import numpy as np
import pytest
from msgspec.structs import replace

from headrace import registry
from headrace.cluster.placement.load_aware import DecodeWeights, PrefillWeights
from headrace.types.costs import DecodeCost
from headrace.types.ids import BlockHash, PoolId
from headrace.types.views import ClusterView, Column
from tests.cluster.test_min_queue import changed
from tests.cluster.test_placement_contract import question, view_of

POLICY = registry.load("cluster.placement", "load_aware")
PP, DD = ("prefill", False, 0), ("decode", False, 0)


class Hardware:
    """A token of prefill takes so many nanoseconds, a byte of KV too."""

    def __init__(self, token_ns: int, byte_ns: int = 1) -> None:
        self.token_ns, self.byte_ns = token_ns, byte_ns

    def decode(self, rows: int, context: int) -> DecodeCost:
        return DecodeCost(1, 1, 1 << 40)

    def step_ps(self, prefills: Sequence[tuple[int, int]], rows: int, context: int) -> int:
        return sum(tokens for tokens, _ in prefills) * self.token_ns * 1000

    def transfer_ns(self, nbytes: int) -> int:
        return nbytes * self.byte_ns


class Held:
    """Leading blocks that each row's pool holds of any prompt."""

    def __init__(self, *blocks: float) -> None:
        self.blocks = blocks

    def hits(self, hashes: tuple[BlockHash, ...]) -> Column:
        return np.array(self.blocks, dtype=np.float64)


def fleet(*rows: tuple[str, bool, int], **settings: object) -> ClusterView:
    view = view_of(list(rows))
    free = {"blocks_free": view.blocks_total, "block_size": 16, "block_bytes": 16}
    return replace(view, **(free | settings))


def placed(view: ClusterView, total: int = 160) -> tuple[str, str | None]:
    answer = POLICY.place(question(total=total), view)
    return answer.prefill.name, answer.decode and answer.decode.name


def test_without_costs_the_least_tokens_to_compute_win():
    view = fleet(PP, ("prefill", False, 9), DD)
    assert placed(view) == ("n0", "n2")
    assert placed(replace(view, prefixes=Held(0, 5, 0))) == ("n0", "n2"), "80 held, 90 queued"
    assert placed(replace(view, prefixes=Held(0, 6, 0))) == ("n1", "n2"), "96 held, 90 queued"


def test_what_is_prefilled_already_is_no_queue():
    view = fleet(PP, ("prefill", False, 9), DD, assigned_prefill=np.array([20.0, 10, 0]))
    assert placed(view) == ("n1", "n2")
    full = replace(view, assigned_prefill=np.array([16384.0, 0, 0]))
    assert PrefillWeights(sending=0, memory=0).score(full).tolist() == [0.7, 0, 0]


def test_one_token_is_always_computed():
    view = fleet(PP, ("prefill", False, 2), DD, prefixes=Held(9, 99, 0))
    assert placed(view) == ("n0", "n2")


def test_a_fast_instance_may_have_the_longer_queue():
    slow, fast = Hardware(30), Hardware(10)
    view = fleet(("prefill", False, 1), ("prefill", False, 16), DD, costs=(slow, fast, fast))
    assert placed(view) == ("n1", "n2"), "170 tokens at 30 ns against 320 at 10 ns"
    assert placed(replace(view, costs=(slow, None, fast))) == ("n0", "n2"), "not known of every row: tokens"


def test_decode_goes_to_where_the_kv_comes_soonest():
    near, far = Hardware(10, byte_ns=1), Hardware(10, byte_ns=9)
    view = fleet(PP, DD, ("decode", False, 3), costs=(near, far, near))
    assert placed(view) == ("n0", "n2")
    assert placed(replace(view, prefixes=Held(0, 9, 0))) == ("n0", "n1"), "a tenth of the bytes"
    beside = (PoolId(0), PoolId(0), PoolId(2))
    assert placed(replace(view, pools=beside)) == ("n0", "n1"), "one pool: nothing to move"


def test_equal_ways_go_to_the_least_load_and_then_by_name():
    view = fleet(PP, ("decode", False, 3), ("decode", False, 2), ("decode", False, 2))
    assert placed(view) == ("n0", "n2")
    assert placed(changed(view, 2, blocks_free=10)) == ("n0", "n3")


def test_a_full_instance_is_passed_over_though_it_is_near():
    """The paper's rule alone would send all to the decode instance beside a prefill instance."""
    view = fleet(PP, DD, DD, pools=(PoolId(0), PoolId(0), PoolId(2)))
    assert placed(view) == ("n0", "n1")
    full = changed(view, 1, blocks_free=0, assigned=8, waiting=8)
    assert placed(full) == ("n0", "n2")
    assert placed(changed(full, 2, blocks_free=0, assigned=8, waiting=8)) == ("n0", "n1"), "all are full"


def test_a_held_sequence_is_bound_by_the_same_rule():
    view = fleet(PP, DD, ("decode", False, 3), pools=(PoolId(0), PoolId(1), PoolId(0)))
    assert POLICY.bind(question(), view, view.addresses[0]) == view.addresses[2]
    gone = view_of([PP] * 4).addresses[3]
    assert POLICY.bind(question(), view, gone) == view.addresses[1]


def test_scores_are_weighted_shares():
    view = changed(fleet(PP, DD), 0, assigned_tokens=8192, held=1, sending=3, blocks_free=16, assigned=4)
    view = replace(view, blocks_total=np.full(2, 1024.0))
    # Half a queue; 4 of 8 sequences on their way out; 1008 of 1024 blocks in use.
    assert PrefillWeights().score(view)[0] == pytest.approx(0.7 / 2 + 0.1 / 2 + 0.2 * 1008 / 1024)
    assert DecodeWeights().score(view)[0] == pytest.approx(0.5 * 1008 / 1024 + 0.3 / 2)
    halved = PrefillWeights(queue=1, sending=0, memory=0, queue_tokens=4096)
    assert halved.score(view)[0] == 1, "a share ends at 1"


def test_what_is_not_known_counts_by_what_was_given():
    view = view_of([("decode", False, None), ("decode", False, None)])
    view = replace(changed(view, 1, assigned=4, assigned_tokens=512), block_size=16)
    score = DecodeWeights().score(view)
    assert score[0] == 0 and score[1] == pytest.approx(0.5 * 32 / 64 + 0.3 / 2)
    assert not np.isnan(PrefillWeights().score(view)).any()
    nothing = replace(view, blocks_total=np.full(2, np.nan), sequences_max=np.full(2, np.nan))
    assert DecodeWeights().score(nothing).tolist() == [0, 0]
