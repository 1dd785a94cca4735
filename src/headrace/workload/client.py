"""The load client behind `headrace bench`: sends a load to any OpenAI-compatible endpoint and times what comes back.

Times are taken when bytes arrive: a request arrives when it is sent, and ends with its last event that carries text. Between tokens are
the gaps between such events. How many tokens there are is what the server's usage says. Metrics are those of `types.outcomes`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import numpy as np

from headrace.types.errors import ConfigError
from headrace.types.outcomes import Outcomes, RunData, Series
from headrace.workload.load import LoadConfig, LoadRequest, Prompt, plan_load

VOCABULARY = 256
"""Every byte-level vocabulary has so many tokens."""
Progress = Callable[[int, int], None]
"""Told how many requests are done, of how many."""


class Outcome(msgspec.Struct):
    """One request as the client saw it. Instants are on one clock, in seconds; 0 has not happened."""

    begun_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    """Last event with text."""
    ended_s: float = 0.0
    events: int = 0
    gaps_s: list[float] = msgspec.field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    """Its kind; empty: it succeeded."""

    def token(self, now_s: float) -> None:
        """An event with text came."""
        self.events += 1
        if self.first_s:
            self.gaps_s.append(now_s - self.last_s)
        else:
            self.first_s = now_s
        self.last_s = now_s


class StreamError(Exception):
    """The server reported an error inside a stream that had begun with status 200."""


class Target:
    """One endpoint and how to ask it."""

    def __init__(self, config: LoadConfig, session: aiohttp.ClientSession, model: str) -> None:
        self._config = config
        self._session = session
        self._model = model
        path = "chat/completions" if config.endpoint == "chat" else "completions"
        self._url = f"{root_of(config.url)}/{path}"
        self._decoder = msgspec.json.Decoder()

    async def send(self, request: LoadRequest) -> Outcome:
        """Ask once. Never raises for what a server or network may do: the outcome names the kind of error."""
        outcome = Outcome(begun_s=time.perf_counter())
        try:
            async with asyncio.timeout(self._config.timeout_s):
                await self._stream(self._body(request.prompt, request.output_tokens), outcome)
        except TimeoutError:
            outcome.error = "timeout"
        except StreamError as error:
            outcome.error = f"stream error: {error}"
        except aiohttp.ClientError as error:
            outcome.error = f"connection: {type(error).__name__}"
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
            outcome.error = f"unexpected answer: {type(error).__name__}"
        outcome.ended_s = time.perf_counter()
        return outcome

    def _body(self, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": output_tokens,
            "temperature": self._config.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._config.ignore_eos:
            body["ignore_eos"] = True
        if self._config.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return body

    async def _stream(self, body: dict[str, Any], outcome: Outcome) -> None:
        async with self._session.post(self._url, data=msgspec.json.encode(body)) as response:
            if response.status != 200:
                await response.read()
                outcome.error = f"http {response.status}"
                return
            complete = False
            async for event in events(response.content):
                if event == b"[DONE]":
                    complete = True
                else:
                    self._event(self._decoder.decode(event), outcome)
        if not complete:
            outcome.error = "incomplete stream"
        elif outcome.output_tokens == 0 and outcome.events:
            outcome.output_tokens = outcome.events  # a server without usage: one token an event

    def _event(self, event: dict[str, Any], outcome: Outcome) -> None:
        if event.get("error"):
            raise StreamError(str(event["error"].get("code") or event["error"].get("type")))
        if any(carries_text(choice) for choice in event.get("choices") or ()):
            outcome.token(time.perf_counter())
        usage = event.get("usage")
        if usage:
            outcome.input_tokens = usage["prompt_tokens"]
            outcome.output_tokens = usage["completion_tokens"]
            outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def carries_text(choice: dict[str, Any]) -> bool:
    """This part of an event says that a token came; a chat's opening role does not."""
    text = choice.get("text") or (choice.get("delta") or {}).get("content")
    return bool(text or choice.get("finish_reason"))


async def events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events."""
    pending = b""
    async for part in content.iter_any():
        pending += part.replace(b"\r\n", b"\n")
        *whole, pending = pending.split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip()


def root_of(url: str) -> str:
    """The URL up to `/v1`, which users give with or without it."""
    plain = url.rstrip("/")
    return plain if plain.endswith("/v1") else f"{plain}/v1"


async def ask_model(config: LoadConfig, session: aiohttp.ClientSession) -> tuple[str, int]:
    """Model name and vocabulary. Raises ConfigError if the server does not answer and the name is needed."""
    try:
        async with session.get(f"{root_of(config.url)}/models") as response:
            listed = (await response.json())["data"] if response.status == 200 else []
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{config.url} does not answer as an OpenAI API: {error or type(error).__name__}"
        ) from error
    names = {card["id"]: card for card in listed if isinstance(card, dict) and "id" in card}
    model = config.model or next(iter(names), None)
    if model is None:
        raise ConfigError(f"{config.url} lists no model (an API key may be missing): name one with --model")
    return model, config.vocabulary or names.get(model, {}).get("vocabulary") or VOCABULARY


async def run_load(config: LoadConfig, progress: Progress = lambda done, total: None) -> RunData:
    """Send the load, and wait for every answer. Raises ConfigError; errors of requests are counted, not raised."""
    headers = {"content-type": "application/json"}
    if config.api_key is not None:
        headers["authorization"] = f"Bearer {config.api_key}"
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    timeout = aiohttp.ClientTimeout(total=None, connect=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        model, vocabulary = await ask_model(config, session)
        # Warm-ups are prompts of their own, so that they fill no cache for the load.
        plan = plan_load(config, vocabulary, extra=config.warmups)
        target = Target(config, session, model)
        for request in plan[config.prompts :]:
            await target.send(request)
        del plan[config.prompts :]
        begun_s = time.perf_counter()
        outcomes = await run_plan(plan, target, config.concurrency, progress)
    return as_run(config, model, outcomes, begun_s)


async def run_plan(
    plan: list[LoadRequest], target: Target, concurrency: int | None, progress: Progress
) -> list[Outcome]:
    """All outcomes in the plan's order."""
    turns = asyncio.Semaphore(concurrency or len(plan))
    begun_s = time.perf_counter()
    done = 0

    async def one(request: LoadRequest) -> Outcome:
        nonlocal done
        await asyncio.sleep(max(0.0, begun_s + request.at_s - time.perf_counter()))
        async with turns:
            outcome = await target.send(request)
        done += 1
        progress(done, len(plan))
        return outcome

    progress(0, len(plan))
    return await asyncio.gather(*(one(request) for request in plan))


def as_run(config: LoadConfig, model: str, outcomes: list[Outcome], begun_s: float) -> RunData:
    """What reports are made of. The clock begins at `begun_s`."""
    gaps = [gap for outcome in outcomes if not outcome.error for gap in outcome.gaps_s]
    ended_s = max((outcome.ended_s for outcome in outcomes), default=begun_s)
    # The key is a secret, and a report is written to files.
    public = msgspec.structs.replace(config, api_key=None)
    return RunData(
        name=model,
        seed=config.seed,
        clock="wall",
        outcomes=columns(outcomes, begun_s),
        series=Series(at_ns=np.zeros(0, dtype=np.int64)),
        counters={},
        duration_s=ended_s - min((outcome.begun_s for outcome in outcomes), default=begun_s),
        settings=msgspec.to_builtins(public, enc_hook=str),
        facts={"model": model},
        goals=config.goals.of_all(len(outcomes)),
        gaps_s=np.array(gaps),
    )


def columns(outcomes: list[Outcome], begun_s: float) -> Outcomes:
    """One row an outcome. A request that failed has the instant it did as its end."""

    def instants(seconds: list[float]) -> np.ndarray:
        at_s = np.array(seconds, dtype=np.float64)
        return np.where(at_s > 0, np.rint((at_s - begun_s) * 1e9), 0).astype(np.int64)

    made = Outcomes.empty(len(outcomes))
    made.arrival_ns = instants([o.begun_s for o in outcomes])
    made.first_ns = instants([o.first_s for o in outcomes])
    # A server may send no text at all: then the end of the stream is all there is.
    made.finished_ns = instants([o.ended_s if o.error else (o.last_s or o.ended_s) for o in outcomes])
    made.prompt[:] = [o.input_tokens for o in outcomes]
    made.output[:] = [o.output_tokens for o in outcomes]
    made.cached[:] = [o.cached_tokens for o in outcomes]
    made.attempts[:] = 1
    for row, outcome in enumerate(outcomes):
        if outcome.error:
            made.fail(row, outcome.error)
    return made
