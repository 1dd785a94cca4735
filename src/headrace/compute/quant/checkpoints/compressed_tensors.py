"""compressed-tensors checkpoints, as LLM Compressor and `headrace quantize` write them (the format of that name, of the vLLM project).

`config_groups` say which modules (a class such as "Linear", a name, or "re:" and a pattern) have which scheme; `ignore`, which have none.
- pack-quantized, integers of 1 to 8 bits: `weight_packed` int32 [out, words], codes offset by 2^(bits - 1), see `words`;
  `weight_shape` [2]; `weight_scale` [out, groups]; asymmetric: `weight_zero_point` int32, packed along the outputs [words, groups];
  act-order: `weight_g_idx` [in].
- int-quantized, float-quantized, naive-quantized: `weight` int8 or e4m3 [out, in]; `weight_scale` of the tensor [1], of each output
  [out, 1], of groups [out, groups], or of blocks [out / b, in / b].
Schemes that quantize activations, too, are served with activations as they are: closer to the model that was quantized, not slower.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headrace.compute.quant.checkpoints import Stored, floats, integers, spread
from headrace.compute.quant.weight import QuantizedWeight
from headrace.compute.quant.words import unpack_words, words_for
from headrace.types.errors import CheckpointError

METHODS = ("compressed-tensors",)
PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
STORED_CODES = ("I8", "F8_E4M3")


@dataclass(frozen=True, slots=True)
class Arguments:
    """How the weights of some modules are quantized."""

    targets: tuple[str, ...]
    bits: int
    float: bool
    block: tuple[int, int] | None
    """Outputs and inputs that share a scale; None: see the scale's shape."""

    def targets_module(self, module: str) -> int:
        """How narrowly: 3 by name, 2 by pattern, 1 by class, 0 not at all."""
        named = [t for t in self.targets if not t.startswith("re:")]
        if any(module == t or module.endswith(f".{t}") for t in named):
            return 3
        if any(re.match(t[3:], module) for t in self.targets if t.startswith("re:")):
            return 2
        return 1 if "Linear" in named else 0


@dataclass(frozen=True, slots=True)
class Scheme:
    groups: tuple[Arguments, ...]
    form: str

    IGNORED: ClassVar[tuple[str, ...]] = (
        ".input_scale",
        ".input_zero_point",
        ".k_scale",
        ".v_scale",
        ".q_scale",
        ".prob_scale",
    )

    @classmethod
    def parse(cls, settings: dict[str, Any], folder: Path) -> Self:
        form = str(settings.get("format", PACKED))
        if form not in FORMATS:
            raise CheckpointError(
                f"{folder}: compressed-tensors format {form!r} is not supported; supported: {', '.join(FORMATS)}"
            )
        sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense":
            raise CheckpointError(f"{folder}: compressed-tensors sparsity {sparse!r} is not supported")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{folder}: quantization_config has no config_groups")
        parsed = tuple(_arguments(name, group, folder) for name, group in groups.items())
        return cls(parsed, form)

    @property
    def summary(self) -> str:
        kinds = sorted({f"{'float' if g.float else 'int'}{g.bits}" for g in self.groups})
        return f"compressed-tensors {self.form}, {', '.join(kinds)}"

    def holds(self, module: str, tensors: Stored) -> bool:
        weight = f"{module}.weight"
        return f"{weight}_packed" in tensors or (
            weight in tensors and tensors.dtype_of(weight) in STORED_CODES
        )

    def read(self, module: str, rows: int, features_in: int, tensors: Stored) -> QuantizedWeight:
        arguments = max(self.groups, key=lambda group: group.targets_module(module))
        if not arguments.targets_module(module):
            raise CheckpointError(f"{module}: no config group of its {self.summary} checkpoint targets it")
        if f"{module}.weight_packed" in tensors:
            return _Packed(module, arguments, rows, features_in, tensors).read()
        return _plain(module, arguments, rows, features_in, tensors)


def _arguments(name: str, group: dict[str, Any], folder: Path) -> Arguments:
    weights = group.get("weights") or {}
    stated, kind = weights.get("num_bits"), weights.get("type", "int")
    bits, wrong = stated if isinstance(stated, int) else 0, ""
    if kind not in ("int", "float"):
        wrong = f"weights of type {kind!r}"
    elif not 1 <= bits <= 8 or (kind == "float" and bits != 8):
        wrong = f"{kind} weights of {stated} bits"
    elif weights.get("dynamic"):
        wrong = "weights quantized as they are used"
    elif group.get("output_activations"):
        wrong = "quantized outputs"
    if wrong:
        raise CheckpointError(f"{folder}: compressed-tensors group {name!r}: {wrong} are not supported")
    block = weights.get("block_structure") if weights.get("strategy") == "block" else None
    if isinstance(block, str):
        block = [int(size) for size in block.split("x")]
    return Arguments(
        tuple(group.get("targets", ("Linear",))),
        bits,
        kind == "float",
        None if block is None else (block[0], block[1]),
    )


@dataclass(frozen=True, slots=True)
class _Packed:
    """One module of a pack-quantized checkpoint."""

    module: str
    arguments: Arguments
    rows: int
    features_in: int
    tensors: Stored

    def read(self) -> QuantizedWeight:
        take, name, bits = self.tensors.raw, f"{self.module}.weight", self.arguments.bits
        packed, scales = take(f"{name}_packed"), take(f"{name}_scale")
        shape = (
            take(f"{name}_shape").tolist()
            if f"{name}_shape" in self.tensors
            else [self.rows, self.features_in]
        )
        if shape != [self.rows, self.features_in] or self.arguments.float:
            self._refuse(f"weight_shape {shape} does not fit {[self.rows, self.features_in]}")
        # Dense, if both would take as many words: so it is written now.
        dense = packed.shape[-1] == words_for(self.features_in, bits)
        try:
            codes = unpack_words(packed, bits, self.features_in, dense=dense)
        except ValueError as error:
            self._refuse(str(error))
            raise
        scales = scales.view(1, 1).expand(self.rows, 1) if scales.numel() == 1 else scales
        if scales.dim() != 2 or scales.shape[0] != self.rows or codes.shape[0] != self.rows:
            self._refuse(f"weight_packed {list(packed.shape)}, weight_scale {list(scales.shape)}")
        zeros = (
            self._zeros(take(f"{name}_zero_point"), dense) if f"{name}_zero_point" in self.tensors else None
        )
        groups = take(f"{name}_g_idx") if f"{name}_g_idx" in self.tensors else None
        return integers(self.module, bits, codes, scales, zeros, groups)

    def _zeros(self, stored: Tensor, dense: bool) -> Tensor:
        """[out, groups], offset as the codes are."""
        bits = self.arguments.bits
        if stored.dtype != torch.int32:
            return (
                (stored.view(len(stored), -1).to(torch.int16) + (1 << bits - 1))
                .expand(self.rows, -1)
                .to(torch.uint8)
            )
        try:
            return unpack_words(stored.T.contiguous(), bits, self.rows, dense=dense).T
        except ValueError as error:
            self._refuse(f"weight_zero_point: {error}")
            raise

    def _refuse(self, what: str) -> None:
        kind = "float" if self.arguments.float else "int"
        raise CheckpointError(
            f"{self.module}: {what} (compressed-tensors {PACKED}, {kind}{self.arguments.bits})"
        )


def _plain(
    module: str, arguments: Arguments, rows: int, features_in: int, tensors: Stored
) -> QuantizedWeight:
    """One module whose `weight` is stored in a byte an element."""
    weight, scales = tensors.raw(f"{module}.weight"), tensors.raw(f"{module}.weight_scale")
    if weight.dtype == torch.float8_e4m3fn:
        return floats(module, weight, scales, arguments.block, rows, features_in)
    scales = spread(module, scales, arguments.block, rows, features_in)
    if list(weight.shape) != [rows, features_in]:
        raise CheckpointError(f"{module}: weight is {list(weight.shape)}, expected {[rows, features_in]}")
    middle = 1 << arguments.bits - 1
    zeros = None
    if f"{module}.weight_zero_point" in tensors:
        stored = tensors.raw(f"{module}.weight_zero_point")
        zeros = (
            (stored.view(-1, scales.shape[1]).to(torch.int16) + middle).to(torch.uint8).expand(scales.shape)
        )
    groups = tensors.raw(f"{module}.weight_g_idx") if f"{module}.weight_g_idx" in tensors else None
    unsigned = (weight.to(torch.int16) + middle).to(torch.uint8)
    return integers(module, arguments.bits, unsigned, scales, zeros, groups)
