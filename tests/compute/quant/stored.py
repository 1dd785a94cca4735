"""Small quantized checkpoints, written from the formats' public definitions, bit by bit, with what their weights stand for.

Nothing here uses the code under test: codes become a large integer, and that becomes words.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Codes = NDArray[np.int64]


@dataclass
class Drawn:
    """weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], g = groups[i]."""

    bits: int
    codes: Codes
    scales: Tensor
    zeros: Codes
    groups: Codes

    @property
    def weight(self) -> Tensor:
        return torch.from_numpy(self.codes - self.zeros[:, self.groups]) * self.scales[:, self.groups].float()


def draw(
    rows: int,
    features_in: int,
    *,
    bits: int,
    group: int,
    asymmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Drawn:
    """A random quantized weight; group -1: per column. Zero points from 1 on, since version 1 of GPTQ cannot say 0."""
    rng = np.random.default_rng(seed)
    size = features_in if group == -1 else group
    count = features_in // size
    shape = (rows, count)
    zeros = rng.integers(1, 1 << bits, shape) if asymmetric else np.full(shape, 1 << bits - 1)
    groups = np.arange(features_in) // size
    return Drawn(
        bits,
        rng.integers(0, 1 << bits, (rows, features_in)),
        torch.from_numpy(rng.uniform(0.2, 1.0, shape) / (1 << bits)).to(dtype),
        zeros,
        rng.permutation(groups) if act_order else groups,
    )


def words(codes: Codes, bits: int, *, dense: bool = True) -> Tensor:
    """[rows, count] -> int32 [rows, words]: the first code in the lowest bits of a row, or (not dense) of each word."""
    if not dense:
        each = 32 // bits
        parts = [codes[:, i : i + each] for i in range(0, codes.shape[1], each)]
        return torch.cat([words(part, bits) for part in parts], 1)
    width = -(-codes.shape[1] * bits // 32)
    rows = [
        sum(int(code) << bits * i for i, code in enumerate(row)).to_bytes(4 * width, "little")
        for row in codes
    ]
    return torch.from_numpy(np.frombuffer(b"".join(rows), np.int32).reshape(len(rows), width).copy())


def gptq(drawn: Drawn, *, version: int = 1) -> dict[str, Tensor]:
    stored = drawn.zeros.T - (1 if version == 1 else 0)
    return {
        "qweight": words(drawn.codes.T.T, drawn.bits).T.contiguous(),
        "qzeros": words(stored, drawn.bits),
        "scales": drawn.scales.T.contiguous(),
        "g_idx": torch.from_numpy(drawn.groups).int(),
    }


def awq(drawn: Drawn) -> dict[str, Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(codes: Codes) -> Tensor:
        return words(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape), 4)

    return {
        "qweight": interleaved(drawn.codes.T),
        "qzeros": interleaved(drawn.zeros.T),
        "scales": drawn.scales.T.contiguous(),
    }


def compressed(drawn: Drawn, *, dense: bool = True) -> dict[str, Tensor]:
    rows, features_in = drawn.codes.shape
    tensors = {
        "weight_packed": words(drawn.codes, drawn.bits, dense=dense),
        "weight_scale": drawn.scales,
        "weight_shape": torch.tensor([rows, features_in]),
    }
    if (drawn.zeros != 1 << drawn.bits - 1).any():
        tensors["weight_zero_point"] = words(drawn.zeros.T, drawn.bits, dense=dense).T.contiguous()
    if (np.diff(drawn.groups) < 0).any():
        tensors["weight_g_idx"] = torch.from_numpy(drawn.groups).int()
    return tensors


def naive(drawn: Drawn) -> dict[str, Tensor]:
    """int8 in place of words."""
    middle = 1 << drawn.bits - 1
    tensors = {
        "weight": torch.from_numpy(drawn.codes - middle).to(torch.int8),
        "weight_scale": drawn.scales,
    }
    if (drawn.zeros != middle).any():
        tensors["weight_zero_point"] = torch.from_numpy(drawn.zeros - middle).to(torch.int8)
    return tensors


def compressed_settings(bits: int, form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    arguments = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": arguments | weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def quantize_folder(
    plain: Path,
    folder: Path,
    settings: dict[str, Any],
    store: Callable[[Drawn], dict[str, Tensor]],
    drawn: Callable[[str, int, int], Drawn],
) -> None:
    """Two checkpoints of one model whose projections are drawn: `folder` stores them quantized, `folder`-dense as they are.

    `drawn(module, rows, features_in)`.
    """
    tensors = load_file(plain / "model.safetensors")
    dense = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        rows, features_in = tensors.pop(name).shape
        made = drawn(module, rows, features_in)
        dense[name] = made.weight
        tensors |= {f"{module}.{part}": tensor for part, tensor in store(made).items()}
    twin = folder.with_name(f"{folder.name}-dense")
    for target, held in ((folder, tensors), (twin, dense)):
        shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
