import pytest
import torch
from torch import Tensor

from headrace.compute import ops
from headrace.compute.ops.backend import native
from headrace.compute.pool import pool_tensors
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout
from tests.compute.ops.paged import Case, make

BACKENDS = ops.available()
NATIVE = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")


def attend(
    case: Case, wanted: list[tuple[int, int]], *, window: int = 0, threads: int = 1, backend: str
) -> Tensor:
    q, rows, positions = case.batch(wanted)
    return ops.paged_attention(
        q, case.kv, case.layer, case.tables, rows, positions,
        scale=q.shape[2] ** -0.5, window=window, threads=threads, backend=backend,
    )  # fmt: skip


def assert_close(
    case: Case, wanted: list[tuple[int, int]], *, window: int = 0, backend: str, threads: int = 2
) -> None:
    out = attend(case, wanted, window=window, backend=backend, threads=threads)
    expected = case.naive(wanted, case.q[0].shape[2] ** -0.5, window)
    assert out.dtype == case.kv.dtype
    assert out.shape == expected.shape
    tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 4, 32), (4, 2, 64), (6, 2, 80), (3, 1, 96), (8, 1, 128), (2, 1, 256), (100, 2, 16), (14, 2, 48)],
)
def test_matches_naive_attention(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, backend: str
) -> None:
    case = make([37, 1, 70], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    assert_close(case, case.every(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("window", [1, 16, 50])
def test_window_reads_nothing_outside_it(window: int, block_size: int, backend: str) -> None:
    case = make([150, 90], block_size=block_size, window=window)  # blocks outside the last window are freed
    assert_close(case, [(0, 149), (1, 89)], window=window, backend=backend)
    whole = make([150, 90], block_size=block_size)
    assert_close(whole, whole.every()[::7], window=window, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distant_tokens_of_one_sequence(backend: str) -> None:
    case = make([300])
    wanted = [(0, 60), (0, 61), (0, 250), (0, 251), (0, 299)]
    case.tables[0, 2:6] = -1  # what lies between their windows is not there
    assert_close(case, wanted, window=50, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_crosses_partitions(dtype: torch.dtype, backend: str) -> None:
    case = make([2100, 1024, 1025], heads=2, kv_heads=1, dim=32, dtype=dtype)
    wanted = [(0, 1023), (0, 1024), (0, 2047), (0, 2099), (1, 1023), (2, 1024)]
    assert_close(case, wanted, backend=backend)
    assert_close(case, wanted, window=1100, backend=backend)


def test_f16_falls_back_to_torch() -> None:
    case = make([40, 7], dtype=torch.float16)
    q, rows, positions = case.batch(case.every())
    out = ops.paged_attention(q, case.kv, 1, case.tables, rows, positions, scale=0.125, threads=2)
    torch.testing.assert_close(out.double(), case.naive(case.every(), 0.125, 0), atol=5e-3, rtol=5e-3)


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (7, 1, 80)])
def test_row_is_the_same_in_any_company(
    heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype, backend: str
) -> None:
    case = make([70, 17, 1, 50], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    every = case.every()
    alone = torch.cat([attend(case, [one], window=window, backend=backend) for one in every])
    assert torch.equal(attend(case, every, window=window, backend=backend), alone), "whole prefill"
    assert torch.equal(attend(case, every, window=window, threads=2, backend=backend), alone), "two threads"
    chunks = [
        attend(case, every[i : i + 29], window=window, threads=2, backend=backend)
        for i in range(0, len(every), 29)
    ]
    assert torch.equal(torch.cat(chunks), alone), "prefill in chunks that mix sequences"
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = attend(case, [every[i] for i in order], window=window, threads=2, backend=backend)
    assert torch.equal(shuffled, alone[order]), "batch of strangers"


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_is_the_same_in_any_blocks(dtype: torch.dtype, backend: str) -> None:
    outs = []
    for layout in Layout:
        for block_size, place in [(16, 1), (32, 2), (64, 3), (32, 4), (48, 5)]:
            case = make([130, 70], block_size=block_size, dtype=dtype, place_seed=place, layout=layout)
            outs.append(attend(case, case.every(), backend=backend))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 50])
def test_a_sequence_in_one_piece_is_one_large_block(window: int, dtype: torch.dtype, backend: str) -> None:
    case = make([150, 90], dtype=dtype, layout=Layout.TOKEN_MAJOR)
    pieces = torch.zeros(2, 160, 3, 2, 2, 64, dtype=dtype).permute(0, 2, 3, 4, 1, 5)
    for s, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
        whole, positions = torch.full((len(k),), s).int(), torch.arange(len(k)).int()
        ops.write_kv(k, v, pieces, 1, whole, positions, backend=backend)
    one = Case(case.k, case.v, case.q, pieces, torch.arange(2).int().view(2, 1), 1)
    scattered = attend(case, case.every(), window=window, backend=backend)
    assert torch.equal(attend(one, case.every(), window=window, threads=2, backend=backend), scattered)


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1500])
def test_long_row_is_the_same_on_any_threads(window: int, dtype: torch.dtype, backend: str) -> None:
    case = make([3100, 40], heads=2, kv_heads=1, dim=32, dtype=dtype)
    wanted = [(0, p) for p in (15, 1023, 1024, 1025, 2047, 2048, 3098, 3099)]
    alone = torch.cat([attend(case, [one], window=window, backend=backend) for one in wanted])
    for threads in (1, 2, 3, 16):
        split = torch.cat(
            [attend(case, [one], window=window, threads=threads, backend=backend) for one in wanted]
        )
        assert torch.equal(split, alone), f"decode, {threads} threads"
        mixed = attend(case, [*wanted, (1, 3), (1, 39)], window=window, threads=threads, backend=backend)
        assert torch.equal(mixed[:-2], alone), f"batch, {threads} threads"
    tail = [(0, p) for p in range(3000, 3100)]
    whole = attend(case, tail, window=window, threads=2, backend=backend)
    assert torch.equal(whole[-2:], alone[-2:]), "prefill chunk after a cached prefix"


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_later_token_never_reaches_an_earlier_one(bad: float, dtype: torch.dtype, backend: str) -> None:
    case = make([80], dtype=dtype)
    clean = attend(case, case.every(), backend=backend)
    poisoned = make([80], dtype=dtype)
    slot = int(poisoned.tables[0, 1]), 1, slice(None), slice(None), 18  # position 50, K and V
    poisoned.kv[slot] = bad
    out = attend(poisoned, case.every(), backend=backend)
    assert torch.equal(out[:50], clean[:50])
    assert out[50:].isnan().all(), "and those that attend it show it"
    windowed = attend(poisoned, case.every(), window=10, backend=backend)
    assert torch.equal(windowed[60:], attend(case, case.every(), window=10, backend=backend)[60:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_block_is_refused(backend: str) -> None:
    case = make([80])
    case.tables[0, 1] = -1
    with pytest.raises(ValueError, match="no block"):
        attend(case, [(0, 70)], backend=backend)
    attend(case, [(0, 31)], backend=backend)
    case.tables[0, 0] = case.kv.shape[0]
    with pytest.raises(ValueError, match="no block"):
        attend(case, [(0, 31)], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", Layout)
def test_write_goes_where_it_is_told(layout: Layout, backend: str) -> None:
    group = KVGroup(GroupKind.FULL, (0, 1), kv_heads=3, head_dim=32)
    [kv] = pool_tensors(KVSpec((group,), 16, "float32", layout), [5])
    fused = torch.randn(4, 5, 3, 32)  # k and v as slices of one projection's output
    k, v = fused[:, 1], fused[:, 2]
    blocks, offsets = torch.tensor([4, 0, 0, 2]).int(), torch.tensor([0, 15, 3, 7]).int()
    ops.write_kv(k, v, kv, 1, blocks, offsets, backend=backend)
    expected = torch.zeros_like(kv)
    for i in range(4):
        expected[blocks[i], 1, 0, :, offsets[i]] = k[i]
        expected[blocks[i], 1, 1, :, offsets[i]] = v[i]
    assert torch.equal(kv, expected)
    if backend != "torch":
        with pytest.raises(ValueError, match="no slot"):
            ops.write_kv(k, v, kv, 1, blocks + 1, offsets, backend=backend)
        assert torch.equal(kv, expected)


def test_pool_may_be_a_view_of_other_memory() -> None:
    case = make([60, 20], dtype=torch.bfloat16)
    raw = bytearray(case.kv.numel() * 2 + 6)
    pool = torch.frombuffer(raw, dtype=torch.bfloat16, offset=6).view(case.kv.shape)  # not even aligned
    pool.copy_(case.kv)
    moved = Case(case.k, case.v, case.q, pool, case.tables, 1)
    for backend in BACKENDS:
        wanted = case.every()
        assert torch.equal(attend(moved, wanted, backend=backend), attend(case, wanted, backend=backend))


def test_wrong_shapes_are_refused() -> None:
    case = make([20, 9])
    q, rows, positions = case.batch([(0, 3), (0, 4)])
    good = {"q": q, "kv": case.kv, "layer": 1, "tables": case.tables, "rows": rows, "positions": positions}
    bad = [
        {"layer": 3},
        {"q": q[:, :3]},
        {"q": q.bfloat16()},
        {"rows": rows.long()},
        {"rows": rows[:1]},
        {"positions": positions.repeat(2)[::2]},
        {"tables": case.tables.T},
        {"kv": case.kv.transpose(3, 4)},
        {"kv": case.kv.transpose(4, 5)},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=r".+"):
            ops.paged_attention(**{**good, **change}, scale=1.0, threads=1)
