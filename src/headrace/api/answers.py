"""Answers as bytes: OpenAI's completion and chat completion objects, whole and as streamed chunks, with vLLM's extra fields."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from headrace.api.generation import Piece
from headrace.api.jobs import Job
from headrace.api.timings import Timings
from headrace.api.tokenizer import Tokenizer
from headrace.types.payload import TokenLogprobs
from headrace.types.request import FinishReason

LOGPROB_MIN = -9999.0
"""JSON has no infinity; vLLM's value for "never"."""


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None
    timings: list[Timings] | UnsetType = UNSET
    """Of every choice, where asked for."""
    weights: list[int] | UnsetType = UNSET
    """Versions of the weights that had part in the answer, if any was pushed."""

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int | None) -> "Usage":
        return cls(prompt, completion, prompt + completion, None if cached is None else CachedTokens(cached))


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry a token."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    content: str | UnsetType = UNSET
    role: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage | UnsetType = UNSET
    delta: ChatMessage | UnsetType = UNSET
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class Answer(msgspec.Struct):
    """The object around choices: a whole answer, or one chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Any]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Writer:
    """What both formats share. `encoder` is kept because a stream encodes thousands of small objects."""

    def __init__(self, job: Job, tokenizer: Tokenizer, chunk_kind: str, whole_kind: str) -> None:
        self.job = job
        self.tokenizer = tokenizer
        self._chunk_kind = chunk_kind
        self._whole_kind = whole_kind
        self._encoder = msgspec.json.Encoder()
        self._weights = 0

    def drawn_by(self, weights: int) -> None:
        """What comes next was drawn by this version; pushed ones are named in `system_fingerprint`."""
        self._weights = max(self._weights, weights)

    @property
    def fingerprint(self) -> str:
        return f"{self.job.fingerprint}-w{self._weights}" if self._weights else self.job.fingerprint

    def chunk(self, choices: Sequence[Any], usage: Usage | UnsetType | None, **extra: Any) -> bytes:
        job = self.job
        if usage is None and not job.include_usage:
            usage = UNSET
        answer = Answer(
            job.id, self._chunk_kind, job.created, job.model, choices, self.fingerprint, usage, **extra
        )
        return b"data: %b\n\n" % self._encoder.encode(answer)

    def answer(self, choices: Sequence[Any], usage: Usage, **extra: Any) -> bytes:
        job = self.job
        return self._encoder.encode(
            Answer(
                job.id, self._whole_kind, job.created, job.model, choices, self.fingerprint, usage, **extra
            )
        )

    def usage_event(self, usage: Usage) -> bytes:
        return self.chunk((), usage)

    def silent(self, piece: Piece) -> bool:
        """Nothing to tell: its text is held back."""
        return not (piece.text or piece.finish or piece.logprobs or self.job.return_token_ids)

    def ids(self, pieces: list[Piece]) -> list[int] | UnsetType:
        return [i for piece in pieces for i in piece.token_ids] if self.job.return_token_ids else UNSET

    def token(self, token_id: int) -> str:
        """A token as logprobs name it."""
        return f"token_id:{token_id}" if self.job.tokens_as_ids else self.tokenizer.token_text(token_id)

    def top(self, entry: TokenLogprobs) -> list[tuple[int, float]]:
        """The most likely tokens, as many as were asked for."""
        count = self.job.logprobs or 0
        pairs = zip(entry.top_ids[:count], entry.top_logprobs[:count], strict=True)
        return [(token_id, finite(logprob)) for token_id, logprob in pairs]


class CompletionFormat(Writer):
    """`/v1/completions`."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer, "text_completion", "text_completion")
        echoed = job.prompts if job.echo else []
        self._echo = [tokenizer.decode(p.token_ids, False) if p.text is None else p.text for p in echoed]

    def opening(self) -> list[bytes]:
        job = self.job
        if not (job.echo or job.return_token_ids):
            return []
        choices = [self._prompt_choice(i) for i in range(len(job.prompts) * job.n)]
        return [self.chunk([choice], None) for choice in choices]

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        if self.silent(piece):
            return b""
        choice = CompletionChoice(
            piece.index,
            piece.text,
            self._logprobs([piece]),
            piece.finish,
            piece.stop_reason,
            self.ids([piece]),
        )
        return self.chunk((choice,), usage)

    def whole(self, pieces: list[list[Piece]], usage: Usage) -> bytes:
        choices: list[CompletionChoice] = []
        for index, parts in enumerate(pieces):
            choice = self._prompt_choice(index)
            choice.text += "".join(piece.text for piece in parts)
            choice.logprobs = self._logprobs(parts)
            choice.finish_reason = parts[-1].finish
            choice.stop_reason = parts[-1].stop_reason
            choice.token_ids = self.ids(parts)
            choices.append(choice)
        return self.answer(choices, usage)

    def _prompt_choice(self, index: int) -> CompletionChoice:
        prompt = index // self.job.n
        choice = CompletionChoice(index, self._echo[prompt] if self._echo else "")
        if self.job.return_token_ids:
            choice.prompt_token_ids = self.job.prompts[prompt].token_ids
        return choice

    def _logprobs(self, pieces: list[Piece]) -> CompletionLogprobs | None:
        if self.job.logprobs is None:
            return None
        lists = CompletionLogprobs([], [], [], [])
        for piece in pieces:
            lists.text_offset += piece.offsets
            for token_id, entry in zip(piece.token_ids, piece.logprobs, strict=True):
                drawn = finite(entry.logprob)
                lists.token_logprobs.append(drawn)
                lists.tokens.append(self.token(token_id))
                top = {self.token(token_id): drawn}
                for top_id, logprob in self.top(entry):
                    top.setdefault(
                        self.token(top_id), logprob
                    )  # two tokens may have one text: the likelier one counts
                lists.top_logprobs.append(top)
        return lists


class ChatFormat(Writer):
    """`/v1/chat/completions`."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer, "chat.completion.chunk", "chat.completion")

    def opening(self) -> list[bytes]:
        events: list[bytes] = []
        for index in range(self.job.n):
            choice = ChatChoice(index, delta=ChatMessage("", "assistant"))
            events.append(self.chunk((choice,), None, **(self._prompt_ids() if index == 0 else {})))
        return events

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        if self.silent(piece):
            return b""
        choice = ChatChoice(
            piece.index,
            UNSET,
            ChatMessage(piece.text) if piece.text else ChatMessage(),
            self._logprobs([piece]),
            piece.finish,
            piece.stop_reason,
            self.ids([piece]),
        )
        return self.chunk((choice,), usage)

    def whole(self, pieces: list[list[Piece]], usage: Usage) -> bytes:
        choices: list[ChatChoice] = []
        for index, parts in enumerate(pieces):
            message = ChatMessage("".join(piece.text for piece in parts), "assistant", None)
            end = parts[-1]
            choices.append(
                ChatChoice(
                    index, message, UNSET, self._logprobs(parts), end.finish, end.stop_reason, self.ids(parts)
                )
            )
        return self.answer(choices, usage, **self._prompt_ids())

    def _prompt_ids(self) -> dict[str, list[int]]:
        return {"prompt_token_ids": self.job.prompts[0].token_ids} if self.job.return_token_ids else {}

    def _logprobs(self, pieces: list[Piece]) -> ChatLogprobs | None:
        if self.job.logprobs is None:
            return None
        content: list[ChatLogprob] = []
        for piece in pieces:
            for token_id, entry in zip(piece.token_ids, piece.logprobs, strict=True):
                top = [
                    TopLogprob(self.token(i), p, list(self.tokenizer.token_bytes(i)))
                    for i, p in self.top(entry)
                ]
                raw = list(self.tokenizer.token_bytes(token_id))
                content.append(ChatLogprob(self.token(token_id), finite(entry.logprob), raw, top))
        return ChatLogprobs(content)


Format = CompletionFormat | ChatFormat
"""One of the two ways to write an answer: `opening` events, an `event` a piece (empty: nothing to say), or the `whole` at once."""


def finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)
