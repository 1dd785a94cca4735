"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the ways to stretch it over longer contexts.

Formulas follow transformers' `modeling_rope_utils.py`, in the same order, so that tables agree with it.
"""

import math
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from headrace.types.errors import CheckpointError


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters as config.json has them: v5 `rope_parameters`, or v4 `rope_scaling` and `rope_theta`."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def stretch(self) -> float:
        """The factor, of a type that cannot do without."""
        assert self.factor is not None, "parse_rope saw to it"
        return self.factor


def parse_rope(stated: dict[str, Any] | None, theta: float | None, original_length: int | None) -> Rope:
    """The parameters in `stated` (of either version), completed by what older files keep beside it.

    Raises CheckpointError for a type that is unknown, or a value without which its formula cannot be computed.
    """
    fields = dict(stated or {})
    fields.setdefault("rope_type", fields.get("type") or "default")
    if any(isinstance(value, dict) for value in fields.values()):
        raise CheckpointError(
            "config.json: rope parameters per layer type are not supported by this architecture"
        )
    if theta is not None:
        fields.setdefault("rope_theta", theta)
    if original_length is not None:
        fields["original_max_position_embeddings"] = original_length
    try:
        rope = msgspec.convert({k: v for k, v in fields.items() if v is not None}, Rope, strict=False)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"config.json: rope parameters: {error}") from error
    if rope.rope_type not in FREQUENCIES:
        raise CheckpointError(
            f"config.json: rope_type {rope.rope_type!r} is unknown; known: {', '.join(FREQUENCIES)}"
        )
    if rope.partial_rotary_factor != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor is not supported by this architecture")
    if rope.rope_type in ("linear", "dynamic", "llama3") and rope.factor is None:
        raise CheckpointError(f"config.json: rope_type {rope.rope_type!r} needs 'factor'")
    return rope


def context_length(rope: Rope, length: int) -> int:
    """Longest context, tokens, of a model with `max_position_embeddings` of `length` (as vLLM derives it)."""
    if rope.rope_type in ("linear", "dynamic"):
        return int(length * (rope.factor or 1.0))
    if rope.rope_type == "yarn" and rope.factor and rope.original_max_position_embeddings:
        return int(rope.original_max_position_embeddings * rope.factor)
    return length


class Angles(NamedTuple):
    """Of each token's position: [tokens, dim / 2] in the model's dtype."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """Tables of cos and sin, f32 [length, dim / 2], computed once; a pass gathers the rows of its positions."""

    def __init__(self, rope: Rope, dim: int, length: int, trained_length: int, dtype: torch.dtype):
        """`length`: positions that may be asked for. `trained_length`: the model's `max_position_embeddings`."""
        positions = torch.arange(length, dtype=torch.float32)
        inverse, scale = FREQUENCIES[rope.rope_type](rope, dim, trained_length, positions)
        # numpy, in f64: torch's f32 cos depends, in its last bit, on where threads divide the table.
        angles = (positions[:, None] * inverse).numpy().astype(np.float64)
        self.cos = torch.from_numpy(np.cos(angles).astype(np.float32)).mul_(scale)
        self.sin = torch.from_numpy(np.sin(angles).astype(np.float32)).mul_(scale)
        self.dtype = dtype

    def __call__(self, positions: Tensor) -> Angles:
        """int32 [tokens] -> angles."""
        cos = self.cos.index_select(0, positions).to(self.dtype)
        sin = self.sin.index_select(0, positions).to(self.dtype)
        return Angles(cos, sin)


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _default(rope: Rope, dim: int, trained_length: int, positions: Tensor) -> tuple[Tensor, float]:
    return _plain(rope.rope_theta, dim), 1.0


def _linear(rope: Rope, dim: int, trained_length: int, positions: Tensor) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return _plain(rope.rope_theta, dim) / rope.stretch, 1.0


def _dynamic(rope: Rope, dim: int, trained_length: int, positions: Tensor) -> tuple[Tensor, float]:
    """NTK-aware scaling whose base grows with the sequence. One row of frequencies for each position: [length, dim / 2].

    Token p turns by the base of a sequence that ends at p, as in transformers when it decodes p with a cache. There a
    prefill beyond the trained length turns all its tokens by the base of the whole prompt, so that KV would depend on
    what follows it, and on chunking; no prefix could be shared.
    """
    ends = np.maximum(positions.numpy().astype(np.float64) + 1, trained_length)
    growth = (rope.stretch * ends / trained_length) - (rope.stretch - 1)
    theta = rope.rope_theta * growth ** (dim / (dim - 2))
    inverse = 1.0 / theta[:, None] ** (np.arange(0, dim, 2) / dim)
    return torch.from_numpy(inverse.astype(np.float32)), 1.0


def _llama3(rope: Rope, dim: int, trained_length: int, positions: Tensor) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings or trained_length
    inverse = _plain(rope.rope_theta, dim)
    wavelength = 2 * math.pi / inverse
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / rope.stretch + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / rope.stretch, inverse)
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(medium, between, scaled), 1.0


def _yarn(rope: Rope, dim: int, trained_length: int, positions: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate the slow dimensions, keep the fast, and sharpen attention."""
    original = rope.original_max_position_embeddings or trained_length
    factor = rope.factor or trained_length / original
    theta = rope.rope_theta

    def dimension(rotations: float) -> float:
        """The dimension that turns so often within the original length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    stretched = 1.0 / (factor * theta ** (torch.arange(0, dim, 2).float() / dim))
    inverse = stretched * (1 - kept) + _plain(theta, dim) * kept
    return inverse, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: Rope, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


FREQUENCIES = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
"""By rope_type: (parameters, dim, trained length, positions f32 [length]) -> inverse frequencies f32, [dim / 2] or
[length, dim / 2], and the factor on cos and sin."""
