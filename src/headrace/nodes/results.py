"""What steps have come to: KV computed, blocks to publish and to send, tokens to tell the router of, and sequences that end."""

from collections.abc import Callable, Iterable

from headrace.engine.sequence import Sequence
from headrace.nodes.leaving import Leaving
from headrace.nodes.parts import Parts
from headrace.types.messages import Prefilled, Role, TokenRun, Tokens
from headrace.types.plan import Output, StepResult, Work
from headrace.types.request import FinishReason


class Results:
    """`hold` takes a sequence whose prompt is computed and that is to be decoded elsewhere; `ended` hears of those that are finished."""

    def __init__(
        self,
        parts: Parts,
        leaving: Leaving,
        hold: Callable[[Sequence, int], None],
        ended: Callable[[Sequence], None],
    ) -> None:
        self._parts = parts
        self._leaving = leaving
        self._hold = hold
        self._ended = ended
        self._size = parts.spec.block_size
        self._interval = parts.config.stream_interval
        self._windows = any(g.window for g in parts.spec.groups)

    def take(self, result: StepResult, now_ns: int) -> None:
        issued = self._parts.scheduler.retire(result)
        repeats = result.repeats
        if not repeats:
            return
        runs: list[TokenRun] = []
        works: Iterable[tuple[Work, Sequence]] = zip(issued.plan.work, issued.rows, strict=True)
        if result.each and not result.outputs:
            self._advance(issued.rows, result.each, runs)
            works = ()
        elif result.each:
            named = {output.key for output in result.outputs}
            self._advance([s for s in issued.rows if s.key not in named], result.each, runs)
            works = [(work, sequence) for work, sequence in works if work.key in named]
        before = issued.repeats - repeats
        for (work, sequence), output in zip(works, result.outputs, strict=True):
            sequence.pending -= repeats * work.emits
            if sequence.ends or output.discarded:
                continue
            if output.lost:
                # Others may have what it lacks, or the same holder next time: it starts over.
                self._parts.scheduler.stop(sequence, ends=False)
                continue
            if output.error:
                self._leaving.fail(sequence, output.error, now_ns, retry=False)
                continue
            run = self._progress(sequence, work.first + work.count * (before + repeats), output, now_ns)
            if run is not None:
                runs.append(run)
        if runs:
            self._parts.send(self._parts.router, Tokens(tuple(runs)))

    def _advance(self, rows: list[Sequence], tokens: int, runs: list[TokenRun]) -> None:
        """These have drawn so many tokens after their first one, none has ended, and no block's hash has become known."""
        interval = self._interval
        for sequence in rows:
            sequence.pending -= tokens
            if sequence.ends:
                continue
            sequence.computed += tokens
            sequence.emitted += tokens
            sequence.total += tokens
            if self._windows:
                self.publish(sequence)
            if sequence.emitted - sequence.told >= interval and (run := self.told(sequence)) is not None:
                runs.append(run)

    def _progress(self, sequence: Sequence, computed: int, output: Output, now_ns: int) -> TokenRun | None:
        """Take in one output: KV, blocks to publish and to send, tokens, and what follows from them."""
        sequence.computed = computed
        sequence.hashes.extend(output.hashes)
        self.publish(sequence)
        if not output.emitted:
            self._parts.sending.advance(sequence)
            return None
        if sequence.emitted == 0:
            self._parts.send(self._parts.router, Prefilled(sequence.key, now_ns))
        sequence.emitted += output.emitted
        sequence.total += output.emitted
        finish = output.finish
        if finish is None and sequence.emitted >= sequence.emits_max:
            finish = FinishReason.LENGTH
        if finish is not None:
            self._parts.scheduler.finished.append(sequence.history + sequence.emitted)
            self._ended(sequence)
            self._leaving.drop(sequence, now_ns)
        elif sequence.role is Role.PREFILL:
            self._parts.scheduler.hold(sequence)
            self._hold(sequence, now_ns)
        if finish is None and sequence.role is not Role.PREFILL:
            return self.told(sequence)
        return self.told(sequence, finish, everything=True)

    def told(
        self, sequence: Sequence, finish: FinishReason | None = None, *, everything: bool = False
    ) -> TokenRun | None:
        """What the router is told now: the first token at once, then whole intervals, and at the end the rest."""
        told, interval = sequence.told, self._interval
        count = sequence.emitted - told
        if not everything and told and interval > 1:
            count -= (sequence.emitted - 1) % interval
        if count <= 0 and finish is None:
            return None
        sequence.told = told + count
        # No hash of a block that holds tokens which are not told yet.
        blocks = (sequence.total - sequence.emitted + sequence.told) // self._size
        hashes = tuple(sequence.hashes[sequence.told_hashes : blocks])
        sequence.told_hashes += len(hashes)
        recomputed = sequence.recomputed if finish is not None else 0
        return TokenRun(sequence.key, sequence.history + told, count, finish, hashes, recomputed)

    def flush(self, sequence: Sequence) -> None:
        """Tell the router all that was drawn and is not told yet."""
        run = self.told(sequence, everything=True)
        if run is not None:
            self._parts.send(self._parts.router, Tokens((run,)))

    def publish(self, sequence: Sequence) -> None:
        message = self._parts.memory.publish(sequence)
        if message is not None:
            self._parts.send(self._parts.pool, message)
        if self._windows:
            before = sum(sequence.trimmed)
            for trim in self._parts.memory.trim(sequence, sequence.computed):
                self._parts.send(self._parts.pool, trim)
            self._parts.scheduler.changed |= sum(sequence.trimmed) != before
