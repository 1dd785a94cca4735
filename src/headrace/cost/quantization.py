"""How a checkpoint keeps the weights of its layers, by `quantization_config`."""

import msgspec

from headrace.cost.fields import Fields
from headrace.types.errors import ConfigError


class Stored(msgspec.Struct, frozen=True):
    """`bits` of one weight, scales included; the rate its products run at, as in `ModelShape.arithmetic`."""

    bits: float
    arithmetic: str = "bf16"


def of(fields: Fields, plain_bits: int) -> Stored:
    """What the file says; without a `quantization_config`, `plain_bits`. Raises ConfigError for a method that is not known."""
    if not fields.has("quantization_config"):
        return Stored(float(plain_bits))
    settings = fields.within("quantization_config")
    method = str(settings.values.get("quant_method", "missing"))
    if method in ("fp8", "fbgemm_fp8"):
        return Stored(8.0, "fp8")
    if method in ("gptq", "awq"):
        return Stored(_grouped_bits(settings, settings.count("bits" if settings.has("bits") else "w_bit")))
    if method == "bitsandbytes":
        return Stored(4.5 if settings.flag("load_in_4bit", False) else 8.0)
    if method == "mxfp4":
        return Stored(4.25)
    if method == "compressed-tensors":
        return _compressed(settings)
    raise ConfigError(
        f"config.json: quantization_config: quant_method {method!r} is not known; known: awq, bitsandbytes, "
        "compressed-tensors, fbgemm_fp8, fp8, gptq, mxfp4. Give the bits of a weight instead."
    )


def _grouped_bits(settings: Fields, bits: int, *, zeros: bool = True) -> float:
    """With one 16-bit scale and (`zeros`) one zero point for each group of weights (group_size -1: a whole column)."""
    size = settings.values.get("group_size") or settings.values.get("q_group_size") or 128
    return bits if size < 0 else bits + (16 + (bits if zeros else 0)) / size


def _compressed(settings: Fields) -> Stored:
    """By the first group; others, if there are any, have the matrices whose inputs its group size does not divide."""
    groups = settings.within("config_groups")
    if not groups.values:
        raise ConfigError("config.json: quantization_config: config_groups is missing")
    first = groups.within(sorted(groups.values)[0])
    weights = first.within("weights")
    bits = weights.count("num_bits")
    if first.has("input_activations"):
        return Stored(float(bits), "fp8" if weights.values.get("type", "int") == "float" else "int8")
    if weights.values.get("strategy") in ("channel", "tensor"):
        return Stored(float(bits))
    return Stored(_grouped_bits(weights, bits, zeros=not weights.flag("symmetric", True)))
