"""Where a trainer's weights come from: a checkpoint folder, or tensors in its memory; as bytes of the dtype that is served."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headrace.compute.checkpoint import DTYPES, Checkpoint
from headrace.types.errors import PushRefused
from headrace.types.weights import Tensor


class FolderSource:
    """The safetensors of a checkpoint folder. Raises CheckpointError."""

    def __init__(self, folder: Path | str) -> None:
        self._checkpoint = Checkpoint(folder)

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which they are read best."""
        checkpoint = self._checkpoint
        return tuple(Tensor(name, tuple(checkpoint.shape(name))) for name in checkpoint.tensors)

    def read(self, name: str, dtype: str) -> memoryview:
        """The tensor's bytes, row-major; the mapped file itself where it has this dtype already."""
        return _bytes(self._checkpoint.tensor(name), dtype)


class TensorSource:
    """A trainer's state dict. Tensors may lie on any device, and are read when it is their turn: do not change them meanwhile."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise PushRefused(f"tensor {name!r} is no floating-point torch tensor")

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(Tensor(name, tuple(tensor.shape)) for name, tensor in self._tensors.items())

    def read(self, name: str, dtype: str) -> memoryview:
        return _bytes(self._tensors[name].detach(), dtype)


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    dense = tensor.to(device="cpu", dtype=DTYPES[dtype]).contiguous()
    return dense.view(-1).view(torch.uint8).numpy().data
