"""Shapes to measure, and their plans."""

import pytest

from headrace.live.shapes import MARGIN, Limits, Shape, Stage, grid, pair_shapes
from headrace.types.ids import StepId
from headrace.types.kv import GroupKind, KVGroup, KVSpec

LIMITS = Limits(tokens=512, sequences=256, length=2048, blocks=10**6, block_size=32)
SPEC = KVSpec(
    (KVGroup(GroupKind.FULL, (0,), 1, 8), KVGroup(GroupKind.WINDOW, (1,), 1, 8, window=64)), 32, "float32"
)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        Limits(tokens=16, sequences=2, length=64, blocks=100, block_size=16),
        Limits(tokens=8192, sequences=8, length=131072, blocks=2000, block_size=32),
    ],
)
def test_the_grid_keeps_the_limits_and_has_all_kinds(limits: Limits, quick: bool) -> None:
    shapes = grid(limits, quick)
    assert len(shapes) == len({*shapes}) <= 130
    for shape in (*shapes, *pair_shapes(limits).values()):
        assert sum(count for count, _ in shape.prefills) + shape.decodes <= limits.tokens
        assert len(shape.prefills) + shape.decodes <= limits.sequences
        assert all(count >= 1 and count + before <= limits.length for count, before in shape.prefills)
        assert not shape.decodes or 1 <= shape.context <= limits.length - MARGIN
        assert 0 < shape.blocks(limits.block_size) <= limits.blocks
    assert any(not s.prefills for s in shapes) and any(not s.decodes for s in shapes)
    assert any(s.prefills and s.decodes for s in shapes)


def test_a_full_grid_spans_rows_contexts_and_chunks() -> None:
    shapes = grid(LIMITS, quick=False)
    assert {s.decodes for s in shapes if not s.prefills} == {1, 2, 4, 8, 16, 32, 64}
    assert {s.context for s in shapes if s.decodes == 1} >= {32, 128, 512, 2048 - MARGIN}
    chunks = {s.prefills[0] for s in shapes if len(s.prefills) == 1}
    assert {count for count, _ in chunks} == {16, 32, 64, 128, 256, 512}
    assert (512, 512) in chunks and len(grid(LIMITS, quick=True)) < len(shapes) // 2


def test_a_stage_runs_its_shape_around_its_context() -> None:
    shape, repeats = Shape(((48, 32), (16, 0)), 3, 100), 9
    stage = Stage(shape, SPEC, 50, 10, repeats)
    base, firsts, seen = StepId(0), [], []
    for number in range(repeats):
        opened = dict(stage.opened())
        assert len(opened) == (5 if number == 0 else 2)
        plan = stage.plan(base)
        assert (plan.base, plan.step) == (base, base + 1)
        base = plan.step
        seen += [start.key for start in plan.starts]
        assert [start.key for start in plan.starts] == list(opened)
        for start in plan.starts:
            assert start.total == len(opened[start.key].token_ids) and max(opened[start.key].token_ids) < 50
            assert {run.group for run in start.table} == {0, 1}
        assert [(w.first, w.count) for w in plan.work[3:]] == [(32, 48), (0, 16)]
        assert all(w.emits for w in plan.work) and {w.count for w in plan.work[:3]} == {1}
        firsts.append(plan.work[0].first)
        assert len(stage.closed(last=number == repeats - 1)) == (5 if number == repeats - 1 else 2)
    assert len({*seen}) == len(seen) == 3 + 2 * repeats and stage.serial == 10 + len(seen)
    assert firsts == list(range(firsts[0], firsts[0] + repeats)) and sorted(firsts)[repeats // 2] == 100
    assert shape.sample((1.0,)).context == 300


def test_sequences_of_a_stage_share_no_block_and_stay_within_what_is_counted() -> None:
    shape = Shape(((48, 32),), 3, 100)
    stage = Stage(shape, SPEC, 50, 1, 20)
    list(stage.opened())
    blocks: list[int] = []
    for start in stage.plan(StepId(0)).starts:
        [run] = [run for run in start.table if run.group == 0]
        blocks += range(run.first, run.first + run.count)
    assert len({*blocks}) == len(blocks) and max(blocks) < shape.blocks(SPEC.block_size)
