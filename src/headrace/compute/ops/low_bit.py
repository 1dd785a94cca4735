"""Linear layers over weights of 1 to 8 bits: activations keep their precision (MARLIN, arXiv 2408.11743), at any width (Tilus, 2504.12984).

`low_bit_linear` keeps the promise of `fixed_linear`. An output is the sum, over its groups in order, of

    scale * (one accumulator over the group's inputs in order - zero point * sum of x over the group).

What a code stands for is exact in bf16, so scales are the only rounding of the weight, and that in f32. Few rows are multiplied by codes
that are decoded in registers; for many, tiles of the weight are decoded into the cache, one after the other: there is never a second copy.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compute.ops import reference
from headrace.compute.ops.backend import isa_of, native
from headrace.compute.ops.linear import check_product
from headrace.compute.quant import PER_COLUMN, QuantizedWeight
from headrace.compute.quant.layout import PANEL, TILE, avx512

PANELS_AT_ONCE = 8
"""Panels that are packed together: bounds the memory that packing takes beside the result."""


@dataclass(frozen=True)
class PackedLowBit:
    """A quantized weight laid out for `low_bit_linear`; made once, at load, by `pack_low_bit`."""

    data: Tensor
    """native: int16 [panels, tiles, 4, bits, 32], by `layout.avx512`. torch: the weight in f32, [features_out, features_in]."""
    table: Tensor
    """bf16 [max(32, 2^bits)]: what each code stands for, less `middle`."""
    scales: Tensor
    """f32 or bf16 [panels, groups, 64]."""
    zeros: Tensor | None
    """uint8 [panels, groups, 64]."""
    gather: Tensor | None
    """int32 [tiles * 32]: the input at each place, -1 where there is none; None: inputs as they come."""
    middle: int
    """What zero points count from: half the codes, so that less cancels between the two sums."""
    bits: int
    features_out: int
    features_in: int
    dtype: torch.dtype
    """Of the rows that it may multiply."""
    isa: int | None
    """Index into `backend.ISAS`; None: torch."""

    @property
    def nbytes(self) -> int:
        """Of all that a call reads."""
        tensors = (self.data, self.scales, self.zeros, self.gather)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_low_bit(weight: QuantizedWeight, dtype: torch.dtype, *, backend: str | None = None) -> PackedLowBit:
    """Lay out a quantized weight for rows in `dtype` (f32, bf16; f16 on torch only).

    Groups begin at a tile of 32 inputs: those of another size are padded to a multiple of it, and inputs are gathered accordingly.
    On torch the weight is dequantized, to f32: correct, and neither small nor fast.
    """
    isa = isa_of(backend, dtype)
    out, features_in, bits = weight.features_out, weight.features_in, weight.format.bits
    middle = 1 << bits - 1 if weight.zeros is not None else 0
    values = weight.format.values().nan_to_num(0, 0, 0) - middle  # codes that are no number do not occur
    table = values.bfloat16().repeat(max(1, 32 >> bits))
    if isa is None:
        dense = weight.dequantize()
        return PackedLowBit(
            dense, table, weight.scales, weight.zeros, None, middle, bits, out, features_in, dtype, isa
        )
    group = features_in if weight.group == PER_COLUMN else weight.group
    padding = -group % TILE
    inputs = weight.groups * (group + padding)
    gather = None
    if weight.order is not None or (padding and weight.groups > 1):
        order = torch.arange(features_in, dtype=torch.int32) if weight.order is None else weight.order
        gather = F.pad(order.view(weight.groups, group), (0, padding), value=-1).view(-1)
    panels = -(-out // PANEL)
    data = torch.empty(panels, inputs // TILE, PANEL // 16, bits, 32, dtype=torch.int16)
    for first in range(0, panels, PANELS_AT_ONCE):
        some = data[first : first + PANELS_AT_ONCE]
        rows = weight.codes[first * PANEL : first * PANEL + len(some) * PANEL]
        padded = F.pad(rows.view(-1, group), (0, padding)).view(-1, inputs)
        padded = F.pad(padded, (0, 0, 0, len(some) * PANEL - len(rows)))
        some.copy_(avx512(len(padded), inputs).pack(padded, bits).view(some.shape))
    zeros = None if weight.zeros is None else _by_panels(weight.zeros)
    return PackedLowBit(
        data, table, _by_panels(weight.scales), zeros, gather, middle, bits, out, features_in, dtype, isa
    )


def low_bit_linear(
    x: Tensor, packed: PackedLowBit, *, threads: int, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """x @ weight.T, with the same bits for a row whatever else is in the batch.

    Args:
        x: [rows, features_in] in the dtype that the weight was packed for.
        packed: the weight, from `pack_low_bit`; its backend is used.
        threads: how many threads may run; the result does not depend on it.
        out_dtype: f32, or x's dtype.

    Returns:
        [rows, features_out] in out_dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_product(x, packed.features_in, packed.dtype, out_dtype)
    if packed.isa is None:
        return reference.fixed_linear(x, packed.data, out_dtype)
    x = x.contiguous()
    rows, n = x.shape[0], packed.features_out
    out = torch.empty(rows, n, dtype=out_dtype)
    native.low_bit(
        packed.isa,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        0 if packed.gather is None else packed.gather.data_ptr(),
        packed.data.data_ptr(),
        packed.table.data_ptr(),
        packed.scales.data_ptr(),
        packed.scales.dtype == torch.bfloat16,
        0 if packed.zeros is None else packed.zeros.data_ptr(),
        packed.middle,
        packed.bits,
        packed.data.shape[1],
        packed.scales.shape[1],
        out.data_ptr(),
        rows,
        n,
        packed.features_in,
        out_dtype == torch.float32,
        threads,
    )
    return out


def _by_panels(x: Tensor) -> Tensor:
    """[out, groups] -> [panels, groups, 64], zero-padded."""
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % PANEL))
    return padded.view(-1, PANEL, x.shape[1]).transpose(1, 2).contiguous()
