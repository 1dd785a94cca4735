"""A checkpoint folder written tensor by tensor, in any order: safetensors files of sizes known before, filled in place.

The safetensors library writes a file from tensors that are all in memory; here one need be. Format: 8 bytes with the header's length,
the header (JSON: element type, shape and place of each tensor), then the tensors' bytes.

1. `Writer` makes a folder of its own beside the target, and files of their full size, empty.
2. `write` fills a tensor's place.
3. `close` checks that every one is filled, writes the index, and gives the folder its name, at once; `abandon` removes it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.compute.checkpoint import INDEX, SINGLE
from headrace.types.errors import ConfigError

ALIGNMENT = 8
STORED = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """Of a tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def check_target(target: Path, nbytes: int) -> None:
    """Raises ConfigError if the folder holds something, or the disk has no room."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"--output {target} exists and is not empty; nothing is overwritten: choose another folder"
        )
    above = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(above).free
    if free < nbytes:
        raise ConfigError(
            f"--output {target} needs {nbytes / 2**20:.0f} MiB, but {free / 2**20:.0f} MiB are free there"
        )


class Writer:
    """See the module's life cycle. Raises ConfigError where the folder cannot be made."""

    def __init__(self, target: Path, shards: Mapping[str, Mapping[str, Spec]]) -> None:
        """`shards`: the tensors of each file, by its name."""
        check_target(target, sum(spec.nbytes for held in shards.values() for spec in held.values()))
        self.target = target.absolute()
        self.folder = self.target.with_name(f"{self.target.name}.partial-{os.getpid()}")
        self._shards = shards
        self._places: dict[str, tuple[Path, int, Spec]] = {}
        try:
            self.folder.mkdir(parents=True)
            for name, held in shards.items():
                self._begin(self.folder / name, held)
        except OSError as error:
            self.abandon()
            raise ConfigError(f"--output {target} cannot be written: {error}") from error

    def write(self, name: str, tensor: Tensor) -> None:
        """Fill a tensor's place, once."""
        path, offset, spec = self._places.pop(name)
        if tensor.dtype != spec.dtype or tensor.shape != spec.shape:
            raise ValueError(f"{name} is {tensor.dtype}{list(tensor.shape)}, not {spec}")
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(raw.data)

    def close(self) -> None:
        """Raises ValueError naming a tensor that was not written."""
        if self._places:
            raise ValueError(f"not written: {', '.join(sorted(self._places)[:3])}")
        if list(self._shards) != [SINGLE]:
            sizes = [spec.nbytes for held in self._shards.values() for spec in held.values()]
            held_by = {tensor: name for name, held in self._shards.items() for tensor in held}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(held_by.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if self.target.exists():
            self.target.rmdir()  # it is empty, or this says so
        self.folder.rename(self.target)

    def abandon(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, path: Path, held: Mapping[str, Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # The largest elements first keeps each one aligned, as the library does it.
        for name, spec in sorted(held.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            end = at + spec.nbytes
            header[name] = {"dtype": STORED[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        data = 8 + len(text)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(data + at)
        for name, spec in held.items():
            self._places[name] = path, data + header[name]["data_offsets"][0], spec
