"""Pushes of weights into services whose KV lies elsewhere, too: swapped out, in host memory, on a disk that outlives them."""

import asyncio
from pathlib import Path

from headrace.live.service import Service
from headrace.live.settings import EngineSettings, PolicySettings, WorkerSettings
from headrace.nodes.limits import InstanceConfig, TierConfig
from headrace.types.payload import Submission
from headrace.types.weights import Running
from tests.live.fake import ONE_GROUP, SPEC, expected
from tests.live.pushing import push, serving
from tests.live.serving import collect, prompt_of, run, submission, take, until

ONE = (WorkerSettings(name="one", leaning="mixed"),)
STREAMS, TOKENS = 8, 120
PROMPTS, PROMPT = 12, 80


def counted(service: Service, name: str) -> int:
    return service.status().counters.get(name, 0)


# Swapped out


def crowded() -> Service:
    """Priorities change all the time, and there is room for a third of the streams."""
    fair = {"pattern": "random", "frequency": 0.2, "levels": 4}
    block_bytes = sum(SPEC.block_bytes(group) for group in range(len(SPEC.groups)))
    return serving(
        workers=ONE,
        kv_bytes=48 * block_bytes,
        engine=EngineSettings(
            ordering=PolicySettings("fair", fair), preemption=PolicySettings("swap", {"group_blocks": 4})
        ),
        instance=InstanceConfig(swap_blocks=(400, 400), lease_blocks=1),
        options={"step_s": 0.004},
    )


async def read(service: Service, wanted: Submission, begun: asyncio.Semaphore) -> list[int]:
    texts: dict[int, list[int]] = {0: []}
    async for chunk in service.submit(wanted):
        if not texts[0]:
            begun.release()
        take(texts, chunk)
    return texts[0]


def spans(wanted: Submission, text: list[int]) -> bool:
    """The old weights began it, and the new ones went on with all of it computed anew."""
    old = expected(wanted.payload, 0, TOKENS)
    return any(
        text[:count] == old[:count]
        and text == expected(wanted.payload, 0, TOKENS, 1, before=tuple(old[:count]))
        for count in range(1, TOKENS)
        if text[: count + 1] != old[: count + 1]
    )


def test_what_is_swapped_out_keeps_its_kv_over_a_push_or_is_computed_again():
    async def test(running: Running) -> None:
        service = crowded()
        await service.start()
        try:
            begun = asyncio.Semaphore(0)
            asked = [submission(service, prompt_of(n, 30), TOKENS) for n in range(STREAMS)]
            reading = [asyncio.ensure_future(read(service, wanted, begun)) for wanted in asked]
            for _ in asked:
                await begun.acquire()
            await until(lambda: counted(service, "swaps_out") > counted(service, "swaps_in") > 0)
            pushed = await push(service, running, hold_ns=20 * 10**9)
            back = counted(service, "swaps_in")
            texts = await asyncio.gather(*reading)
            kept = running is Running.KEEP
            assert (pushed.kept, pushed.recomputed) == ((STREAMS, 0) if kept else (0, STREAMS))
            assert counted(service, "swaps_full") == 0
            for wanted, text in zip(asked, texts, strict=True):
                assert text == expected(wanted.payload, 0, TOKENS) if kept else spans(wanted, text)
            if kept:
                await until(lambda: counted(service, "swaps_in") > back)
            again = submission(service, prompt_of(0, 30), 9)
            assert (await collect(service, again))[0] == expected(again.payload, 0, 9, 1)
            assert not service.failed.done(), service.failed.exception()
        finally:
            await service.stop()

    for running in Running:
        run(test(running))


# In tiers


def tiered(folder: Path) -> Service:
    """The pool holds three prompts, host memory twice as much, disk all."""
    return serving(
        ONE_GROUP,
        workers=ONE,
        kv_bytes=40 * ONE_GROUP.block_bytes(0),
        instance=InstanceConfig(lease_blocks=1),
        tiers=TierConfig(host_blocks=60, disk_blocks=1000, ahead_blocks=6),
        disk_cache=str(folder),
        options={"one_group": True},
    )


async def asked(service: Service, version: int) -> None:
    """Every prompt is answered by these weights."""
    for number in range(PROMPTS):
        wanted = submission(service, prompt_of(number, PROMPT), 6)
        text = (await collect(service, wanted))[0]
        assert text == expected(wanted.payload, 0, 6, version, ONE_GROUP), f"prompt {number}"


def hits(service: Service) -> tuple[int, int]:
    return counted(service, "tokens_hit_host"), counted(service, "tokens_hit_disk")


def test_tiers_go_on_after_a_push_and_a_restart_finds_none_of_it(tmp_path: Path):
    async def first() -> None:
        service = tiered(tmp_path)
        await service.start()
        try:
            await asked(service, 0)
            await asked(service, 0)
            assert min(hits(service)) > 0
            kept = submission(service, prompt_of(99, PROMPT), 60)
            answering = asyncio.ensure_future(collect(service, kept))
            await until(lambda: service.status().requests_running == 1)
            before = hits(service)
            pushed = await push(service)
            assert pushed.kept + pushed.recomputed <= 1
            await asked(service, 1)
            assert hits(service) == before, "nothing from before the push is found"
            saved = counted(service, "tier_disk_bytes_saved")
            await asked(service, 1)
            assert all(now > then for now, then in zip(hits(service), before, strict=True))
            assert counted(service, "tier_disk_bytes_saved") > saved
            text = (await answering)[0]
            assert not pushed.kept or text == expected(kept.payload, 0, 60, 0, ONE_GROUP)
            assert counted(service, "tier_spills_failed") == 0
        finally:
            await service.stop()

    async def second() -> None:
        service = tiered(tmp_path)
        await service.start()
        try:
            assert counted(service, "tier_files_outdated") > 0 and counted(service, "tier_files_damaged") == 0
            await asked(service, 0)
            assert counted(service, "tokens_hit_disk") > 0, "what the folder's weights had made"
            before = hits(service)
            await push(service)
            await asked(service, 1)
            assert hits(service) == before, "the first push of another life is not this one's"
        finally:
            await service.stop()

    run(first())
    run(second())
