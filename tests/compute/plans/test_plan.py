from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from headrace.compute.plans import PARTITION, Capacity, Limits, Plan, Shape, advance, bounds, make_plan
from headrace.compute.plans.balance import chunk_partitions, deal
from headrace.compute.plans.sparse import describe
from tests.compute.plans.steps import Step, random_step, step

SEEDS = range(12)
SHAPES = [Shape(16, 8), Shape(4, 4), Shape(14, 2), Shape(8, 1), Shape(100, 2)]


def planned(one: Step, shape: Shape, limits: Limits) -> Plan:
    return make_plan(*one.describe(shape.window), shape, limits)


def attended(one: Step, plan: Plan) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """By (token, head in group): what its items attend, as (first key, last key, slot or -1 for the output), in the items' order."""
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    group = plan.shape.group
    for item, tile in enumerate(plan.item_tile):
        low = max(plan.tile_low[tile], plan.item_begin[item] * PARTITION)
        high = min(plan.tile_high[tile], plan.item_end[item] * PARTITION - 1)
        for vector in range(plan.tile_begin[tile], plan.tile_end[tile]):
            token = int(plan.order[vector // group])
            direct = plan.slots[token] == plan.slots[token + 1]
            state = -1 if direct else int(plan.item_state[item])
            found.setdefault((token, vector % group), []).append((int(low), int(high), state))
            # The tile's blocks are the token's own, as far as the token attends.
            until = min(high, one.positions[token]) // one.block_size + 1
            mine = one.tables[one.rows[token], low // one.block_size : until]
            at = plan.tile_blocks[tile]
            theirs = plan.sparse.indices[at + low // one.block_size : at + until]
            assert np.array_equal(mine, theirs)
    return found


def check(one: Step, plan: Plan) -> None:
    found = attended(one, plan)
    group, window = plan.shape.group, plan.shape.window
    assert found.keys() == {(t, h) for t in range(len(one.positions)) for h in range(group)}
    for (token, _), pieces in found.items():
        position = int(one.positions[token])
        first = max(0, position - window + 1) if window else 0
        pieces.sort()
        assert pieces[0][0] <= first, "its first key"
        assert pieces[-1][1] >= position, "and its last"
        for (_, high, _), (low, _, _) in pairwise(pieces):
            assert low == high + 1 and low % PARTITION == 0, "once each, cut at borders of partitions"
        slots = int(plan.slots[token + 1] - plan.slots[token])
        if not slots:
            assert [state for _, _, state in pieces] == [-1]
            continue
        written = [0]
        assert pieces[0][2] == 0
        for low, high, state in pieces[1:]:
            parts = high // PARTITION - low // PARTITION + 1
            written += range(state, state + parts)
        assert written == list(range(slots)), "each slot once, in the order of positions"
    spans = -(-plan.shape.kv_heads // plan.head_span)
    units = len(plan.item_tile) * spans
    assert sorted(plan.units.tolist()) == list(range(units))
    assert sorted(plan.worker_units.tolist()) == list(range(units))
    assert plan.worker_indptr[0] == 0 and plan.worker_indptr[-1] == units


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_key_is_attended_once_and_cut_at_partitions(shape: Shape) -> None:
    shared = 0
    for seed in SEEDS:
        one = random_step(seed)
        plan = planned(one, shape, Limits(workers=1 + seed % 5, levels=seed % 4))
        check(one, plan)
        shared += bool(plan.shared)
    assert shared > 1 or shape.group > 48, "some of them share prefixes"


@pytest.mark.parametrize("window", [1, 700, 1024, 3000])
def test_windows_are_cut_alike(window: int) -> None:
    for seed in SEEDS:
        one = random_step(seed)
        plan = planned(one, Shape(8, 4, window), Limits(workers=3))
        check(one, plan)
        assert not plan.shared


def test_one_input_has_one_plan() -> None:
    for seed in SEEDS:
        plans = [planned(random_step(seed), SHAPES[0], Limits(workers=4)) for _ in range(2)]
        for one, other in zip(plans[0].arrays(), plans[1].arrays(), strict=True):
            assert one.dtype == np.int32
            assert np.array_equal(one, other)
        assert np.array_equal(plans[0].worker_units, plans[1].worker_units)


@pytest.mark.parametrize("workers", [1, 2, 7, 132])
def test_no_worker_has_more_than_greed_allows(workers: int) -> None:
    draw = np.random.default_rng(workers)
    for _ in range(30):
        costs = (draw.zipf(1.5, size=draw.integers(1, 400)).clip(max=1 << 20)).astype(np.int64)
        indptr, dealt, order = deal(costs, workers)
        assert sorted(dealt.tolist()) == sorted(order.tolist()) == list(range(len(costs)))
        assert (np.diff(costs[order]) <= 0).all(), "dearest first"
        loads = [int(costs[dealt[indptr[w] : indptr[w + 1]]].sum()) for w in range(workers)]
        best = max(int(costs.max()), -(-int(costs.sum()) // workers))
        if len(costs) > workers:
            best = max(best, int(np.sort(costs)[::-1][workers - 1 : workers + 1].sum()))
        # Graham 1969: at most 4/3 of the best possible, of which `best` is a lower bound, and the mean plus one unit.
        assert max(loads) <= costs.sum() / workers + int(costs.max()) * (1 - 1 / workers) + 1e-9
        if len(costs) <= workers:
            assert max(loads) == best


def test_a_long_sequence_is_spread_over_all_workers() -> None:
    one = step([0, 0, 0], [(131_000, 1), (300, 1), (300, 1)])
    for workers in (2, 16, 64):
        plan = planned(one, Shape(2, 1), Limits(workers))
        keys = plan.item_end - plan.item_begin
        loads = [
            int(keys[plan.worker_units[plan.worker_indptr[w] : plan.worker_indptr[w + 1]]].sum())
            for w in range(workers)
        ]
        assert max(loads) <= 1.25 * 128 / workers + 1, loads


def test_chunks_are_no_shorter_than_they_must_be() -> None:
    partitions = np.array([100, 1, 1], dtype=np.int32)
    costs, tokens = np.array([3, 3, 3], dtype=np.int64), np.ones(3, dtype=np.int32)
    given = dict(kv_heads=1, workers=4)
    free = chunk_partitions(partitions, costs, tokens, splits_max=1000, states_max=1000, **given)
    assert free * 3 <= 306 // 32 < (free + 1) * 3, "the longest that balances"
    tight = chunk_partitions(partitions, costs, tokens, splits_max=3, states_max=1000, **given)
    assert tight == 25, "the shortest with three splits"
    assert chunk_partitions(partitions, costs, tokens, splits_max=1000, states_max=31, **given) == 70
    assert chunk_partitions(partitions, costs, tokens, splits_max=0, states_max=0, **given) == 100


def test_no_plan_exceeds_its_bounds() -> None:
    for shape in SHAPES:
        for seed in SEEDS:
            one = random_step(seed)
            limits = Limits(workers=1 + seed % 3, levels=seed % 3, states_max=(0, 50, 65_536)[seed % 3])
            capacity = Capacity(
                tokens=len(one.positions),
                rows=len(one.tables),
                keys=int(one.positions.max()) + 1,
                block_size=one.block_size,
            )
            most, plan = bounds(capacity, shape, limits), planned(one, shape, limits)
            padded = most.pad(plan)
            assert len({len(a) for a in padded[2:7]}) == len({len(a) for a in padded[7:11]}) == 1
            assert plan.states <= limits.states_max
            assert (padded[-1][len(plan.units) :] == -1).all()
            with pytest.raises(ValueError, match="room for"):
                bounds(
                    Capacity(1, 1, 1, one.block_size), shape, Limits(1, splits=0, levels=0, states_max=0)
                ).pad(planned(step([0], [(5000, 60)]), shape, limits))


def test_a_plan_goes_on_with_the_next_step() -> None:
    whole = step([0, 64, 64, 0], [(3600, 1), (3100, 1), (2200, 1), (800, 3)])

    def after(tokens: int) -> Step:
        return replace(whole, positions=whole.positions + np.int32(tokens - 100))

    shape, limits = SHAPES[0], Limits(workers=2)
    plan = planned(after(0), shape, limits)
    assert plan.shared
    for tokens in range(1, 100):
        one = after(tokens)
        moved = advance(plan, *one.describe())
        if moved is None:
            break
        check(one, moved)
        assert moved.keys == one.positions.max() + 1
        plan = moved
    assert tokens == 3072 - 2999, "until a row enters its next partition"
    last = after(tokens - 1)
    assert advance(plan, *last.describe()) is None, "not the next step"
    one = after(1)
    plan = planned(after(0), shape, limits)
    assert advance(plan, *one.describe()) is not None
    one.tables[1, 3], one.tables[1, 4] = one.tables[1, 4], one.tables[1, 3]
    assert advance(plan, *one.describe()) is None, "other blocks where prefixes were shared"
    windowed = make_plan(*after(0).describe(50), Shape(16, 8, 50), limits)
    assert advance(windowed, *after(1).describe(50)) is None
    fewer = replace(after(1), rows=after(1).rows[:2], positions=after(1).positions[:2])
    assert advance(plan, *fewer.describe()) is None


def test_csr_says_what_the_tables_say() -> None:
    one = step([0, 2], [(100, 3), (90, 1)])
    queries, sparse = one.describe()
    assert queries.indptr.tolist() == [0, 3, 4]
    assert queries.first.tolist() == [97, 89]
    assert sparse.indptr.tolist() == [0, 4, 7]
    assert sparse.last.tolist() == [4, 26]
    assert sparse.keys().tolist() == [100, 90]
    assert sparse.indices[:4].tolist() == one.tables[0, :4].tolist()
    assert sparse.indices[4:6].tolist() == sparse.indices[:2].tolist()


def test_bad_batches_are_refused_by_name() -> None:
    one = step([0], [(100, 2)])
    good = {"tables": one.tables, "rows": one.rows, "positions": one.positions}
    cases = [
        ({"rows": one.rows.astype(np.int64)}, "rows must be int32"),
        ({"rows": one.rows[:1]}, "1 rows for 2 positions"),
        ({"rows": one.rows + np.int32(1)}, "no table row"),
        ({"positions": one.positions + np.int32(300)}, "outside its table"),
        ({"positions": one.positions - np.int32(99)}, "outside its table"),
        (
            {"tables": np.where(one.tables == one.tables[0, 0], -1, one.tables).astype(np.int32)},
            "row 0 names no",
        ),
        ({"tables": one.tables[0]}, "tables must be int32 of 2"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            describe(**{**good, **change}, blocks=one.blocks, block_size=32)
    behind = np.where(np.arange(one.tables.shape[1]) < 1, -1, one.tables).astype(np.int32)
    describe(behind, one.rows, one.positions, blocks=one.blocks, block_size=32, window=60)
    with pytest.raises(ValueError, match="names no block"):
        describe(behind, one.rows, one.positions, blocks=one.blocks, block_size=32, window=80)
    with pytest.raises(ValueError, match="window -1"):
        Shape(4, 2, -1)
    with pytest.raises(ValueError, match="5 heads over 2"):
        Shape(5, 2)
    with pytest.raises(ValueError, match="workers is 0"):
        Limits(0)
