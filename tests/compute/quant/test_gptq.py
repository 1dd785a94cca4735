import pytest
import torch

from headrace.compute.quant import gptq
from headrace.compute.quant.recipe import Recipe, round_to_nearest
from headrace.compute.quant.weight import PER_COLUMN
from headrace.types.errors import ConfigError


def inputs(features_in: int, tokens: int = 600) -> torch.Tensor:
    """Inputs that depend on each other, some far louder than others."""
    torch.manual_seed(1)
    mix = torch.randn(features_in, features_in) * torch.rand(features_in)[:, None] ** 3
    return torch.randn(tokens, features_in) @ mix


def weights(rows: int, features_in: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, features_in)


def energy(x: torch.Tensor) -> torch.Tensor:
    found = gptq.Energy.zero(x.shape[1])
    for part in x.split(100):
        found.add(part)
    assert found.tokens == len(x)
    return found.moment


def one_by_one(
    weight: torch.Tensor, moment: torch.Tensor, bits: int, group: int, damping: float
) -> torch.Tensor:
    """The method as the paper states it, with H's inverse updated column by column (its equations 2 and 3), in f64."""
    weight, moment = weight.double().clone(), moment.double().clone()
    size = weight.shape[1]
    moment += damping * moment.diagonal().mean() * torch.eye(size)
    top, found = 2 ** (bits - 1), torch.empty_like(weight)
    inverse = torch.linalg.inv(moment)
    for column in range(size):
        if column % group == 0:
            scale = weight[:, column : column + group].abs().amax(1).float() / ((2**bits - 1) / 2)
        found[:, column] = (weight[:, column] / scale).round().clamp(-top, top - 1) * scale
        error = (weight[:, column] - found[:, column]) / inverse[column, column]
        weight -= error[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return found.float()


@pytest.mark.parametrize(("features_in", "group"), [(64, 32), (96, 96), (192, 64), (384, 192)])
def test_as_the_paper_states_it(features_in, group):
    """Blocks, groups inside a block, a group over two blocks."""
    weight, moment = weights(12, features_in), energy(inputs(features_in, 900))
    found = gptq.quantize(
        weight,
        moment,
        Recipe(4, group, search=False),
        group=group if group < features_in else PER_COLUMN,
        scale_dtype=torch.float32,
        order="none",
    ).dequantize()
    expected = one_by_one(weight, moment, 4, group, 0.01)
    # A weight on the edge between two codes may fall to either side; what follows then differs, too, and costs as little.
    assert ((found - expected).abs() < 1e-3).float().mean() > 0.8
    costs = [float(((w - weight) @ moment * (w - weight)).sum()) for w in (found, expected)]
    assert costs[0] == pytest.approx(costs[1], rel=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, PER_COLUMN])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_layer_is_closer_than_rounding_makes_it(bits, group, symmetric):
    weight, x = weights(40, 160), inputs(160)
    recipe = Recipe(bits, group, symmetric)
    nearest = round_to_nearest(weight, recipe, group=group, scale_dtype=torch.float32)
    best = float((x @ (nearest.dequantize() - weight).T).square().mean())
    for order in ("none", "static", "group"):
        found = gptq.quantize(
            weight, energy(x), recipe, group=group, scale_dtype=torch.float32, order=order, damping=0.01
        )
        assert float((x @ (found.dequantize() - weight).T).square().mean()) < 0.5 * best
        assert (found.order is not None) == (order == "group" and group != PER_COLUMN)
        assert found.group == group


def test_without_a_relation_between_inputs_it_is_rounding():
    weight = weights(8, 64)
    for order in ("none", "static"):
        recipe = Recipe(3, 32)
        found = gptq.quantize(
            weight, torch.eye(64) * 7, recipe, group=32, scale_dtype=torch.bfloat16, order=order
        )
        expected = round_to_nearest(weight, recipe, group=32, scale_dtype=torch.bfloat16)
        assert torch.equal(found.dequantize(), expected.dequantize())


def test_inputs_that_were_never_seen():
    weight, x = weights(8, 64), inputs(64)
    x[:, 5] = 0
    found = gptq.quantize(weight, energy(x), Recipe(4, 32), group=32, scale_dtype=torch.float32).dequantize()
    assert not found[:, 5].any()
    assert bool(found.isfinite().all())


def test_inputs_that_are_no_numbers():
    moment = energy(inputs(64))
    moment[3, 4] = torch.nan
    with pytest.raises(ConfigError, match="up_proj: the calibration's inputs give no moment"):
        gptq.quantize(
            weights(8, 64), moment, Recipe(4, 32), group=32, scale_dtype=torch.float32, name="up_proj"
        )


def test_few_samples_need_more_damping():
    """Fewer tokens than inputs: the moment has no inverse of its own."""
    weight, x = weights(8, 64), inputs(64, 20)
    found = gptq.quantize(
        weight, energy(x), Recipe(4, 32), group=32, scale_dtype=torch.float32, damping=0.0
    ).dequantize()
    nearest = round_to_nearest(weight, Recipe(4, 32), group=32, scale_dtype=torch.float32).dequantize()
    assert (x @ (found - weight).T).square().mean() < (x @ (nearest - weight).T).square().mean()
