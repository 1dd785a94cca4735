"""FP8 checkpoints as models are released in (DeepSeek-V3, arXiv:2412.19437, section 3.3; Qwen3), and as transformers writes them.

A module has `weight` e4m3 [out, in] and `weight_scale_inv`, of blocks [out / b, in / b] (`weight_block_size`), which multiplies in spite
of its name; or `weight_scale` of the tensor or of each output. Activations stay as they are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from headrace.compute.quant.checkpoints import Stored, floats
from headrace.compute.quant.weight import QuantizedWeight
from headrace.types.errors import CheckpointError

METHODS = ("fp8",)


@dataclass(frozen=True, slots=True)
class Scheme:
    block: tuple[int, int] | None

    IGNORED: ClassVar[tuple[str, ...]] = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")

    @classmethod
    def parse(cls, settings: dict[str, Any], folder: Path) -> Self:
        kind, block = settings.get("fmt", "e4m3"), settings.get("weight_block_size")
        if kind not in ("e4m3", "float8_e4m3fn"):
            raise CheckpointError(
                f"{folder}: FP8 weights of kind {kind!r} are not supported; supported: e4m3"
            )
        return cls(None if block is None else (int(block[0]), int(block[1])))

    @property
    def summary(self) -> str:
        return "FP8 e4m3" + ("" if self.block is None else f", blocks of {self.block[0]} x {self.block[1]}")

    def holds(self, module: str, tensors: Stored) -> bool:
        weight = f"{module}.weight"
        return weight in tensors and tensors.dtype_of(weight) == "F8_E4M3"

    def read(self, module: str, rows: int, features_in: int, tensors: Stored) -> QuantizedWeight:
        inverse = f"{module}.weight_scale_inv"
        scales = tensors.raw(inverse if inverse in tensors else f"{module}.weight_scale")
        return floats(module, tensors.raw(f"{module}.weight"), scales, self.block, rows, features_in)
