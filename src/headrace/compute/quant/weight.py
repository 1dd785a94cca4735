"""A quantized weight as plain data: what checkpoints and quantizers give, and what kernels pack.

    weight[:, order[i]] = (values[codes[:, i]] - zeros[:, g]) * scales[:, g],  g = i // group

Everything that can be wrong with one is found when it is made, and named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.compute.quant.formats import Format
from headrace.types.errors import ConfigError

PER_COLUMN = -1
"""Group size: one scale for all inputs of an output."""

SCALE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Raises ConfigError, naming the field, for what is not a weight."""

    format: Format
    codes: Tensor
    """uint8 [out, in], contiguous, one code per element, in the low `format.bits` bits (the others 0)."""
    scales: Tensor
    """f32 or bf16 [out, groups]; finite."""
    group: int = PER_COLUMN
    """Inputs that share a scale, `in` being a multiple of it; `PER_COLUMN`: all."""
    zeros: Tensor | None = None
    """uint8 [out, groups], at most 2^bits: what is subtracted from the values, of unsigned formats only; None: 0."""
    order: Tensor | None = None
    """int32 [in], a permutation: input `order[i]` meets `codes[:, i]` (act-order: inputs of one group need not be neighbours). None:
    input i."""
    name: str = "weight"
    """How errors call it."""

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or not self.codes.numel():
            self._refuse(f"codes are {self.codes.dtype}{list(self.codes.shape)}, expected uint8 [out, in]")
        if int(self.codes.max()) >> self.format.bits:
            self._refuse(f"code {int(self.codes.max())} does not fit in {self.format.bits} bits")
        if self.group != PER_COLUMN and (self.group < 1 or self.features_in % self.group):
            self._refuse(f"group size {self.group} does not divide its {self.features_in} inputs")
        self._check_scales()
        self._check_zeros()
        self._check_order()
        if self.format.name in ("e4m3", "e5m2"):  # the formats with codes that are no number
            finite = self.format.values().isfinite()
            if not bool(finite[self.codes.long()].all()):
                self._refuse(f"has NaN or infinite values ({self.format.name})")

    @property
    def features_out(self) -> int:
        return self.codes.shape[0]

    @property
    def features_in(self) -> int:
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        """Of an output."""
        return 1 if self.group == PER_COLUMN else self.features_in // self.group

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] in `dtype`, inputs in the order in which they come: the reference of every kernel, computed in f32."""
        values = self.format.values()[self.codes.long()].view(self.features_out, self.groups, -1)
        if self.zeros is not None:
            values = values - self.zeros.float()[:, :, None]
        weight = (values * self.scales.float()[:, :, None]).view(self.features_out, self.features_in)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order.long(), weight)
        return weight.to(dtype)

    def _check_scales(self) -> None:
        shape = [self.features_out, self.groups]
        if self.scales.dtype not in SCALE_DTYPES or list(self.scales.shape) != shape:
            found = f"{self.scales.dtype}{list(self.scales.shape)}"
            self._refuse(
                f"scales are {found}, expected float32 or bfloat16 {shape} for groups of {self.group}"
            )
        if not bool(self.scales.isfinite().all()):
            self._refuse("scales hold NaN or infinities")

    def _check_zeros(self) -> None:
        if self.zeros is None:
            return
        if self.format.kind != "unsigned":
            self._refuse(f"has zero points, which {self.format.name} cannot have: only unsigned formats do")
        if self.zeros.dtype != torch.uint8 or self.zeros.shape != self.scales.shape:
            found = f"{self.zeros.dtype}{list(self.zeros.shape)}"
            self._refuse(f"zero points are {found}, expected uint8 {list(self.scales.shape)}")
        if int(self.zeros.max()) > 1 << self.format.bits:
            self._refuse(
                f"zero point {int(self.zeros.max())} is beyond the {self.format.bits} bits of its codes"
            )

    def _check_order(self) -> None:
        if self.order is None:
            return
        if self.order.dtype != torch.int32 or list(self.order.shape) != [self.features_in]:
            found = f"{self.order.dtype}{list(self.order.shape)}"
            self._refuse(f"the order of inputs is {found}, expected int32 [{self.features_in}]")
        if not torch.equal(self.order.long().sort().values, torch.arange(self.features_in)):
            self._refuse("the order of inputs is no permutation")

    def _refuse(self, what: str) -> None:
        raise ConfigError(f"{self.name}: {what}")


def concat(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """The outputs of all `parts` as one weight, or None where they differ in more than their outputs."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        alike = (part.format, part.group, part.features_in) == (first.format, first.group, first.features_in)
        if (
            not alike
            or (part.zeros is None) != (first.zeros is None)
            or not _same_order(part.order, first.order)
        ):
            return None
    return QuantizedWeight(
        first.format,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts])
        if len({part.scales.dtype for part in parts}) == 1
        else torch.cat([part.scales.float() for part in parts]),
        first.group,
        None if first.zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None]),
        first.order,
        first.name,
    )


def stack(parts: Sequence[Tensor | QuantizedWeight]) -> list[Tensor | QuantizedWeight]:
    """The outputs of all `parts`, in order, in as few weights as can be: neighbours that `concat` takes become one."""
    stacked: list[Tensor | QuantizedWeight] = []
    alike: list[QuantizedWeight] = []
    for part in parts:
        if isinstance(part, Tensor):
            alike = []
            stacked.append(part)
            continue
        whole = concat([*alike, part])
        if whole is None or not alike:
            alike = [part]
            stacked.append(part)
        else:
            alike.append(part)
            stacked[-1] = whole
    return stacked


def _same_order(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
