"""A checkpoint whose tensors were pushed into memory: the folder gives the configuration, a memory file the weights."""

import mmap
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.compute.checkpoint import DTYPES, Checkpoint
from headrace.types.errors import CheckpointError
from headrace.types.weights import Place, Staged


class StagedCheckpoint(Checkpoint):
    """Tensors are views of the memory file, which lives as long as they do. Raises CheckpointError if it cannot be mapped."""

    def __init__(self, folder: Path | str, staged: Staged) -> None:
        super().__init__(folder)
        self._staged = staged
        try:
            fd = os.open(staged.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # Torch wants memory that could be written; what it would write is its own.
                self._memory = mmap.mmap(fd, staged.nbytes, flags=mmap.MAP_PRIVATE)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the pushed weights (version {staged.version}) cannot be mapped: {error}"
            ) from error

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Place of every tensor, by its name."""
        return {place.name: place for place in self._staged.places}

    def shape(self, name: str) -> list[int]:
        return list(self._place(name).shape)

    def tensor(self, name: str) -> Tensor:
        place, dtype = self._place(name), DTYPES[self._staged.dtype]
        count = place.nbytes // dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=place.offset).view(place.shape)

    def fingerprint(self) -> str:
        return self._staged.fingerprint

    def _place(self, name: str) -> Place:
        place: Place = self.tensors[name]
        return place
