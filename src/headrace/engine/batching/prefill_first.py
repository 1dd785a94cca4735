"""Prefill first (the rule of Orca-style engines, and of vLLM before chunked prefill).

While any prompt waits for compute, a step holds prompts only.

Time to first token is lowest and running decodes stall for it. A prompt longer than the budget is split.
Leaves out: a limit on how long decodes may stall.
"""

import msgspec

from headrace.engine.policies import FOREVER, StepView
from headrace.engine.sequence import Sequence


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    def __init__(self, config: Config) -> None:
        pass

    def plan(self, view: StepView) -> list[tuple[Sequence, int]]:
        if not view.prefills:
            return [(sequence, 1) for sequence in view.decodes[: min(view.tokens_max, view.sequences_max)]]
        work: list[tuple[Sequence, int]] = []
        budget = view.tokens_max
        for sequence in view.prefills[: view.sequences_max]:
            chunk = min(budget, sequence.remaining)
            if chunk <= 0:
                break
            work.append((sequence, chunk))
            budget -= chunk
        return work

    def horizon(self, view: StepView) -> int:
        return 1 if view.prefills else FOREVER
