"""The input of one forward pass: a flat batch of tokens, prefill and decode of many sequences mixed."""

from dataclasses import dataclass

from torch import Tensor

from headrace.compute.distant import Distant
from headrace.compute.planning import StepPlans


@dataclass(frozen=True, slots=True)
class GroupKV:
    """Where one KV group of a batch lies."""

    kv: Tensor
    """The group's pool: [blocks, layers in group, 2 (K, V), kv_heads, block_size, dim] in the model's dtype, in any order in memory."""
    tables: Tensor
    """Block tables: int32 [sequences, blocks_max], -1 = absent."""
    blocks: Tensor
    """int32 [tokens]: the block that each token's KV is written to."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences; those of one sequence in ascending position, but not necessarily adjacent."""

    ids: Tensor
    """int32 [tokens]."""
    positions: Tensor
    """int32 [tokens]: place in the sequence."""
    rows: Tensor
    """int32 [tokens]: the row of the block tables of each token's sequence."""
    offsets: Tensor
    """int32 [tokens]: slot inside the block (position modulo block size)."""
    wanted: Tensor
    """int32 [wanted]: indices of the tokens whose logits are asked for."""
    groups: tuple[GroupKV, ...]
    """In the order of the model's `KVSpec.groups`."""
    threads: int
    """How many threads the kernels may use; no result depends on it."""
    plans: StepPlans
    """How its attention is cut into work."""
    distant: Distant | None = None
    """If some of the sequences lie partly elsewhere."""
