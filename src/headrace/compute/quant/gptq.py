"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round one input's weights after the other; those to come make up for the error.

For inputs X the layer's squared error is that of (W - Q) under H = X X^T. With the upper Cholesky factor U of H's inverse, rounding
column i leaves e = (w_i - q_i) / U_ii, and the columns j > i become w_j - e U_ij. Columns are worked in blocks: what a block leaves
reaches the later ones in one product. A share of H's mean diagonal is added to the diagonal (damping), more if it has no factor even so.

Orders of the inputs (act-order: those with the most energy first, while most others can still make up for them):
- "none": as they come; scales are chosen when a group begins, from the weights as they are by then.
- "static": by energy; groups are of neighbouring inputs all the same, and their scales are chosen before. Costs nothing when served.
- "group": by energy, and groups are of neighbours in that order: the best fit, but inputs must be gathered when served.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.compute.quant.recipe import Recipe, choose_scales, made, nearest, restored
from headrace.compute.quant.weight import PER_COLUMN, QuantizedWeight
from headrace.types.errors import ConfigError

Order = Literal["none", "static", "group"]
BLOCK = 128
"""Columns; a multiple of what groups are of, or a part of it."""
DAMPING_TRIES = 5
DAMPING_MIN = 1e-4
"""From which damping grows, if less does not do."""


@dataclass(slots=True)
class Energy:
    """The second moment of a layer's inputs, f32 [in, in], added up over tokens."""

    moment: Tensor
    tokens: int = 0

    @classmethod
    def zero(cls, features_in: int) -> "Energy":
        return cls(torch.zeros(features_in, features_in))

    def add(self, x: Tensor) -> None:
        """[tokens, in]."""
        wide = x.float()
        self.moment.addmm_(wide.T, wide)
        self.tokens += len(x)


def quantize(
    weight: Tensor,
    energy: Tensor,
    recipe: Recipe,
    *,
    group: int,
    scale_dtype: torch.dtype,
    damping: float = 0.01,
    order: Order = "static",
    name: str = "weight",
) -> QuantizedWeight:
    """Of a weight [out, in], for inputs whose second moment is `energy` [in, in].

    Raises ConfigError if the moment has no inverse under any sensible damping: the inputs were no numbers.
    """
    weight, energy = weight.float().clone(), energy.float().clone()
    features_in = weight.shape[1]
    size = features_in if group == PER_COLUMN else group
    silent = energy.diagonal() == 0  # never seen: any value will do, and 0 costs nothing
    energy.diagonal()[silent] = 1
    weight[:, silent] = 0
    taken = torch.arange(features_in)
    fixed = None
    if order != "none" and group != PER_COLUMN:
        fixed = (
            choose_scales(weight.view(len(weight), -1, size), recipe, scale_dtype)
            if order == "static"
            else None
        )
    if order != "none":
        taken = energy.diagonal().argsort(descending=True, stable=True)
        weight, energy = weight[:, taken], energy[taken][:, taken]
    work = _Columns(
        weight.T.contiguous(), _factor(energy, damping, name), recipe, size, scale_dtype, taken, fixed
    )
    work.run()
    scales, zeros = work.scales, work.zeros
    if order == "group" and group != PER_COLUMN:
        return made(work.values.T.contiguous(), scales, zeros, recipe, group, taken.int(), name)
    values = torch.empty_like(work.values)
    values[taken] = work.values
    return made(values.T.contiguous(), scales, zeros, recipe, group, None, name)


class _Columns:
    """The weights on their way, inputs first: [in, out]."""

    def __init__(
        self,
        weight: Tensor,
        factor: Tensor,
        recipe: Recipe,
        size: int,
        scale_dtype: torch.dtype,
        taken: Tensor,
        fixed: tuple[Tensor, Tensor | None] | None,
    ) -> None:
        """`taken`: the input of each row; `fixed`: scales and zeros [out, groups] by the input's own place, if chosen before."""
        self._weight = weight
        self._factor = factor
        self._recipe = recipe
        self._size = size
        self._scale_dtype = scale_dtype
        self._groups = (
            (taken // size).tolist() if fixed is not None else [i // size for i in range(len(weight))]
        )
        self._fixed = fixed is not None
        rows, groups = weight.shape[1], len(weight) // size
        empty = torch.empty(rows, groups)
        self.scales, self.zeros = fixed or (empty, None if recipe.symmetric else empty.clone())
        self.values = torch.empty_like(weight)

    def run(self) -> None:
        weight, factor = self._weight, self._factor
        for begin in range(0, len(weight), BLOCK):
            end = min(begin + BLOCK, len(weight))
            block, errors = weight[begin:end], torch.empty(end - begin, weight.shape[1])
            for i in range(end - begin):
                if not self._fixed and (begin + i) % self._size == 0:
                    self._begin_group(begin + i, end, errors)
                row = factor[begin + i, begin:end]
                errors[i] = (block[i] - self._round(begin + i, block[i])) / row[i]
                block[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
            weight[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)

    def _begin_group(self, at: int, end: int, errors: Tensor) -> None:
        """Scales of the group that begins with row `at`. What this block leaves to the rows after it, up to now, is counted in."""
        rows = self._weight[at : at + self._size]
        if at + self._size > end:
            begin = end - len(errors)
            rows = rows.clone()
            rows[end - at :].addmm_(
                self._factor[begin:at, end : at + self._size].T, errors[: at - begin], alpha=-1
            )
        scales, zeros = choose_scales(rows.T.contiguous()[:, None], self._recipe, self._scale_dtype)
        self.scales[:, at // self._size] = scales[:, 0]
        if self.zeros is not None and zeros is not None:
            self.zeros[:, at // self._size] = zeros[:, 0]

    def _round(self, at: int, row: Tensor) -> Tensor:
        """Note the codes of a row; what they stand for."""
        group = self._groups[at]
        scales = self.scales[:, group]
        zeros = None if self.zeros is None else self.zeros[:, group]
        self.values[at] = nearest(row, scales, zeros, self._recipe)
        return restored(self.values[at], scales, zeros)


def _factor(energy: Tensor, damping: float, name: str) -> Tensor:
    """Upper Cholesky factor of the damped moment's inverse."""
    mean = float(energy.diagonal().mean())
    for attempt in range(DAMPING_TRIES):
        damped = energy.clone()
        damped.diagonal().add_(mean * (damping if not attempt else max(damping, DAMPING_MIN) * 10**attempt))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper
    raise ConfigError(
        f"{name}: the calibration's inputs give no moment that could be inverted, with damping from {damping:g} to "
        f"{max(damping, DAMPING_MIN) * 10 ** (DAMPING_TRIES - 1):g}: are they numbers?"
    )
