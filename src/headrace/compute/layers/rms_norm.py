"""Root mean square layer normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.compute import ops


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """y = x / rms(x) * weight over the last axis; see `ops.rms_norm`."""

    weight: Tensor
    """[dim]; of the norm of each head: [heads, dim]."""
    eps: float

    def __call__(self, x: Tensor, delta: Tensor | None, threads: int) -> Tensor:
        """[tokens, dim] -> the same. What the layer before adds to the stream, `delta`, is added to x in place first."""
        return ops.rms_norm(x, self.weight, self.eps, delta=delta, threads=threads)


def per_head(query: Tensor, key: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Weights of a query and a key norm, [dim] each, as one [heads + kv_heads, dim] for rows that hold both."""
    return torch.cat([query.expand(heads, -1), key.expand(kv_heads, -1)])
