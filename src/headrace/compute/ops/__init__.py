"""Tensor operations with several backends and one reference each.

All but `linear` are batch-invariant on the native backend; `describe` says what runs here.
"""

from headrace.compute.ops.attention import paged_attention, write_kv
from headrace.compute.ops.backend import available, describe
from headrace.compute.ops.choice import Choice, choose
from headrace.compute.ops.linear import PackedWeight, fixed_linear, linear, pack
from headrace.compute.ops.low_bit import PackedLowBit, low_bit_linear, pack_low_bit
from headrace.compute.ops.partial import combine_partials, partial_attention
from headrace.compute.ops.planned import Workspace, planned_attention
from headrace.compute.ops.rows import Activation, gated, rms_norm, turn_and_write

__all__ = [
    "Activation",
    "Choice",
    "PackedLowBit",
    "PackedWeight",
    "Workspace",
    "available",
    "choose",
    "combine_partials",
    "describe",
    "fixed_linear",
    "gated",
    "linear",
    "low_bit_linear",
    "pack",
    "pack_low_bit",
    "paged_attention",
    "partial_attention",
    "planned_attention",
    "rms_norm",
    "turn_and_write",
    "write_kv",
]
