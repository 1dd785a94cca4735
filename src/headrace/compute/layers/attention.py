"""Grouped-query attention over the paged KV pool (Ainslie et al. 2023, arXiv:2305.13245), causal, full or windowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.batch import Batch
from headrace.compute.layers.linear import Linear
from headrace.compute.layers.rms_norm import RMSNorm, per_head
from headrace.compute.layers.rotary import Angles
from headrace.compute.ops import turn_and_write
from headrace.types.kv import GroupKind, KVGroup


class Place(NamedTuple):
    """Where a layer's KV lies: the group, the layer's index in it, and the window (0: all)."""

    group: int
    index: int
    window: int


def windowed_groups(windows: Sequence[int], kv_heads: int, head_dim: int) -> tuple[KVGroup, ...]:
    """KV groups of layers that differ in their window only (tokens; 0: full attention): full first, then by window."""
    return tuple(
        KVGroup(
            kind=GroupKind.WINDOW if window else GroupKind.FULL,
            layers=tuple(i for i, w in enumerate(windows) if w == window),
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window,
        )
        for window in sorted(set(windows))
    )


def places(groups: Sequence[KVGroup]) -> dict[int, Place]:
    """Place of every layer, by the layer's index in the model."""
    return {
        layer: Place(g, index, group.window)
        for g, group in enumerate(groups)
        for index, layer in enumerate(group.layers)
    }


@dataclass(frozen=True, slots=True)
class Attention:
    """Projections with Q, K and V in one matrix; between them and attention, one pass over the heads."""

    qkv: Linear
    """hidden -> (heads + 2 * kv_heads) * dim: all Q heads, then K, then V."""
    out: Linear
    """heads * dim -> hidden."""
    norm: RMSNorm | None
    """On each head of Q and K, before the rotation: weight [heads + kv_heads, dim]."""
    heads: int
    kv_heads: int
    dim: int
    place: Place

    @classmethod
    def load(
        cls,
        weights: Weights,
        prefix: str,
        place: Place,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        dim: int,
        qkv_bias: bool = False,
        out_bias: bool = False,
        norm_eps: float | None = None,
    ) -> "Attention":
        """Take `{prefix}q_proj.weight` and so on. `norm_eps`: of `q_norm` and `k_norm`, which are there if given."""
        norm = None
        if norm_eps is not None:
            query, key = (weights.take(f"{prefix}{name}.weight", dim) for name in ("q_norm", "k_norm"))
            norm = RMSNorm(per_head(query, key, heads, kv_heads), norm_eps)
        rows = [("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim)]
        return cls(
            qkv=Linear.load(weights, prefix, rows, hidden, qkv_bias),
            out=Linear.load(weights, prefix, [("o_proj", hidden)], heads * dim, out_bias),
            norm=norm,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            place=place,
        )

    def __call__(self, x: Tensor, batch: Batch, angles: Angles) -> Tensor:
        """[tokens, hidden] -> the same; writes the tokens' KV into the pool first."""
        group = batch.groups[self.place.group]
        heads = self.qkv(x, batch.threads).view(len(x), -1, self.dim)
        q = turn_and_write(
            heads,
            *angles,
            group.kv,
            self.place.index,
            group.blocks,
            batch.offsets,
            weight=None if self.norm is None else self.norm.weight,
            eps=0.0 if self.norm is None else self.norm.eps,
            threads=batch.threads,
        )
        if batch.distant is not None:
            attended = batch.distant.attend(
                q,
                group.kv,
                self.place.group,
                self.place.index,
                group.tables,
                batch.rows,
                batch.positions,
                scale=self.dim**-0.5,
                threads=batch.threads,
            )
            return self.out(attended, batch.threads)
        attended = batch.plans.attend(
            q,
            group.kv,
            self.place.index,
            group.tables,
            batch.rows,
            batch.positions,
            group=self.place.group,
            scale=self.dim**-0.5,
            window=self.place.window,
            threads=batch.threads,
        )
        return self.out(attended, batch.threads)
