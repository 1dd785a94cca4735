import pytest
import torch

from headrace.compute.quant.recipe import Recipe, round_to_nearest
from headrace.compute.quant.weight import PER_COLUMN
from headrace.types.errors import ConfigError


def weights(rows: int = 24, features_in: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, features_in).mul_(torch.rand(rows, 1))


def rounded(weight: torch.Tensor, group: int = 32, **settings) -> torch.Tensor:
    recipe = Recipe(group=group, **settings)
    return round_to_nearest(weight, recipe, group=group, scale_dtype=torch.float32).dequantize()


@pytest.mark.parametrize("group", [32, PER_COLUMN])
@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric(bits, group):
    """By the definition of compressed-tensors, element by element."""
    weight = weights()
    top = 2 ** (bits - 1)
    expected = torch.empty_like(weight)
    size = weight.shape[1] if group == PER_COLUMN else group
    for row in range(len(weight)):
        for begin in range(0, weight.shape[1], size):
            part = weight[row, begin : begin + size]
            scale = part.abs().max() / ((2**bits - 1) / 2)
            expected[row, begin : begin + size] = (part / scale).round().clamp(-top, top - 1) * scale
    found = rounded(weight, group, bits=bits, search=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_asymmetric(bits):
    weight = weights() + 0.2
    expected = torch.empty_like(weight)
    for row in range(len(weight)):
        for begin in range(0, weight.shape[1], 32):
            part = weight[row, begin : begin + 32]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = (high - low) / (2**bits - 1)
            zero = round(-low / scale)
            codes = ((part / scale).round() + zero).clamp(0, 2**bits - 1)
            expected[row, begin : begin + 32] = (codes - zero) * scale
    found = rounded(weight, bits=bits, symmetric=False, search=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searching_never_costs_accuracy(bits, symmetric):
    weight = weights()
    errors = [
        (rounded(weight, bits=bits, symmetric=symmetric, search=search) - weight).square().sum()
        for search in (True, False)
    ]
    assert errors[0] <= errors[1]
    assert bits > 4 or errors[0] < 0.95 * errors[1]


def test_a_group_of_zeros():
    weight = weights()
    weight[3, :32] = 0
    for symmetric in (True, False):
        found = rounded(weight, bits=4, symmetric=symmetric)
        assert bool(found.isfinite().all())
        assert not found[3, :32].any()


def test_scales_are_what_is_stored():
    """Codes are chosen for the scale as it is written, in bf16."""
    found = round_to_nearest(weights(), Recipe(8, 32), group=32, scale_dtype=torch.bfloat16)
    assert torch.equal(found.scales, found.scales.bfloat16().float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "0 bits are not supported: 1 to 8"),
        ({"bits": 9}, "9 bits are not supported: 1 to 8"),
        ({"bits": 1}, "one bit cannot be symmetric"),
        ({"group": 8}, "groups of 8 are not supported: at least 16"),
        ({"group": 0}, "groups of 0 are not supported"),
    ],
)
def test_settings_that_cannot_be_had(settings, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)


def test_groups_that_do_not_divide():
    recipe = Recipe(4, 128)
    assert recipe.group_for("m", 1024) == 128
    assert recipe.group_for("m", 576) == 64
    assert recipe.group_for("m", 100) == PER_COLUMN
    with pytest.raises(
        ConfigError, match="m: groups of 128 do not divide its 1000 inputs, nor does any part"
    ):
        recipe.group_for("m", 1000)
