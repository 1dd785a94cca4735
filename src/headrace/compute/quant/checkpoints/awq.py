"""AWQ checkpoints (Lin et al. 2023, arXiv:2306.00978) in the layout of its `gemm` kernels, which AutoAWQ and LLM Compressor write.

A module has `qweight` int32 [in, out / 8] and `qzeros` int32 [groups, out / 8], 4 bits each, both packed along the outputs: nibbles 0 to 7
of a word, lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight; `scales` [groups, out]. weight = (code - zero) * scale. The
activation-aware factors have been folded into norms and weights: nothing of them is left to do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headrace.compute.quant.checkpoints import Stored, integers
from headrace.compute.quant.weight import QuantizedWeight
from headrace.compute.quant.words import unpack_words
from headrace.types.errors import CheckpointError

METHODS = ("awq",)
BITS = 4
NIBBLE_OF_OUTPUT = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True, slots=True)
class Scheme:
    group: int

    IGNORED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, settings: dict[str, Any], folder: Path) -> Self:
        version = str(settings.get("version", settings.get("format", "gemm"))).lower()
        if version != "gemm":
            raise CheckpointError(f"{folder}: AWQ version {version!r} is not supported; supported: gemm")
        bits = settings.get("bits", settings.get("w_bit"))
        group = settings.get("group_size", settings.get("q_group_size"))
        if bits != BITS or not isinstance(group, int):
            raise CheckpointError(
                f"{folder}: AWQ with bits {bits} and group_size {group} is not supported; bits are {BITS}"
            )
        return cls(group)

    @property
    def summary(self) -> str:
        return f"AWQ, {BITS} bits, groups of {self.group}"

    def holds(self, module: str, tensors: Stored) -> bool:
        return f"{module}.qweight" in tensors

    def read(self, module: str, rows: int, features_in: int, tensors: Stored) -> QuantizedWeight:
        packed, scales = tensors.raw(f"{module}.qweight"), tensors.raw(f"{module}.scales").T
        if packed.shape[0] != features_in or scales.shape[0] != rows:
            raise CheckpointError(
                f"{module}: qweight {list(packed.shape)} and scales {list(scales.T.shape)} do not fit {rows} outputs of "
                f"{features_in} inputs ({self.summary})"
            )
        try:
            codes = self._outputs(packed, rows).T.contiguous()
            zeros = None
            if f"{module}.qzeros" in tensors:
                zeros = self._outputs(tensors.raw(f"{module}.qzeros"), rows).T
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{module}: {error} ({self.summary})") from error
        return integers(module, BITS, codes, scales, zeros)

    @staticmethod
    def _outputs(packed: Tensor, rows: int) -> Tensor:
        """int32 [n, out / 8] -> uint8 [n, out]."""
        nibbles = unpack_words(packed, BITS, rows).view(len(packed), -1, len(NIBBLE_OF_OUTPUT))
        return nibbles[:, :, NIBBLE_OF_OUTPUT].reshape(len(packed), rows)
