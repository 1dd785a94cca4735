"""The operations between projections: against torch in f64 over odd shapes, and bit by bit against themselves."""

import random

import pytest
import torch
from torch import Tensor

from headrace.compute import ops
from headrace.compute.ops import reference
from headrace.compute.pool import pool_tensors
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout
from tests.compute.ops.test_attention import BACKENDS, DTYPES, NATIVE, needs_native

TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 2e-6},
    torch.bfloat16: {"atol": 1e-6, "rtol": 2**-6},
    torch.float16: {"atol": 1e-3, "rtol": 2e-3},
}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_over_odd_shapes(dtype: torch.dtype, backend: str) -> None:
    rng = random.Random(f"{dtype} {backend}")
    for seed in range(12):
        rows, dim = rng.randint(1, 40), rng.choice((1, 7, 16, 63, 64, 65, 128, 1000, 1024))
        x = draw(rows, dim, dtype=dtype, seed=seed, scale=3)
        delta = draw(rows, dim, dtype=dtype, seed=seed + 50)
        weight = draw(dim, dtype=dtype, seed=seed + 99)
        for added in (None, delta):
            stream = x.clone()
            out = ops.rms_norm(stream, weight, 1e-5, delta=added, threads=2, backend=backend)
            expected = x if added is None else x + added
            assert same_bits(stream, expected)
            wide = expected.double()
            normed = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()) * weight.double()
            torch.testing.assert_close(out.double(), normed, **TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gate_over_odd_shapes(activation: ops.Activation, dtype: torch.dtype, backend: str) -> None:
    rng = random.Random(f"{dtype} {backend}")
    for seed in range(12):
        rows, width = rng.randint(1, 40), rng.choice((1, 5, 16, 48, 100, 1376))
        x = draw(rows, 2 * width, dtype=dtype, seed=seed, scale=4)
        out = ops.gated(x, activation, threads=2, backend=backend)
        gate, up = x.double().chunk(2, -1)
        expected = reference.ACTIVATIONS[activation](gate) * up
        torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype] | {"atol": 4e-6})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gate_of_extreme_values(activation: ops.Activation, backend: str) -> None:
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, -200.0, 1e30, -1e30, float("inf"), float("nan"), 1e-30])
    x = torch.cat([gate, torch.ones(10)])[None]
    out = ops.gated(x, activation, threads=1, backend=backend)[0]
    expected = torch.tensor([0.0, 0.0, 88.0, 0.0, 0.0, 1e30, 0.0, float("inf"), float("nan"), 0.0])
    torch.testing.assert_close(out[:7], expected[:7], rtol=1e-6, atol=1e-30)
    assert out[8].isnan()
    assert out[9].abs() < 1e-29
    if activation == "silu":
        assert out[7] == float("inf")


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 20), (2, 2, 128), (1, 1, 2), (6, 3, 40)]
)
def test_heads_are_turned_and_written(
    heads: int, kv_heads: int, dim: int, layout: Layout, dtype: torch.dtype, backend: str
) -> None:
    group = KVGroup(GroupKind.FULL, (0, 1), kv_heads=kv_heads, head_dim=dim)
    spec = KVSpec((group,), 16, str(dtype).removeprefix("torch."), layout)
    tokens = 9
    qkv = draw(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    weight = draw(heads + kv_heads, dim, dtype=dtype, seed=1)
    angles = draw(tokens, dim // 2, dtype=torch.float32, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(5 * 16)[:tokens].int()
    blocks, offsets = slots // 16, slots % 16
    for norm in (None, weight):
        [kv] = pool_tensors(spec, [5])
        kv.fill_(7.0)
        work = qkv.clone()
        q = ops.turn_and_write(
            work, cos, sin, kv, 1, blocks, offsets, weight=norm, eps=1e-5, threads=2, backend=backend
        )
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if norm is not None:
            qk = reference.rms_norm(qk, norm, 1e-5)
        expected = turned(qk, cos, sin)
        close = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
        torch.testing.assert_close(q.double(), expected[:, :heads], atol=close, rtol=close)
        planes = kv[blocks.long(), 1, :, :, offsets.long()]  # [tokens, 2, kv_heads, dim]
        torch.testing.assert_close(planes[:, 0].double(), expected[:, heads:], atol=close, rtol=close)
        assert same_bits(planes[:, 1], v)
        kv[blocks.long(), 1, :, :, offsets.long()] = 7.0
        assert bool((kv == 7.0).all()), "nothing else is written"


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_turning_rounds_where_torch_does(dtype: torch.dtype, backend: str) -> None:
    """Without a norm, whose sum may go in another order, the bits are torch's."""
    tokens, heads, kv_heads, dim = 33, 4, 2, 64
    qkv = draw(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = draw(tokens, dim // 2, dtype=torch.float32, seed=2)
    spec = KVSpec((KVGroup(GroupKind.FULL, (0,), kv_heads, dim),), 16, str(dtype).removeprefix("torch."))
    made = []
    for name in (backend, "torch"):
        [kv] = pool_tensors(spec, [4])
        kv.zero_()
        slots = torch.arange(tokens).int()
        place = (slots // 16, slots % 16)
        angle = angles.cos().to(dtype), angles.sin().to(dtype)
        q = ops.turn_and_write(qkv.clone(), *angle, kv, 0, *place, threads=1, backend=name)
        made.append((q, kv))
    # But for zeros' signs: a product of -1 and 0 is added.
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 100, 1376])
def test_a_row_is_the_same_in_any_company(width: int, dtype: torch.dtype, backend: str) -> None:
    x, delta = draw(301, width, dtype=dtype, scale=3), draw(301, width, dtype=dtype, seed=1)
    weight = draw(width, dtype=dtype, seed=2)

    def every(begin: int, end: int, threads: int) -> list[Tensor]:
        stream = x[begin:end].clone()
        normed = ops.rms_norm(stream, weight, 1e-6, delta=delta[begin:end], threads=threads, backend=backend)
        gates = [
            ops.gated(stream, name, threads=threads, backend=backend)
            for name in ("silu", "gelu_pytorch_tanh")
        ]
        return [stream, normed, *gates]

    alone = every(0, 301, 1)
    for begin, end, threads in ((0, 301, 2), (0, 301, 3), (7, 8, 1), (100, 133, 2), (299, 301, 2)):
        for whole, part in zip(alone, every(begin, end, threads), strict=True):
            assert same_bits(whole[begin:end], part)


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
def test_a_token_is_turned_alike_in_any_company(backend: str) -> None:
    tokens, heads, kv_heads, dim = 120, 6, 3, 40
    spec = KVSpec((KVGroup(GroupKind.FULL, (0,), kv_heads, dim),), 16, "bfloat16")
    qkv = draw(tokens, heads + 2 * kv_heads, dim, dtype=torch.bfloat16)
    weight = draw(heads + kv_heads, dim, dtype=torch.bfloat16, seed=1)
    cos, sin = draw(2, tokens, dim // 2, dtype=torch.bfloat16, seed=2).unbind()
    slots = torch.arange(tokens).int()
    [whole] = pool_tensors(spec, [8])
    whole.zero_()
    q = ops.turn_and_write(
        qkv.clone(),
        cos,
        sin,
        whole,
        0,
        slots // 16,
        slots % 16,
        weight=weight,
        eps=1e-6,
        threads=3,
        backend=backend,
    )
    [pieces] = pool_tensors(spec, [8])
    pieces.zero_()
    for begin, end in ((0, 1), (1, 50), (50, 53), (53, 120)):
        s = slice(begin, end)
        part = ops.turn_and_write(
            qkv[s].clone(), cos[s], sin[s], pieces, 0, slots[s] // 16, slots[s] % 16,
            weight=weight, eps=1e-6, threads=1, backend=backend,
        )  # fmt: skip
        assert same_bits(part, q[s])
    assert same_bits(pieces, whole)


def test_half_precision_runs_on_torch() -> None:
    x = draw(3, 48, dtype=torch.float16)
    weight = torch.ones(48, dtype=torch.float16)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    out = ops.rms_norm(x, weight, 1e-6, threads=1)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float16])
    assert ops.gated(x, "silu", threads=1).shape == (3, 24)


def test_wrong_shapes_are_refused() -> None:
    x, weight = draw(4, 32, dtype=torch.float32), torch.ones(32)
    for bad in (
        {"x": x.T},
        {"x": x[0]},
        {"weight": weight[1:]},
        {"weight": weight.bfloat16()},
        {"delta": x[:3]},
        {"delta": x.bfloat16()},
    ):
        arguments = {"x": x, "weight": weight, **bad}
        with pytest.raises(ValueError, match="contiguous"):
            ops.rms_norm(arguments.pop("x"), arguments.pop("weight"), 1e-6, **arguments, threads=1)
    with pytest.raises(ValueError, match="contiguous"):
        ops.gated(x[:, :31].contiguous(), "silu", threads=1)
    with pytest.raises(ValueError, match="unknown"):
        ops.gated(x, "relu", threads=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_places_are_refused(backend: str) -> None:
    [kv] = pool_tensors(KVSpec((KVGroup(GroupKind.FULL, (0,), 2, 32),), 16, "float32"), [4])
    kv.zero_()
    index = torch.tensor([3, 1]).int()
    good = {
        "qkv": draw(2, 8, 32, dtype=torch.float32),
        "cos": torch.ones(2, 16),
        "sin": torch.ones(2, 16),
        "kv": kv,
        "layer": 0,
        "blocks": index,
        "offsets": index,
    }
    bad = [
        {"qkv": good["qkv"][:, :4]},
        {"qkv": good["qkv"].bfloat16()},
        {"cos": torch.ones(2, 32)},
        {"sin": torch.ones(1, 16)},
        {"layer": 1},
        {"blocks": index + 1},
        {"blocks": index - 2},
        {"offsets": index + 13},
        {"offsets": index.long()},
        {"weight": torch.ones(8, 32)},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=r".+"):
            ops.turn_and_write(**{**good, **change}, threads=1, backend=backend)
    assert not kv.any()
