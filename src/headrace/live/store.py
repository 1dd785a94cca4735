"""The payload store: token ids and chunks of every unfinished request. The truth from which a failover resumes.

Ids drawn wait here, by attempt, until the router says that they are next; then they are history, and a chunk for the client. A client that
does not read holds no more than its own tokens.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from headrace.types.errors import HeadraceError, Overloaded, RequestFailed
from headrace.types.events import Deliver, Reject
from headrace.types.ids import BlockHash, RequestId
from headrace.types.messages import Start
from headrace.types.payload import Chunk, Emission, SequencePayload, Submission


@dataclass(slots=True)
class Choice:
    """What is known of one continuation."""

    sent: list[int] = field(default_factory=list[int])
    """Ids delivered to the client, in order."""
    attempt: int = 0
    drawn: dict[int, Emission] = field(default_factory=dict[int, Emission])
    """Of this attempt, not yet delivered, by first index."""


class Stream:
    """One request on its way to its client."""

    def __init__(self, submission: Submission) -> None:
        self.payload = submission.payload
        self.salt = submission.salt
        self.choices = {i: Choice() for i in range(submission.request.choices)}
        """Those that are unfinished."""
        self._chunks: deque[Chunk] = deque()
        self._error: HeadraceError | None = None
        self._news = asyncio.Event()

    def put(self, chunk: Chunk) -> None:
        if chunk.finish is not None:
            del self.choices[chunk.choice]
        self._chunks.append(chunk)
        self._news.set()

    def withdraw(self, choice: int) -> None:
        """It ends without a further chunk, be it one that waits to be read."""
        self.choices.pop(choice, None)
        self._chunks = deque(chunk for chunk in self._chunks if chunk.choice != choice)
        self._news.set()

    def fail(self, error: HeadraceError) -> None:
        """Raised to the client behind the chunks that are there."""
        self.choices.clear()
        self._error = error
        self._news.set()

    async def read(self) -> AsyncIterator[Chunk]:
        """Raises Overloaded or RequestFailed."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._error is not None:
                raise self._error
            if not self.choices:
                return
            self._news.clear()
            await self._news.wait()


class Store:
    """All streams. `empty` is set while there is none. `root`: of hash chains with this cache salt, under the weights of now."""

    def __init__(self, root: Callable[[str], BlockHash]) -> None:
        self._root = root
        self.empty = asyncio.Event()
        self.empty.set()
        self._streams: dict[RequestId, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, submission: Submission) -> Stream:
        assert submission.request.id not in self._streams, (
            f"request {submission.request.id} is submitted twice"
        )
        stream = self._streams[submission.request.id] = Stream(submission)
        self.empty.clear()
        return stream

    def close(self, request: RequestId) -> None:
        del self._streams[request]
        if not self._streams:
            self.empty.set()

    def payload_for(self, start: Start) -> SequencePayload | None:
        """Prompt and history of the attempt that begins; None if the client has left meanwhile."""
        choice, stream = self._choice(start.key.request, start.key.choice)
        if choice is None or stream is None:
            return None
        if start.key.attempt != choice.attempt:
            choice.attempt = start.key.attempt
            choice.drawn.clear()
        if start.version > stream.payload.version:
            stream.payload = replace(stream.payload, root=self._root(stream.salt), version=start.version)
        payload = stream.payload
        assert start.history <= len(choice.sent)
        token_ids = payload.token_ids + choice.sent[: start.history]
        return replace(payload, token_ids=token_ids)

    def drawn(self, emissions: tuple[Emission, ...]) -> None:
        """Ids that a worker says it has drawn."""
        for emission in emissions:
            choice, _ = self._choice(emission.key.request, emission.key.choice)
            if choice is not None and choice.attempt == emission.key.attempt:
                choice.drawn[emission.first] = emission

    def deliver(self, command: Deliver) -> Chunk | None:
        """What the client was handed; None if it has left meanwhile."""
        choice, stream = self._choice(command.request, command.choice)
        if choice is None or stream is None:
            return None
        emission = choice.drawn.pop(command.first)
        assert len(emission.token_ids) == command.count and command.first == len(choice.sent)
        choice.sent += emission.token_ids
        chunk = Chunk(
            choice=command.choice,
            first=command.first,
            token_ids=emission.token_ids,
            logprobs=emission.logprobs,
            finish=command.finish,
            timeline=command.timeline,
            weights=emission.weights,
        )
        stream.put(chunk)
        return chunk

    def withdraw(self, request: RequestId, choice: int) -> None:
        """It needs no more tokens."""
        stream = self._streams.get(request)
        if stream is not None:
            stream.withdraw(choice)

    def reject(self, command: Reject) -> None:
        stream = self._streams.get(command.request)
        if stream is not None:
            stream.fail((Overloaded if command.overloaded else RequestFailed)(command.reason))

    def fail_all(self, error: HeadraceError) -> None:
        for stream in self._streams.values():
            stream.fail(error)

    def _choice(self, request: RequestId, index: int) -> tuple[Choice | None, Stream | None]:
        stream = self._streams.get(request)
        return (None, None) if stream is None else (stream.choices.get(index), stream)
