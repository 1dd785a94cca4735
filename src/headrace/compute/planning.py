"""A step's attention plans: each is made when the first layer that needs it asks, and used by all layers of that KV group.

A step of decoding most often follows one with the same sequences, each a token shorter: the plan of that one goes on (`plans.advance`).
"""

from torch import Tensor

from headrace.compute.ops import Workspace, planned_attention
from headrace.compute.plans import Limits, Plan, Shape, advance, describe, make_plan

LEVELS = 2
"""Shared prefixes that a token may be part of: a system prompt, and a conversation or document that some have in common."""


class StepPlans:
    """Of one batch. A plan belongs to one group's tables, and one shape of attention over them."""

    def __init__(
        self, workspace: Workspace, last: "LastPlans", threads: int, shared_prefixes: bool = True
    ) -> None:
        """`workspace`: of all steps. `shared_prefixes`: rows with one prefix may attend to it together, where that pays."""
        self._workspace = workspace
        self._limits = Limits(threads, levels=LEVELS if shared_prefixes else 0)
        self._plans: dict[tuple[int, Shape], Plan] = {}
        self._last = last

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        layer: int,
        tables: Tensor,
        rows: Tensor,
        positions: Tensor,
        *,
        group: int,
        scale: float,
        window: int,
        threads: int,
    ) -> Tensor:
        """As `ops.paged_attention`. `group`: of the KV, by which its plan is known."""
        shape = Shape(q.shape[1], kv.shape[3], window)
        plan = self._plans.get((group, shape))
        if plan is None:
            queries, sparse = describe(
                tables.numpy(),
                rows.numpy(),
                positions.numpy(),
                blocks=kv.shape[0],
                block_size=kv.shape[4],
                window=window,
            )
            limits, last = self._last.get((group, shape), (None, None))
            plan = advance(last, queries, sparse) if last is not None and limits == self._limits else None
            plan = plan or make_plan(queries, sparse, shape, self._limits)
            self._plans[group, shape], self._last[group, shape] = plan, (self._limits, plan)
        return planned_attention(
            q, kv, layer, plan, positions, scale=scale, threads=threads, workspace=self._workspace
        )


LastPlans = dict[tuple[int, Shape], tuple[Limits, Plan]]
"""What a step leaves for the next one; empty at first."""
