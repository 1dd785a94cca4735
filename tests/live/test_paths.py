"""Services of real processes whose KV goes by each way and path: the texts are those of the reference, also when a worker is killed."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from headrace.live.settings import TransferSettings
from headrace.live.transfer import pieces
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transports import Settings, open_transports
from headrace.types.ids import Address
from tests.live.onesided import fabric_environment, nixl_environment
from tests.live.serving import collect, prompt_of, run, serving, submission, until, wanted_of
from tests.live.test_failover import DEATHS, FLEET, SMALL, many, pid_of

Environment = Callable[[Path], dict[str, str]]


def nixl(ways: str, folder: Path) -> dict[str, str]:
    return nixl_environment(folder) | ({"UCX_TLS": ways} if ways else {})


def fabric(provider: str, folder: Path) -> dict[str, str]:
    return fabric_environment(provider)


WAYS: dict[str, tuple[str, Environment]] = {
    "nixl over tcp": ("nixl", partial(nixl, "tcp")),
    "nixl over shared memory": ("nixl", partial(nixl, "")),
    "fabric over tcp": ("fabric", partial(fabric, "tcp;ofi_rxm")),
    "fabric over shared memory": ("fabric", partial(fabric, "shm")),
}


@pytest.mark.parametrize(("way", "path"), list(zip(WAYS, ("runs", "gather", "gather", "runs"), strict=True)))
def test_texts_are_right_by_every_way(way: str, path: str, tmp_path: Path) -> None:
    transport, environment = WAYS[way]

    async def scenario() -> None:
        fields = {
            "environment": environment(tmp_path),
            "transfer": TransferSettings(transport=transport, path=path),
        }
        async with serving(shared=False, **fields) as service:
            wanted = [submission(service, prompt_of(i, 5 + 17 * i % 90), 12, seed=i) for i in range(16)]
            texts = await asyncio.gather(*(collect(service, w) for w in wanted))
            assert texts == [wanted_of(w) for w in wanted]
            assert service.status().counters["transfer_bytes"] > 0

    run(scenario())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_texts_are_right_by_gathering(transport: str) -> None:
    async def scenario() -> None:
        async with serving(
            shared=False, transfer=TransferSettings(transport=transport, path="gather")
        ) as service:
            wanted = [submission(service, prompt_of(i, 5 + 17 * i % 90), 12, seed=i) for i in range(24)]
            texts = await asyncio.gather(*(collect(service, w) for w in wanted))
            assert texts == [wanted_of(w) for w in wanted]

    run(scenario())


@pytest.mark.parametrize(
    ("way", "victim"),
    [
        ("gather", FLEET[0].name),
        ("gather", FLEET[1].name),
        ("nixl over tcp", FLEET[1].name),
        ("fabric over tcp", FLEET[0].name),
        ("fabric over shared memory", FLEET[1].name),
    ],
)
def test_a_killed_worker_costs_no_token(way: str, victim: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        fields: dict[str, object] = {"transfer": TransferSettings(transport="tcp", path="gather")}
        if way in WAYS:
            transport, environment = WAYS[way]
            fields = {
                "environment": environment(tmp_path),
                "transfer": TransferSettings(transport=transport),
            }
        options = {"step_s": 0.004, "dies_at": {victim: DEATHS[victim]}}
        async with serving(workers=FLEET, shared=False, options=options, instance=SMALL, **fields) as service:
            wanted = many(service, 24, 40)
            assert await asyncio.gather(*(collect(service, w) for w in wanted)) == [
                wanted_of(w) for w in wanted
            ]
            assert service.status().counters["failovers"] > 0

    run(scenario())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_whoever_knows_the_secret_and_counts_what_nobody_sent_ends_no_worker(transport: str) -> None:
    """It is refused from then on; the requests of others go on by the very workers that they began with."""

    async def scenario() -> None:
        settings = TransferSettings(transport=transport)
        async with serving(
            workers=FLEET, shared=False, transfer=settings, options={"step_s": 0.004}, instance=SMALL
        ) as service:
            pids = [pid_of(service, worker.name) for worker in FLEET]
            wanted = many(service, 16, 60)
            streams = [asyncio.create_task(collect(service, w)) for w in wanted]
            await until(lambda: service.status().counters.get("tokens_generated", 0) > 5)
            rogue = Address("rogue")
            known = Settings(rogue, service._team._secret)
            engine = TransferEngine(rogue, open_transports(transport, known), asyncio.get_running_loop())
            place = service.members.by_name["decode-0"].place
            assert place is not None
            heard: list[str] = []
            why = "takes nothing of rogue#0 any more: it counted 65535 for slot"
            while not any(why in error for error in heard):
                # Bytes have landed, and are acknowledged, before the core says that they cannot be.
                before = len(heard)
                count = immediate(before, 65535)
                engine.write(
                    None, place.descriptor, pieces.empty(), lambda e: heard.append(str(e)), imm=count
                )
                await until(lambda before=before: len(heard) > before)
            engine.close()
            assert await asyncio.gather(*streams) == [wanted_of(w) for w in wanted]
            assert [pid_of(service, worker.name) for worker in FLEET] == pids

    run(scenario())
