"""How `headrace quantize` stores weights: compressed-tensors, pack-quantized; read by `checkpoints.compressed_tensors`, and by vLLM."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.compute.quant.gptq import Order
from headrace.compute.quant.recipe import Recipe
from headrace.compute.quant.shards import Spec
from headrace.compute.quant.weight import PER_COLUMN, QuantizedWeight
from headrace.compute.quant.words import pack_words, words_for


def specs(
    rows: int, features_in: int, recipe: Recipe, group: int, scale_dtype: torch.dtype, order: Order | None
) -> dict[str, Spec]:
    """Tensors of one module's weight, by the end of their names."""
    groups = 1 if group == PER_COLUMN else features_in // group
    found = {
        "weight_packed": Spec(torch.int32, (rows, words_for(features_in, recipe.bits))),
        "weight_scale": Spec(scale_dtype, (rows, groups)),
        "weight_shape": Spec(torch.int64, (2,)),
    }
    if not recipe.symmetric:
        found["weight_zero_point"] = Spec(torch.int32, (words_for(rows, recipe.bits), groups))
    if order == "group" and group != PER_COLUMN:
        found["weight_g_idx"] = Spec(torch.int32, (features_in,))
    return found


def tensors(weight: QuantizedWeight, scale_dtype: torch.dtype, order: Order | None) -> dict[str, Tensor]:
    """What `specs` announces, of an integer weight."""
    bits = weight.format.bits
    codes, groups = weight.codes, None
    if order == "group" and weight.group != PER_COLUMN:
        taken = torch.arange(weight.features_in) if weight.order is None else weight.order.long()
        codes = torch.empty_like(codes).index_copy_(1, taken, codes)
        groups = torch.empty(weight.features_in, dtype=torch.int32)
        groups[taken] = torch.arange(weight.features_in, dtype=torch.int32) // weight.group
    if weight.format.kind == "signed":
        codes = codes ^ 1 << bits - 1
    found = {
        "weight_packed": pack_words(codes, bits),
        "weight_scale": weight.scales.to(scale_dtype),
        "weight_shape": torch.tensor([weight.features_out, weight.features_in]),
    }
    if weight.zeros is not None:
        found["weight_zero_point"] = pack_words(weight.zeros.T.contiguous(), bits).T.contiguous()
    if groups is not None:
        found["weight_g_idx"] = groups
    return found


def settings(recipe: Recipe, groups: Mapping[str, int], order: Order | None) -> dict[str, Any]:
    """`quantization_config` of config.json; `groups`: the group of each module, by its name."""
    sizes = sorted(set(groups.values()), key=lambda size: list(groups.values()).count(size), reverse=True)
    by_size = {size: [module for module, found in groups.items() if found == size] for size in sizes}
    config_groups = {}
    for number, size in enumerate(sizes):
        per_column = size == PER_COLUMN
        ordered = {"static": "static", "group": None if per_column else "group"}.get(order or "none")
        weights = {
            "num_bits": recipe.bits,
            "type": "int",
            "symmetric": recipe.symmetric,
            "strategy": "channel" if per_column else "group",
            "group_size": None if per_column else size,
            "dynamic": False,
            "actorder": ordered,
            "observer": "mse" if recipe.search else "minmax",
        }
        config_groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(sizes) == 1 else _targets(by_size[size], groups),
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(modules: list[str], groups: Mapping[str, int]) -> list[str]:
    """By the last part of their names, if no other module has it; else by name."""
    last = sorted({module.rsplit(".", 1)[-1] for module in modules})
    others = {module.rsplit(".", 1)[-1] for module in groups if module not in modules}
    if others.intersection(last):
        return modules
    return [rf"re:.*\.{re.escape(part)}$" for part in last]
