"""Workers that die or hang under load: every stream goes on as if nothing had happened."""

import asyncio
import os
import signal

import pytest

from headrace.live.members import State
from headrace.live.service import Service
from headrace.live.settings import TransferSettings, WorkerSettings
from headrace.nodes.limits import InstanceConfig, RouterConfig
from headrace.types.errors import RequestFailed
from headrace.types.payload import Submission
from tests.live.fake import FAULT
from tests.live.serving import SPLIT, collect, prompt_of, run, serving, submission, until, wanted_of

FLEET = (*SPLIT, WorkerSettings(name="mixed-0"))
MS = 1_000_000
MIXED = (WorkerSettings(name="w0"),)
SMALL = InstanceConfig(tokens_max=128)
"""Prefilling takes many steps."""


def pid_of(service: Service, name: str) -> int:
    member = service.members.by_name[name]
    pid = service.launcher.pid(member.address)
    assert pid is not None
    return pid


def many(service: Service, count: int, tokens: int) -> list[Submission]:
    return [submission(service, prompt_of(i, 40 + i), tokens, seed=i) for i in range(count)]


DEATHS = {"prefill-0": 3, "decode-0": 6, "mixed-0": 4}
"""In which step of theirs workers are killed: there is work in it, and more of it to come."""


@pytest.mark.parametrize("transport", ["none", "shm", "tcp"])
@pytest.mark.parametrize("victim", DEATHS)
def test_a_killed_worker_costs_no_token(victim: str, transport: str) -> None:
    async def scenario() -> None:
        shared = transport == "none"
        transfer = TransferSettings(transport="auto" if shared else transport, lanes=2)
        options = {"step_s": 0.004, "dies_at": {victim: DEATHS[victim]}}
        async with serving(
            workers=FLEET, shared=shared, transfer=transfer, options=options, instance=SMALL
        ) as service:
            wanted = many(service, 32, 60)
            texts = await asyncio.gather(*(collect(service, w) for w in wanted))
            assert texts == [wanted_of(w) for w in wanted]
            assert service.status().counters["failovers"] > 0
            await until(lambda: all(i.state == "ready" for i in service.status().instances))
            assert await collect(service, (again := submission(service, prompt_of(77, 50), 20))) == wanted_of(
                again
            )

    run(scenario())


def test_a_stream_waits_neither_for_a_deadline_nor_for_a_new_worker() -> None:
    """A death is seen at once, and another worker goes on: it takes less than a second unless the machine is slow."""

    async def scenario() -> None:
        options = {"step_s": 0.004, "dies_at": {"decode-0": 30}}
        never = {"silence_ns": 10**12, "backoff_ns": 10**12, "backoff_max_ns": 10**12}
        async with serving(workers=SPLIT, options=options, **never) as service:
            wanted = submission(service, prompt_of(1, 60), 100)
            assert await collect(service, wanted) == wanted_of(wanted)
            assert service.status().counters["failovers"] == 1 and not service.members.restarts

    run(scenario())


def test_a_worker_that_hangs_is_killed_and_its_streams_go_on() -> None:
    async def scenario() -> None:
        async with serving(heartbeat_ns=50 * MS, silence_ns=1500 * MS, options={"step_s": 0.004}) as service:
            wanted = many(service, 4, 60)
            streams = [asyncio.create_task(collect(service, w)) for w in wanted]
            await until(lambda: service.status().counters.get("tokens_generated", 0) > 40)
            os.kill(pid_of(service, "decode-0"), signal.SIGSTOP)
            assert await asyncio.gather(*streams) == [wanted_of(w) for w in wanted]
            await until(lambda: service.members.by_name["decode-0"].epoch > 0)

    run(scenario())


def test_a_step_that_never_ends_is_ended() -> None:
    async def scenario() -> None:
        limits = {"heartbeat_ns": 50 * MS, "step_ns": 300 * MS}
        async with serving(workers=MIXED, options={"fault": "hang"}, **limits) as service:
            stream = asyncio.create_task(collect(service, submission(service, [FAULT], 5)))
            await until(lambda: service.members.restarts > 0)
            stream.cancel()

    run(scenario())


def test_a_failing_sequence_fails_alone() -> None:
    async def scenario() -> None:
        async with serving(options={"fault": "sequence"}) as service:
            good = submission(service, prompt_of(1, 30), 20)
            text = asyncio.create_task(collect(service, good))
            with pytest.raises(RequestFailed, match="this sequence has a fault"):
                await collect(service, submission(service, [FAULT], 5))
            assert await text == wanted_of(good)
            assert service.members.restarts == 0

    run(scenario())


@pytest.mark.parametrize("fault", ["error", "exit"])
def test_a_request_that_ends_its_workers_is_given_up(fault: str) -> None:
    async def scenario() -> None:
        router = RouterConfig(deaths_max=2)
        async with serving(workers=MIXED, options={"fault": fault}, router=router) as service:
            with pytest.raises(RequestFailed, match="2 workers ended while they ran this request"):
                await collect(service, submission(service, [FAULT], 5))
            good = submission(service, prompt_of(1, 30), 20)
            assert await collect(service, good) == wanted_of(good)

    run(scenario())


def test_workers_that_die_one_after_the_other() -> None:
    async def scenario() -> None:
        async with serving(workers=FLEET, shared=False, options={"step_s": 0.004}, backoff_ns=MS) as service:
            wanted = many(service, 16, 150)
            streams = [asyncio.create_task(collect(service, w)) for w in wanted]
            for count, victim in enumerate(("decode-0", "mixed-0", "prefill-0", "decode-0"), 1):
                await until(
                    lambda count=count: service.status().counters.get("tokens_generated", 0) > 300 * count
                )
                await until(lambda victim=victim: service.members.by_name[victim].state is State.READY)
                os.kill(pid_of(service, victim), signal.SIGKILL)
            assert await asyncio.gather(*streams) == [wanted_of(w) for w in wanted]

    run(scenario())


def test_when_no_worker_can_be_started_any_more_requests_end() -> None:
    async def scenario() -> None:
        options = {"step_s": 0.004, "restart_fault": True}
        async with serving(workers=MIXED, options=options, backoff_ns=MS) as service:
            stream = asyncio.create_task(collect(service, submission(service, prompt_of(1, 40), 3000)))
            await until(lambda: service.status().counters.get("tokens_generated", 0) > 5)
            os.kill(pid_of(service, "w0"), signal.SIGKILL)
            with pytest.raises(RequestFailed, match="no worker is left"):
                await stream
            status = service.status()
            assert not status.ready
            assert "cannot be loaded" in status.reason
            with pytest.raises(RequestFailed):
                await collect(service, submission(service, prompt_of(1, 40), 5))

    run(scenario())


def test_a_long_step_is_not_a_silent_worker() -> None:
    async def scenario() -> None:
        limits = {"heartbeat_ns": 50 * MS, "silence_ns": 1500 * MS}
        async with serving(workers=MIXED, options={"step_s": 2.0}, **limits) as service:
            wanted = submission(service, prompt_of(1, 20), 1)
            assert await collect(service, wanted) == wanted_of(wanted)
            assert service.members.restarts == 0

    run(scenario())
