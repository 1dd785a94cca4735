"""From a checkpoint folder to a quantized one, a layer at a time: round to nearest, or GPTQ with a calibration text.

Embedding, norms, biases and LM head stay as they are. Files keep the source's shards; what is no weight (tokenizer, generation settings,
chat template) is copied. The new folder has its name only when it is whole.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from headrace.compute import models
from headrace.compute.checkpoint import DTYPES, SAFETENSORS_DTYPES, SINGLE, Checkpoint, finite
from headrace.compute.layers.linear import Linear
from headrace.compute.quant import gptq, packed
from headrace.compute.quant.calibration import calibrate
from headrace.compute.quant.gptq import Order
from headrace.compute.quant.recipe import Recipe, round_to_nearest
from headrace.compute.quant.shards import STORED, Spec, Writer
from headrace.compute.quant.streaming import OneLayer, Outline, linears
from headrace.compute.quant.weight import QuantizedWeight
from headrace.types.errors import CheckpointError, ConfigError

COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
BLOCK_SIZE = 32
TORCH_OF = {stored: dtype for dtype, stored in STORED.items()}

Progress = Callable[[int, int], None]
"""(layers done, layers)."""


@dataclass(slots=True)
class Outcome:
    """What became of the weights."""

    modules: int = 0
    plain_bytes: int = 0
    """Of the quantized matrices before."""
    quantized_bytes: int = 0
    """Of the same after, scales and all."""
    other_bytes: int = 0
    """Of all that stayed as it was."""
    errors: dict[str, list[float]] = field(default_factory=dict)
    """By the last part of a module's name: ||W - Q|| / ||W|| of each."""
    groups: dict[str, int] = field(default_factory=dict)
    """Of each module."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids [samples, length] for GPTQ, and its settings."""

    samples: Tensor
    order: Order = "static"
    damping: float = 0.01


def samples_of(ids: Sequence[int], count: int, length: int) -> Tensor:
    """[at most count, length]: stretches of a text, evenly spaced. Raises ConfigError if there is not one."""
    found = min(count, len(ids) // length)
    if not found:
        raise ConfigError(
            f"--calibrate: the text has {len(ids)} tokens, and one sample takes {length}: give a longer text, or a smaller --length"
        )
    starts = [i * (len(ids) - length) // max(1, found - 1) for i in range(found)]
    return torch.tensor([list(ids[start : start + length]) for start in starts])


def convert(
    source: Checkpoint,
    target: Path,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    threads: int,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Raises ConfigError (settings, target) or CheckpointError (source), and leaves nothing behind then."""
    return _Conversion(source, target, recipe, calibration, threads, progress).run()


class _Conversion:
    def __init__(
        self,
        source: Checkpoint,
        target: Path,
        recipe: Recipe,
        calibration: Calibration | None,
        threads: int,
        progress: Progress,
    ) -> None:
        if source.scheme is not None:
            raise ConfigError(f"{source.folder} is quantized already ({source.scheme.summary})")
        self._source = source
        self._target = target
        self._recipe = recipe
        self._calibration = calibration
        self._order: Order | None = None if calibration is None else calibration.order
        self._threads = threads
        self._progress = progress
        self._outcome = Outcome()
        # Calibration text runs in bfloat16 in place of float16, which no kernel of this engine knows.
        dtype = source.dtype()
        self._dtype = "bfloat16" if dtype == "float16" else dtype
        self._layers = [
            linears(layer) for layer in models.load(source, dtype=self._dtype, handing_out=Outline).layers
        ]
        self._groups = self._outcome.groups
        for layer in self._layers:
            for linear in layer:
                for module, _ in linear.modules:
                    self._groups[module] = recipe.group_for(module, self._shape(module)[1])

    def run(self) -> Outcome:
        self._writer = Writer(self._target, self._shards())
        try:
            self._copy()
            if self._calibration is None:
                self._round()
            else:
                self._calibrate(self._calibration)
            self._writer.close()
        except OSError as error:
            self._writer.abandon()
            raise ConfigError(f"--output {self._target} cannot be written: {error}") from error
        except BaseException:
            self._writer.abandon()
            raise
        return self._outcome

    def _round(self) -> None:
        for done, layer in enumerate(self._layers, 1):
            for linear in layer:
                for module, _ in linear.modules:
                    weight = self._weight(module)
                    self._keep(
                        weight,
                        round_to_nearest(
                            weight,
                            self._recipe,
                            group=self._groups[module],
                            scale_dtype=self._scale_dtype(module),
                            name=module,
                        ),
                    )
            self._progress(done, len(self._layers))

    def _calibrate(self, calibration: Calibration) -> None:
        length = calibration.samples.shape[1]
        model = models.load(self._source, dtype=self._dtype, length=length, handing_out=OneLayer)
        spec = models.kv_spec(self._source, dtype=self._dtype, block_size=BLOCK_SIZE)
        done = 0

        def quantize(linear: Linear, energy: Tensor) -> list[QuantizedWeight]:
            return [self._fit(module, energy, calibration) for module, _ in linear.modules]

        def told() -> None:
            nonlocal done
            done += 1
            self._progress(done, len(self._layers))

        calibrate(model, spec, calibration.samples, quantize, threads=self._threads, progress=told)

    def _fit(self, module: str, energy: Tensor, calibration: Calibration) -> QuantizedWeight:
        weight = self._weight(module)
        quantized = gptq.quantize(
            weight,
            energy,
            self._recipe,
            group=self._groups[module],
            scale_dtype=self._scale_dtype(module),
            damping=calibration.damping,
            order=calibration.order,
            name=module,
        )
        self._keep(weight, quantized)
        return quantized

    def _keep(self, weight: Tensor, quantized: QuantizedWeight) -> None:
        """Write a module's weight, and note how far it is from what it was."""
        module = quantized.name
        error = float((weight - quantized.dequantize()).norm() / weight.norm().clamp(min=1e-30))
        self._outcome.errors.setdefault(module.rsplit(".", 1)[-1], []).append(error)
        for name, tensor in packed.tensors(quantized, self._scale_dtype(module), self._order).items():
            self._writer.write(f"{module}.{name}", tensor)

    def _weight(self, module: str) -> Tensor:
        """f32."""
        weight = self._source.tensor(f"{module}.weight")
        if not finite(weight):
            raise CheckpointError(
                f"{self._source.folder}: tensor '{module}.weight' holds NaN or infinite values"
            )
        return weight.float()

    def _scale_dtype(self, module: str) -> torch.dtype:
        return DTYPES[SAFETENSORS_DTYPES[self._source.dtype_of(f"{module}.weight")]]

    def _shape(self, module: str) -> tuple[int, int]:
        rows, features_in = self._source.shape(f"{module}.weight")
        return rows, features_in

    def _shards(self) -> dict[str, dict[str, Spec]]:
        """The source's, with packed weights in place of the modules'."""
        shards: dict[str, dict[str, Spec]] = {}
        for file, name in self._source.places():
            held = shards.setdefault(file, {})
            module, stored = name.removesuffix(".weight"), self._source.dtype_of(name)
            if module in self._groups:
                rows, features_in = self._shape(module)
                added = packed.specs(
                    rows,
                    features_in,
                    self._recipe,
                    self._groups[module],
                    self._scale_dtype(module),
                    self._order,
                )
                self._outcome.modules += 1
                self._outcome.plain_bytes += rows * features_in * self._scale_dtype(module).itemsize
                self._outcome.quantized_bytes += sum(spec.nbytes for spec in added.values())
                held |= {f"{module}.{part}": spec for part, spec in added.items()}
                continue
            if stored not in TORCH_OF:
                raise CheckpointError(
                    f"{self._source.folder}: tensor {name!r} is {stored}, which cannot be copied"
                )
            held[name] = Spec(TORCH_OF[stored], tuple(self._source.shape(name)))
            self._outcome.other_bytes += held[name].nbytes
        return shards if len(shards) > 1 else {SINGLE: next(iter(shards.values()))}

    def _copy(self) -> None:
        """What is not quantized, and config.json."""
        for _, name in self._source.places():
            if name.removesuffix(".weight") not in self._groups:
                self._writer.write(name, self._source.raw(name))
        for path in sorted({path for pattern in COPIED for path in self._source.folder.glob(pattern)}):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, self._writer.folder / path.name)
        added = {"quantization_config": packed.settings(self._recipe, self._groups, self._order)}
        text = json.dumps(self._source.config | added, indent=2)
        (self._writer.folder / "config.json").write_text(text + "\n")
