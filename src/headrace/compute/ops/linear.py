"""Linear layers whose rows do not depend on the batch.

`fixed_linear` keeps that by its own order of sums, and is faster than F.linear at every batch size measured
(benchmarks/linear.py); `linear` is for weights that are not packed, and for dtypes without native kernels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compute.ops import reference
from headrace.compute.ops.backend import isa_of, native

ROWS_MIN = 4
"""F.linear takes other code paths, with other bits, for 1 to 3 rows (MKL f32: 1 | 2, 3 | 4 and more; oneDNN bf16: 1 | 2
and more, or 1..3 | 4 and more, by CPU). From 4 rows on one path serves every batch."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight laid out for `fixed_linear`; made once, at load, by `pack`."""

    data: Tensor
    """The packed copy. native: [panels of 64 outputs, features_in / width, 64, width], zero-padded, where width (inputs to
    a 32-bit word) is 2 for bf16 and 1 for f32. torch: the weight in f32, [features_out, features_in]."""
    features_out: int
    features_in: int
    dtype: torch.dtype
    """Dtype of the weight as given, and of the rows it may multiply."""
    isa: int | None
    """Index into `backend.ISAS`; None: torch."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, never on fewer than `ROWS_MIN` rows: [..., in] x [out, in] -> [..., out] in x's dtype.

    Row-invariant on the CPUs that were measured, by the accident of how libraries choose their paths: the start-up
    self-test decides. Padding costs 4 to 13% of a lone bf16 row, and nothing from 4 rows on.
    """
    rows = x.numel() // x.shape[-1]
    if rows >= ROWS_MIN or rows == 0:
        return F.linear(x, weight, bias)
    padded = x.new_zeros(ROWS_MIN, x.shape[-1])
    padded[:rows] = x.reshape(rows, -1)
    return F.linear(padded, weight, bias)[:rows].reshape(*x.shape[:-1], -1)


def pack(weight: Tensor, *, backend: str | None = None) -> PackedWeight:
    """Lay out a [features_out, features_in] weight (f32, bf16, f16) for `fixed_linear`.

    The pack is a second copy: where the LM head is tied to the embedding, both stay in memory. In torch it is an f32
    copy, twice the size of a bf16 weight.
    """
    isa = isa_of(backend, weight.dtype)
    features_out, features_in = weight.shape
    if isa is None:
        return PackedWeight(weight.detach().float(), features_out, features_in, weight.dtype, None)
    width = 4 // weight.element_size()
    padded = F.pad(weight.detach(), (0, -features_in % width, 0, -features_out % native.PANEL))
    data = padded.view(-1, native.PANEL, padded.shape[1] // width, width).transpose(1, 2).contiguous()
    return PackedWeight(data, features_out, features_in, weight.dtype, isa)


def fixed_linear(
    x: Tensor, packed: PackedWeight, *, threads: int, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """x @ weight.T, each output one accumulator over all of features_in in a fixed order.

    Args:
        x: [rows, features_in] in the weight's dtype.
        packed: the weight, from `pack`; its backend is used.
        threads: how many threads may run; the result does not depend on it.
        out_dtype: f32 (logits: bf16 logits tie in about 4% of steps), or the weight's dtype.

    Returns:
        [rows, features_out] in out_dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_product(x, packed.features_in, packed.dtype, out_dtype)
    if packed.isa is None:
        return reference.fixed_linear(x, packed.data, out_dtype)
    padded = packed.data.shape[1] * packed.data.shape[3]
    x = x.contiguous() if padded == x.shape[1] else F.pad(x, (0, padded - x.shape[1]))
    rows, n = x.shape[0], packed.features_out
    out = torch.empty(rows, n, dtype=out_dtype)
    native.linear(
        packed.isa,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        packed.data.data_ptr(),
        out.data_ptr(),
        rows,
        n,
        packed.features_in,
        out_dtype == torch.float32,
        threads,
    )
    return out


def check_product(x: Tensor, features_in: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Raises ValueError if x is not [rows, features_in] in the dtype that a weight takes, or nothing gives its product in `out_dtype`."""
    if x.dim() != 2 or x.shape[1] != features_in or x.dtype != dtype:
        raise ValueError(f"x {x.dtype}{list(x.shape)} does not fit {dtype}[.., {features_in}]")
    if out_dtype not in (torch.float32, dtype):
        raise ValueError(f"out_dtype {out_dtype} is neither float32 nor x's {dtype}")
