"""Projections. On the native kernels the bits of a row do not depend on the batch; they are also faster than torch's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.compute import ops
from headrace.compute.checkpoint import Weights


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x @ weight.T + bias, in x's dtype."""

    weight: ops.PackedWeight | Tensor
    """Packed for the native kernels; as it is, [out, in], where there are none for this dtype."""
    bias: Tensor | None
    """[out], f32 beside a packed weight, else in the weight's dtype."""

    @classmethod
    def load(
        cls, weights: Weights, prefix: str, parts: Sequence[tuple[str, int]], features_in: int, bias: bool
    ) -> "Linear":
        """Take `{prefix}{name}.weight` [rows, features_in] (and `.bias`) of all `parts`, (name, rows), as one matrix."""
        names = [(f"{prefix}{name}", rows) for name, rows in parts]
        weight = weights.concat([(f"{name}.weight", rows) for name, rows in names], features_in)
        added = weights.concat([(f"{name}.bias", rows) for name, rows in names]) if bias else None
        if not ops.describe(weight.dtype)["invariant"]:
            return cls(weight, added)
        return cls(ops.pack(weight), None if added is None else added.float())

    def __call__(self, x: Tensor, threads: int) -> Tensor:
        """[tokens, in] -> [tokens, out] in x's dtype."""
        if isinstance(self.weight, Tensor):
            return ops.linear(x, self.weight, self.bias)
        if self.bias is None:
            return ops.fixed_linear(x, self.weight, threads=threads, out_dtype=x.dtype)
        # As in one fused operation: the sum is rounded once.
        wide = ops.fixed_linear(x, self.weight, threads=threads, out_dtype=torch.float32)
        return wide.add_(self.bias).to(x.dtype)
