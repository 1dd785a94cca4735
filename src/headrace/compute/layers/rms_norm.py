"""Root mean square layer normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """y = x / rms(x) * weight over the last axis; the root in f32, the product in x's dtype, as transformers computes it."""

    weight: Tensor
    """[dim], or any shape that broadcasts to x (one weight per head: [heads, dim])."""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same shape and dtype."""
        wide = x.float()
        scale = (wide * wide).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (wide * scale).to(x.dtype) * self.weight


def per_head(query: Tensor, key: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Weights of a query and a key norm, [dim] each, as one [heads + kv_heads, dim] for rows that hold both."""
    return torch.cat([query.expand(heads, -1), key.expand(kv_heads, -1)])
