"""Number formats of 1 to 8 bits: what each code stands for.

Integers: signed (two's complement) or unsigned. Floats: sign, exponent, mantissa, with subnormals and the bias 2^(exponent - 1) - 1. As in
the OCP formats (8-bit floating point 1.0, Microscaling 1.0), e4m3 has no infinities and one NaN of either sign, e5m2 has both as IEEE 754
has them, and every other one is finite throughout (Tilus, arXiv 2504.12984, section 7, takes the same spectrum).

Every finite value of every format is exact in bf16: kernels multiply values, not approximations, and scale the sums.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.types.errors import ConfigError

BITS_MAX = 8

Kind = Literal["signed", "unsigned", "float"]


@dataclass(frozen=True, slots=True)
class Format:
    """How many bits a code has and what they mean. Raises ConfigError for a format that no kernel knows."""

    kind: Kind
    bits: int
    exponent: int = 0
    """Bits of the exponent, of a float; at least 1. What is left beside the sign is the mantissa."""

    def __post_init__(self) -> None:
        if self.kind not in ("signed", "unsigned", "float"):
            raise ConfigError(f"number kind {self.kind!r} is not known; known: signed, unsigned, float")
        least = {"signed": 2, "unsigned": 1, "float": 3}[self.kind]
        if not least <= self.bits <= BITS_MAX:
            raise ConfigError(
                f"{self.kind} weights of {self.bits} bits are not supported: {least} to {BITS_MAX} are"
            )
        if self.kind == "float" and not 1 <= self.exponent <= min(self.bits - 1, 5):
            raise ConfigError(
                f"a float of {self.bits} bits cannot have {self.exponent} bits of exponent: 1 to {min(self.bits - 1, 5)}"
            )
        if self.kind != "float" and self.exponent:
            raise ConfigError(
                f"{self.kind} integers have no exponent, but {self.exponent} bits of one were given"
            )

    @classmethod
    def named(cls, name: str) -> "Format":
        """The format of a name: int2 to int8, uint1 to uint8, e2m1, e4m3, e3m2 and so on."""
        if found := re.fullmatch(r"(u?)int(\d+)", name):
            return cls("unsigned" if found[1] else "signed", int(found[2]))
        if found := re.fullmatch(r"e(\d+)m(\d+)", name):
            return cls("float", 1 + int(found[1]) + int(found[2]), int(found[1]))
        raise ConfigError(
            f"number format {name!r} is not known; known: int2..int8, uint1..uint8, and floats such as e2m1 or e4m3"
        )

    @property
    def name(self) -> str:
        """What `named` takes."""
        if self.kind == "float":
            return f"e{self.exponent}m{self.mantissa}"
        return f"{'u' if self.kind == 'unsigned' else ''}int{self.bits}"

    @property
    def mantissa(self) -> int:
        """Bits of the mantissa, of a float."""
        return self.bits - 1 - self.exponent

    def values(self) -> Tensor:
        """f32 [2^bits]: what each code stands for. Codes of e4m3 and e5m2 that are no number are NaN or infinite."""
        codes = torch.arange(1 << self.bits)
        if self.kind == "unsigned":
            return codes.float()
        if self.kind == "signed":
            return torch.where(codes < 1 << self.bits - 1, codes, codes - (1 << self.bits)).float()
        sign = 1 - 2 * (codes >> self.bits - 1)
        exponent = codes >> self.mantissa & (1 << self.exponent) - 1
        fraction = (codes & (1 << self.mantissa) - 1) / (1 << self.mantissa)
        bias = (1 << self.exponent - 1) - 1
        magnitude = torch.where(
            exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias).float()
        )
        if self.name == "e4m3":
            magnitude[(exponent == 15) & (fraction == 0.875)] = float("nan")
        elif self.name == "e5m2":
            magnitude[(exponent == 31) & (fraction == 0)] = float("inf")
            magnitude[(exponent == 31) & (fraction > 0)] = float("nan")
        return sign * magnitude
