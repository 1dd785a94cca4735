"""Aggressive admission (the rule of vLLM; named so in Past-Future, arXiv 2507.10150, section 2): start whatever fits now.

A sequence starts as soon as the blocks of what is already known of it are free. What running sequences will still generate is not
counted, so under load it overcommits and pays by preemption.
Leaves out: a watermark.
"""

import msgspec

from headrace.engine.policies import FOREVER, AdmissionView, StepView
from headrace.engine.sequence import Sequence


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    def __init__(self, config: Config) -> None:
        pass

    def admit(self, view: AdmissionView, sequence: Sequence) -> bool:
        return all(need <= free for need, free in zip(view.blocks_needed, view.blocks_free, strict=True))

    def horizon(self, view: StepView) -> int:
        # While nothing ends, memory only gets less.
        return FOREVER
