import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from headrace.compute import ops
from headrace.compute.ops.partial import TAIL
from headrace.compute.plans import PARTITION
from tests.compute.ops.paged import Case, make
from tests.compute.ops.test_attention import BACKENDS, DTYPES, NATIVE, attend, needs_native

Wanted = list[tuple[int, int]]


def index(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poisoned(case: Case, spans: list[tuple[int, int]]) -> Case:
    """The same sequences, of which only these partitions of each are here; everything else is NaN, or absent."""
    kv, tables = torch.full_like(case.kv, float("nan")), torch.full_like(case.tables, -1)
    each = PARTITION // case.kv.shape[4]
    for s, (first, end) in enumerate(spans):
        mine = slice(first * each, end * each)
        tables[s, mine] = case.tables[s, mine]
        blocks = tables[s, mine][tables[s, mine] >= 0].long()
        kv[blocks] = case.kv[blocks]
    return Case(case.k, case.v, case.q, kv, tables, case.layer)


def by_holders(case: Case, wanted: Wanted, cuts: list[list[int]], threads: int, backend: str) -> Tensor:
    """Attend with the partitions of sequence s dealt out at the borders `cuts[s]`, each piece from a pool of its own."""
    q, rows, positions = case.batch(wanted)
    tokens, heads, dim = q.shape
    scale = dim**-0.5
    last = [p // PARTITION + 1 for _, p in wanted]
    states = torch.full((tokens, max(last), heads, dim + TAIL), float("nan"))
    for piece in range(len(cuts[0]) - 1):
        spans = [(c[piece], c[piece + 1]) for c in cuts]
        here = poisoned(case, spans)
        asked = [i for i, (s, _) in enumerate(wanted) if spans[s][0] < min(spans[s][1], last[i])]
        if not asked:
            continue
        begins = index([spans[wanted[i][0]][0] for i in asked])
        ends = index([min(spans[wanted[i][0]][1], last[i]) for i in asked])
        answer = torch.full((len(asked), int((ends - begins).max()), heads, dim + TAIL), float("nan"))
        ops.partial_attention(
            q[asked], here.kv, case.layer, here.tables, rows[asked], positions[asked], begins, ends, begins, answer,
            scale=scale, threads=threads, backend=backend,
        )  # fmt: skip
        for j, i in enumerate(asked):
            states[i, begins[j] : ends[j]] = answer[j, : ends[j] - begins[j]]
    kv_heads = case.kv.shape[3]
    return ops.combine_partials(
        states, index(last), positions, kv_heads, q.dtype, threads=threads, backend=backend
    )


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (100, 2, 16), (2, 2, 128)])
def test_any_split_has_the_bits_of_one_call(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, backend: str
) -> None:
    lengths = [3200, 1030]
    case = make(lengths, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    decode = [(0, 3199), (1, 1029)]
    chunk = [(0, p) for p in range(2060, 2080)] + [(1, p) for p in range(1020, 1030)] + [(0, 3100)]
    rng = random.Random(f"{heads} {dtype}")
    for wanted in (decode, chunk):
        whole = attend(case, wanted, backend=backend)
        for _ in range(3):
            borders = [sorted(rng.choices(range(n // PARTITION + 2), k=2)) for n in lengths]
            ends = [n // PARTITION + 1 for n in lengths]
            cuts = [[0, *(min(b, e) for b in border), e] for border, e in zip(borders, ends, strict=True)]
            split = by_holders(case, wanted, cuts, rng.choice((1, 2)), backend)
            assert torch.equal(split.view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_to_naive_on_every_backend(backend: str) -> None:
    case = make([2100, 30], heads=4, kv_heads=2, dim=32)
    wanted = [(0, 2099), (0, 1023), (1, 29), (0, 1024)]
    split = by_holders(case, wanted, [[0, 1, 2, 3], [0, 1, 1, 1]], 2, backend)
    expected = case.naive(wanted, 32**-0.5, 0)
    torch.testing.assert_close(split.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_blocks_of_the_partitions_are_read(backend: str) -> None:
    case = make([2100], heads=2, kv_heads=1, dim=32)
    there = poisoned(case, [(1, 2)])
    there.tables = there.tables[
        :, : 2 * PARTITION // 32
    ].contiguous()  # a holder's table ends with what it holds
    q, rows, positions = case.batch([(0, 2099)])
    out = torch.full((1, 1, 2, 32 + TAIL), float("nan"))
    one, two = index([1]), index([2])
    ops.partial_attention(
        q, there.kv, 1, there.tables, rows, positions, one, two, one, out, scale=0.2, threads=1, backend=backend
    )  # fmt: skip
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("begin", "end", "base"), [(0, 0, 0), (-1, 1, -1), (0, 3, 0), (1, 2, 2), (0, 2, 0), (1, 2, 0)]
)
def test_refuses_partitions_that_are_not_there(begin: int, end: int, base: int, backend: str) -> None:
    case = make([2000], heads=2, kv_heads=1, dim=32)
    q, rows, positions = case.batch([(0, 1999)])
    out = torch.zeros(1, 1, 2, 32 + TAIL)
    with pytest.raises(ValueError, match="no such partitions"):
        ops.partial_attention(
            q, case.kv, 1, case.tables, rows, positions, index([begin]), index([end]), index([base]), out,
            scale=0.2, threads=1, backend=backend,
        )  # fmt: skip
    hole = poisoned(case, [(1, 2)])
    with pytest.raises(ValueError, match="names no block"):
        ops.partial_attention(
            q, case.kv, 1, hole.tables, rows, positions, index([0]), index([1]), index([0]), out,
            scale=0.2, threads=1, backend=backend,
        )  # fmt: skip


@needs_native
def test_states_merge_in_order_only() -> None:
    """The order of the merge is part of the result: a merge in another order need not give the same bits."""
    case = make([4096], heads=2, kv_heads=1, dim=32)
    q, rows, positions = case.batch([(0, 4095)])
    states = torch.zeros(1, 4, 2, 32 + TAIL)
    for begin, end in pairwise((0, 1, 4)):
        ops.partial_attention(
            q, case.kv, 1, case.tables, rows, positions, index([begin]), index([end]), index([0]), states,
            scale=0.2, threads=1,
        )  # fmt: skip
    merged = ops.combine_partials(states, index([4]), positions, 1, torch.float32, threads=1)
    turned = ops.combine_partials(states.flip(1), index([4]), positions, 1, torch.float32, threads=1)
    torch.testing.assert_close(merged, turned, atol=1e-5, rtol=1e-5)
    assert not torch.equal(merged, turned)
