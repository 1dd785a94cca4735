from headrace.compute.plans import PARTITION, Limits, Shape, make_plan
from tests.compute.plans.steps import step

BLOCKS = PARTITION // 32


def nodes(
    prefixes: list[int], spans: list[tuple[int, int]], levels: int = 2
) -> list[tuple[tuple[int, ...], int, int]]:
    plan = make_plan(*step(prefixes, spans).describe(), Shape(16, 8), Limits(workers=2, levels=levels))
    return [(node.rows, node.begin, node.end) for node in plan.shared]


def test_whole_partitions_that_all_have_are_attended_together() -> None:
    spans = [(4 * PARTITION + 50, 1)] * 16
    every = tuple(range(16))
    assert nodes([4 * BLOCKS] * 16, spans) == [(every, 0, 4)]
    assert nodes([4 * BLOCKS - 1] * 16, spans) == [(every, 0, 3)], (
        "a partition that they share in part is each one's own"
    )
    assert nodes([4 * BLOCKS] * 16, [(3 * PARTITION + 1, 1)] * 16) == [(every, 0, 3)], (
        "and that of the query, too"
    )
    assert nodes([BLOCKS - 1] * 16, spans) == []
    assert nodes([4 * BLOCKS] * 16, spans, levels=0) == [], "switched off"


def test_branches_are_attended_together_where_they_are_one() -> None:
    spans = [(9 * PARTITION, 1)] * 8
    prefixes = [0, 8 * BLOCKS, 8 * BLOCKS, 8 * BLOCKS, 4 * BLOCKS, 8 * BLOCKS, 8 * BLOCKS, 8 * BLOCKS]
    left, right = (0, 1, 2, 3), (4, 5, 6, 7)
    assert nodes(prefixes, spans) == [((*left, *right), 0, 4), (left, 4, 8), (right, 4, 8)]
    assert nodes(prefixes, spans, levels=1) == [(left, 0, 8), (right, 0, 8)], "one level: where it saves most"


def test_nothing_is_shared_where_it_does_not_pay() -> None:
    assert nodes([0, BLOCKS], [(PARTITION + 1, 1), (9, 1)]) == []
    prefill = [(4 * PARTITION, 512)] * 2
    assert nodes([3 * BLOCKS] * 2, prefill) == [], "chunks of prefill fill their tiles by themselves"
    mixed = [(4 * PARTITION, 512), (4 * PARTITION, 1), (4 * PARTITION, 1)]
    assert nodes([0, 3 * BLOCKS, 3 * BLOCKS], mixed) == [((1, 2), 0, 3)]


def test_plans_that_need_too_much_memory_share_nothing() -> None:
    one = step([4 * BLOCKS] * 16, [(4 * PARTITION + 50, 1)] * 16)
    shape = Shape(16, 8)
    assert make_plan(*one.describe(), shape, Limits(workers=2, states_max=64)).shared
    tight = make_plan(*one.describe(), shape, Limits(workers=2, states_max=31))
    assert not tight.shared and tight.states <= 31
