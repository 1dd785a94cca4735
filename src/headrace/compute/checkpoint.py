"""Hugging Face checkpoint folders: config.json and memory-mapped safetensors. Nothing in a checkpoint is ever executed.

Weights may be quantized, in the schemes of `quant.checkpoints`: a model asks for matrices and gets either kind.

Format: https://huggingface.co/docs/safetensors and transformers' `save_pretrained`: one `model.safetensors`, or shards
named by the `weight_map` of `model.safetensors.index.json`.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.compute.quant import QuantizedWeight
from headrace.compute.quant.checkpoints import scheme_of
from headrace.compute.quant.weight import stack
from headrace.types.errors import CheckpointError

Layer = TypeVar("Layer")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Element types that models run in, by the name that flags, config.json and `KVSpec` use."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Stored element types of tensors that are served as they are; others (I8, F8_E4M3, I32, ...) belong to quantized weights."""

SAMPLE_BYTES = 256
"""How much of each tensor goes into the fingerprint."""


class Checkpoint:
    """A checkpoint folder. Construction reads config.json only; tensors are mapped when first asked for.

    Raises CheckpointError, naming the file, for whatever cannot be served.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.config: dict[str, Any] = self._json("config.json")
        self.scheme = scheme_of(self.config, self.folder)
        """How weights are quantized; None: they are not."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: as in transformers, generation_config.json first, else config.json."""
        path = self.folder / "generation_config.json"
        generation = self._json(path.name) if path.exists() else {}
        ids = generation.get("eos_token_id", self.config.get("eos_token_id"))
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, list) else (ids,)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Open shard of every tensor, by the tensor's name."""
        return {name: shard for shard in map(self._open, self._shards()) for name in shard.keys()}

    def dtype(self, requested: str = "auto") -> str:
        """The element type to run in. "auto" is what config.json says, or, if it says nothing, the first tensor's.

        A quantized model that says float16, as most do, runs in bfloat16: its weights are integers, and no kernel for them knows float16.
        """
        name = requested
        if requested == "auto":
            name = self.config.get("dtype") or self.config.get("torch_dtype") or self._stored_dtype()
            name = "bfloat16" if self.scheme is not None and name == "float16" else name
        if name not in DTYPES:
            raise CheckpointError(
                f"{self.folder}: dtype {name!r} is not supported; known: auto, {', '.join(DTYPES)}"
            )
        return name

    def shape(self, name: str) -> list[int]:
        return self.tensors[name].get_slice(name).get_shape()

    def places(self) -> list[tuple[str, str]]:
        """(file name, tensor's name) of every tensor, by file."""
        return [(path.name, name) for path in self._shards() for name in self._open(path).keys()]

    def dtype_of(self, name: str) -> str:
        """The element type of one tensor, as safetensors calls it."""
        return self.tensors[name].get_slice(name).get_dtype()

    def raw(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file, whatever its type: no copy, shared with other processes until written."""
        return self.tensors[name].get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """The same, of floating point."""
        stored = self.dtype_of(name)
        if stored not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is {stored}; expected one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        return self.raw(name)

    def fingerprint(self) -> str:
        """Hex digest of the configuration, of every tensor's name and shape, and of a sample of its content.

        A sample, so that start-up need not read all of a large checkpoint; the runner's numerics id covers the rest.
        """
        digest = blake2b(json.dumps(self.config, sort_keys=True).encode(), digest_size=16)
        for name in sorted(self.tensors):
            digest.update(f"{name} {self.shape(name)}".encode())
            flat = self.raw(name).reshape(-1).view(torch.uint8)
            middle = len(flat) // 2
            digest.update(flat[middle : middle + SAMPLE_BYTES].numpy().tobytes())
        return digest.hexdigest()

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist; expected a Hugging Face checkpoint folder"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
        return content

    def _shards(self) -> list[Path]:
        """Paths of the safetensors files, in the order of their names."""
        if (self.folder / INDEX).exists():
            weight_map = self._json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(
                    f"{self.folder / INDEX}: expected 'weight_map', tensor names to file names"
                )
            names = sorted(set(weight_map.values()))
        elif (self.folder / SINGLE).exists():
            names = [SINGLE]
        else:
            pickled = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = (
                f" ({pickled[0]} is a pickle, which may execute code, and is never loaded)" if pickled else ""
            )
            raise CheckpointError(
                f"{self.folder}: neither {SINGLE} nor {INDEX} exists{hint}; convert to safetensors"
            )
        for name in names:
            # An index comes with the checkpoint, so it must not lead out of the folder.
            if Path(name).name != name:
                raise CheckpointError(f"{self.folder / INDEX}: {name!r} is not a plain file name")
        return [self.folder / name for name in names]

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}, named by {INDEX}, does not exist: the download is incomplete"
            ) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error

    def _stored_dtype(self) -> str:
        if not self.tensors:
            raise CheckpointError(f"{self.folder}: no tensors")
        found = [self.dtype_of(name) for name in self.tensors]
        stored = next((dtype for dtype in found if dtype in SAFETENSORS_DTYPES), found[0])
        return SAFETENSORS_DTYPES.get(stored, str(stored))


class Weights:
    """The tensors of a checkpoint, handed out once each, by name, in the dtype that the model runs in.

    A model takes what it needs; `finish` then finds what nobody took. So a checkpoint that differs in any tensor from
    what the model expects fails at load, with the tensor's name.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._left = set(checkpoint.tensors)
        for suffix in () if checkpoint.scheme is None else checkpoint.scheme.IGNORED:
            self.ignore(suffix)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def dtype_of(self, name: str) -> str:
        return self._checkpoint.dtype_of(name)

    def raw(self, name: str) -> Tensor:
        """The tensor as it is stored. Raises CheckpointError if it is missing."""
        if name not in self._left:
            raise CheckpointError(f"{self._checkpoint.folder}: tensor {name!r} is missing")
        self._left.remove(name)
        return self._checkpoint.raw(name)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have `shape`. A view of the mapped file where the dtype allows."""
        return self._claim(name, shape).to(self.dtype)

    def concat(self, parts: Sequence[tuple[str, int]], *rest: int) -> Tensor:
        """Tensors of shape [rows, *rest], stacked along the first axis; `parts` are (name, rows). A lone one is not copied."""
        if len(parts) == 1:
            return self.take(parts[0][0], parts[0][1], *rest)
        out = torch.empty(sum(rows for _, rows in parts), *rest, dtype=self.dtype)
        at = 0
        for name, rows in parts:
            out[at : at + rows].copy_(self._claim(name, (rows, *rest)))
            at += rows
        return out

    def matrices(
        self, modules: Sequence[tuple[str, int]], features_in: int
    ) -> list[Tensor | QuantizedWeight]:
        """The weights [rows, features_in] of `modules`, (name, rows), stacked: one matrix, or several if they are not alike.

        Modules are alike if none is quantized, or if all are, in one format with one order of inputs; neighbours that are become one.
        """
        scheme = self._checkpoint.scheme
        quantized = [scheme is not None and scheme.holds(name, self) for name, _ in modules]
        if scheme is None or not any(quantized):
            return [self.concat([(f"{name}.weight", rows) for name, rows in modules], features_in)]
        parts: list[Tensor | QuantizedWeight] = [
            scheme.read(name, rows, features_in, self)
            if is_quantized
            else self.take(f"{name}.weight", rows, features_in)
            for (name, rows), is_quantized in zip(modules, quantized, strict=True)
        ]
        return stack(parts)

    def dense(self, module: str, rows: int, features_in: int) -> Tensor:
        """The weight of a module as floating point, whatever it is stored as."""
        (found,) = self.matrices([(module, rows)], features_in)
        return found if isinstance(found, Tensor) else found.dequantize(self.dtype)

    def drop_zeros(self, name: str) -> None:
        """Expect, and drop, a tensor that is all zero: some quantizers give every layer a bias."""
        if name in self._left and not bool(self._checkpoint.tensor(name).any()):
            self._left.remove(name)

    def layers(self, count: int, load: Callable[[int], Layer]) -> Iterable[Layer]:
        """The model's layers, in order, `load(index)` each; here all at once."""
        return tuple(load(index) for index in range(count))

    def ignore(self, suffix: str) -> None:
        """Expect, and drop, tensors with this end of their name (buffers that old versions saved)."""
        self._left = {name for name in self._left if not name.endswith(suffix)}

    def finish(self) -> None:
        """Raises CheckpointError if a tensor was not taken."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{self._checkpoint.folder}: unexpected tensors for {self._architecture}: {', '.join(names[:3])}{more}"
            )

    @property
    def _architecture(self) -> str:
        return ", ".join(self._checkpoint.config.get("architectures") or ["?"])

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError if there is no such tensor, or it has another shape."""
        if name not in self._left:
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor {name!r} is missing; {self._architecture} expects it as {list(shape)}"
            )
        found = self._checkpoint.shape(name)
        if found != list(shape):
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor {name!r} is {found}, expected {list(shape)}"
            )

    def _claim(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.check(name, shape)
        self._left.remove(name)
        tensor = self._checkpoint.tensor(name)
        if not finite(tensor):
            raise CheckpointError(f"{self._checkpoint.folder}: tensor {name!r} holds NaN or infinite values")
        return tensor


def finite(tensor: Tensor) -> bool:
    """Whether all elements are numbers. By the extremes, which a NaN spoils: one reading, 0.15 s for 1 GB, and no second tensor."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low > -torch.inf and high < torch.inf)
