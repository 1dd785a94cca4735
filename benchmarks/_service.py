"""A real service in a benchmark's own process, driven by token ids."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from headrace.cli import wiring
from headrace.cli.options import EngineOptions
from headrace.live.service import Service
from headrace.types.hashing import block_hashes
from headrace.types.payload import SamplingParams, SequencePayload, Submission
from headrace.types.request import Request, Timeline


@asynccontextmanager
async def service(**options: Any) -> AsyncIterator[Service]:
    """As `headrace serve` would run it, without HTTP."""
    resolved = EngineOptions(**options)
    found = await wiring.probe(resolved)
    made = Service(wiring.service_config(resolved, found), wiring.model(resolved, found), wiring.WORKER)
    async with wiring.running(made) as running:
        yield running


async def complete(
    running: Service, ids: list[int], tokens: int, salt: str = ""
) -> tuple[list[int], Timeline]:
    """Greedy tokens, and where the time went. Another salt never finds this one's cache."""
    root = running.root(salt)
    now = running.now_ns()
    sampling = SamplingParams(temperature=0, ignore_eos=True, tokens_max=tokens)
    hashes = tuple(block_hashes(root, ids, running.info().block_size))
    request = Request(running.next_id(), len(ids), hashes, tokens, arrival_ns=now)
    got: list[int] = []
    timeline = Timeline()
    async for chunk in running.submit(Submission(request, SequencePayload(root, ids, len(ids), sampling))):
        got.extend(chunk.token_ids)
        timeline = chunk.timeline or timeline
    return got, timeline


async def complete_all(
    running: Service, prompts: list[list[int]], tokens: int, salt: str = ""
) -> list[list[int]]:
    """All at once."""
    done = await asyncio.gather(*(complete(running, ids, tokens, salt) for ids in prompts))
    return [ids for ids, _ in done]
