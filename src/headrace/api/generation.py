"""A job at work: the service's chunks in, pieces of text out.

1. Chunks of all prompts are read as one stream.
2. Each choice turns its tokens into text and looks for stop strings; one that is found ends the choice here, and the service is told.
3. When every choice has ended the stream is closed. Closing it earlier, for whatever reason, cancels what still runs.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import msgspec

from headrace.api.detokenizer import Detokenizer
from headrace.api.jobs import Job
from headrace.api.metrics import Meter
from headrace.api.stop import StopFinder
from headrace.api.tokenizer import Tokenizer
from headrace.ports import Gateway
from headrace.types.errors import RequestFailed
from headrace.types.payload import Chunk, Submission, TokenLogprobs
from headrace.types.request import FinishReason, Timeline

MERGED_MAX = 64
"""Chunks of several prompts that may wait for the client; then the prompts' readers wait."""


class Piece(msgspec.Struct):
    """What one chunk added to one choice. Text lags behind tokens while it may be part of a character or of a stop string."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    offsets: list[int]
    """Characters before each token, where logprobs are asked for."""
    finish: FinishReason | None
    stop_reason: str | int | None = None
    """The stop string or requested stop token that ended the choice."""
    weights: int = 0
    """Version that drew it."""


class Choice:
    """One answer as it grows."""

    def __init__(self, job: Job, tokenizer: Tokenizer, index: int) -> None:
        prompt = job.prompts[index // job.n]
        self.index = index
        self.tokens = 0
        """Drawn and counted: up to the one that completed a stop string."""
        self.finish: FinishReason | None = None
        self.timeline: Timeline | None = None
        self.weights: dict[int, None] = {}
        """Versions that had part in it."""
        self._options = job.text
        self._logprobs = job.logprobs is not None
        self._detokenizer = Detokenizer(tokenizer, prompt.token_ids, job.text.skip_special)
        self._finder = StopFinder(job.text.stops, job.text.include_stop)
        self._chars = 0

    def take(self, chunk: Chunk) -> Piece:
        """Add the service's next tokens of this choice."""
        ids = chunk.token_ids
        finish = chunk.finish
        reason: str | int | None = None
        silent = 0
        if finish is FinishReason.STOP and ids and ids[-1] in self._options.end_ids:
            silent = 0 if self._options.include_stop else 1
            reason = ids[-1] if ids[-1] in self._options.stop_ids else None
        text = ""
        offsets: list[int] = []
        for at, token_id in enumerate(ids):
            if self._logprobs:
                offsets.append(self._chars)
            if at == len(ids) - silent:
                break
            new = self._detokenizer.push(token_id)
            self._chars += len(new)
            if self.tokens + at < self._options.min_tokens:
                text += new
                continue
            found = self._finder.push(new)
            text += found.text
            if found.stop is not None:
                ids, finish, reason = ids[: at + 1], FinishReason.STOP, found.stop
                break
        if finish is not None and not isinstance(reason, str):
            text += self._finder.push(self._detokenizer.flush()).text + self._finder.flush()
        self.tokens += len(ids)
        self.finish = finish
        self.timeline = chunk.timeline or self.timeline
        self.weights |= dict.fromkeys(chunk.weights)
        logprobs = chunk.logprobs[: len(ids)]
        return Piece(self.index, text, ids, logprobs, offsets, finish, reason, chunk.weights[1])


class Generation:
    """Runs one job."""

    def __init__(self, gateway: Gateway, tokenizer: Tokenizer, job: Job, meter: Meter) -> None:
        self._gateway = gateway
        self._job = job
        self._meter = meter
        self.choices = [Choice(job, tokenizer, i) for i in range(len(job.prompts) * job.n)]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices, each choice's in order; its last has `finish`. Raises what the service raises."""
        job = self._job
        unfinished = len(self.choices)
        async with aclosing(merged(self._gateway, job.submissions)) as chunks:
            async for prompt, chunk in chunks:
                choice = self.choices[prompt * job.n + chunk.choice]
                if choice.finish is not None:
                    continue  # sent before the service knew of the stop string
                piece = choice.take(chunk)
                self._meter.tokens(choice.index, len(piece.token_ids))
                if piece.finish is not None:
                    unfinished -= 1
                    self._meter.finished(choice.index, piece.finish, choice.tokens, choice.timeline)
                    if chunk.finish is None:
                        self._gateway.withdraw(job.submissions[prompt].request.id, chunk.choice)
                yield piece
                if not unfinished:
                    return
        raise RequestFailed("the service ended the stream before the answer was complete")

    def seconds_left(self) -> float:
        """Until the deadline; negative after it."""
        deadline_ns = min(submission.request.deadline_ns for submission in self._job.submissions)
        return (deadline_ns - self._gateway.now_ns()) / 1e9

    @property
    def late(self) -> bool:
        """The deadline has passed."""
        return self.seconds_left() <= 0

    def weights(self) -> list[int]:
        """Versions that had part in any choice."""
        return sorted({version for choice in self.choices for version in choice.weights})

    def counts(self) -> tuple[int, int, int | None]:
        """Prompt tokens, new tokens, and prompt tokens found in a prefix cache (None: not known yet).

        A prompt counts once, however many choices it has; what its choices found of each other's prompt was not cached before.
        """
        cached: int | None = None
        for at in range(0, len(self.choices), self._job.n):
            lines = [c.timeline.cached for c in self.choices[at : at + self._job.n] if c.timeline is not None]
            if lines:
                cached = (cached or 0) + min(lines)
        prompt = sum(len(p.token_ids) for p in self._job.prompts)
        return prompt, sum(c.tokens for c in self.choices), cached


def submit(gateway: Gateway, submission: Submission) -> AsyncGenerator[Chunk, None]:
    """The port promises an iterator that can be closed; `aclose` is the name for that."""
    return cast(AsyncGenerator[Chunk, None], gateway.submit(submission))


async def merged(gateway: Gateway, submissions: list[Submission]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks of all submissions with their submission's index. An error of one ends all."""
    if len(submissions) == 1:
        async with aclosing(submit(gateway, submissions[0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(MERGED_MAX)
    readers = [asyncio.create_task(read(gateway, s, i, queue)) for i, s in enumerate(submissions)]
    try:
        unfinished = len(readers)
        while unfinished:
            index, chunk = await queue.get()
            if chunk is None:
                unfinished -= 1
            elif isinstance(chunk, Exception):
                raise chunk
            else:
                yield index, chunk
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def read(
    gateway: Gateway,
    submission: Submission,
    index: int,
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]],
) -> None:
    """Carry one submission's chunks, then None or the error that ended it, to `queue`."""
    try:
        async with aclosing(submit(gateway, submission)) as chunks:
            async for chunk in chunks:
                await queue.put((index, chunk))
    except Exception as error:
        await queue.put((index, error))
    else:
        await queue.put((index, None))
