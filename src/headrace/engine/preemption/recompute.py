"""Preemption by recomputation (vLLM, arXiv 2309.06180, section 4.5): drop the KV of the last in order, compute it again later.

What the victim had published stays in the prefix index until it is evicted, so often only a part is computed again.
Leaves out: swapping (`swap`); weighing how much a victim has to lose.
"""

import msgspec

from headrace.engine.policies import FOREVER, Fate, StepView
from headrace.engine.sequence import Sequence


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    swapping = None

    def __init__(self, config: Config) -> None:
        pass

    def victim(self, needy: Sequence | None, candidates: list[Sequence]) -> Sequence | None:
        return candidates[-1] if candidates else None

    def fate(self, victim: Sequence) -> Fate:
        return Fate.RECOMPUTE

    def horizon(self, view: StepView) -> int:
        return FOREVER
