from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from headrace.compute import ops
from headrace.compute.ops.backend import native

BACKENDS = ops.available()
NATIVE = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 4, 7, 16, 33, 128]
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 32), (200, 96), (1, 1), (63, 17), (130, 333)])
def test_matches_f64(n: int, k: int, dtype: torch.dtype, backend: str) -> None:
    x, weight = draw(5, k, dtype=dtype), draw(n, k, dtype=dtype, seed=1)
    packed = ops.pack(weight, backend=backend)
    expected = x.double() @ weight.double().T
    out = ops.fixed_linear(x, packed, threads=2)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)
    rounded = ops.fixed_linear(x, packed, threads=2, out_dtype=dtype)
    assert torch.equal(rounded, out.to(dtype))


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(320, 256), (100, 77)])
def test_row_is_the_same_in_any_company(n: int, k: int, dtype: torch.dtype, backend: str) -> None:
    x = draw(max(ROWS), k, dtype=dtype)
    packed = ops.pack(draw(n, k, dtype=dtype, seed=1), backend=backend)
    whole = ops.fixed_linear(x, packed, threads=1)
    for rows in ROWS:
        assert torch.equal(ops.fixed_linear(x[:rows], packed, threads=2), whole[:rows])
        assert torch.equal(ops.fixed_linear(x[-rows:], packed, threads=3), whole[-rows:])


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
def test_column_is_the_same_in_any_slice(backend: str) -> None:
    """So that a weight may be split by outputs (tensor parallel, fused projections) without changing a bit."""
    x, weight = draw(9, 64, dtype=torch.bfloat16), draw(300, 64, dtype=torch.bfloat16, seed=1)
    whole = ops.fixed_linear(x, ops.pack(weight, backend=backend), threads=1)
    part = ops.fixed_linear(x, ops.pack(weight[37:211], backend=backend), threads=1)
    assert torch.equal(part, whole[:, 37:211])


@needs_native
def test_calls_from_several_threads_do_not_mix() -> None:
    """The kernels' own threads serve one call at a time; a second call does its work alone."""
    packed = ops.pack(draw(1280, 256, dtype=torch.bfloat16, seed=1))
    inputs = [draw(5, 256, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    expected = [ops.fixed_linear(x, packed, threads=1) for x in inputs]

    def repeat(i: int) -> bool:
        outs = (ops.fixed_linear(inputs[i], packed, threads=2 + i) for _ in range(100))
        return all(torch.equal(out, expected[i]) for out in outs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_poison_stays_in_its_row(backend: str) -> None:
    x = draw(8, 33, dtype=torch.bfloat16)
    packed = ops.pack(draw(70, 33, dtype=torch.bfloat16, seed=1), backend=backend)
    clean = ops.fixed_linear(x, packed, threads=1)
    x[3] = float("nan")
    out = ops.fixed_linear(x, packed, threads=1)
    assert out[3].isnan().all()
    keep = torch.arange(8) != 3
    assert torch.equal(out[keep], clean[keep])


def test_no_rows() -> None:
    packed = ops.pack(draw(70, 32))
    assert ops.fixed_linear(torch.empty(0, 32), packed, threads=2).shape == (0, 70)
    assert ops.linear(torch.empty(0, 32), draw(70, 32)).shape == (0, 70)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_linear_pads_few_rows(dtype: torch.dtype) -> None:
    x, weight, bias = (
        draw(6, 48, dtype=dtype),
        draw(40, 48, dtype=dtype, seed=1),
        draw(40, dtype=dtype, seed=2),
    )
    whole = ops.linear(x, weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(whole.double(), expected, atol=0.1, rtol=0.02)
    for rows in (1, 2, 3):
        assert torch.equal(ops.linear(x[:rows], weight, bias), whole[:rows])
    assert ops.linear(x[0], weight).shape == (40,)
    assert ops.linear(x.view(2, 3, 48), weight).shape == (2, 3, 40)


def test_wrong_shapes_are_refused() -> None:
    packed = ops.pack(draw(70, 32))
    for x in (draw(3, 31), draw(3, 32, dtype=torch.bfloat16), draw(32)):
        with pytest.raises(ValueError, match="does not fit"):
            ops.fixed_linear(x, packed, threads=1)
    with pytest.raises(ValueError, match="out_dtype"):
        ops.fixed_linear(draw(3, 32), packed, threads=1, out_dtype=torch.bfloat16)
