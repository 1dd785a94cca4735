"""Projections. On the native kernels the bits of a row do not depend on the batch; they are also faster than torch's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.compute import ops
from headrace.compute.checkpoint import Weights
from headrace.compute.quant import QuantizedWeight
from headrace.compute.quant.weight import stack


@dataclass(frozen=True, slots=True)
class Piece:
    """Some outputs of a projection, whose weights are kept alike."""

    weight: ops.PackedWeight | ops.PackedLowBit | Tensor
    """Packed for the native kernels, in bf16 or f32 or in its few bits; as it is, [out, in], where there are none for this dtype."""
    multiply: Callable[..., Tensor]
    """The operation that takes this kind of weight, where it is packed."""
    bias: Tensor | None
    """[out], f32 beside a packed weight, else in the weight's dtype."""

    @classmethod
    def ready(cls, weight: Tensor | QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> "Piece":
        """Packed if kernels promise equal bits in `dtype`; else a quantized weight is widened to it: the slow path, and the large one."""
        if not ops.describe(dtype)["invariant"]:
            return cls(weight if isinstance(weight, Tensor) else weight.dequantize(dtype), ops.linear, bias)
        added = None if bias is None else bias.float()
        if isinstance(weight, QuantizedWeight):
            return cls(ops.pack_low_bit(weight, dtype), ops.low_bit_linear, added)
        return cls(ops.pack(weight), ops.fixed_linear, added)

    def __call__(self, x: Tensor, threads: int) -> Tensor:
        if isinstance(self.weight, Tensor):
            return self.multiply(x, self.weight, self.bias)
        if self.bias is None:
            return self.multiply(x, self.weight, threads=threads, out_dtype=x.dtype)
        # As in one fused operation: the sum is rounded once.
        wide = self.multiply(x, self.weight, threads=threads, out_dtype=torch.float32)
        return wide.add_(self.bias).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x @ weight.T + bias, in x's dtype."""

    pieces: tuple[Piece, ...]
    """Side by side in the outputs; more than one only if a checkpoint quantized what is stacked here in different ways."""
    modules: tuple[tuple[str, int], ...]
    """What is stacked here: the checkpoint's names, and the outputs of each."""

    @classmethod
    def load(
        cls, weights: Weights, prefix: str, parts: Sequence[tuple[str, int]], features_in: int, bias: bool
    ) -> "Linear":
        """Take `{prefix}{name}.weight` [rows, features_in] (and `.bias`) of all `parts`, (name, rows), as one matrix."""
        modules = tuple((f"{prefix}{name}", rows) for name, rows in parts)
        found = weights.matrices(modules, features_in)
        biases: list[Tensor | None] = [None] * len(found)
        if bias:
            added = weights.concat([(f"{name}.bias", rows) for name, rows in modules])
            biases = list(added.split([_rows(weight) for weight in found]))
        else:
            for name, _ in modules:
                weights.drop_zeros(f"{name}.bias")
        pieces = zip(found, biases, strict=True)
        return cls(tuple(Piece.ready(weight, added, weights.dtype) for weight, added in pieces), modules)

    def quantized(self, parts: Sequence[QuantizedWeight], dtype: torch.dtype) -> "Linear":
        """The same with other weights: one of each module."""
        biases = [piece.bias for piece in self.pieces if piece.bias is not None]
        bias = torch.cat(biases) if biases else None
        stacked = stack(parts)
        split = [None] * len(stacked) if bias is None else bias.split([_rows(part) for part in stacked])
        pieces = zip(stacked, split, strict=True)
        return Linear(tuple(Piece.ready(part, added, dtype) for part, added in pieces), self.modules)

    def __call__(self, x: Tensor, threads: int) -> Tensor:
        """[tokens, in] -> [tokens, out] in x's dtype."""
        if len(self.pieces) == 1:
            return self.pieces[0](x, threads)
        return torch.cat([piece(x, threads) for piece in self.pieces], 1)


def _rows(weight: Tensor | QuantizedWeight) -> int:
    return len(weight) if isinstance(weight, Tensor) else weight.features_out
