"""First come, first served, by arrival at the service (not at this instance: a failover keeps its place).

Leaves out: everything else; it is the baseline of the axis.
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

    def rank(self, sequence: Sequence, moment: Moment) -> tuple[int, SequenceKey]:
        return (sequence.arrival_ns, sequence.key)

    def horizon(self, view: StepView) -> int:
        return FOREVER
