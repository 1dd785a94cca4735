"""Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.batch import Batch
from headrace.compute.layers.linear import Linear
from headrace.types.errors import CheckpointError


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_pytorch_tanh": _gelu_tanh}
"""By the name in config.json, `hidden_act`. Not torch's exact gelu: its formula depends on the size of the tensor."""

PARALLEL_MIN = 32768
"""Elements from which torch divides an elementwise operation among threads (at::internal::GRAIN_SIZE)."""


def activate(activation: Callable[[Tensor], Tensor], x: Tensor, threads: int) -> Tensor:
    """[tokens, intermediate], one row after the other -> the same, contiguous.

    On one thread: threads divide a large tensor at any element, and the last few of a piece are computed by another
    formula than the rest, which differs in the last bit. So a row's bits would depend on the batch.
    """
    if threads == 1 or x.numel() < PARALLEL_MIN:
        return activation(x)
    torch.set_num_threads(1)
    try:
        return activation(x)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)), gate and up in one matrix."""

    gate_up: Linear
    """hidden -> 2 * intermediate: gate, then up."""
    down: Linear
    """intermediate -> hidden."""
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def load(
        cls,
        weights: Weights,
        prefix: str,
        *,
        hidden: int,
        intermediate: int,
        activation: str,
        bias: bool = False,
    ) -> "GatedMLP":
        """Take `{prefix}gate_proj.weight` and so on. Raises CheckpointError for an unknown activation."""
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise CheckpointError(f"config.json: hidden_act {activation!r} is unknown; known: {known}")
        rows = [("gate_proj", intermediate), ("up_proj", intermediate)]
        return cls(
            gate_up=Linear.load(weights, prefix, rows, hidden, bias),
            down=Linear.load(weights, prefix, [("down_proj", hidden)], intermediate, bias),
            activation=ACTIVATIONS[activation],
        )

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """[tokens, hidden] -> the same."""
        gate, up = self.gate_up(x, batch.threads).chunk(2, -1)
        return self.down(activate(self.activation, gate, batch.threads).mul_(up), batch.threads)
