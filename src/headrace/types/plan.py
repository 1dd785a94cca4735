"""One step of an instance as data: what to run (`StepPlan`) and what came of it (`StepResult`)."""

import msgspec

from headrace.types.ids import Address, BlockHash, SequenceKey, StepId
from headrace.types.kv import TableRun
from headrace.types.request import FinishReason


class SequenceStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that this and later plans name for the first time (or again, after preemption)."""

    key: SequenceKey
    total: int
    """Tokens known: prompt, history and what was emitted here."""
    computed: int
    """Leading tokens whose KV is already valid in the table: a prefix hit, or received."""
    hashed: int
    """Leading blocks whose hash the core knows; `Output.hashes` goes on from there."""
    table: tuple[TableRun, ...]


class Growth(msgspec.Struct, frozen=True, array_like=True):
    """Blocks appended to a known sequence's table."""

    key: SequenceKey
    table: tuple[TableRun, ...]


class Elsewhere(msgspec.Struct, frozen=True, array_like=True):
    """From now on these blocks of a known sequence are a peer's, and read there: whole partitions, before all that are here."""

    key: SequenceKey
    holder: Address
    table: tuple[TableRun, ...]
    """Block ids of the holder's pool."""


class Work(msgspec.Struct, frozen=True, array_like=True):
    """Compute KV for `count` tokens of a sequence from position `first`; with `emits`, draw the token that follows."""

    key: SequenceKey
    first: int
    count: int
    emits: bool


class StepPlan(msgspec.Struct, frozen=True):
    """A step, as a difference to the plan `base`: an executor that did not run `base` last must refuse it.

    Executors apply `ends`, then `starts` and `growth`, then run `work` in order. A sequence that finished in an earlier plan than its core
    knew is skipped: its `Output` says `emitted=0, discarded=True`.
    """

    step: StepId
    base: StepId
    """The plan issued before this one; 0 before the first."""
    ends: tuple[SequenceKey, ...]
    """Preempted: their tables are dropped, their ids are kept until `Executor.close`."""
    starts: tuple[SequenceStart, ...]
    growth: tuple[Growth, ...]
    work: tuple[Work, ...]
    layered: bool = False
    """The core wants to hear `LayersDone` while it runs."""
    elsewhere: tuple[Elsewhere, ...] = ()
    """Applied before `work`."""
    repeat_max: int = 1
    """How often it may run unchanged, each run one token further (see `engine.repeats`). A plan that may repeat carries no tables."""


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one `Work` came to."""

    key: SequenceKey
    emitted: int
    """Tokens drawn: 0 or 1 a run (more with speculation)."""
    hashes: tuple[BlockHash, ...] = ()
    """Of blocks whose KV this step completed and whose hash the core did not know."""
    finish: FinishReason | None = None
    discarded: bool = False
    error: str = ""
    """Not empty: this sequence failed (others did not)."""
    lost: bool = False
    """A holder of its KV did not answer: nothing came of this, and nothing will until it starts over."""


class StepResult(msgspec.Struct, frozen=True):
    """What one step came to; `outputs` in the order of the plan's `work`."""

    step: StepId
    outputs: tuple[Output, ...]
    started_ns: int = 0
    ended_ns: int = 0
    repeats: int = 1
    """Runs of the plan that this result tells of; each output counts the tokens of all of them."""
    each: int = 0
    """Not 0: every row that `outputs` does not name drew so many tokens, not its first ones, and there is nothing else to tell of it."""
    left: int = 0
    """Runs of the plan that are still to come, each with a result of its own or together."""
