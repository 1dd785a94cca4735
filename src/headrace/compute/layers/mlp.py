"""Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from dataclasses import dataclass
from typing import get_args

import msgspec
from torch import Tensor

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.batch import Batch
from headrace.compute.layers.linear import Linear
from headrace.compute.ops import Activation, gated
from headrace.types.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)), gate and up in one matrix."""

    gate_up: Linear
    """hidden -> 2 * intermediate: gate, then up."""
    down: Linear
    """intermediate -> hidden."""
    activation: Activation

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
        known = get_args(Activation)
        if activation not in known:
            raise CheckpointError(
                f"config.json: hidden_act {activation!r} is unknown; known: {', '.join(known)}"
            )
        rows = [("gate_proj", intermediate), ("up_proj", intermediate)]
        return cls(
            gate_up=Linear.load(weights, prefix, rows, hidden, bias),
            down=Linear.load(weights, prefix, [("down_proj", hidden)], intermediate, bias),
            activation=msgspec.convert(activation, Activation),
        )

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """[tokens, hidden] -> the same."""
        both = self.gate_up(x, batch.threads)
        return self.down(gated(both, self.activation, threads=batch.threads), batch.threads)
