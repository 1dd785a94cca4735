from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.compute.quant import Format
from headrace.compute.quant.weight import concat
from headrace.types.errors import ConfigError
from tests.compute.quant.drawn import draw_weight

WEIGHT = draw_weight("uint4", 6, 12, group=4, zeros=True, order=True, seed=3)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        ["uint1", "int2", "uint3", "int4", "uint4", "int5", "uint6", "int7", "int8", "uint8", "e2m1", "e4m3"]
    ),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([-1, 1, 3, 8]),
    st.booleans(),
    st.integers(0, 99),
)
def test_dequantize_is_the_formula(
    name: str, out: int, groups: int, group: int, order: bool, seed: int
) -> None:
    features_in = groups * abs(group)
    zeros = name.startswith("u") and bool(seed % 2)
    weight = draw_weight(name, out, features_in, group=group, zeros=zeros, order=order, seed=seed)
    dense = weight.dequantize()
    values = weight.format.values().tolist()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        n = int(torch.randint(out, (1,), generator=generator))
        i = int(torch.randint(features_in, (1,), generator=generator))
        g = 0 if group == -1 else i // group
        zero = 0 if weight.zeros is None else int(weight.zeros[n, g])
        at = i if weight.order is None else int(weight.order[i])
        expected = (values[int(weight.codes[n, i])] - zero) * weight.scales[n, g].float()
        assert dense[n, at] == expected


def test_dtype_is_rounded_once() -> None:
    assert torch.equal(WEIGHT.dequantize(torch.bfloat16), WEIGHT.dequantize().bfloat16())


def test_concat() -> None:
    other = replace(WEIGHT, codes=WEIGHT.codes.flip(0), scales=WEIGHT.scales * 2)
    both = concat([WEIGHT, other])
    assert both is not None
    assert torch.equal(both.dequantize(), torch.cat([WEIGHT.dequantize(), other.dequantize()]))
    assert concat([WEIGHT]) is WEIGHT
    assert concat([WEIGHT, replace(other, zeros=None)]) is None
    assert concat([WEIGHT, replace(other, order=None)]) is None
    assert WEIGHT.order is not None
    assert concat([WEIGHT, replace(other, order=WEIGHT.order.flip(0))]) is None
    assert concat([WEIGHT, replace(other, format=Format.named("uint5"))]) is None
    mixed = concat([WEIGHT, replace(other, scales=other.scales.bfloat16())])
    assert mixed is not None and mixed.scales.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes": WEIGHT.codes.int()}, "codes are torch.int32"),
        ({"codes": WEIGHT.codes[:0]}, "codes are"),
        ({"codes": WEIGHT.codes + 16}, "does not fit in 4 bits"),
        ({"group": 5}, "group size 5 does not divide its 12 inputs"),
        ({"group": 0}, "group size 0"),
        ({"group": -2}, "group size -2"),
        ({"group": 6}, "scales are"),
        ({"scales": WEIGHT.scales.half()}, "scales are torch.float16"),
        ({"scales": WEIGHT.scales * float("nan")}, "NaN"),
        ({"scales": WEIGHT.scales * float("inf")}, "infinities"),
        ({"zeros": WEIGHT.scales}, "zero points are torch.float32"),
        ({"zeros": torch.full_like(WEIGHT.zeros, 17)}, "zero point 17"),
        ({"format": Format.named("int4")}, "only unsigned"),
        ({"order": torch.arange(12)}, "order of inputs is torch.int64"),
        ({"order": torch.zeros(12, dtype=torch.int32)}, "no permutation"),
    ],
)
def test_what_is_no_weight_is_named(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.q_proj: .*{said}"):
        replace(WEIGHT, name="model.q_proj", **change)


def test_codes_that_are_no_number_are_refused() -> None:
    weight = draw_weight("e4m3", 2, 4)
    codes = weight.codes.clone()
    codes[1, 2] = 0x7F
    with pytest.raises(ConfigError, match="NaN"):
        replace(weight, codes=codes)
