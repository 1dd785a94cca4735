"""Batch shapes to measure, and the step plans that have them."""

from collections.abc import Iterator

import msgspec

from headrace.types.hashing import chain_root
from headrace.types.ids import RequestId, SequenceKey, StepId
from headrace.types.kv import KVSpec, TableRun
from headrace.types.payload import SamplingParams, SequencePayload
from headrace.types.plan import SequenceStart, StepPlan, Work
from headrace.types.profile import StepSample

DECODES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 128, 512, 2048, 8192, 32768)
CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048)
TOKENS_MAX = 32768
"""KV of one shape at most."""
MARGIN = 32
"""Tokens that a measured sequence grows by at most."""
ROOT = chain_root("profile")


class Shape(msgspec.Struct, frozen=True):
    """What is in a step: chunks as (tokens, context before them), and `decodes` rows with `context` tokens before each."""

    prefills: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    context: int = 0

    def blocks(self, block_size: int) -> int:
        """That its KV takes, room to grow included."""
        chunks = sum(-(-(count + before) // block_size) for count, before in self.prefills)
        return chunks + self.decodes * -(-(self.context + MARGIN) // block_size)

    def sample(self, seconds: tuple[float, ...]) -> StepSample:
        return StepSample(self.prefills, self.decodes, self.decodes * self.context, seconds)


class Limits(msgspec.Struct, frozen=True):
    """Of what is profiled."""

    tokens: int
    """Of a step."""
    sequences: int
    length: int
    """Of a sequence, tokens."""
    blocks: int
    """KV that the memory has room for."""
    block_size: int

    def allow(self, shape: Shape) -> bool:
        return (
            sum(count for count, _ in shape.prefills) + shape.decodes <= self.tokens
            and len(shape.prefills) + shape.decodes <= self.sequences
            and max((count + before for count, before in shape.prefills), default=0) <= self.length
            and (not shape.decodes or shape.context + MARGIN <= self.length)
            and shape.blocks(self.block_size) <= min(self.blocks, TOKENS_MAX // self.block_size)
        )


def grid(limits: Limits, quick: bool) -> list[Shape]:
    """All shapes within the limits, without repeats; the smallest first."""
    chunks = sorted({*(c for c in CHUNKS if c <= limits.tokens), min(limits.tokens, limits.length)})
    deepest = limits.length - MARGIN
    contexts = sorted({*(c for c in CONTEXTS if c < deepest), deepest}) if deepest > 0 else []
    decodes = DECODES
    if quick:
        chunks, contexts, decodes = chunks[::-2][::-1], contexts[::-2][::-1], DECODES[::2]
    shapes = [Shape(decodes=rows, context=context) for rows in decodes for context in contexts]
    shapes += [Shape(((count, before),)) for count in chunks for before in (0, *contexts)]
    shapes += [Shape(((count, 0),) * 4) for count in chunks]
    beside = contexts[:: max(1, len(contexts) - 1)]
    # Rows come first: a chunk that would fill the step alone gets what they leave.
    shapes += [
        Shape(((min(count, limits.tokens - rows), before),), rows, context)
        for count in chunks[::2]
        for rows in decodes[::2]
        if rows < limits.tokens
        for before, context in zip((0, *beside), beside, strict=False)
    ]
    return [shape for shape in dict.fromkeys(shapes) if limits.allow(shape)]


def pair_shapes(limits: Limits) -> dict[str, Shape]:
    """A usual step of each kind."""
    count = max(1, min(256, limits.tokens, limits.length))
    rows = min(8, limits.tokens, limits.sequences)
    return {
        "prefill": Shape(((count, 0),)),
        "decode": Shape(decodes=rows, context=max(1, min(128, limits.length - MARGIN))),
    }


class Stage:
    """One shape as plans. Chunks begin anew in every plan; decode rows grow by a token each, around the shape's context.

    KV is not computed beforehand: what lies in the pool is as good, as no kernel is faster or slower for it.
    """

    def __init__(self, shape: Shape, spec: KVSpec, vocabulary: int, serial: int, repeats: int) -> None:
        """`serial`: a number that no earlier sequence of this executor has; `repeats`: plans to come."""
        self._shape = shape
        self._spec = spec
        self._vocabulary = vocabulary
        self._serial = serial
        self._block = 0
        self._first = max(1, shape.context - repeats // 2)
        self._rows = [self._key() for _ in range(shape.decodes)]
        self._chunks: list[SequenceKey] = []
        self._made = 0
        self._row_tables = [self._table(self._first + repeats + 2) for _ in self._rows]
        self._chunk_tables = [self._table(count + before) for count, before in shape.prefills]

    @property
    def serial(self) -> int:
        """The first number that no sequence has."""
        return self._serial

    def opened(self) -> Iterator[tuple[SequenceKey, SequencePayload]]:
        """Sequences that the next plan names for the first time; called once before each."""
        if not self._made:
            for key in self._rows:
                yield key, self._payload(self._first + 1)
        self._chunks = [self._key() for _ in self._shape.prefills]
        for key, (count, before) in zip(self._chunks, self._shape.prefills, strict=True):
            yield key, self._payload(count + before)

    def plan(self, base: StepId) -> StepPlan:
        starts: list[SequenceStart] = []
        work: list[Work] = []
        for key, table in zip(self._rows, self._row_tables, strict=True):
            if not self._made:
                starts.append(self._start(key, self._first + 1, self._first, table))
            work.append(Work(key, self._first + self._made, 1, True))
        for key, (count, before), table in zip(
            self._chunks, self._shape.prefills, self._chunk_tables, strict=True
        ):
            starts.append(self._start(key, count + before, before, table))
            work.append(Work(key, before, count, True))
        self._made += 1
        return StepPlan(StepId(base + 1), base, (), tuple(starts), (), tuple(work))

    def closed(self, *, last: bool) -> list[SequenceKey]:
        """Sequences that the plan just made was the last to name."""
        return [*self._chunks, *self._rows] if last else self._chunks

    def _key(self) -> SequenceKey:
        self._serial += 1
        return SequenceKey(RequestId(self._serial - 1))

    def _payload(self, total: int) -> SequencePayload:
        ids = [(7919 * self._serial + 31 * i) % self._vocabulary for i in range(total)]
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, tokens_max=2**30)
        return SequencePayload(ROOT, ids, total, sampling)

    def _start(
        self, key: SequenceKey, total: int, computed: int, table: tuple[TableRun, ...]
    ) -> SequenceStart:
        return SequenceStart(key, total, computed, self._spec.blocks_for(total), table)

    def _table(self, tokens: int) -> tuple[TableRun, ...]:
        blocks, first = self._spec.blocks_for(tokens), self._block
        self._block += blocks
        return tuple(TableRun(group, 0, first, blocks) for group in range(len(self._spec.groups)))
