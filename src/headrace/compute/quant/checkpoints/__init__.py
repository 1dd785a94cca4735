"""How checkpoints keep quantized weights, one file each: what is stored becomes a `QuantizedWeight`, whatever wrote it.

A file of this package has
- ``METHODS``: names as in config.json's `quantization_config.quant_method`;
- ``Scheme``: made by `parse(settings, folder)` from that object, it knows the modules that hold a quantized weight and reads them.

Numbers are taken from the tensors where they say the same as the configuration: it may describe a part of the modules only.
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from headrace.compute.quant.formats import Format
from headrace.compute.quant.weight import PER_COLUMN, QuantizedWeight
from headrace.types.errors import CheckpointError


class Stored(Protocol):
    """A checkpoint's tensors, as they are stored."""

    def __contains__(self, name: str) -> bool: ...
    def dtype_of(self, name: str) -> str:
        """As safetensors calls it."""
        ...

    def raw(self, name: str) -> Tensor:
        """The tensor, which is hereby used."""
        ...


class Scheme(Protocol):
    IGNORED: tuple[str, ...]
    """Ends of names of tensors that are of no use to weight-only arithmetic."""

    @classmethod
    def parse(cls, settings: dict[str, Any], folder: Path) -> Self:
        """Raises CheckpointError naming what is not supported."""
        ...

    @property
    def summary(self) -> str:
        """Method and width, for messages."""
        ...

    def holds(self, module: str, tensors: Stored) -> bool:
        """Whether the weight of a module (`model.layers.0.mlp.up_proj`) is a quantized one."""
        ...

    def read(self, module: str, rows: int, features_in: int, tensors: Stored) -> QuantizedWeight:
        """Raises CheckpointError or ConfigError naming module and scheme."""
        ...


def methods() -> dict[str, Any]:
    """Every scheme by the methods that it reads, found by walking this folder."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {method: module.Scheme for module in modules for method in module.METHODS}


def scheme_of(config: dict[str, Any], folder: Path) -> Scheme | None:
    """The scheme that a config.json names; None: nothing is quantized. Raises CheckpointError."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return None
    known = methods()
    name = str(settings.get("quant_method")) if isinstance(settings, dict) else str(settings)
    if not isinstance(settings, dict) or name not in known:
        raise CheckpointError(
            f"{folder}: weights quantized by {name!r} are not supported; supported: {', '.join(sorted(known))}"
        )
    return known[name].parse(settings, folder)


def integers(
    module: str,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups_of_inputs: Tensor | None = None,
) -> QuantizedWeight:
    """Of unsigned codes [out, in], scales [out, groups] and zero points (None: the middle); inputs in the stored order.

    `groups_of_inputs`: the group of each input [in], where they are not neighbours. Zero points that are all the middle become
    signed codes without any.
    """
    middle = 1 << bits - 1
    group, order = grouping(module, scales.shape[1], codes.shape[1], groups_of_inputs)
    if order is not None:
        codes = codes[:, order.long()].contiguous()
    scales = scales if scales.dtype == torch.bfloat16 else scales.float()
    centred = zeros is None or bool((zeros == middle).all())
    if centred and bits > 1:
        form, codes, zeros = Format("signed", bits), codes ^ middle, None
    else:
        form = Format("unsigned", bits)
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8) if zeros is None else zeros.contiguous()
    return QuantizedWeight(form, codes, scales.contiguous(), group, zeros, order, module)


def floats(
    module: str,
    weight: Tensor,
    scales: Tensor,
    block: tuple[int, int] | None,
    rows: int,
    features_in: int,
) -> QuantizedWeight:
    """Of 8-bit floats e4m3 [out, in] and scales as `spread` takes them. Raises CheckpointError."""
    if list(weight.shape) != [rows, features_in]:
        raise CheckpointError(f"{module}: weight is {list(weight.shape)}, expected {[rows, features_in]}")
    scales = spread(module, scales, block, rows, features_in)
    scales = scales if scales.dtype == torch.bfloat16 else scales.float()
    group, _ = grouping(module, scales.shape[1], features_in, None)
    codes = weight.contiguous().view(torch.uint8)
    return QuantizedWeight(Format.named("e4m3"), codes, scales.contiguous(), group, None, None, module)


def spread(module: str, scales: Tensor, block: tuple[int, int] | None, rows: int, features_in: int) -> Tensor:
    """Scales as [out, groups], whatever shares one: the tensor [1], an output [out, 1], a group [out, groups], or a block of both.

    Raises CheckpointError if they do not fit.
    """
    if scales.numel() == 1:
        return scales.view(1, 1).expand(rows, 1)
    if block is not None:
        tall, wide = block
        expected = [-(-rows // tall), -(-features_in // wide)]
        if list(scales.shape) != expected or features_in % wide:
            raise CheckpointError(
                f"{module}: scales {list(scales.shape)} of blocks of {tall} x {wide} do not fit {[rows, features_in]}"
            )
        return scales.repeat_interleave(tall, 0)[:rows]
    scales = scales.view(len(scales), -1)
    if scales.shape[0] != rows:
        raise CheckpointError(f"{module}: scales {list(scales.shape)} do not fit {rows} outputs")
    return scales


def grouping(
    module: str, groups: int, features_in: int, groups_of_inputs: Tensor | None
) -> tuple[int, Tensor | None]:
    """(size of a group, order of inputs as in `QuantizedWeight`). Raises CheckpointError if groups differ in size."""
    if groups < 1 or features_in % groups:
        raise CheckpointError(f"{module}: {groups} groups do not divide its {features_in} inputs")
    size = features_in // groups
    if groups == 1:
        return PER_COLUMN, None
    if groups_of_inputs is None or bool((groups_of_inputs == -1).all()):
        return size, None
    found = groups_of_inputs.long()
    if len(found) != features_in or not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise CheckpointError(
            f"{module}: its g_idx does not give each of {features_in} inputs one of {groups} groups"
        )
    counts = torch.bincount(found, minlength=groups)
    if not bool((counts == size).all()):
        raise CheckpointError(
            f"{module}: groups of {int(counts.min())} to {int(counts.max())} inputs: a group size that does not divide its "
            f"{features_in} inputs is not supported"
        )
    order = found.argsort(stable=True)
    return size, None if torch.equal(order, torch.arange(features_in)) else order.int()
