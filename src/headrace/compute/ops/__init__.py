"""Tensor operations with several backends and one reference each.

`paged_attention` and `fixed_linear` are batch-invariant on the native backend; `describe` says what runs here.
"""

from headrace.compute.ops.attention import paged_attention, write_kv
from headrace.compute.ops.backend import available, describe
from headrace.compute.ops.linear import PackedWeight, fixed_linear, linear, pack

__all__ = [
    "PackedWeight",
    "available",
    "describe",
    "fixed_linear",
    "linear",
    "pack",
    "paged_attention",
    "write_kv",
]
