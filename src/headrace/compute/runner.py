"""The executor: runs step plans on a model (implements `ports.Executor`).

Life of a sequence here:
1. `open`: its ids and sampling arrive, long before the first plan that names it; `append` adds tokens drawn elsewhere.
2. A plan's `starts` gives it a row: its ids and block table among those of all running sequences.
3. `work` computes KV and draws tokens; an end-of-text token or the last allowed one finishes it. What later plans,
   made before that was known, still ask of it is discarded.
4. `ends` takes the row away: the sequence is over, or preempted (then back to 2).
5. `close` forgets it.
A sequence that cannot go on (a bad id, logits that are not numbers) fails alone, by `Output.error`. One whose KV lies partly
with a peer that does not answer is lost, by `Output.lost`, until `ends` and `starts` name it again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic_ns

import msgspec

from headrace.compute.layers.decoder import Decoder
from headrace.compute.memory import Memory
from headrace.compute.memory.paged import PagedMemory
from headrace.compute.ops.choice import Logits
from headrace.compute.rows import Rows, Span
from headrace.compute.sampling import Sampler, Token, sample_all
from headrace.ports import Partials
from headrace.types.hashing import block_hash
from headrace.types.ids import BlockHash, SequenceKey, StepId
from headrace.types.kv import KVSpec
from headrace.types.payload import Emission, SequencePayload
from headrace.types.plan import Output, SequenceStart, StepPlan, StepResult, Work
from headrace.types.ranges import RangeCounts


@dataclass(slots=True)
class Resident:
    """One opened sequence."""

    key: SequenceKey
    root: BlockHash
    prompt: int
    """Tokens of the prompt."""
    ids: list[int]
    """Prompt and output."""
    sampler: Sampler | None
    """None: its parameters are wrong, see `error`."""
    error: str = ""
    finished: bool = False
    lost: bool = False
    """A holder of its KV did not answer: nothing comes of it until it starts anew."""
    row: int | None = None
    chain: list[BlockHash] = field(default_factory=list)
    """Hashes of its leading full blocks, as far as they were needed."""
    reported: int = 0
    """Leading blocks whose hash its core knows."""
    version: int = 0
    """Of the weights under which it began."""

    def hashes(self, until: int, block_size: int) -> tuple[BlockHash, ...]:
        """Hashes of the blocks before `until` that its core does not know yet; after this it does."""
        while len(self.chain) < until:
            at = len(self.chain) * block_size
            parent = self.chain[-1] if self.chain else self.root
            self.chain.append(block_hash(parent, self.ids[at : at + block_size]))
        fresh = tuple(self.chain[self.reported : until])
        self.reported = max(self.reported, until)
        return fresh


class Runner:
    """Runs plans, one at a time and in order, on the thread that calls it."""

    def __init__(
        self,
        model: Decoder,
        spec: KVSpec,
        blocks: Sequence[int],
        *,
        eos_token_ids: Sequence[int],
        threads: int,
        buffers: Sequence[memoryview] | None = None,
        memory: Memory | None = None,
        partials: Partials | None = None,
        shared_prefixes: bool = True,
    ):
        """`blocks`: of the pool, per KV group. `buffers`: the pool's memory, see `pool_tensors`.

        `memory`: how attention sees that pool; by default by block tables. `partials`: asks about KV elsewhere.
        `shared_prefixes`: sequences of a step may attend together to what they share; the bits are the same.
        """
        self.model = model
        self._memory = memory or PagedMemory(spec, blocks, buffers)
        self.pool = self._memory.pool
        self._spec = spec
        self._eos_token_ids = tuple(eos_token_ids)
        self._threads = threads
        self._partials = partials
        self._rows = Rows(spec, model.length, shared_prefixes=shared_prefixes)
        self._residents: dict[SequenceKey, Resident] = {}
        self._last = StepId(0)
        self._token_bytes = sum(spec.block_bytes(g) // spec.block_size for g in range(len(spec.groups)))
        self.version = 0
        """Of the model's weights."""

    def open(self, key: SequenceKey, payload: SequencePayload) -> None:
        """Keep the ids and sampling of a sequence until `close`. What is wrong with them fails its first step."""
        ids, sampler, error = list(payload.token_ids), None, self._reason_against(payload.token_ids)
        if not error:
            try:
                sampler = Sampler(
                    payload.sampling,
                    choice=key.choice,
                    vocab=self.model.vocab,
                    eos_token_ids=self._eos_token_ids,
                    prompt=ids[: payload.prompt],
                )
                sampler.append(ids[payload.prompt :])
            except ValueError as wrong:
                error = str(wrong)
        self._residents[key] = Resident(
            key, payload.root, payload.prompt, ids, sampler, error, version=payload.version
        )

    def append(self, emission: Emission) -> None:
        """Add tokens that another instance drew; those already known are skipped.

        Raises ValueError if tokens before them are missing, or the sequence is not open.
        """
        resident = self._resident(emission.key)
        known = len(resident.ids) - resident.prompt
        if emission.first > known:
            raise ValueError(f"{emission.key}: tokens from {emission.first} on, but only {known} are known")
        fresh = emission.token_ids[known - emission.first :]
        resident.error = resident.error or self._reason_against(fresh)
        if resident.sampler is not None and not resident.error:
            resident.sampler.append(fresh)
        resident.ids.extend(fresh)

    def execute(
        self, plan: StepPlan, layers_done: Callable[[int], None] | None = None
    ) -> tuple[StepResult, tuple[Emission, ...]]:
        """Run one step. Raises ValueError if the plan does not follow the last one or contradicts what is known."""
        if plan.base != self._last:
            raise ValueError(f"plan {plan.step} follows {plan.base}, but {self._last} was executed last")
        started_ns = monotonic_ns()
        for key, reason in self._memory.prepare(plan).items():
            resident = self._resident(key)
            resident.error = resident.error or reason
        for key in plan.ends:
            self._end(self._resident(key))
        for start in plan.starts:
            self._start(start)
        for growth in plan.growth:
            if (row := self._resident(growth.key).row) is not None:
                self._rows.extend(row, growth.table)
        for moved in plan.elsewhere:
            if (row := self._resident(moved.key).row) is not None:
                self._rows.move_out(row, moved.holder, moved.table)
        named = [(work, self._resident(work.key)) for work in plan.work]
        runs = [(work, resident, span) for work, resident in named if (span := self._span(work, resident))]
        logits = self._forward(runs, layers_done if plan.layered else None)
        drawn = self._draw([resident for work, resident, _ in runs if work.emits], logits)
        outputs, emissions = [], []
        for work, resident in named:
            output, emission = self._conclude(work, resident, drawn)
            outputs.append(output)
            emissions.extend([emission] if emission else [])
        self._last = plan.step
        result = StepResult(
            step=plan.step, outputs=tuple(outputs), started_ns=started_ns, ended_ns=monotonic_ns()
        )
        return result, tuple(emissions)

    def close(self, key: SequenceKey) -> None:
        """Forget a sequence. Unknown keys are ignored."""
        self._memory.release(key)
        if resident := self._residents.pop(key, None):
            self._end(resident)

    def ahead(self, plan: StepPlan) -> None:
        """The plan will be executed behind those named before. From one other thread; returns at once."""
        self._memory.ahead(plan)

    def counts(self) -> RangeCounts | None:
        """What virtual KV ranges did and hold; None where memory is paged. From any thread."""
        counts = self._memory.counts()
        if counts is None:
            return None
        tokens = sum(len(r.ids) for r in list(self._residents.values()) if r.row is not None)
        return msgspec.structs.replace(counts, used_bytes=tokens * self._token_bytes)

    def renew(self, model: Decoder, version: int) -> None:
        """Other weights of the same model, from the next step on. KV that is there stays."""
        self.model, self.version = model, version

    def _resident(self, key: SequenceKey) -> Resident:
        if key not in self._residents:
            raise ValueError(f"sequence {key} is not open")
        return self._residents[key]

    def _start(self, start: SequenceStart) -> None:
        resident = self._resident(start.key)
        if resident.error:
            return
        if resident.row is not None or start.total != len(resident.ids):
            raise ValueError(
                f"{start.key} starts with {start.total} tokens, but {len(resident.ids)} are known"
                f" and it is {'' if resident.row is None else 'already '}running"
            )
        resident.row = self._rows.acquire(resident.ids, self._memory.row(start.key))
        resident.reported = start.hashed
        self._rows.extend(resident.row, start.table)

    def _end(self, resident: Resident) -> None:
        if resident.row is not None:
            self._rows.release(resident.row)
            resident.row = None
        resident.lost = False

    def _span(self, work: Work, resident: Resident) -> Span | None:
        """What is to be computed; None if the sequence has failed or finished."""
        until, known = work.first + work.count, len(resident.ids)
        if resident.finished or resident.error or resident.lost:
            return None
        if resident.row is None or until > known or (work.emits and until != known):
            raise ValueError(f"{work} contradicts {known} known tokens, row {resident.row}")
        if until > self.model.length:
            resident.error = f"longer than the {self.model.length} tokens that this worker serves"
            return None
        return resident.row, work.first, work.count

    def _forward(
        self, runs: Sequence[tuple[Work, Resident, Span]], layers_done: Callable[[int], None] | None
    ) -> Iterator[Logits]:
        """Logits of the last token of every span that emits, in order."""
        if not runs:
            return iter(())
        spans, emits = [span for _, _, span in runs], [work.emits for work, _, _ in runs]
        batch = self._rows.batch(spans, emits, self.pool, self._threads, self._partials)
        batch = self._memory.view(batch)
        logits = self.model.forward(batch, layers_done).numpy()
        if batch.distant is not None:
            for _, resident, (row, _, _) in runs:
                resident.lost = resident.lost or row in batch.distant.lost
        return iter(logits)

    def _draw(
        self, residents: Sequence[Resident], logits: Iterator[Logits]
    ) -> dict[SequenceKey, Token | FloatingPointError]:
        """The next token of each of these that is not lost."""
        rows = list(zip(residents, logits, strict=True))
        found = [(r.key, r.sampler, row) for r, row in rows if r.sampler is not None and not r.lost]
        tokens = sample_all([s for _, s, _ in found], [row for _, _, row in found], threads=self._threads)
        return {key: token for (key, _, _), token in zip(found, tokens, strict=True)}

    def _conclude(
        self, work: Work, resident: Resident, drawn: Mapping[SequenceKey, Token | FloatingPointError]
    ) -> tuple[Output, Emission | None]:
        if resident.lost:
            return Output(work.key, 0, lost=True), None
        if resident.error:
            return Output(work.key, 0, error=resident.error), None
        if resident.finished:
            return Output(work.key, 0, discarded=True), None
        hashes = resident.hashes((work.first + work.count) // self._spec.block_size, self._spec.block_size)
        if not work.emits:
            return Output(work.key, 0, hashes), None
        token = drawn[work.key]
        assert resident.row is not None
        if isinstance(token, FloatingPointError):
            resident.error = f"the model's output is not a distribution: {token}"
            return Output(work.key, 0, error=resident.error), None
        self._rows.put(resident.row, len(resident.ids), token.id)
        first = len(resident.ids) - resident.prompt
        resident.ids.append(token.id)
        resident.finished = token.finish is not None
        found = () if token.logprobs is None else (token.logprobs,)
        return Output(work.key, 1, hashes, token.finish), Emission(
            work.key, first, (token.id,), found, (resident.version, self.version)
        )

    def _reason_against(self, token_ids: Sequence[int]) -> str:
        """Why a sequence with these ids cannot be served; empty if it can."""
        if len(token_ids) > self.model.length:
            return f"{len(token_ids)} tokens, but this worker serves at most {self.model.length}"
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.model.vocab:
            return f"a token id is outside 0..{self.model.vocab - 1}"
        return ""
