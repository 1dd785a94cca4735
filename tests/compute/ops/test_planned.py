from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.compute import ops
from headrace.compute.ops.backend import native
from headrace.compute.ops.variants import VARIANTS, Alibi, Masked, Sigmoid, Sinks, SoftCap, Standard
from headrace.compute.plans import Limits, Plan, Shape, describe, make_plan
from tests.compute.ops.paged import Case, make

BACKENDS = ops.available()
NATIVE = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")
Wanted = list[tuple[int, int]]
HEADS = 6


def plan_of(case: Case, wanted: Wanted, *, window: int = 0, workers: int = 2, levels: int = 2) -> Plan:
    q, rows, positions = case.batch(wanted)
    queries, sparse = describe(
        case.tables.numpy(), rows.numpy(), positions.numpy(),
        blocks=case.kv.shape[0], block_size=case.kv.shape[4], window=window,
    )  # fmt: skip
    limits = Limits(workers, levels=levels)
    return make_plan(queries, sparse, Shape(q.shape[1], case.kv.shape[3], window), limits)


def attend(
    case: Case,
    wanted: Wanted,
    *,
    window: int = 0,
    workers: int = 2,
    levels: int = 2,
    variant: Standard | None = None,
    backend: str,
) -> Tensor:
    q, _, positions = case.batch(wanted)
    plan = plan_of(case, wanted, window=window, workers=workers, levels=levels)
    return ops.planned_attention(
        q, case.kv, case.layer, plan, positions,
        scale=q.shape[2] ** -0.5, threads=workers, variant=variant or Standard(), backend=backend,
    )  # fmt: skip


def close(out: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (6, 2, 80), (5, 1, 96), (100, 2, 16)])
def test_matches_naive_attention(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, backend: str
) -> None:
    case = make([1100, 1060, 70, 1], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, shared=1024)
    wanted = [(0, 1099), (1, 1059), *((2, p) for p in range(30, 70)), (3, 0), (1, 1050)]
    expected = case.naive(wanted, dim**-0.5, 0)
    close(attend(case, wanted, backend=backend), expected)
    close(attend(case, wanted, backend=backend, levels=0), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 50, 1500])
def test_windows_match_naive_attention(window: int, backend: str) -> None:
    case = make([2100, 90], heads=2, kv_heads=1, dim=32)
    wanted = [(0, 1023), (0, 1024), (0, 2099), *((1, p) for p in range(90))]
    close(attend(case, wanted, window=window, backend=backend), case.naive(wanted, 32**-0.5, window))


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_together_has_the_bits_of_alone(dtype: torch.dtype, backend: str) -> None:
    """Over batches drawn at random, under plans for any number of workers, with and without shared prefixes."""
    draw = torch.Generator().manual_seed(3)
    shared = 0
    for seed in range(4):
        lengths = (torch.randint(1, 1400, (6,), generator=draw) + 1024 * torch.arange(6) % 3072).tolist()
        lengths[0] = 3100
        case = make(
            lengths,
            heads=HEADS,
            kv_heads=2,
            dim=32,
            dtype=dtype,
            seed=seed,
            shared=1024 * (seed + 1) - 31 * (seed % 2),
        )
        ends = [(s, length - 1) for s, length in enumerate(lengths)]
        chunk = [(5, p) for p in range(max(0, lengths[5] - 40), lengths[5] - 1)]
        wanted = [*ends[:3], *chunk, *ends[3:]]
        q, rows, positions = case.batch(wanted)
        alone = torch.cat([
            ops.paged_attention(
                q[i : i + 1], case.kv, 1, case.tables, rows[i : i + 1], positions[i : i + 1],
                scale=32**-0.5, threads=1, backend=backend,
            )
            for i in range(len(wanted))
        ])  # fmt: skip
        for workers, levels in ((1, 0), (2, 2), (3, 1), (16, 2)):
            out = attend(case, wanted, workers=workers, levels=levels, backend=backend)
            assert torch.equal(out, alone), (seed, workers, levels)
        shared += bool(plan_of(case, wanted).shared)
    assert shared >= 3, "most of them share a prefix"


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [40, 1500])
def test_windows_have_the_bits_of_alone(window: int, dtype: torch.dtype, backend: str) -> None:
    case = make([3100, 500], heads=4, kv_heads=2, dim=32, dtype=dtype)
    wanted = [(0, 3099), *((1, p) for p in range(430, 500)), (0, 1024)]
    q, rows, positions = case.batch(wanted)
    same = ops.paged_attention(
        q, case.kv, 1, case.tables, rows, positions, scale=32**-0.5, window=window, threads=1, backend=backend
    )
    for workers in (1, 2, 16):
        assert torch.equal(attend(case, wanted, window=window, workers=workers, backend=backend), same)


# Variants: each in f64 over all keys, from its definition.


def soft_cap(s: Tensor, *_: Tensor) -> Tensor:
    return (3 * torch.tanh(s / 3)).softmax(-1)


def alibi(s: Tensor, distance: Tensor, *_: Tensor) -> Tensor:
    return (s + SLOPES.double()[:, None, None] * distance).softmax(-1)


def sinks(s: Tensor, *_: Tensor) -> Tensor:
    with_sink = torch.cat([s, SINKS.double()[:, None, None].expand(*s.shape[:2], 1)], -1)
    return with_sink.softmax(-1)[..., :-1]


def sigmoid(s: Tensor, *_: Tensor) -> Tensor:
    return torch.sigmoid(s - 2)


def masked(s: Tensor, _: Tensor, mask: Tensor) -> Tensor:
    return s.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.06, 0.03, 0.0])
SINKS = torch.tensor([-1.0, 0.0, 2.0, 5.0, 20.0, -30.0])
Weights = Callable[..., Tensor]
CASES: list[tuple[Callable[[Tensor], Standard], Weights]] = [
    (lambda _: SoftCap(3.0), soft_cap),
    (lambda _: Alibi(SLOPES), alibi),
    (lambda _: Sinks(SINKS), sinks),
    (lambda _: Sigmoid(-2.0), sigmoid),
    (Masked.of, masked),
]
NAMES = ["soft_cap", "alibi", "sinks", "sigmoid", "masked"]


def by_definition(case: Case, wanted: Wanted, mask: Tensor, weights: Weights) -> Tensor:
    out = []
    for i, (sequence, position) in enumerate(wanted):
        q, k, v = (x[sequence].double() for x in (case.q, case.k, case.v))
        k, v = (x[: position + 1].transpose(0, 1).repeat_interleave(HEADS // x.shape[1], 0) for x in (k, v))
        s = q[position][:, None] @ k.mT * q.shape[2] ** -0.5
        distance = torch.arange(position + 1) - position
        out.append((weights(s, distance, mask[i, : position + 1]) @ v).flatten())
    return torch.stack(out)


def mask_for(wanted: Wanted) -> Tensor:
    """Random keys; the third token has none in its first 1,100, and the second none at all."""
    keys = max(p for _, p in wanted) + 1
    mask = torch.rand(len(wanted), keys, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[1] = False
    mask[2, :1100] = False
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("make_variant", "weights"), CASES, ids=NAMES)
def test_variants_are_what_they_say(
    make_variant: Callable[[Tensor], Standard], weights: Weights, dtype: torch.dtype, backend: str
) -> None:
    case = make([1100, 1060, 1149, 70, 1], heads=HEADS, kv_heads=2, dim=48, dtype=dtype, shared=1056)
    wanted = [(0, 1099), (1, 1059), (2, 1148), *((3, p) for p in range(50, 70)), (4, 0)]
    mask = mask_for(wanted)
    out = attend(case, wanted, variant=make_variant(mask), backend=backend)
    expected = by_definition(case, wanted, mask, weights)
    if weights is sigmoid:  # a sum of a thousand values is as large
        out, expected = out / 30, expected / 30
    close(out, expected)


@needs_native
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make_variant", [make for make, _ in CASES], ids=NAMES)
def test_variants_have_the_bits_of_alone(
    make_variant: Callable[[Tensor], Standard], dtype: torch.dtype, backend: str
) -> None:
    case = make([2100, 2060, 1149, 70], heads=HEADS, kv_heads=2, dim=32, dtype=dtype, shared=2048)
    wanted = [(0, 2099), (1, 2059), (2, 1148), *((3, p) for p in range(53, 70))]
    mask = mask_for(wanted)
    assert plan_of(case, wanted).shared
    alone = torch.cat([
        attend(case, [one], variant=make_variant(mask[i : i + 1]), workers=1, backend=backend)
        for i, one in enumerate(wanted)
    ])  # fmt: skip
    for workers, levels in ((1, 2), (2, 2), (16, 0)):
        out = attend(
            case, wanted, variant=make_variant(mask), workers=workers, levels=levels, backend=backend
        )
        assert torch.equal(out, alone), (workers, levels)
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = attend(case, [wanted[i] for i in order], variant=make_variant(mask[order]), backend=backend)
    assert torch.equal(shuffled, alone[order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_hidden_keys_are_not_read(bad: float, backend: str) -> None:
    case = make([80])
    wanted = [(0, 70), (0, 79), (0, 5)]
    mask = torch.ones(3, 80, dtype=torch.bool)
    mask[:2, 18] = False  # the third comes before it
    clean = attend(case, wanted, variant=Masked.of(mask), backend=backend)
    case.kv[int(case.tables[0, 0]), 1, 1, :, 18] = bad
    assert torch.equal(attend(case, wanted, variant=Masked.of(mask), backend=backend), clean)


@needs_native
def test_native_has_the_variants_in_this_order() -> None:
    assert [variant.__name__ for variant in VARIANTS] == list(native.VARIANTS)


def test_bad_input_is_refused_by_name() -> None:
    case = make([80, 20])
    wanted = [(0, 79), (1, 19)]
    q, _, positions = case.batch(wanted)
    plan = plan_of(case, wanted)
    good = {"q": q, "kv": case.kv, "layer": 1, "plan": plan, "positions": positions}
    bad = [
        ({"layer": 3}, "layer 3 of 3"),
        ({"q": q[:1]}, "a plan of 2 tokens, 4 heads over 2 for a batch of 1"),
        ({"q": q[:, ::2]}, "must be contiguous"),
        ({"positions": positions.long()}, "positions must be"),
        ({"positions": positions[:1]}, "positions must be"),
        ({"kv": make([80, 20], block_size=16).kv}, "blocks of 32 for a pool with blocks of 16"),
        ({"kv": case.kv[1:]}, "a plan for a pool of 7 blocks for one of 6"),
        ({"variant": SoftCap(0.0)}, "soft cap must be a number above 0"),
        ({"variant": SoftCap(float("nan"))}, "soft cap must be a number above 0"),
        ({"variant": Sigmoid(float("inf"))}, "bias must be a number"),
        ({"variant": Alibi(torch.ones(3))}, "slopes must be contiguous"),
        ({"variant": Alibi(torch.full((4,), float("nan")))}, "slopes must be numbers"),
        ({"variant": Sinks(torch.ones(4).double())}, "scores of sinks must be"),
        ({"variant": Masked(torch.zeros(2, 8, dtype=torch.uint8))}, "for 2 tokens and 80 keys: 16 bytes"),
        ({"variant": Masked(torch.zeros(1, 16, dtype=torch.uint8))}, "for 2 tokens and 80 keys: 16 bytes"),
        ({"variant": Masked(torch.zeros(2, 16))}, "must be contiguous uint8"),
        ({"variant": object()}, "no known variant"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            ops.planned_attention(**{**good, **change}, scale=1.0, threads=1)
