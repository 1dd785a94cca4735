import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.types.kv import GroupKind, KVGroup, KVSpec, TableRun, id_runs, table_runs

BLOCKS = st.lists(st.integers(-1, 6), max_size=12)
UNIQUE = st.lists(st.integers(0, 20), max_size=12, unique=True)


@given(at=st.integers(0, 5), blocks=BLOCKS)
def test_table_runs_name_every_present_block_once(at: int, blocks: list[int]):
    named: dict[int, int] = {}
    for run in table_runs(2, at, blocks):
        assert run.group == 2 and run.count > 0
        for i in range(run.count):
            assert run.at + i not in named
            named[run.at + i] = run.first + i
    assert named == {at + i: block for i, block in enumerate(blocks) if block >= 0}


@given(blocks=BLOCKS)
def test_table_runs_are_as_few_as_may_be(blocks: list[int]):
    breaks = [
        i
        for i, block in enumerate(blocks)
        if block >= 0 and (i == 0 or blocks[i - 1] < 0 or blocks[i - 1] + 1 != block)
    ]
    assert len(table_runs(0, 0, blocks)) == len(breaks)


def test_a_table_is_told_as_runs():
    assert table_runs(1, 3, [-1, 7, 8, 2, -1]) == [TableRun(1, 4, 7, 2), TableRun(1, 6, 2, 1)]
    assert table_runs(0, 0, []) == []


@given(blocks=UNIQUE)
def test_id_runs_are_the_set_in_ascending_runs_that_do_not_touch(blocks: list[int]):
    runs = id_runs(blocks)
    assert [b for first, count in runs for b in range(first, first + count)] == sorted(blocks)
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(runs))


def test_sizes_follow_from_the_spec():
    full = KVGroup(GroupKind.FULL, (0, 2, 4), kv_heads=2, head_dim=8)
    latent = KVGroup(GroupKind.FULL, (1,), kv_heads=1, head_dim=16, planes=1)
    spec = KVSpec((full, latent), block_size=4, dtype="bfloat16")
    assert spec.block_bytes(0) == 3 * 2 * 2 * 4 * 8 * 2
    assert spec.block_bytes(1) == 1 * 1 * 1 * 4 * 16 * 2
    assert [spec.blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("page_bytes", [4096, 65536, 2**21])
def test_the_step_of_block_sizes_makes_whole_pages(page_bytes: int):
    groups = (KVGroup(GroupKind.FULL, (0, 2, 4), 2, 8), KVGroup(GroupKind.FULL, (1,), 1, 24, planes=1))
    spec = KVSpec(groups, 16, "bfloat16")
    step = spec.block_size_step(page_bytes)
    fits = [size for size in range(16, 2 * step + 1, 16) if whole_pages(spec, size, page_bytes)]
    assert fits == [step, 2 * step]


def whole_pages(spec: KVSpec, block_size: int, page_bytes: int) -> bool:
    sized = msgspec.structs.replace(spec, block_size=block_size)
    return all(sized.block_bytes(g) % page_bytes == 0 for g in range(len(spec.groups)))
