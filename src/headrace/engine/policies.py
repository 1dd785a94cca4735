"""The four axes of an instance's scheduler, as protocols. A policy is pure: it reads sequences, writes none, and keeps no clock."""

import collections.abc
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from headrace.engine.memory import Memory
from headrace.engine.sequence import Sequence

FOREVER = 2**31
"""A horizon without end."""

FINISHED_MAX = 1000
"""Ended sequences whose lengths an admission policy can look at."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When a step is planned."""

    now_ns: int
    steps: int = 0
    """Plans made before it: with a sequence's key it keys a draw."""
    served: collections.abc.Mapping[str, int] = field(default_factory=dict[str, int])
    """Tokens computed so far, by `engine.shares.share_of`; empty unless the ordering reads it."""


@dataclass(slots=True)
class StepView:
    """What the next step may be made of. Lists are in the ordering policy's order."""

    now_ns: int
    decodes: list[Sequence]
    """Running, one token each."""
    prefills: list[Sequence]
    """Running, with more than one token to compute."""
    waiting: list[Sequence]
    tokens_max: int
    """Budget of the step, tokens."""
    sequences_max: int
    """Budget of the step, sequences."""
    moment: Moment = Moment(0)


@dataclass(slots=True)
class AdmissionView:
    running: list[Sequence]
    blocks_free: list[int]
    """Per group: in hand, plus free or evictable in the pool as last heard."""
    blocks_total: tuple[int, ...]
    blocks_needed: list[int]
    """Per group, for what the candidate is known to need now."""
    block_size: int
    receiving: list[Sequence]
    """Blocks are reserved for them, and their KV is on the way."""
    finished: collections.abc.Sequence[int]
    """New tokens of the sequences that ended here, the newest last, at most `FINISHED_MAX`."""
    steps: int
    """Plans made so far: with the sequence's key it keys a draw."""

    @classmethod
    def of(
        cls,
        memory: Memory,
        blocks_needed: list[int],
        running: list[Sequence],
        receiving: list[Sequence],
        finished: collections.abc.Sequence[int],
        steps: int,
    ) -> "AdmissionView":
        return cls(
            running=running,
            blocks_free=[s.total + f for s, f in zip(memory.spare, memory.pool_free, strict=True)],
            blocks_total=memory.blocks_total,
            blocks_needed=blocks_needed,
            block_size=memory.spec.block_size,
            receiving=receiving,
            finished=finished,
            steps=steps,
        )


class Batching(Protocol):
    def plan(self, view: StepView) -> list[tuple[Sequence, int]]:
        """Tokens per sequence of the next step, within the budgets; order is the order of execution."""
        ...

    def horizon(self, view: StepView) -> int: ...


class Admission(Protocol):
    def admit(self, view: AdmissionView, sequence: Sequence) -> bool:
        """May this sequence start now?"""
        ...

    def horizon(self, view: StepView) -> int: ...


class Ordering(Protocol):
    @property
    def displaces(self) -> bool:
        """Does a sequence that waits, and cannot start otherwise, take the place of one that runs and ranks behind it?"""
        ...

    @property
    def reads_served(self) -> bool:
        """Are served tokens to be counted?"""
        ...

    def rank(self, sequence: Sequence, moment: Moment) -> tuple[Any, ...]:
        """The lowest is looked at first. Must be unique to the sequence."""
        ...

    def horizon(self, view: StepView) -> int: ...


class Fate(Enum):
    """What becomes of a victim's KV."""

    RECOMPUTE = "recompute"
    SWAP = "swap"
    """To host memory, if there is room."""


@dataclass(frozen=True, slots=True)
class SwapRules:
    """How KV is swapped (`nodes.swapping`)."""

    group_blocks: int
    """Host blocks of a sequence are allocated by so many, and copied run by run; 0: block by block."""
    background: bool
    """Copies run beside steps; False: no step is planned while one is under way."""
    reuse: bool
    """What the host holds stays valid when its sequence runs again, and is not copied a second time."""


class Preemption(Protocol):
    @property
    def swapping(self) -> SwapRules | None:
        """None: its victims are always recomputed."""
        ...

    def fate(self, victim: Sequence) -> Fate:
        """Asked when the last plan that names the victim has run."""
        ...

    def victim(self, needy: Sequence | None, candidates: list[Sequence]) -> Sequence | None:
        """Whom to stop so that `needy` (None: another instance) can go on. Candidates are in order, best first, and rank after `needy`."""
        ...

    def horizon(self, view: StepView) -> int: ...


@dataclass(frozen=True, slots=True)
class EnginePolicies:
    batching: Batching
    admission: Admission
    ordering: Ordering
    preemption: Preemption

    def horizon(self, view: StepView) -> int:
        """For how many unchanged steps none of them need be asked."""
        return min(
            self.batching.horizon(view),
            self.admission.horizon(view),
            self.ordering.horizon(view),
            self.preemption.horizon(view),
        )
