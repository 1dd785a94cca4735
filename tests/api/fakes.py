"""A deterministic service and the real HTTP server around it, for tests of the API."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import uvloop
from starlette.applications import Starlette
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from headrace.api.app import create_app
from headrace.api.server import ApiServer, address_of, listen
from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import Tokenizer
from headrace.types.hashing import chain_root
from headrace.types.ids import BlockHash, RequestId
from headrace.types.payload import Chunk, Submission, TokenLogprobs
from headrace.types.request import FinishReason, Timeline
from headrace.types.service import InstanceStatus, ServiceInfo, ServiceStatus

MODEL = "fake-model"
LENGTH_MAX = 256
WAIT_S = 60
"""Longest a test waits for something that must happen; reached only when it fails."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'function' %}{{ raise_exception('no functions here') }}{% endif %}"
    "[{{ message.role }}] {{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Stop here, END of story. ",
    "naïve café 你好世界 🎉 ",
] * 3
SPECIAL = ["<s>", "</s>", "<|end|>"]


def byte_level() -> RustTokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, show_progress=False, initial_alphabet=alphabet, special_tokens=SPECIAL
    )
    rust.train_from_iterator(CORPUS, trainer)
    return rust


def sentencepiece() -> RustTokenizer:
    """BPE with "▁" for spaces and byte fallback, as Llama 2 and Mistral have it."""
    rust = RustTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<unk>", *SPECIAL, *fallback]
    )
    rust.train_from_iterator([CORPUS[0]], trainer)
    content = json.loads(rust.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    return RustTokenizer.from_str(json.dumps(content))


def write_checkpoint(folder: Path, rust: RustTokenizer, **config: Any) -> Path:
    """The tokenizer's half of a checkpoint."""
    rust.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


class Pace:
    """Lets as many tokens through as a test allows."""

    def __init__(self, tokens: int = 0) -> None:
        self._permits = asyncio.Semaphore(tokens)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def step(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._permits.acquire()

    def allow(self, tokens: int) -> None:
        assert self._loop is not None
        for _ in range(tokens):
            self._loop.call_soon_threadsafe(self._permits.release)


class FakeGateway:
    """Draws each token from a hash of (seed, choice, position), or from `script`; ends as a service does."""

    def __init__(
        self, tokenizer: Tokenizer, vocabulary: int | None = None, length_max: int = LENGTH_MAX
    ) -> None:
        self._tokenizer = tokenizer
        self._length_max = length_max
        self._vocabulary = vocabulary or tokenizer.size
        self._next = 0
        self.reset()

    def reset(self) -> None:
        self.script: list[int] | None = None
        """What every choice says, ended by end-of-text."""
        self.stride = 1
        """Tokens a chunk."""
        self.pace: Pace | None = None
        self.error: Exception | None = None
        self.error_after = 0
        """Tokens before `error` is raised."""
        self.cached = 0
        self.ready = True
        self.submissions: list[Submission] = []
        self.withdrawn: list[tuple[RequestId, int]] = []
        self.cancelled = threading.Event()
        """A stream was closed before its end."""
        self.started = threading.Event()
        self.open = 0
        self.sent = 0

    def text(self, text: str) -> None:
        """Have every choice say this."""
        self.script = self._tokenizer.encode(text, special=False)

    async def submit(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        self.submissions.append(submission)
        self.open += 1
        unfinished = set(range(submission.request.choices))
        try:
            self.started.set()
            if self.error is not None and not self.error_after:
                raise self.error
            answers = [self._answer(submission, c) for c in range(submission.request.choices)]
            for at in range(0, max(len(ids) for ids, _ in answers), self.stride):
                for choice, (ids, finish) in enumerate(answers):
                    if at >= len(ids) or (submission.request.id, choice) in self.withdrawn:
                        continue
                    if self.pace is not None:
                        await self.pace.step()
                    if self.error is not None and at >= self.error_after:
                        raise self.error
                    self.sent += 1
                    chunk = self._chunk(submission, choice, ids, at, finish)
                    if chunk.finish is not None:
                        unfinished.remove(choice)
                    yield chunk
                    await asyncio.sleep(0)
        finally:
            self.open -= 1
            if any((submission.request.id, choice) not in self.withdrawn for choice in unfinished):
                self.cancelled.set()

    def _answer(self, submission: Submission, choice: int) -> tuple[list[int], FinishReason]:
        sampling = submission.payload.sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self._tokenizer.eos_ids))
        plain = [i for i in range(self._vocabulary) if i not in self._tokenizer.special_ids]
        ids: list[int] = []
        for position in range(sampling.tokens_max):
            if self.script is not None:
                end = self._tokenizer.eos_ids[0]
                token_id = self.script[position] if position < len(self.script) else end
            else:
                key = f"{sampling.seed}/{choice}/{position}".encode()
                token_id = plain[int.from_bytes(blake2b(key, digest_size=8).digest()) % len(plain)]
            ids.append(token_id)
            if token_id in ends and position >= sampling.min_tokens:
                return ids, FinishReason.STOP
        return ids, FinishReason.LENGTH

    def _chunk(
        self, submission: Submission, choice: int, ids: list[int], at: int, finish: FinishReason
    ) -> Chunk:
        part = tuple(ids[at : at + self.stride])
        last = at + self.stride >= len(ids)
        count = submission.payload.sampling.logprobs
        logprobs = (
            () if count is None else tuple(self._logprobs(i, at + k, count) for k, i in enumerate(part))
        )
        now = self.now_ns()
        line = Timeline(
            arrival_ns=submission.request.arrival_ns,
            placed_ns=now,
            prefill_ns=now,
            prefilled_ns=now,
            joined_ns=now,
            finished_ns=now,
            cached=self.cached + choice,
            cached_decode=1,
            writes=2,
            bytes_moved=4096,
        )
        return Chunk(choice, at, part, logprobs, finish if last else None, line if last else None)

    def _logprobs(self, token_id: int, position: int, count: int) -> TokenLogprobs:
        """The drawn token has rank 2 at odd positions."""
        others = [(token_id + 1 + k) % self._vocabulary for k in range(count)]
        top = (
            [token_id, *others][:count] if position % 2 == 0 else [*others[:1], token_id, *others[1:]][:count]
        )
        return TokenLogprobs(
            -0.5, 1 + position % 2, tuple(top), tuple(-0.25 * (k + 1) for k in range(len(top)))
        )

    def withdraw(self, request: RequestId, choice: int) -> None:
        self.withdrawn.append((request, choice))

    def next_id(self) -> RequestId:
        self._next += 1
        return RequestId(self._next)

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def root(self, salt: str) -> BlockHash:
        return chain_root("fake", salt)

    def info(self) -> ServiceInfo:
        return ServiceInfo(MODEL, self._length_max, 8, self._vocabulary, "fake-numerics", "equal bits")

    def status(self) -> ServiceStatus:
        instances = (InstanceStatus("p0", 1, "prefill", "ready"), InstanceStatus("d0", 2, "decode", "ready"))
        counters = {"preemptions": 3, "failovers": 1, "tokens_prompt_hit": 7, "transfer_bytes": 4096}
        return ServiceStatus(
            self.ready, "" if self.ready else "p0 starts", instances, 2, 1, counters, 100, 75
        )


class Running:
    """A server in a thread."""

    def __init__(
        self, app: Starlette, server: ApiServer, address: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.app = app
        self.address = address
        self._server = server
        self._loop = loop

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A connection of its own, for what no client library would do."""
        host, port = self.address.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.settimeout(WAIT_S)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((host, int(port)))
        return connection

    def post(self, connection: socket.socket, path: str, body: dict[str, Any]) -> None:
        """Send a request, and read nothing."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)

    def call(self, function: Callable[[], Any]) -> None:
        """On the server's loop."""
        with suppress(RuntimeError):  # its loop has just ended
            self._loop.call_soon_threadsafe(function)

    def drain(self) -> None:
        self.call(self._server.drain)


@contextmanager
def serving(
    gateway: FakeGateway,
    tokenizer: Tokenizer,
    settings: ApiSettings | None = None,
    drain_timeout_s: float = WAIT_S,
) -> Iterator[Running]:
    """The real server on a free port."""
    listener = listen("127.0.0.1", 0)
    address = address_of(listener)
    begun = threading.Event()
    holder: list[Running] = []

    async def main() -> None:
        app = create_app(gateway, tokenizer, settings)
        server = ApiServer(app, listener, drain_timeout_s, listening=lambda address: begun.set())
        holder.append(Running(app, server, address, asyncio.get_running_loop()))
        await server.run_until_drained()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(WAIT_S)
    try:
        yield holder[0]
    finally:
        if thread.is_alive():
            holder[0].drain()
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server did not end"
