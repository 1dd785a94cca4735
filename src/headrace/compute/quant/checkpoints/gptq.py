"""GPTQ checkpoints (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ, GPTQModel and Optimum write them.

A module has `qweight` int32 [in * bits / 32, out], packed along the inputs; `qzeros` int32 [groups, out * bits / 32], packed along the
outputs; `scales` [groups, out]; `g_idx` [in], the group of each input (act-order: any). weight = (code - zero) * scale.

`checkpoint_format` "gptq" (or none) is version 1: it stores zero points less one. "gptq_v2" stores them as they are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headrace.compute.quant.checkpoints import Stored, integers
from headrace.compute.quant.weight import QuantizedWeight
from headrace.compute.quant.words import WORD, unpack_words
from headrace.types.errors import CheckpointError

METHODS = ("gptq",)
FORMATS = ("gptq", "gptq_v2")
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Scheme:
    bits: int
    group: int
    version: int

    IGNORED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, settings: dict[str, Any], folder: Path) -> Self:
        form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if form not in FORMATS:
            raise CheckpointError(
                f"{folder}: GPTQ checkpoint format {form!r} is not supported; supported: {', '.join(FORMATS)}"
            )
        bits, group = settings.get("bits"), settings.get("group_size")
        if bits not in WIDTHS or not isinstance(group, int):
            raise CheckpointError(
                f"{folder}: GPTQ with bits {bits} and group_size {group} is not supported; bits are one of {WIDTHS}"
            )
        return cls(bits, group, 1 if form == "gptq" else 2)

    @property
    def summary(self) -> str:
        return f"GPTQ, {self.bits} bits, groups of {self.group}"

    def holds(self, module: str, tensors: Stored) -> bool:
        return f"{module}.qweight" in tensors

    def read(self, module: str, rows: int, features_in: int, tensors: Stored) -> QuantizedWeight:
        packed, scales = tensors.raw(f"{module}.qweight"), tensors.raw(f"{module}.scales").T
        # Modules may differ from what config.json says (GPTQModel's `dynamic`): their shapes tell.
        bits = packed.shape[0] * WORD // features_in
        if bits not in WIDTHS or packed.shape[1] != rows or scales.shape[0] != rows:
            raise CheckpointError(
                f"{module}: qweight {list(packed.shape)} and scales {list(scales.T.shape)} do not fit {rows} outputs of "
                f"{features_in} inputs ({self.summary})"
            )
        try:
            codes = unpack_words(packed.T.contiguous(), bits, features_in)
            zeros = unpack_words(self._zeros(tensors.raw(f"{module}.qzeros"), bits), bits, rows).T
        except ValueError as error:
            raise CheckpointError(f"{module}: {error} ({self.summary})") from error
        if self.version == 1 and WORD % bits:
            zeros = zeros + 1 & (1 << bits) - 1
        groups = tensors.raw(f"{module}.g_idx") if f"{module}.g_idx" in tensors else None
        return integers(module, bits, codes, scales, zeros, groups)

    def _zeros(self, packed: Tensor, bits: int) -> Tensor:
        """Version 1's less one is undone in whole words, as it is done: what it borrows from the next code is given back."""
        if self.version == 2 or WORD % bits:
            return packed
        ones = sum(1 << shift for shift in range(0, WORD, bits))
        wide = (packed.long() & 0xFFFFFFFF) + ones & 0xFFFFFFFF
        return (wide - ((wide >> WORD - 1) << WORD)).to(torch.int32)
