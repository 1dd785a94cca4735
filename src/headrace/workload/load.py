"""What a load is: which prompts are sent, when, and for how many tokens. All of it follows from the configuration and its seed."""

import math
from pathlib import Path
from random import Random
from typing import Literal

import msgspec
import numpy as np

from headrace.types.errors import ConfigError
from headrace.types.outcomes import Ints

WORDS = (
    "river",
    "water",
    "mill",
    "wheel",
    "field",
    "stone",
    "bridge",
    "garden",
    "winter",
    "summer",
    "letter",
    "music",
    "paper",
    "story",
    "time",
    "world",
)
"""Random prompts as text are made of these: each is one or two tokens in most vocabularies."""

Prompt = str | list[int]


class Goals(msgspec.Struct, frozen=True, kw_only=True):
    """Latency goals of every request, milliseconds; those that are set must all be met."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def of_all(self, rows: int) -> tuple[Ints, Ints] | None:
        """As `RunData.goals` takes them; None without goals."""
        if self == Goals():
            return None
        ttft_ns, tpot_ns = (-1 if ms is None else round(ms * 1e6) for ms in (self.ttft_ms, self.tpot_ms))
        return np.full(rows, ttft_ns, dtype=np.int64), np.full(rows, tpot_ns, dtype=np.int64)


class LoadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A load on one OpenAI-compatible endpoint."""

    url: str = "http://127.0.0.1:8000"
    endpoint: Literal["completions", "chat"] = "completions"
    model: str | None = None
    """None: the first that `/v1/models` lists."""
    api_key: str | None = None
    prompts: int = 100
    """Requests in all."""
    request_rate: float = math.inf
    """Requests a second, with exponential gaps (a Poisson process); inf, in JSON null: all at once."""
    concurrency: int | None = None
    """Requests under way at most; later ones wait for their turn, and their time begins when they are sent."""
    input_tokens: int = 128
    output_tokens: int = 64
    spread: float = 0.0
    """Lengths are drawn evenly from (1 - spread) to (1 + spread) times the number above."""
    prefix_tokens: int = 0
    """So many leading tokens are the same in all prompts, on top of `input_tokens`."""
    text: Path | None = None
    """Prompts from a file: JSON lines with `prompt` (and `max_tokens`), or plain text to cut pieces from."""
    vocabulary: int | None = None
    """Random ids are below it; None: what the server says, else 256."""
    ignore_eos: bool = True
    """Ask for exactly `output_tokens`; servers that do not know the field need it off."""
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 600.0
    warmups: int = 1
    """Requests before the measurement."""
    goals: Goals = Goals()


class LoadRequest(msgspec.Struct, frozen=True):
    """One request of a load."""

    at_s: float
    """After the load's begin."""
    prompt: Prompt
    output_tokens: int


def check(config: LoadConfig) -> None:
    """Raises ConfigError naming what is wrong."""
    rules = {
        "prompts must be at least 1": config.prompts >= 1,
        "request_rate must be more than 0": config.request_rate > 0,
        "warmups must not be negative": config.warmups >= 0,
        "concurrency must be at least 1": config.concurrency is None or config.concurrency >= 1,
        "input_tokens must be at least 1": config.input_tokens >= 1,
        "output_tokens must be at least 1": config.output_tokens >= 1,
        "spread must be from 0 to less than 1": 0 <= config.spread < 1,
        "prefix_tokens must not be negative": config.prefix_tokens >= 0,
        "url must begin with http:// or https://": config.url.startswith(("http://", "https://")),
    }
    for complaint, holds in rules.items():
        if not holds:
            raise ConfigError(f"load: {complaint}")


def plan_load(config: LoadConfig, vocabulary: int, extra: int = 0) -> list[LoadRequest]:
    """Every request, by time, and `extra` ones that continue the load. Raises ConfigError."""
    check(config)
    times = arrivals(Random(f"{config.seed}/arrivals"), config.prompts + extra, config.request_rate)
    lengths = Random(f"{config.seed}/lengths")
    sources = read_prompts(config) if config.text is not None else [(None, None)]
    plan: list[LoadRequest] = []
    for i, at_s in enumerate(times):
        inputs = spread(lengths, config.input_tokens, config.spread)
        outputs = spread(lengths, config.output_tokens, config.spread)
        prompt, asked = sources[i % len(sources)]
        if prompt is None:
            prompt = random_prompt(config, inputs, i, vocabulary)
        plan.append(LoadRequest(at_s, prompt, asked or outputs))
    return plan


def arrivals(rng: Random, count: int, rate: float) -> list[float]:
    """Instants of a Poisson process; all 0 for an infinite rate."""
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        times.append(now)
        now += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    return times


def spread(rng: Random, middle: int, ratio: float) -> int:
    """A length near `middle`."""
    low, high = math.ceil(middle * (1 - ratio)), math.floor(middle * (1 + ratio))
    return max(1, rng.randint(low, high))


def random_prompt(config: LoadConfig, length: int, index: int, vocabulary: int) -> Prompt:
    """Token ids, or words for chat; the leading `prefix_tokens` are the same for every index."""
    shared, own = Random(f"{config.seed}/prefix"), Random(f"{config.seed}/prompt/{index}")
    if config.endpoint == "chat":
        words = [shared.choice(WORDS) for _ in range(config.prefix_tokens)]
        return " ".join([*words, *(own.choice(WORDS) for _ in range(length))])
    ids = [shared.randrange(vocabulary) for _ in range(config.prefix_tokens)]
    return ids + [own.randrange(vocabulary) for _ in range(length)]


def read_prompts(config: LoadConfig) -> list[tuple[Prompt, int | None]]:
    """Prompts of a file, with the new tokens each asks for, if it does. Raises ConfigError."""
    path = config.text
    assert path is not None
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"load: {path} cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        lines = enumerate(content.splitlines(), 1)
        entries = [entry(line, f"{path}:{i}") for i, line in lines if line.strip()]
        if not entries:
            raise ConfigError(f"load: {path} holds no prompt")
        return entries
    words = content.split()
    if len(words) < config.input_tokens:
        raise ConfigError(
            f"load: {path} has {len(words)} words, fewer than input_tokens {config.input_tokens}"
        )
    rng = Random(f"{config.seed}/text")
    starts = [
        rng.randint(0, len(words) - config.input_tokens) for _ in range(config.prompts + config.warmups)
    ]
    return [(" ".join(words[at : at + config.input_tokens]), None) for at in starts]


class Entry(msgspec.Struct):
    """One line of a JSON lines file."""

    prompt: str | list[int]
    max_tokens: int | None = None


def entry(line: str, where: str) -> tuple[Prompt, int | None]:
    try:
        parsed = msgspec.json.decode(line, type=Entry)
    except msgspec.DecodeError as error:
        raise ConfigError(f"load: {where}: {error}") from error
    return parsed.prompt, parsed.max_tokens
