"""Preemption by swapping (FastSwitch, arXiv 2411.18424): the last in order leaves, its KV goes to host memory and comes back later.

Three parts, each of which can be switched off: block groups (one copy for a run of blocks, and room for a sequence's next blocks kept
behind its run; `groups`), copies beside steps (`background`), and copies that stay valid when their sequence runs again, so that only what
is new is copied at its next preemption (`reuse`). All three off is the paper's baseline, vLLM's swapping. See `nodes.swapping`.
Where host memory is full the victim is recomputed.
Leaves out: the paper's reuse from one turn of a conversation to the next (a turn is a request; its prefix is the pool's cache); its choice
between waiting for copies and going on, by recent counts: here only what needs a block waits for it, so a step waits if nothing else runs.
"""

from typing import Annotated

import msgspec

from headrace.engine.policies import FOREVER, Fate, StepView, SwapRules
from headrace.engine.sequence import Sequence


class Config(msgspec.Struct, frozen=True):
    groups: bool = True
    group_blocks: Annotated[int, msgspec.Meta(ge=1)] = 60
    """Blocks of a group. The paper's figure could not be verified."""
    background: bool = True
    reuse: bool = True
    tokens_min: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Sequences with less KV than this, in tokens, are recomputed."""


class Policy:
    def __init__(self, config: Config) -> None:
        group_blocks = config.group_blocks if config.groups else 0
        self.swapping = SwapRules(group_blocks, config.background, config.reuse)
        self._tokens_min = config.tokens_min

    def victim(self, needy: Sequence | None, candidates: list[Sequence]) -> Sequence | None:
        return candidates[-1] if candidates else None

    def fate(self, victim: Sequence) -> Fate:
        return Fate.SWAP if victim.computed >= self._tokens_min else Fate.RECOMPUTE

    def horizon(self, view: StepView) -> int:
        return FOREVER
