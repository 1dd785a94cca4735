"""Static priority (as vLLM's `--scheduling-policy priority`): the lower number first, then by arrival.

A running sequence of lower rank is preempted when memory is short, never merely to make room in the batch.
Leaves out: aging; a steady stream of urgent requests starves the rest.
"""

import msgspec

from headrace.engine.policies import FOREVER, Moment, StepView
from headrace.engine.sequence import Sequence
from headrace.types.ids import SequenceKey


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    displaces = False
    reads_served = False

    def __init__(self, config: Config) -> None:
        pass

    def rank(self, sequence: Sequence, moment: Moment) -> tuple[int, int, SequenceKey]:
        return (sequence.priority, sequence.arrival_ns, sequence.key)

    def horizon(self, view: StepView) -> int:
        return FOREVER
