"""Conservative admission (the rule of TGI; named so in Past-Future, arXiv 2507.10150, section 2): start only what can never run short.

A sequence starts if it and all that run or are being received would still fit if each of them generated as much as it may. Each counts by
its own limit, rounded up to blocks, per group of KV. So nothing is ever preempted by what was admitted here, and memory stands half empty
wherever outputs are shorter than their limits. Free is what the pool has free or evictable; what others hold does not count.
Leaves out: sliding windows, which may give back more than is counted here: a group in which one has passed is judged by what fits now.
"""

import msgspec

from headrace.engine.policies import FOREVER, AdmissionView, StepView
from headrace.engine.sequence import Sequence, Status


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    def __init__(self, config: Config) -> None:
        pass

    def admit(self, view: AdmissionView, sequence: Sequence) -> bool:
        if any(need > free for need, free in zip(view.blocks_needed, view.blocks_free, strict=True)):
            return False
        others = [*view.running, *view.receiving]
        # Alone it may always start: whether it fits at all was asked when it came.
        return not others or all(
            _growth([*others, sequence], group, view.block_size) <= free
            for group, free in enumerate(view.blocks_free)
        )

    def horizon(self, view: StepView) -> int:
        # While nothing ends, what may still be asked for and what is free get less by the same, and what fits now only gets less.
        return FOREVER


def _growth(sequences: list[Sequence], group: int, block_size: int) -> int:
    """Blocks of one group that they may still come to ask for. What they hold already, shared or not, is not free and not asked for."""
    if any(s.trimmed[group] for s in sequences):
        return 0
    return sum(max(0, -(-_longest(s) // block_size) - _held(s, group, block_size)) for s in sequences)


def _held(sequence: Sequence, group: int, block_size: int) -> int:
    if sequence.status is Status.RECEIVING and not sequence.tables[group]:
        # Prefilled in the same pool: it will be handed blocks that are taken already.
        return -(-sequence.total // block_size)
    return len(sequence.tables[group])


def _longest(sequence: Sequence) -> int:
    """Tokens of KV at most. The last token that is drawn needs none."""
    return sequence.total - sequence.emitted + sequence.emit_limit - 1
