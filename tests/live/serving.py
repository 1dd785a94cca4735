"""Services over the fake executor, and clients of them."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop
from msgspec.structs import replace

from headrace.live.service import Service
from headrace.live.settings import Model, ServiceConfig, WorkerSettings
from headrace.types.hashing import block_hashes
from headrace.types.payload import Chunk, SamplingParams, SequencePayload, Submission
from headrace.types.request import Request
from tests.live.fake import SPEC, VOCABULARY, expected

REPOSITORY = Path(__file__).parents[2]
HANG_S = 120.0
"""Only a test that hangs takes so long, on however slow a machine."""
COMMAND = [sys.executable, "-m", "tests.live.fake_worker"]
MODEL = Model(name="fake", fingerprint="fake", spec=SPEC, vocabulary=VOCABULARY, length_max=4096)
SPLIT = (
    WorkerSettings(name="prefill-0", leaning="prefill"),
    WorkerSettings(name="decode-0", leaning="decode"),
)


def config_for(**fields: Any) -> ServiceConfig:
    """Small pools, and workers that can import the tests."""
    config = ServiceConfig(
        workers=SPLIT,
        kv_bytes=8 * 2**20,
        threads=1,
        environment={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"},
    )
    return replace(config, **fields)


def run(test: Coroutine[Any, Any, None], timeout_s: float = HANG_S) -> None:
    async def within() -> None:
        async with asyncio.timeout(timeout_s):
            await test

    uvloop.run(within())


@asynccontextmanager
async def serving(**fields: Any) -> AsyncIterator[Service]:
    service = Service(config_for(**fields), MODEL, COMMAND)
    await service.start()
    try:
        yield service
        assert not service.failed.done(), service.failed.exception()
    finally:
        await service.stop()


def submission(
    service: Service, prompt: list[int], tokens: int, *, choices: int = 1, **sampling: Any
) -> Submission:
    root = service.root("")
    params = SamplingParams(tokens_max=tokens, **sampling)
    request = Request(
        id=service.next_id(),
        prompt=len(prompt),
        hashes=tuple(block_hashes(root, prompt, SPEC.block_size)),
        tokens_max=tokens,
        choices=choices,
        arrival_ns=service.now_ns(),
    )
    return Submission(request, SequencePayload(root, prompt, len(prompt), params))


def prompt_of(index: int, length: int) -> list[int]:
    return [(index * 7919 + i * 31) % (VOCABULARY - 1) for i in range(length)]


async def collect(service: Service, wanted: Submission) -> dict[int, list[int]]:
    """Token ids by choice; chunks must continue each other."""
    texts: dict[int, list[int]] = {i: [] for i in range(wanted.request.choices)}
    async for chunk in service.submit(wanted):
        take(texts, chunk)
    return texts


def take(texts: dict[int, list[int]], chunk: Chunk) -> None:
    assert chunk.first == len(texts[chunk.choice]), "a chunk is lost or doubled"
    texts[chunk.choice] += chunk.token_ids


async def hear(service: Service, wanted: Submission, enough: Callable[[], bool]) -> list[int]:
    """What one choice says until `enough()`, and twenty tokens more: whatever was waited for happened while it ran."""
    texts: dict[int, list[int]] = {0: []}
    more = 0
    async with aclosing(service.submit(wanted)) as stream:
        async for chunk in stream:
            take(texts, chunk)
            more += enough()
            if more >= 20:
                return texts[0]
    raise AssertionError(f"it ended after {len(texts[0])} tokens, before what was waited for")


def drawn(service: Service) -> int:
    """Tokens, since the start."""
    return service.status().counters.get("tokens_generated", 0)


def quiet(service: Service) -> bool:
    """No worker has anything left, as far as it has said."""
    reports = [i.report for i in service.status().instances]
    return all(r is not None and not (r.running or r.waiting or r.held or r.receiving) for r in reports)


def wanted_of(wanted: Submission) -> dict[int, list[int]]:
    """What `collect` must give."""
    count = wanted.request.tokens_max
    return {i: expected(wanted.payload, i, count) for i in range(wanted.request.choices)}


async def until(condition: Callable[[], bool]) -> None:
    """Within the test's own time limit."""
    while not condition():
        await asyncio.sleep(0.002)
