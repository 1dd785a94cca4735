"""Variants of attention, each a small functor: what it does to the scores, which keys it hides, how it ends.

`VARIANTS` lists them. The native kernels have one functor of the same name for each (`native/variants.h`), compiled ahead of time for every
instruction set; what stands here is its plain-torch reference. A sliding window goes with every variant: it is part of the plan's shape
(`plans.Shape.window`), as keys outside it are not even looked at. A row's result depends on its head, position and keys alone, so it has
the same bits in any batch and under any plan, like plain attention's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Extra = tuple[int, int, int, float]
"""For the native kernel: addresses of values by head and of the mask's bits, bytes from one token's bits to the next's, a constant."""


@dataclass(frozen=True, slots=True)
class Standard:
    """Softmax over the scores."""

    softmax: ClassVar[bool] = True
    """Weights are divided by their sum (and taken relative to the greatest score, so that none overflows)."""

    def check(self, tokens: int, heads: int, keys: int) -> None:
        """Raises ValueError if it does not fit a batch of `tokens` that attend positions below `keys`."""

    def extra(self) -> Extra:
        return 0, 0, 0, 0.0

    def score(self, s: Tensor, heads: Tensor, distance: Tensor) -> Tensor:
        """From s = q.k * scale, f32 [vectors, n, keys], the heads' numbers [vectors, n], and key less query position [vectors, keys]."""
        return s

    def seen(self, tokens: Tensor, keys: Tensor) -> Tensor | None:
        """Bool [tokens, keys] where some keys (positions) are hidden from some tokens (numbers in the batch)."""
        return None

    def weight(self, s: Tensor) -> Tensor:
        """Of each score: what softmax divides by their sum."""
        return s.exp()

    def share(self, total: Tensor, greatest: Tensor, heads: Tensor) -> Tensor:
        """What the output is multiplied by: from sums of 2^(score * log2(e) - greatest), greatest, and the heads' numbers, [n] each."""
        return 1 / total


@dataclass(frozen=True, slots=True)
class SoftCap(Standard):
    """cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    cap: float

    def check(self, tokens: int, heads: int, keys: int) -> None:
        if not 0 < self.cap < float("inf"):
            raise ValueError(f"a soft cap must be a number above 0, not {self.cap}")

    def extra(self) -> Extra:
        return 0, 0, 0, self.cap

    def score(self, s: Tensor, heads: Tensor, distance: Tensor) -> Tensor:
        return self.cap * (s / self.cap).tanh()


@dataclass(frozen=True, slots=True)
class Alibi(Standard):
    """slope * (key - query) added to the score (ALiBi, Press et al. 2022, arXiv 2108.12409)."""

    slopes: Tensor
    """f32 [heads]."""

    def check(self, tokens: int, heads: int, keys: int) -> None:
        _check_heads("slopes", self.slopes, heads)

    def extra(self) -> Extra:
        return self.slopes.data_ptr(), 0, 0, 0.0

    def score(self, s: Tensor, heads: Tensor, distance: Tensor) -> Tensor:
        return s + self.slopes[heads][..., None] * distance[:, None]


@dataclass(frozen=True, slots=True)
class Sinks(Standard):
    """A learned score for each head takes part in the sum, and has no value (gpt-oss; after StreamingLLM, arXiv 2309.17453)."""

    scores: Tensor
    """f32 [heads]."""

    def check(self, tokens: int, heads: int, keys: int) -> None:
        _check_heads("scores of sinks", self.scores, heads)

    def extra(self) -> Extra:
        return self.scores.data_ptr(), 0, 0, 0.0

    def share(self, total: Tensor, greatest: Tensor, heads: Tensor) -> Tensor:
        sink = self.scores[heads] * LOG2_E
        now = torch.maximum(greatest, sink)
        keep = (greatest - now).exp2()
        return keep / (total * keep + (sink - now).exp2())


@dataclass(frozen=True, slots=True)
class Masked(Standard):
    """Only keys whose bit is set, of those up to the token's position, as trees of drafts need it. A row without any gives zeros."""

    bits: Tensor
    """uint8 [tokens, bytes], contiguous: bit k % 8 of byte k // 8 is key k's. Bytes: whole 64s of keys."""

    @classmethod
    def of(cls, mask: Tensor) -> "Masked":
        """From bool [tokens, keys]."""
        padded = torch.zeros(len(mask), -(-mask.shape[1] // 64) * 64, dtype=torch.uint8)
        padded[:, : mask.shape[1]] = mask
        weights = 1 << torch.arange(8, dtype=torch.uint8)
        return cls((padded.view(len(mask), -1, 8) * weights).sum(-1, dtype=torch.uint8))

    def check(self, tokens: int, heads: int, keys: int) -> None:
        length = -(-keys // 64) * 8
        if self.bits.dtype != torch.uint8 or self.bits.ndim != 2 or not self.bits.is_contiguous():
            raise ValueError("a mask's bits must be contiguous uint8 [tokens, bytes]")
        if len(self.bits) != tokens or self.bits.shape[1] < length:
            raise ValueError(
                f"a mask of {list(self.bits.shape)} bytes for {tokens} tokens and {keys} keys: {length} bytes each"
            )

    def extra(self) -> Extra:
        return 0, self.bits.data_ptr(), self.bits.stride(0), 0.0

    def seen(self, tokens: Tensor, keys: Tensor) -> Tensor:
        return (self.bits[tokens][:, keys // 8] >> (keys % 8).to(torch.uint8) & 1).bool()

    def share(self, total: Tensor, greatest: Tensor, heads: Tensor) -> Tensor:
        return torch.where(total == 0, 0, 1 / total)


@dataclass(frozen=True, slots=True)
class Sigmoid(Standard):
    """1 / (1 + e^-(score + bias)) for each key, not divided by their sum (Ramapuram et al. 2024, arXiv 2409.04431)."""

    softmax: ClassVar[bool] = False
    bias: float

    def check(self, tokens: int, heads: int, keys: int) -> None:
        if not abs(self.bias) < float("inf"):
            raise ValueError(f"a sigmoid's bias must be a number, not {self.bias}")

    def extra(self) -> Extra:
        return 0, 0, 0, self.bias

    def score(self, s: Tensor, heads: Tensor, distance: Tensor) -> Tensor:
        return s + self.bias

    def weight(self, s: Tensor) -> Tensor:
        return s.sigmoid()

    def share(self, total: Tensor, greatest: Tensor, heads: Tensor) -> Tensor:
        return torch.ones_like(total)


LOG2_E = 1.44269504

VARIANTS: tuple[type[Standard], ...] = (Standard, SoftCap, Alibi, Sinks, Masked, Sigmoid)


def _check_heads(name: str, x: Tensor, heads: int) -> None:
    if x.dtype != torch.float32 or x.shape != (heads,) or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 [{heads}], not {x.dtype}{list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{name} must be numbers")
