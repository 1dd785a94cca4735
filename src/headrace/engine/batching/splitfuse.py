"""Dynamic SplitFuse (DeepSpeed-FastGen, arXiv 2401.08671, section 3.3).

Every step has the same size: each running decode gives one token, and prompt chunks fill what is left of the budget, long prompts split
over steps and short ones fused. So no decode waits for a whole prompt.
Leaves out: choosing the budget from a throughput curve; it is the instance's `tokens_max`.
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
        work = [(sequence, 1) for sequence in view.decodes[: min(view.tokens_max, view.sequences_max)]]
        budget = view.tokens_max - len(work)
        for sequence in view.prefills[: view.sequences_max - len(work)]:
            if budget <= 0:
                break
            chunk = min(budget, sequence.remaining)
            work.append((sequence, chunk))
            budget -= chunk
        return work

    def horizon(self, view: StepView) -> int:
        return 1 if view.prefills else FOREVER
