"""Model families, one file each. A family's file names the architectures that it serves, so there is no table to edit.

A family module has
- ``ARCHITECTURES``: names as in config.json's `architectures`;
- ``Config``: a struct with `parse(config.json) -> Config` and `context_length`;
- ``kv_groups(config) -> tuple[KVGroup, ...]``: what it keeps in the KV cache, from the configuration alone;
- ``load(config, weights, length) -> Decoder``: the model for sequences of at most `length` tokens.
"""

import pkgutil
from importlib import import_module
from typing import Any, Protocol, Self

from headrace.compute.checkpoint import DTYPES, Checkpoint, Weights
from headrace.compute.layers.decoder import Decoder
from headrace.types.errors import CheckpointError
from headrace.types.kv import KVGroup, KVSpec, Layout


class FamilyConfig(Protocol):
    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self: ...
    @property
    def context_length(self) -> int: ...


class Family(Protocol):
    """What a module of this package offers."""

    ARCHITECTURES: tuple[str, ...]
    Config: type[FamilyConfig]

    def kv_groups(self, config: Any) -> tuple[KVGroup, ...]: ...
    def load(self, config: Any, weights: Weights, length: int) -> Decoder: ...


def families() -> dict[str, Family]:
    """Every family by the architectures that it serves, found by walking this folder."""
    modules: list[Any] = [
        import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)
    ]
    return {architecture: module for module in modules for architecture in module.ARCHITECTURES}


def family(checkpoint: Checkpoint) -> Family:
    """The family that serves a checkpoint. Raises CheckpointError naming the architecture and those known."""
    named = checkpoint.config.get("architectures") or []
    known = families()
    for architecture in named:
        if architecture in known:
            return known[architecture]
    raise CheckpointError(
        f"{checkpoint.folder}: architecture {', '.join(map(str, named)) or 'not stated'} is not supported; "
        f"supported: {', '.join(sorted(known))}"
    )


def context_length(checkpoint: Checkpoint) -> int:
    """Longest sequence, tokens, that the model is meant for."""
    return family(checkpoint).Config.parse(checkpoint.config).context_length


def kv_spec(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    block_size: int = 32,
    layout: Layout = Layout.HEAD_MAJOR,
) -> KVSpec:
    """What the model keeps in the KV cache; reads the configuration only (and one tensor's header for its dtype)."""
    module = family(checkpoint)
    groups = module.kv_groups(module.Config.parse(checkpoint.config))
    return KVSpec(groups=groups, block_size=block_size, dtype=checkpoint.dtype(dtype), layout=layout)


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    length: int | None = None,
    handing_out: type[Weights] = Weights,
) -> Decoder:
    """Load the model for sequences of at most `length` tokens (default: as many as it is meant for).

    `handing_out`: how the tensors reach the model; see `quant.streaming` for others.

    Raises CheckpointError for an unknown architecture, and for tensors that are missing, unexpected or mis-shaped.
    """
    module = family(checkpoint)
    config = module.Config.parse(checkpoint.config)
    weights = handing_out(checkpoint, DTYPES[checkpoint.dtype(dtype)])
    return module.load(config, weights, length or config.context_length)
