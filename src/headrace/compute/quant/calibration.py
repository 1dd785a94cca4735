"""Runs texts through a model, layer by layer, and has each layer's projections quantized on the inputs that they really get.

A layer's inputs come from the layers before it as they are by then, quantized; within a layer, from its unquantized projections. So a layer
runs twice over all samples: to see its inputs, and to pass on its outputs. In memory are one layer, the moments of its inputs, and the
hidden states of the samples.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compute.layers.batch import Batch
from headrace.compute.layers.decoder import Decoder
from headrace.compute.layers.linear import Linear
from headrace.compute.pool import pool_tensors
from headrace.compute.quant.gptq import Energy
from headrace.compute.quant.streaming import with_linears
from headrace.compute.quant.weight import QuantizedWeight
from headrace.compute.rows import Rows
from headrace.types.kv import KVSpec, TableRun

Quantize = Callable[[Linear, Tensor], list[QuantizedWeight]]
"""Of a projection and the second moment of its inputs [in, in]: the quantized weight of each of its modules."""


class _Watched:
    """A projection that adds up the moment of what it is given."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.energy: Energy | None = None

    def __call__(self, x: Tensor, threads: int) -> Tensor:
        if self.energy is None:
            self.energy = Energy.zero(x.shape[1])
        self.energy.add(x)
        return self._linear(x, threads)


@torch.inference_mode()
def calibrate(
    model: Decoder,
    spec: KVSpec,
    samples: Tensor,
    quantize: Quantize,
    *,
    threads: int,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Have every projection quantized. `samples`: token ids [samples, length]; `progress` is called after every layer."""
    batch = _batch(spec, samples.shape[1], threads)
    angles = model.rotary(batch.positions)
    hidden = [F.embedding(ids, model.embedding) for ids in samples]
    for layer in model.layers:
        watched: dict[tuple[Any, ...], _Watched] = {}

        def watch(linear: Linear, seen: dict[tuple[Any, ...], _Watched] = watched) -> _Watched:
            return seen.setdefault(linear.modules, _Watched(linear))

        def change(linear: Linear, seen: dict[tuple[Any, ...], _Watched] = watched) -> Linear:
            energy = seen.pop(linear.modules).energy
            assert energy is not None, f"{linear.modules} was not run"
            return linear.quantized(quantize(linear, energy.moment), model.dtype)

        seen = with_linears(layer, watch)
        for x in hidden:
            seen(x.clone(), None, batch, angles)  # a layer adds to what it is given
        del seen
        after = with_linears(layer, change)
        for x in hidden:
            x.add_(after(x, None, batch, angles))
        progress()


def _batch(spec: KVSpec, length: int, threads: int) -> Batch:
    """One whole sequence of so many tokens; whose, a layer does not ask. Its KV is overwritten by the next."""
    blocks = spec.blocks_for(length)
    rows = Rows(spec, length, 1)
    row = rows.acquire([0] * length)
    rows.extend(row, (TableRun(g, 0, 0, blocks) for g in range(len(spec.groups))))
    return rows.batch([(row, 0, length)], [True], pool_tensors(spec, [blocks] * len(spec.groups)), threads)
