"""What weights are to become: width, group, symmetry, and how scales are chosen; and rounding to nearest, the plainest way there.

Integers as compressed-tensors has them: symmetric codes are signed, -2^(bits - 1) to 2^(bits - 1) - 1, with the scale
max|w| / ((2^bits - 1) / 2); asymmetric ones are unsigned, with the scale and integer zero point that put a group's smallest and largest
weight, and 0, in range.

`search` shrinks a group's range, in steps, as far as that lowers the squared error of its weights: outliers are clipped to give the
others a finer grid. It matters most below 4 bits.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from headrace.compute.quant.formats import BITS_MAX, Format
from headrace.compute.quant.weight import PER_COLUMN, QuantizedWeight
from headrace.types.errors import ConfigError

GROUP_MIN = 16
SHRINK_MIN = 0.4
SHRINK_STEPS = 24
ROWS_AT_ONCE = 1 << 22
"""Weights for which scales are searched at a time: what this takes beside the weight is bounded."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Raises ConfigError naming what cannot be had."""

    bits: int = 4
    group: int = 128
    """Inputs that share a scale; `PER_COLUMN`: all of an output's."""
    symmetric: bool = True
    search: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= BITS_MAX:
            raise ConfigError(f"weights of {self.bits} bits are not supported: 1 to {BITS_MAX} are")
        if self.symmetric and self.bits == 1:
            raise ConfigError(
                "one bit cannot be symmetric: it would hold 0 and one sign; quantize asymmetrically"
            )
        if self.group != PER_COLUMN and self.group < GROUP_MIN:
            raise ConfigError(
                f"groups of {self.group} are not supported: at least {GROUP_MIN}, or {PER_COLUMN} for one scale an output"
            )

    @property
    def format(self) -> Format:
        return Format("signed" if self.symmetric else "unsigned", self.bits)

    def group_for(self, module: str, features_in: int) -> int:
        """The group of a weight with so many inputs: as asked, or the largest part of it that divides them.

        Raises ConfigError if that is smaller than any kernel takes.
        """
        if self.group == PER_COLUMN or self.group >= features_in:
            return PER_COLUMN
        divisor = gcd(self.group, features_in)
        if divisor < GROUP_MIN:
            raise ConfigError(
                f"{module}: groups of {self.group} do not divide its {features_in} inputs, nor does any part of at least "
                f"{GROUP_MIN}: choose another --group, or {PER_COLUMN} for one scale an output"
            )
        return divisor


def round_to_nearest(
    weight: Tensor, recipe: Recipe, *, group: int, scale_dtype: torch.dtype, name: str = "weight"
) -> QuantizedWeight:
    """Of a weight [out, in], each element to the nearest code. `scale_dtype`: that of the scales when they are stored."""
    rows, features_in = weight.shape
    grouped = weight.float().view(rows, -1, features_in if group == PER_COLUMN else group)
    scales, zeros = choose_scales(grouped, recipe, scale_dtype)
    codes = nearest(grouped, scales[:, :, None], None if zeros is None else zeros[:, :, None], recipe)
    return made(codes.view(rows, features_in), scales, zeros, recipe, group, None, name)


def choose_scales(grouped: Tensor, recipe: Recipe, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales, f32 [out, groups] that `scale_dtype` can hold, and zero points, f32 or (symmetric) None; of f32 [out, groups, size]."""
    step = max(1, ROWS_AT_ONCE // grouped[0].numel())
    found = [_scales(rows, recipe, scale_dtype) for rows in grouped.split(step)]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor | None, recipe: Recipe) -> Tensor:
    """Values of the codes, f32, integers: signed or (with zeros) unsigned. Scales and zeros broadcast to the weight."""
    top = 1 << recipe.bits - 1
    if zeros is None:
        return (weight / scales).round_().clamp_(-top, top - 1)
    return (weight / scales).round_().add_(zeros).clamp_(0, 2 * top - 1)


def restored(values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """What the values of codes stand for."""
    return (values if zeros is None else values - zeros) * scales


def made(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    recipe: Recipe,
    group: int,
    order: Tensor | None,
    name: str,
) -> QuantizedWeight:
    """Values as `nearest` gives them, as a weight. Scales are f32."""
    codes = values.to(torch.int16).bitwise_and_((1 << recipe.bits) - 1).to(torch.uint8)
    points = None if zeros is None else zeros.to(torch.uint8)
    return QuantizedWeight(recipe.format, codes, scales, group, points, order, name)


def _scales(grouped: Tensor, recipe: Recipe, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    low, high = (
        end.clamp(*bounds)
        for end, bounds in zip(grouped.aminmax(dim=-1), ((None, 0), (0, None)), strict=True)
    )
    scales, zeros = _spanned(low, high, recipe, scale_dtype)
    if not recipe.search:
        return scales, zeros
    best = _error(grouped, scales, zeros, recipe)
    for i in range(1, SHRINK_STEPS + 1):
        share = 1 - (1 - SHRINK_MIN) * i / SHRINK_STEPS
        tried, points = _spanned(low * share, high * share, recipe, scale_dtype)
        error = _error(grouped, tried, points, recipe)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, tried, scales)
        zeros = None if zeros is None or points is None else torch.where(better, points, zeros)
    return scales, zeros


def _spanned(
    low: Tensor, high: Tensor, recipe: Recipe, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that span low (at most 0) to high (at least 0)."""
    codes = (1 << recipe.bits) - 1
    span = torch.maximum(-low, high) * 2 if recipe.symmetric else high - low
    # The smallest normal number, so that a group of zeros has a scale, too.
    scales = (span / codes).to(scale_dtype).float().clamp(min=torch.finfo(scale_dtype).tiny)
    return scales, None if recipe.symmetric else (-low / scales).round_().clamp_(0, codes)


def _error(grouped: Tensor, scales: Tensor, zeros: Tensor | None, recipe: Recipe) -> Tensor:
    """Squared error of each group."""
    scale, zero = scales[:, :, None], None if zeros is None else zeros[:, :, None]
    return (restored(nearest(grouped, scale, zero, recipe), scale, zero) - grouped).square_().sum(-1)
