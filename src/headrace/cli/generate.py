"""`headrace generate`: complete prompts from a file or standard input, on a service without HTTP."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from headrace.api.errors import ApiError
from headrace.api.generation import Generation
from headrace.api.jobs import JobBuilder
from headrace.api.metrics import Meter, Metrics
from headrace.api.protocol import CompletionBody, parse
from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import Tokenizer
from headrace.cli import wiring
from headrace.cli.options import EngineOptions
from headrace.live.service import Service
from headrace.types.errors import ConfigError, HeadraceError
from headrace.workload.report import progress_bar

AT_ONCE = 1024
"""Prompts given to the service at once; it forms its own batches of them."""

Body = dict[str, Any]


async def generate(options: EngineOptions, prompts: Path | None, output: Path | None, defaults: Body) -> None:
    """One JSON line per prompt, in their order. A prompt that fails gives a line with `error`; the others go on."""
    bodies = [defaults | body for body in read_bodies(prompts)]
    probing = asyncio.create_task(wiring.probe(options))
    tokenizer = await asyncio.to_thread(Tokenizer.load, wiring.folder(options))
    found = await probing
    service = Service(wiring.service_config(options, found), wiring.model(options, found), wiring.WORKER)
    async with wiring.running(service):
        worker = Completer(service, tokenizer)
        with progress_bar(Console(stderr=True)) as progress:
            lines = await worker.complete_all(bodies, progress)
    if output is None:
        write(lines, sys.stdout)
        return
    with output.open("w", encoding="utf-8") as file:
        write(lines, file)


def read_bodies(prompts: Path | None) -> list[Body]:
    """A body per non-empty line. Raises ConfigError naming the line."""
    try:
        text = prompts.read_text(encoding="utf-8") if prompts is not None else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {prompts or 'standard input'}: {error}") from error
    bodies: list[Body] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("{"):
            try:
                bodies.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"--prompts, line {number}: begins like JSON but is not: {error}"
                ) from error
        elif line.strip():
            bodies.append({"prompt": line})
    if not bodies:
        raise ConfigError("--prompts: no prompt found; give one per line")
    return bodies


def write(lines: list[Body], file: TextIO) -> None:
    for line in lines:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


class Completer:
    """Runs completion bodies as the HTTP API would."""

    def __init__(self, service: Service, tokenizer: Tokenizer) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._metrics = Metrics(service)
        self._jobs = JobBuilder(service, tokenizer, ApiSettings())
        self._room = asyncio.Semaphore(AT_ONCE)

    async def complete_all(self, bodies: list[Body], progress: Callable[[int, int], None]) -> list[Body]:
        """An answer per body, in their order."""
        done = 0

        async def one(number: int, body: Body) -> Body:
            nonlocal done
            async with self._room:
                answer = await self._complete(number, body)
            done += 1
            progress(done, len(bodies))
            return answer

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, body)) for i, body in enumerate(bodies)]
        return [task.result() for task in tasks]

    async def _complete(self, number: int, body: Body) -> Body:
        shown = {"prompt": body.get("prompt")}
        try:
            raw = json.dumps(body).encode()
            job = await self._jobs.build(parse(raw, CompletionBody), str(number), len(raw), 0.0)
            lengths = [len(prompt.token_ids) for prompt in job.prompts]
            tokens_max = max(s.request.tokens_max for s in job.submissions)
            meter = Meter(self._metrics, lengths, job.n, tokens_max, 0.0)
            generation = Generation(self._service, self._tokenizer, job, meter)
            texts = [""] * len(generation.choices)
            reasons = [""] * len(texts)
            async for piece in generation.pieces():
                texts[piece.index] += piece.text
                reasons[piece.index] = piece.finish.value if piece.finish else reasons[piece.index]
        except (ApiError, HeadraceError) as error:
            return shown | {"error": str(error)}
        prompt, new, cached = generation.counts()
        choices = [{"text": t, "finish_reason": r} for t, r in zip(texts, reasons, strict=True)]
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "cached_tokens": cached or 0}
        return shown | {"choices": choices, "usage": usage}
