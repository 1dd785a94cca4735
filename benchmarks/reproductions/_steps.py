"""The discrete simulation that Past-Future was published with, around this package's own admission policies.

One step gives every running sequence a token, whatever is in it; prompts cost nothing, and a sequence that is put out keeps what it has
generated. All requests are there from the begin. It tells memory policies apart by counts alone: steps, evictions, memory in use.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from headrace.engine.policies import AdmissionView
from headrace.engine.sequence import Sequence, Status, sequence_from
from headrace.types.draws import uniform
from headrace.types.ids import RequestId, SequenceKey
from headrace.types.messages import Role, Start
from headrace.types.request import NEVER_NS

LIMIT = 4096
"""New tokens at most, of every request."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output, each uniform between two bounds."""

    name: str
    prompt: tuple[int, int]
    output: tuple[int, int]

    def draw(self, seed: int, count: int) -> list[tuple[int, int]]:
        return [
            (
                _between(self.prompt, uniform(seed, "prompt", i)),
                _between(self.output, uniform(seed, "output", i)),
            )
            for i in range(count)
        ]


DISTRIBUTIONS = (
    Lengths("decode-heavy", (32, 4096), (2048, 4096)),
    Lengths("balanced", (3000, 5000), (3000, 5000)),
    Lengths("prefill-heavy", (2048, 4096), (32, 4096)),
)


@dataclass(slots=True)
class Counts:
    steps: int = 0
    evictions: int = 0
    used: float = 0.0
    """Mean share of memory in use."""


class Steps:
    """One run."""

    def __init__(
        self,
        policy: Any,
        requests: list[tuple[int, int]],
        tokens: int,
        block_size: int,
        limit: int,
        ended: list[int],
    ) -> None:
        self.counts = Counts()
        self._policy = policy
        self._output = {RequestId(i): output for i, (_, output) in enumerate(requests)}
        self._waiting = deque(_sequence(i, prompt, limit) for i, (prompt, _) in enumerate(requests))
        self._running: list[Sequence] = []
        self._blocks = tokens // block_size
        self._free = self._blocks
        self._size = block_size
        self._finished: deque[int] = deque(ended, maxlen=1000)

    def run(self) -> Counts:
        used = 0
        while self._waiting or self._running:
            self._admit()
            self._make_room()
            self._step()
            used += self._blocks - self._free
        self.counts.used = used / self.counts.steps / self._blocks
        return self.counts

    def _admit(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            need = -(-first.total // self._size)
            view = AdmissionView(
                running=self._running,
                blocks_free=[self._free],
                blocks_total=(self._blocks,),
                blocks_needed=[need],
                block_size=self._size,
                receiving=[],
                finished=self._finished,
                steps=self.counts.steps,
            )
            if need > self._free or not self._policy.admit(view, first):
                return
            self._waiting.popleft()
            self._grow(first, need)
            first.status = Status.RUNNING
            self._running.append(first)

    def _make_room(self) -> None:
        """Put out the newest until every other one can have its next token."""
        while sum(s.total + 1 > len(s.tables[0]) * self._size for s in self._running) > self._free:
            newest = self._running.pop()
            self._release(newest)
            newest.status = Status.WAITING
            self._waiting.appendleft(newest)
            self.counts.evictions += 1

    def _step(self) -> None:
        self.counts.steps += 1
        for sequence in list(self._running):
            sequence.total += 1
            sequence.emitted += 1
            if sequence.total > len(sequence.tables[0]) * self._size:
                self._grow(sequence, 1)
            if sequence.emitted == self._output[sequence.key.request]:
                self._running.remove(sequence)
                self._release(sequence)
                self._finished.append(sequence.emitted)

    def _grow(self, sequence: Sequence, blocks: int) -> None:
        self._free -= blocks
        sequence.tables[0] += [0] * blocks

    def _release(self, sequence: Sequence) -> None:
        self._free += len(sequence.tables[0])
        sequence.tables[0] = []


def _sequence(number: int, prompt: int, limit: int) -> Sequence:
    start = Start(
        key=SequenceKey(RequestId(number)),
        role=Role.WHOLE,
        total=prompt,
        history=0,
        emits_max=limit,
        hashes=(),
        arrival_ns=number,
        deadline_ns=NEVER_NS,
    )
    return sequence_from(start, 1)


def _between(bounds: tuple[int, int], u: float) -> int:
    return bounds[0] + int(u * (bounds[1] - bounds[0] + 1))
