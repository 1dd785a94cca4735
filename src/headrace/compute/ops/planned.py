"""Attention by a step's plan: the work of `plans.Plan`, one layer at a time.

The bits of a row are those of `paged_attention`, and of every other plan: its partitions' states, merged left to right. Rows that share a
prefix attend to it as one tile where the plan says so. On other backends than the native one, it is the plan's plain-torch reference.
"""

import torch
from torch import Tensor

from headrace.compute.ops import reference
from headrace.compute.ops.attention import check_pool, check_rows, place_of
from headrace.compute.ops.backend import isa_of, native
from headrace.compute.ops.partial import TAIL
from headrace.compute.ops.variants import VARIANTS, Standard
from headrace.compute.plans import Plan

STANDARD = Standard()


class Workspace:
    """Memory for the partial states of one call after the other; it grows to what the largest plan needs, and is kept."""

    def __init__(self) -> None:
        self._floats = torch.empty(0)

    def states(self, count: int) -> Tensor:
        """At least `count` floats, of any value."""
        if len(self._floats) < count:
            self._floats = torch.empty(count)
        return self._floats


def planned_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    plan: Plan,
    positions: Tensor,
    *,
    scale: float,
    threads: int,
    variant: Standard = STANDARD,
    workspace: Workspace | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend each query token to the keys of its sequence up to and including its own position, as the plan says.

    Args:
        q, kv, layer, scale, threads, backend: as for `paged_attention`.
        plan: of this batch, and described for this pool.
        positions: int32 [tokens], contiguous: absolute position of each query token.
        variant: one of `variants.VARIANTS`.
        workspace: for partial states; None: memory of this call alone.

    Returns:
        [tokens, heads * dim] in q's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other, the plan or the variant.
    """
    tokens, heads, dim = q.shape
    blocks, _, _, kv_heads, block_size, _ = kv.shape
    check_pool(kv, layer, q.dtype, dim)
    check_rows("q", q)
    _check_plan(plan, tokens, heads, kv_heads, blocks, block_size, positions)
    if type(variant) not in VARIANTS:
        raise ValueError(f"{variant!r} is no known variant of attention")
    variant.check(tokens, heads, plan.keys)
    states = (workspace or Workspace()).states(plan.states * heads * (dim + TAIL))
    isa = isa_of(backend, q.dtype)
    fits = isa is not None and not dim % 16 and not block_size % 16 and dim <= native.DIM_MAX
    if not fits and backend not in (None, "torch"):
        raise ValueError(f"the native kernels have no dim {dim} with blocks of {block_size}")
    if not fits:
        return reference.planned_attention(q, kv, layer, plan, positions, scale, variant)
    if plan.tile_vectors > native.VECTORS:
        raise ValueError(f"the native kernels take tiles of at most {native.VECTORS} query vectors")
    out = torch.empty(tokens, heads * dim, dtype=q.dtype)
    native.planned_attention(
        isa,
        VARIANTS.index(type(variant)),
        q.dtype == torch.bfloat16,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        *place_of(kv, layer, 1),
        positions.data_ptr(),
        block_size,
        kv_heads,
        heads // kv_heads,
        dim,
        plan.shape.window,
        scale,
        *variant.extra(),
        plan.addresses,
        [tokens, len(plan.tile_begin), len(plan.item_tile), len(plan.units), plan.head_span],
        states.data_ptr(),
        threads,
    )
    return out


def _check_plan(
    plan: Plan, tokens: int, heads: int, kv_heads: int, blocks: int, block_size: int, positions: Tensor
) -> None:
    if (plan.tokens, plan.shape.heads, plan.shape.kv_heads) != (tokens, heads, kv_heads):
        raise ValueError(
            f"a plan of {plan.tokens} tokens, {plan.shape.heads} heads over {plan.shape.kv_heads} for a batch of "
            f"{tokens}, {heads} over {kv_heads}"
        )
    if plan.sparse.block_size != block_size:
        raise ValueError(
            f"a plan for blocks of {plan.sparse.block_size} for a pool with blocks of {block_size}"
        )
    if plan.sparse.blocks > blocks:
        raise ValueError(f"a plan for a pool of {plan.sparse.blocks} blocks for one of {blocks}")
    if positions.dtype != torch.int32 or positions.shape != (tokens,) or not positions.is_contiguous():
        raise ValueError(f"positions must be contiguous int32 [{tokens}], not {positions.dtype}")
