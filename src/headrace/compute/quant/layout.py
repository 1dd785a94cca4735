"""A small algebra of layouts, from which the packing of weights of 1 to 8 bits is generated for any target.

A layout maps an index to an offset: the index is written in mixed radix (its digits' ranges are the shape, last digit fastest), and the
offset is the sum of digit times stride (Tilus, arXiv 2504.12984, section 5; the laws are those of CuTe's layouts, here with flat modes and
the last one fastest). Composition, complement, inverse and division make new layouts of old ones.

A packing cuts a weight into lanes, each holding several codes. Whatever the bits of a code, a lane holds them as one stream of bits, least
significant first, cut into words: two views of a lane's registers are compatible if they have the same lanes and the same bits to a
lane. So one layout serves every width, no code is padded, and unpacking is shifts that are known when a kernel is compiled.
"""

from dataclasses import dataclass
from math import gcd, prod
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """index -> offset. Raises ValueError where a shape or stride is none."""

    shape: tuple[int, ...]
    """Ranges of the digits, last one fastest."""
    strides: tuple[int, ...]
    """What each digit counts."""

    def __post_init__(self) -> None:
        if (
            len(self.shape) != len(self.strides)
            or min(self.shape, default=1) < 1
            or min(self.strides, default=0) < 0
        ):
            raise ValueError(f"shape {self.shape} and strides {self.strides} make no layout")

    @property
    def size(self) -> int:
        """How many indices there are."""
        return prod(self.shape)

    def __call__(self, index: int) -> int:
        offset = 0
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            index, digit = divmod(index, n)
            offset += digit * stride
        return offset

    def indices(self) -> Tensor:
        """int64 [size]: the offset of every index."""
        offsets = torch.zeros((), dtype=torch.int64)
        for n, stride in zip(self.shape, self.strides, strict=True):
            offsets = offsets[..., None] + torch.arange(n) * stride
        return offsets.reshape(-1)

    def then(self, *inner: "Layout") -> "Layout":
        """The digits of all of them, those of the last one fastest."""
        return Layout(
            self.shape + tuple(n for layout in inner for n in layout.shape),
            self.strides + tuple(stride for layout in inner for stride in layout.strides),
        )

    def coalesced(self) -> "Layout":
        """The same map with as few digits as can be."""
        shape: list[int] = []
        strides: list[int] = []
        for n, stride in zip(self.shape, self.strides, strict=True):
            if n == 1:
                continue
            if shape and strides[-1] == n * stride:
                shape[-1], strides[-1] = shape[-1] * n, stride
            else:
                shape.append(n)
                strides.append(stride)
        return Layout(tuple(shape), tuple(strides))

    def compose(self, inner: "Layout") -> "Layout":
        """index -> self(inner(index)). Raises ValueError where that is no layout, because digits would carry or be cut."""
        outer = self.coalesced()
        most = [0] * len(outer.shape)  # greatest digit of ours that inner's digits add up to
        pieces: list[Layout] = []
        for n, stride in zip(inner.shape, inner.strides, strict=True):
            pieces.append(outer._walk(n, stride, most))
        if any(top >= n for top, n in zip(most, outer.shape, strict=True)):
            raise ValueError(f"{inner} carries from digit to digit of {outer}")
        return Layout((), ()).then(*pieces)

    def _walk(self, n: int, stride: int, most: list[int]) -> "Layout":
        """The offsets of n indices, `stride` apart; what they take of each digit is added to `most`."""
        if stride == 0 or n == 1:
            return Layout((n,), (0,))
        left, step = n, stride
        shape: list[int] = []
        strides: list[int] = []
        for i in reversed(range(len(self.shape))):
            extent = self.shape[i]
            if left == 1:
                break
            if step % extent == 0:  # this digit stays 0
                step //= extent
                continue
            take = min(extent // step, left)
            if extent % step or left % take:
                raise ValueError(f"{n} steps of {stride} cut digits of {self}")
            shape.insert(0, take)
            strides.insert(0, step * self.strides[i])
            most[i] += (take - 1) * step
            left, step = left // take, 1
        if left > 1:
            raise ValueError(f"{n} steps of {stride} leave {self}")
        return Layout(tuple(shape), tuple(strides))

    def complement(self, size: int) -> "Layout":
        """The layout of what is left: with it, every offset below `size` is reached once.

        Raises ValueError where an offset is reached twice, or `size` is not filled evenly.
        """
        shape: list[int] = []
        strides: list[int] = []
        reached = 1  # all offsets below are reached by the digits so far
        for stride, n in sorted((s, n) for n, s in zip(self.shape, self.strides, strict=True) if n > 1):
            if stride == 0 or stride % reached:
                raise ValueError(f"{self} reaches an offset twice")
            if stride > reached:
                shape.insert(0, stride // reached)
                strides.insert(0, reached)
            reached = stride * n
        if size % reached:
            raise ValueError(f"{self} does not fill {size} offsets evenly")
        if size > reached:
            shape.insert(0, size // reached)
            strides.insert(0, reached)
        return Layout(tuple(shape), tuple(strides))

    def divide(self, tile: "Layout") -> tuple["Layout", "Layout"]:
        """(over the tiles, inside one), where `tile` says which indices make the first tile. Their digits together reach what self does."""
        return self.compose(tile.complement(self.size)), self.compose(tile)

    def inverse(self) -> "Layout":
        """offset -> index. Raises ValueError unless every offset below the size is reached, once."""
        self.complement(self.size)  # raises
        digits = sorted(
            (
                (stride, n, prod(self.shape[i + 1 :]))
                for i, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True))
                if n > 1
            ),
            reverse=True,
        )
        return Layout(tuple(n for _, n, _ in digits), tuple(step for _, _, step in digits))


@dataclass(frozen=True, slots=True)
class Packing:
    """How the codes of a weight [out, in], in row-major order, lie in words: which ones a lane holds, and what comes after what."""

    size: int
    """Codes of the weight."""
    outer: Layout
    """Over the tiles of lanes."""
    lanes: Layout
    """Over the lanes of a tile, to the first code of each."""
    codes: Layout
    """Over the codes of a lane."""
    word_bits: int
    """16 or 32."""

    @classmethod
    def of(cls, size: int, tiles: Layout, lanes: Layout, codes: Layout, word_bits: int) -> Self:
        """Tiles repeat in the order of the weight; `tiles` orders those that are neighbours otherwise."""
        rest, _ = Layout((size,), (1,)).divide(tiles.then(lanes, codes))
        return cls(size, rest.then(tiles), lanes, codes, word_bits)

    @property
    def layout(self) -> Layout:
        """(tile, lane, code) -> place in the weight."""
        return self.outer.then(self.lanes, self.codes)

    def words(self, bits: int) -> int:
        """Words to a lane. Raises ValueError where codes of so many bits do not fill them."""
        if not self.compatible(bits):
            raise ValueError(f"{self.codes.size} codes of {bits} bits do not fill words of {self.word_bits}")
        return self.codes.size * bits // self.word_bits

    def compatible(self, bits: int) -> bool:
        """Whether a lane's codes of `bits` bits can be viewed as words."""
        return self.codes.size * bits % self.word_bits == 0

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """uint8 codes [out, in] -> words [tiles, words to a lane, lanes], int16 or int32."""
        streams = codes.contiguous().as_strided(self.layout.shape, self.layout.strides)
        streams = streams.reshape(self.outer.size, self.lanes.size, self.codes.size)
        count, width = self.words(bits), self.word_bits
        words = torch.zeros(
            self.outer.size, count, self.lanes.size, dtype=torch.int64 if width == 32 else torch.int32
        )
        for j in range(self.codes.size):
            word, shift = divmod(j * bits, width)
            code = streams[:, :, j].to(words.dtype)
            words[:, word] |= code << shift & (1 << width) - 1
            if shift + bits > width:
                words[:, word + 1] |= code >> width - shift
        top = 1 << width - 1  # to the signed number of the same bits
        return ((words ^ top) - top).to(torch.int32 if width == 32 else torch.int16)

    def unpack(self, words: Tensor, bits: int) -> Tensor:
        """What `pack` was given, flat: uint8 [size]."""
        width, mask = self.word_bits, (1 << self.word_bits) - 1
        wide = words.view(self.outer.size, self.words(bits), self.lanes.size).long() & mask
        streams = torch.empty(self.outer.size, self.lanes.size, self.codes.size, dtype=torch.uint8)
        for j in range(self.codes.size):
            word, shift = divmod(j * bits, width)
            code = wide[:, word] >> shift
            if shift + bits > width:
                code |= wide[:, word + 1] << width - shift
            streams[:, :, j] = (code & (1 << bits) - 1).to(torch.uint8)
        back = self.layout.inverse()
        return streams.as_strided(back.shape, back.strides).reshape(-1)


PANEL = 64
"""Outputs that the CPU kernels compute together (native/kernels.h)."""
TILE = 32
"""Inputs of a tile of the CPU kernels (native/low_bit.h)."""


def avx512(features_out: int, features_in: int) -> Packing:
    """For 32 lanes of 16 bits: 16 outputs by a pair of neighbouring inputs, 16 pairs to a lane; tiles of 64 outputs and 32 inputs.

    A shift brings code j of every lane to the bottom, where vpermw looks its value up: what vdpbf16ps multiplies. `features_out` is a
    multiple of PANEL, `features_in` of TILE.
    """
    blocks = Layout((PANEL // 16,), (16 * features_in,))
    lanes = Layout((16, 2), (features_in, 1))
    return Packing.of(features_out * features_in, blocks, lanes, Layout((TILE // 2,), (2,)), 16)


def triton(features_out: int, features_in: int, block_in: int, bits: int) -> Packing:
    """For Triton's dot operand [inputs, outputs]: words of 32 bits [block of inputs, word, rows, outputs].

    A lane's codes are `rows` inputs apart, so that code j of all lanes is rows j * rows .. (j + 1) * rows - 1 of the operand: unpacked by
    a shift, and multiplied as it lies, without a change of layout after the load. Raises ValueError where `block_in` is no multiple
    of the codes that fill whole words (32 / gcd(32, bits)), or does not divide `features_in`.
    """
    count = 32 // gcd(32, bits)
    if block_in % count or features_in % block_in:
        raise ValueError(
            f"blocks of {block_in} inputs do not divide {features_in}, or are no multiple of {count}"
        )
    rows = block_in // count
    lanes = Layout((rows, features_out), (1, features_in))
    return Packing.of(features_out * features_in, Layout((), ()), lanes, Layout((count,), (rows,)), 32)
