"""The whole live system over real processes and sockets; only the model is a fake."""

import asyncio

import pytest

from headrace.live.settings import WorkerSettings
from headrace.nodes.limits import InstanceConfig
from tests.live.fake import SPEC
from tests.live.serving import collect, prompt_of, run, serving, submission, wanted_of

LEANINGS = {
    "split": ("prefill", "decode"),
    "mixed": ("mixed", "mixed"),
    "three": ("prefill", "decode", "mixed"),
}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("fleet", LEANINGS)
def test_streams_equal_the_reference(fleet: str, shared: bool) -> None:
    workers = tuple(
        WorkerSettings(name=f"w{i}", leaning=leaning) for i, leaning in enumerate(LEANINGS[fleet])
    )

    async def scenario() -> None:
        async with serving(workers=workers, shared=shared) as service:
            wanted = [
                submission(service, prompt_of(i, 5 + 17 * i % 90), 12 + i % 20, seed=i, choices=1 + i % 2)
                for i in range(24)
            ]
            texts = await asyncio.gather(*(collect(service, w) for w in wanted))
            assert texts == [wanted_of(w) for w in wanted]
            counters = service.status().counters
            assert (counters.get("transfer_bytes", 0) > 0) == (not shared and fleet != "mixed")

    run(scenario())


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_texts_survive_preemption(shared: bool) -> None:
    async def scenario() -> None:
        few = 90 * sum(SPEC.block_bytes(g) for g in range(2))
        async with serving(shared=shared, kv_bytes=few, instance=InstanceConfig(lease_blocks=2)) as service:
            wanted = [submission(service, prompt_of(i, 30 + i), 150, seed=i) for i in range(12)]
            texts = await asyncio.gather(*(collect(service, w) for w in wanted))
            assert texts == [wanted_of(w) for w in wanted]
            assert service.status().counters["preemptions"] > 0

    run(scenario())
