"""The API's side of the simulation: who asked what, which ids they were given, and the payload store from which any failover resumes."""

from dataclasses import dataclass, field

from headrace.sim.memory import expected_tokens
from headrace.types.events import Deliver, Reject
from headrace.types.hashing import root_of_version
from headrace.types.ids import Address, RequestId, SequenceKey
from headrace.types.kv import KVSpec
from headrace.types.messages import Start
from headrace.types.payload import Emission, SequencePayload
from headrace.types.request import FinishReason, Request, Timeline


@dataclass(slots=True)
class Stream:
    """One choice, as its client sees it."""

    token_ids: list[int] = field(default_factory=list[int])
    finish: FinishReason | None = None
    timeline: Timeline | None = None
    withdrawn: bool = False
    attempt: int = 0
    """The latest that was started."""
    expected: list[int] = field(default_factory=list[int])
    expected_finish: FinishReason | None = None
    version: int = 0
    """Of the weights under which the latest attempt began."""
    mixed: bool = False
    """Later weights had part in what it says: no lone sequence says the same (`sim.executors` looks at each tag instead)."""
    texts: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """What a lone sequence says under each version that it began anew with."""

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.withdrawn


@dataclass(slots=True)
class Client:
    request: Request
    payload: SequencePayload
    streams: list[Stream]
    rejected: Reject | None = None

    @property
    def ended(self) -> bool:
        return self.rejected is not None or all(stream.ended for stream in self.streams)


class Clients:
    """Checks what is delivered against what a lone sequence would have said."""

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.all: dict[RequestId, Client] = {}
        self.unfinished = 0
        self.doomed: dict[RequestId, int] = {}
        """Requests that may fail without anybody's fault: because they are too long, or broken beyond so many tokens."""
        self._drawn: dict[SequenceKey, dict[int, tuple[int, tuple[int, int]]]] = {}
        """Token and `Emission.weights`, by index."""

    def submit(self, request: Request, payload: SequencePayload) -> None:
        streams: list[Stream] = []
        for choice in range(request.choices):
            said, finish = expected_tokens(payload, request.tokens_max, self.spec, choice)
            stream = Stream(expected=said, expected_finish=finish or FinishReason.LENGTH, texts={0: said})
            streams.append(stream)
        self.all[request.id] = Client(request, payload, streams)
        self.unfinished += 1

    def payload_for(self, start: Start, target: Address) -> SequencePayload:
        """Prompt and what was delivered before this attempt: what a sequence of it starts from."""
        client = self.all[start.key.request]
        stream = client.streams[start.key.choice]
        assert start.history <= len(stream.token_ids), f"{start.key} starts from {start.history} tokens"
        ids = client.payload.token_ids + stream.token_ids[: start.history]
        assert start.total == len(ids)
        assert start.emits_max == client.request.tokens_max - start.history > 0
        stream.attempt = start.key.attempt
        payload = client.payload
        root = root_of_version(payload.root, start.version)
        begun = SequencePayload(root, ids, payload.prompt, payload.sampling, start.version)
        if start.version != stream.version:
            assert start.version > stream.version
            said = stream.token_ids[: start.history]
            text, finish = expected_tokens(
                begun, client.request.tokens_max, self.spec, start.key.choice, said
            )
            stream.version, stream.mixed = start.version, False
            stream.expected = stream.texts[start.version] = text
            stream.expected_finish = finish or FinishReason.LENGTH
        return begun

    def drawn(self, emissions: tuple[Emission, ...]) -> None:
        """Ids that came with a `Tokens` message to the router."""
        for emission in emissions:
            known = self._drawn.setdefault(emission.key, {})
            for index, token in enumerate(emission.token_ids, emission.first):
                assert index not in known, f"{emission.key}: token {index} was told twice"
                known[index] = token, emission.weights

    def deliver(self, command: Deliver, now_ns: int) -> None:
        key = command.key
        client = self.all[command.request]
        stream = client.streams[command.choice]
        assert (key.request, key.choice) == (command.request, command.choice)
        assert key.attempt == stream.attempt, f"{key} is delivered while attempt {stream.attempt} runs"
        assert not stream.ended, f"{key}: more tokens after the end"
        assert client.rejected is None, f"{key}: more tokens after a rejection"
        assert command.first == len(stream.token_ids), (
            f"{key}: token {command.first} after {len(stream.token_ids)}"
        )
        drawn = [self._drawn[key][i] for i in range(command.first, command.first + command.count)]
        ids = [token for token, _ in drawn]
        stream.token_ids += ids
        assert all(oldest == stream.version for _, (oldest, _) in drawn), f"{key} began under other weights"
        stream.mixed |= any(newest != stream.version for _, (_, newest) in drawn)
        if stream.mixed:
            stream.expected = list(stream.token_ids)
            stream.expected_finish = command.finish
        wanted = stream.expected[command.first : command.first + command.count]
        assert ids == wanted, f"{key}: wrong text at token {command.first}: {ids} instead of {wanted}"
        if command.finish is not None:
            assert command.finish is stream.expected_finish, f"{key} ends with {command.finish}"
            assert stream.token_ids == stream.expected, f"{key} ends too early"
            _check_timeline(command.timeline)
            stream.finish, stream.timeline = command.finish, command.timeline
            self.unfinished -= client.ended

    def reject(self, command: Reject, now_ns: int) -> None:
        client = self.all[command.request]
        late = now_ns >= client.request.deadline_ns
        assert late or command.request in self.doomed, f"{command} has no reason"
        assert not client.ended, f"request {command.request} is rejected after its end"
        client.rejected = command
        self.unfinished -= 1

    def withdraw(self, request: RequestId, choice: int | None) -> bool:
        """The client leaves. False: it had its answer already."""
        client = self.all[request]
        if client.ended:
            return False
        for index, stream in enumerate(client.streams):
            if choice in (None, index):
                stream.withdrawn = True
        self.unfinished -= client.ended
        return True


def _check_timeline(timeline: Timeline | None) -> None:
    assert timeline is not None and timeline.attempts >= 1
    stages = (
        timeline.arrival_ns,
        timeline.placed_ns,
        timeline.prefill_ns,
        timeline.prefilled_ns,
        timeline.finished_ns,
    )
    assert list(stages) == sorted(stages), f"stages out of order: {timeline}"
