from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.compute import ops
from headrace.compute.ops.backend import native
from headrace.compute.quant import Format, QuantizedWeight
from headrace.compute.quant.weight import concat
from tests.compute.quant.drawn import draw_weight

BACKENDS = ops.available()
NATIVE = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16]
EVERY_WIDTH = [
    *(
        "uint1",
        "int2",
        "uint2",
        "int3",
        "uint3",
        "int4",
        "uint4",
        "int5",
        "uint5",
        "int6",
        "uint6",
        "int7",
        "uint7",
    ),
    *("int8", "uint8", "e1m1", "e2m1", "e2m2", "e3m2", "e2m3", "e3m3", "e4m3", "e5m2"),
]
ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 25, 32, 33, 53, 265, 291]  # both sides of every border at which rows are cut
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: torch.Tensor, weight: QuantizedWeight, backend: str) -> None:
    """Against the dequantized weight in f64. What rounding may add is measured by the magnitudes that are added."""
    dense = weight.dequantize(torch.float64)
    expected = x.double() @ dense.T
    table = weight.format.values()
    most = table[table.isfinite()].abs().max() * 2 * weight.scales.float().abs().max()
    bound = 4e-7 * x.double().abs().sum(-1, keepdim=True) * most + 1e-30
    packed = ops.pack_low_bit(weight, x.dtype, backend=backend)
    out = ops.low_bit_linear(x, packed, threads=2)
    assert out.dtype == torch.float32 and out.shape == expected.shape
    assert bool(((out.double() - expected).abs() <= bound).all())
    rounded = ops.low_bit_linear(x, packed, threads=1, out_dtype=x.dtype)
    assert torch.equal(rounded, out.to(x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVERY_WIDTH)
def test_every_width_matches_f64(name: str, backend: str) -> None:
    for dtype, rows in ((torch.bfloat16, 3), (torch.float32, 2), (torch.bfloat16, 37)):
        check(draw(rows, 192, dtype=dtype), draw_weight(name, 80, 192, group=64), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(EVERY_WIDTH),
    st.integers(1, 140),
    st.integers(1, 5),
    st.sampled_from([-1, 1, 3, 16, 32, 37, 128, 160]),
    st.sampled_from(ROWS),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_odd_shapes_match_f64(
    backend: str,
    name: str,
    out: int,
    groups: int,
    group: int,
    rows: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    features_in = 67 * groups if group == -1 else groups * group
    weight = draw_weight(
        name,
        out,
        features_in,
        group=group,
        zeros=name[0] == "u" and seed % 2 == 0,
        order=seed % 3 == 0,
        scale_dtype=scale_dtype,
        seed=seed,
    )
    check(draw(rows, features_in, dtype=dtype, seed=seed), weight, backend)


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "k", "group", "zeros", "order"),
    [
        ("int4", 256, 128, False, False),
        ("uint4", 384, 128, True, True),
        ("uint4", 416, -1, True, False),
        ("int3", 320, 64, False, False),
        ("uint5", 77, -1, True, True),
        ("int6", 320, 160, False, False),
        ("e3m3", 100, 20, False, True),
        ("e4m3", 288, -1, False, False),
        ("uint8", 256, 256, True, False),
        ("int2", 64, 32, False, False),
        ("uint1", 64, 16, True, False),
    ],
)
def test_row_is_the_same_in_any_company(
    name: str, k: int, group: int, zeros: bool, order: bool, dtype: torch.dtype, backend: str
) -> None:
    """Narrow and wide, decoded in registers or in the cache, on any number of threads: the same bits."""
    x = draw(max(ROWS), k, dtype=dtype)
    packed = ops.pack_low_bit(
        draw_weight(name, 100, k, group=group, zeros=zeros, order=order), dtype, backend=backend
    )
    whole = ops.low_bit_linear(x, packed, threads=1)
    for rows in ROWS:
        assert torch.equal(ops.low_bit_linear(x[:rows], packed, threads=2), whole[:rows])
        assert torch.equal(ops.low_bit_linear(x[-rows:], packed, threads=3), whole[-rows:])


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
def test_column_is_the_same_in_any_slice(backend: str) -> None:
    x = draw(40, 128, dtype=torch.bfloat16)
    parts = [draw_weight("int4", out, 128, group=32, seed=out) for out in (37, 90, 5)]
    both = concat(parts)
    assert both is not None
    whole = ops.low_bit_linear(x, ops.pack_low_bit(both, x.dtype, backend=backend), threads=1)
    some = [
        ops.low_bit_linear(x, ops.pack_low_bit(part, x.dtype, backend=backend), threads=1) for part in parts
    ]
    assert torch.equal(whole, torch.cat(some, 1))


@needs_native
def test_widths_agree_where_they_hold_the_same_values() -> None:
    """A weight of 4-bit integers, held in 4 to 8 bits: the very same sums."""
    four = draw_weight("uint4", 70, 256, group=64, zeros=True)
    x = draw(5, 256, dtype=torch.bfloat16)
    first = ops.low_bit_linear(x, ops.pack_low_bit(draw_same(four, "uint4"), x.dtype), threads=2)
    for bits in range(5, 9):
        same = ops.pack_low_bit(draw_same(four, f"uint{bits}"), x.dtype)
        assert same.data.numel() * 16 == 128 * 256 * bits
        assert torch.equal(ops.low_bit_linear(x, same, threads=2), first)


def draw_same(weight: QuantizedWeight, name: str) -> QuantizedWeight:
    return replace(weight, format=Format.named(name), zeros=None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [8, 64])
def test_poison_stays_in_its_row(rows: int, backend: str) -> None:
    x = draw(rows, 66, dtype=torch.bfloat16)
    packed = ops.pack_low_bit(
        draw_weight("uint4", 70, 66, group=33, zeros=True, order=True), x.dtype, backend=backend
    )
    clean = ops.low_bit_linear(x, packed, threads=1)
    x[3, 5], x[5, 7] = float("nan"), float("inf")
    out = ops.low_bit_linear(x, packed, threads=1)
    assert out[3].isnan().all()
    assert not out[5].isfinite().any()
    keep = [i for i in range(rows) if i not in (3, 5)]
    assert torch.equal(out[keep], clean[keep])


def test_the_packed_weight_is_small() -> None:
    if native is None:
        pytest.skip("the native extension is not built")
    weight = draw_weight("uint4", 256, 1024, group=128, zeros=True, scale_dtype=torch.bfloat16)
    packed = ops.pack_low_bit(weight, torch.bfloat16)
    assert packed.nbytes == 256 * 1024 // 2 + 256 * 8 * 3


def test_f16_runs_on_torch() -> None:
    x, weight = draw(3, 64, dtype=torch.float16), draw_weight("int4", 32, 64, group=32)
    packed = ops.pack_low_bit(weight, torch.float16)
    assert packed.isa is None
    out = ops.low_bit_linear(x, packed, threads=1, out_dtype=torch.float16)
    torch.testing.assert_close(out.double(), x.double() @ weight.dequantize().double().T, atol=0.1, rtol=2e-3)


def test_no_rows() -> None:
    packed = ops.pack_low_bit(draw_weight("int4", 70, 32), torch.float32)
    assert ops.low_bit_linear(torch.empty(0, 32), packed, threads=2).shape == (0, 70)


def test_wrong_shapes_are_refused() -> None:
    packed = ops.pack_low_bit(draw_weight("int4", 70, 32), torch.float32)
    for x in (draw(3, 31), draw(3, 32, dtype=torch.bfloat16), draw(32)):
        with pytest.raises(ValueError, match="does not fit"):
            ops.low_bit_linear(x, packed, threads=1)
    with pytest.raises(ValueError, match="out_dtype"):
        ops.low_bit_linear(draw(3, 32), packed, threads=1, out_dtype=torch.bfloat16)
