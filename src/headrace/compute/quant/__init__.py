"""Weights of 1 to 8 bits: what a code stands for, and a quantized weight as plain data, before it is packed for any kernel."""

from headrace.compute.quant.formats import Format
from headrace.compute.quant.weight import PER_COLUMN, QuantizedWeight

__all__ = ["PER_COLUMN", "Format", "QuantizedWeight"]
