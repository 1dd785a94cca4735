"""A running sequence moves from one process to another, and its client notices nothing."""

import asyncio
import os
import signal

import pytest

from headrace.live.service import Service
from headrace.live.settings import PolicySettings, WorkerSettings
from headrace.nodes.limits import InstanceConfig
from tests.live.fake import expected
from tests.live.serving import hear, prompt_of, run, serving, submission, until

PAIR = (WorkerSettings(name="one"), WorkerSettings(name="two"))
SPLIT = (
    WorkerSettings(name="prefill-0", leaning="prefill"),
    WorkerSettings(name="decode-0", leaning="decode"),
    WorkerSettings(name="decode-1", leaning="decode"),
)
LEVEL = PolicySettings("virtual_usage", {"out": 8000, "into": 8000, "period_s": 0.02, "urgent_tokens": 0})
"""Of the 11,000 blocks of each pool: two running sequences are too many, one is not."""
SMALL = InstanceConfig(tokens_max=64, lease_blocks=4, move_blocks_last=1)


def moved(service: Service) -> bool:
    return service.status().counters.get("migrations", 0) > 0


@pytest.mark.parametrize("workers", [PAIR, SPLIT], ids=["mixed", "split"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_texts_do_not_change(workers: tuple[WorkerSettings, ...], shared: bool) -> None:
    async def scenario() -> None:
        async with serving(
            workers=workers, shared=shared, options={"step_s": 0.004}, instance=SMALL, rebalance=LEVEL
        ) as service:
            wanted = [submission(service, prompt_of(i, 70 + i), 3000, seed=i) for i in range(3)]
            texts = await asyncio.gather(*(hear(service, w, lambda: moved(service)) for w in wanted))
            assert texts == [expected(w.payload, 0, len(text)) for w, text in zip(wanted, texts, strict=True)]

    run(scenario())


@pytest.mark.parametrize("victim", [w.name for w in PAIR])
def test_a_death_on_the_way_costs_no_token(victim: str) -> None:
    async def scenario() -> None:
        async with serving(
            workers=PAIR, shared=False, options={"step_s": 0.004}, instance=SMALL, rebalance=LEVEL
        ) as service:
            wanted = [submission(service, prompt_of(i, 70 + i), 3000, seed=i) for i in range(3)]
            streams = [
                asyncio.create_task(hear(service, w, lambda: service.members.restarts > 0)) for w in wanted
            ]
            await until(lambda: moved(service))
            pid = service.launcher.pid(service.members.by_name[victim].address)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            texts = await asyncio.gather(*streams)
            assert texts == [expected(w.payload, 0, len(text)) for w, text in zip(wanted, texts, strict=True)]
            assert service.status().counters["failovers"] > 0

    run(scenario())
