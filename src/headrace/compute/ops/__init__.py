"""Tensor operations with several backends and one reference each.

The attentions, `fixed_linear` and `low_bit_linear` are batch-invariant on the native backend; `describe` says what runs here.
"""

from headrace.compute.ops.attention import paged_attention, write_kv
from headrace.compute.ops.backend import available, describe
from headrace.compute.ops.linear import PackedWeight, fixed_linear, linear, pack
from headrace.compute.ops.low_bit import PackedLowBit, low_bit_linear, pack_low_bit
from headrace.compute.ops.partial import combine_partials, partial_attention
from headrace.compute.ops.planned import Workspace, planned_attention

__all__ = [
    "PackedLowBit",
    "PackedWeight",
    "Workspace",
    "available",
    "combine_partials",
    "describe",
    "fixed_linear",
    "linear",
    "low_bit_linear",
    "pack",
    "pack_low_bit",
    "paged_attention",
    "partial_attention",
    "planned_attention",
    "write_kv",
]
