"""From a checked body to a job: what the service is asked (`Submission`s), and how the answer is to look."""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import msgspec

from headrace import __version__
from headrace.api.errors import ApiError, invalid
from headrace.api.prompts import Prompt, Prompter, too_long
from headrace.api.protocol import ChatBody, CompletionBody, GenerationBody
from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import SamplingDefaults, Tokenizer
from headrace.ports import Gateway
from headrace.types.hashing import block_hashes
from headrace.types.ids import BlockHash
from headrace.types.payload import SamplingParams, SequencePayload, Submission
from headrace.types.request import Request, Slo

COMPLETION_TOKENS = 16
"""New tokens of a completion that says nothing, as in OpenAI's API."""
GREEDY_BELOW = 1e-5
"""Temperatures under it mean greedy, as in vLLM."""
OFFLOAD_BYTES = 16_384
"""Larger bodies are read and tokenized in a thread, so that streams go on."""

P = ParamSpec("P")
R = TypeVar("R")


class TextOptions(msgspec.Struct, frozen=True):
    """How tokens become text, and which text ends a choice."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0
    """Stop strings are looked for in later tokens only."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end a choice and, unless `include_stop`, have no text."""
    stop_ids: frozenset[int] = frozenset()
    """Those that the request asked for: they are its `stop_reason`."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request, ready to run: choice `c` of prompt `p` has index `p * n + c`."""

    id: str
    created: int
    model: str
    fingerprint: str
    prompts: list[Prompt]
    submissions: list[Submission]
    n: int
    text: TextOptions
    logprobs: int | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    return_token_ids: bool
    return_timings: bool
    tokens_as_ids: bool
    arrival_s: float
    """On the monotonic clock."""


async def offload(size: int, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `call` here if the work is small, else in a thread."""
    if size < OFFLOAD_BYTES:
        return call(*args, **kwargs)
    return await asyncio.to_thread(call, *args, **kwargs)


class JobBuilder:
    """Makes jobs for one service."""

    def __init__(self, gateway: Gateway, tokenizer: Tokenizer, settings: ApiSettings) -> None:
        self._gateway = gateway
        self._tokenizer = tokenizer
        self._settings = settings
        self._info = gateway.info()
        self.prompter = Prompter(tokenizer, self._info.vocabulary, self._info.length_max)
        self._defaults = tokenizer.defaults if settings.model_defaults else SamplingDefaults()

    async def build(
        self, body: CompletionBody | ChatBody, request_id: str, size: int, arrival_s: float
    ) -> Job:
        """The job of a body of `size` bytes. Raises ApiError."""
        self.check_model(body.model)
        self._check(body)
        n = body.n or 1
        root = self._gateway.root(body.cache_salt or "")
        prompts, hashes = await offload(size, self._read, body, n, root)
        chat = isinstance(body, ChatBody)
        options = body.stream_options
        return Job(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{body.request_id or request_id}",
            created=int(time.time()),
            model=self._info.model,
            fingerprint=f"headrace-{__version__}-{self._gateway.info().numerics or 'unpromised'}",
            prompts=prompts,
            submissions=[self._submission(body, p, h, n, root) for p, h in zip(prompts, hashes, strict=True)],
            n=n,
            text=self._text_options(body),
            logprobs=logprobs_of(body),
            stream=bool(body.stream),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
            echo=bool(body.echo),
            return_token_ids=bool(body.return_token_ids),
            return_timings=bool(body.return_timings),
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            arrival_s=arrival_s,
        )

    def check_model(self, model: str | None) -> None:
        """Raises ApiError for a model that is not served; None means the one that is."""
        if model is not None and model != self._info.model:
            message = f"the model {model!r} does not exist; this server serves {self._info.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check(self, body: CompletionBody | ChatBody) -> None:
        """What concerns several fields at once, or limits of this server."""
        s = self._settings
        n = body.n or 1
        if n > s.choices_max:
            raise invalid("n", f"must be at most {s.choices_max}", code="invalid_value")
        if body.best_of not in (None, n):
            raise invalid(
                "best_of", "must equal n: candidates are not ranked here", code="unsupported_parameter"
            )
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "is allowed only with stream: true", code="invalid_value")
        if body.timeout is not None and body.timeout > s.request_timeout_s:
            raise invalid("timeout", f"must be at most {s.request_timeout_s:g} seconds", code="invalid_value")
        stops = body.stop or []
        if len(stops) > s.stops_max:
            raise invalid("stop", f"at most {s.stops_max} strings, got {len(stops)}", code="invalid_value")
        for i, stop in enumerate(stops):
            if not 1 <= len(stop) <= s.stop_length_max:
                raise invalid(
                    f"stop[{i}]", f"must have 1 to {s.stop_length_max} characters", code="invalid_value"
                )
        if isinstance(body, CompletionBody):
            if body.echo and body.logprobs is not None:
                raise invalid("echo", "is not supported together with logprobs", code="unsupported_parameter")
        elif body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs", "needs logprobs: true", code="invalid_value")
        elif body.tools and body.tool_choice != "none":
            raise invalid("tools", 'only tool_choice "none" is supported', code="unsupported_parameter")
        elif body.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice", 'only "none" is supported', code="unsupported_parameter")

    def _read(
        self, body: CompletionBody | ChatBody, n: int, root: BlockHash
    ) -> tuple[list[Prompt], list[tuple[BlockHash, ...]]]:
        """Prompts and their block hashes. May run in a thread."""
        if isinstance(body, ChatBody):
            prompts = [self.prompter.chat(body)]
        else:
            prompts = self.prompter.completion(body, max(1, self._settings.sequences_max // n))
        return prompts, [tuple(block_hashes(root, p.token_ids, self._info.block_size)) for p in prompts]

    def _submission(
        self,
        body: CompletionBody | ChatBody,
        prompt: Prompt,
        hashes: tuple[BlockHash, ...],
        n: int,
        root: BlockHash,
    ) -> Submission:
        length = len(prompt.token_ids)
        sampling = self._sampling(body, self._tokens_max(body, length))
        now = self._gateway.now_ns()
        request = Request(
            id=self._gateway.next_id(),
            prompt=length,
            hashes=hashes,
            tokens_max=sampling.tokens_max,
            choices=n,
            arrival_ns=now,
            deadline_ns=now + int((body.timeout or self._settings.request_timeout_s) * 1e9),
            priority=body.priority or 0,
            tenant=body.user or "",
            category=body.category or "",
            slo=Slo(nanoseconds(body.ttft_slo_ms), nanoseconds(body.tpot_slo_ms)),
        )
        payload = SequencePayload(root, prompt.token_ids, length, sampling)
        return Submission(request, payload, body.cache_salt or "")

    def _tokens_max(self, body: CompletionBody | ChatBody, prompt: int) -> int:
        """New tokens at most: as asked if they fit the context, else the default."""
        left = self._info.length_max - prompt
        chat = isinstance(body, ChatBody)
        field, asked = "max_tokens", body.max_tokens
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            field, asked = "max_completion_tokens", body.max_completion_tokens
        if left < 1:
            raise too_long("messages" if chat else "prompt", str(prompt), asked, self._info.length_max)
        if asked is not None and asked > left:
            raise too_long(field, str(prompt), asked, self._info.length_max)
        if asked is not None:
            return asked
        return min(left, (self._defaults.max_new_tokens or left) if chat else COMPLETION_TOKENS)

    def _sampling(self, body: GenerationBody, tokens_max: int) -> SamplingParams:
        """The request's values, else the checkpoint's, else OpenAI's."""
        d = self._defaults
        if body.min_tokens is not None and body.min_tokens > tokens_max:
            raise invalid("min_tokens", f"must be at most max_tokens, {tokens_max}", code="invalid_value")
        temperature = first(body.temperature, d.temperature, 1.0)
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
        return SamplingParams(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=max(0, first(body.top_k, d.top_k, 0)),
            top_p=first(body.top_p, d.top_p, 1.0),
            min_p=first(body.min_p, d.min_p, 0.0),
            repetition_penalty=first(body.repetition_penalty, d.repetition_penalty, 1.0),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=self._logit_bias(body.logit_bias or {}),
            seed=seed,
            logprobs=logprobs_of(body),
            stop_token_ids=self._stop_token_ids(body.stop_token_ids or []),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=body.min_tokens or 0,
            tokens_max=tokens_max,
        )

    def _logit_bias(self, biases: dict[str, float]) -> dict[int, float]:
        plain: dict[int, float] = {}
        for key, bias in biases.items():
            param = f"logit_bias.{key[:32]}"
            if not (key.isascii() and key.isdigit()) or len(key) > 10 or int(key) >= self._info.vocabulary:
                raise invalid(
                    param, f"must be a token id from 0 to {self._info.vocabulary - 1}", code="invalid_value"
                )
            if not -100 <= bias <= 100:
                raise invalid(param, "must be from -100 to 100", code="invalid_value")
            plain[int(key)] = bias
        return plain

    def _stop_token_ids(self, ids: list[int]) -> tuple[int, ...]:
        for i, token_id in enumerate(ids):
            if not 0 <= token_id < self._info.vocabulary:
                message = f"must be a token id from 0 to {self._info.vocabulary - 1}"
                raise invalid(f"stop_token_ids[{i}]", message, code="invalid_value")
        return tuple(ids)

    def _text_options(self, body: GenerationBody) -> TextOptions:
        stop_ids = frozenset(body.stop_token_ids or ())
        return TextOptions(
            stops=tuple(dict.fromkeys(body.stop or ())),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special=body.skip_special_tokens is not False,
            min_tokens=body.min_tokens or 0,
            end_ids=stop_ids.union(() if body.ignore_eos else self._tokenizer.eos_ids),
            stop_ids=stop_ids,
        )


def first(asked: R | None, recommended: R | None, default: R) -> R:
    """The first that is not None."""
    return asked if asked is not None else recommended if recommended is not None else default


def nanoseconds(milliseconds: float | None) -> int | None:
    return None if milliseconds is None else int(milliseconds * 1e6)


def logprobs_of(body: GenerationBody) -> int | None:
    """How many of the most likely tokens to name; None: no logprobs."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionBody) else None
