"""How a service starts, ends, and treats clients that leave."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from headrace.live.service import Service
from headrace.live.settings import TransferSettings, WorkerSettings
from headrace.types.errors import ConfigError, HeadraceError, Overloaded, RequestFailed
from headrace.types.request import FinishReason
from tests.live.fake import expected
from tests.live.serving import (
    COMMAND,
    MODEL,
    REPOSITORY,
    collect,
    config_for,
    prompt_of,
    quiet,
    run,
    serving,
    submission,
    until,
    wanted_of,
)

MIXED = (WorkerSettings(name="w0"),)


# Clients


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_a_client_that_leaves_cancels_its_work(shared: bool) -> None:
    async def scenario() -> None:
        async with serving(shared=shared, options={"step_s": 0.002}) as service:
            total = service.status().blocks_total
            for count in range(4):
                wanted = submission(service, prompt_of(count, 60), 4000, choices=2)
                async with aclosing(service.submit(wanted)) as stream:
                    for _ in range(count * 7):
                        await anext(stream)
            assert service.status().requests_running == 8 - 6
            await until(lambda: service.status().requests_running == 0 and quiet(service))
            # All is free or evictable but for what the workers keep in hand.
            kept = 2 * 2 * 4 * service._config.instance.lease_blocks
            await until(lambda: service.status().blocks_free >= total - kept)

    run(scenario())


def test_a_withdrawn_choice_ends_without_a_chunk_and_the_others_go_on() -> None:
    async def scenario() -> None:
        async with serving(options={"step_s": 0.002}) as service:
            wanted = submission(service, prompt_of(3, 40), 30, choices=2)
            texts: dict[int, list[int]] = {0: [], 1: []}
            async for chunk in service.submit(wanted):
                texts[chunk.choice] += chunk.token_ids
                if chunk.choice == 0 and len(texts[0]) == 5:
                    service.withdraw(wanted.request.id, 0)
                    assert chunk.finish is None
            whole = wanted_of(wanted)
            assert texts[1] == whole[1]
            assert texts[0] == whole[0][:5]

    run(scenario())


def test_a_client_that_stops_reading_holds_up_nobody() -> None:
    async def scenario() -> None:
        async with serving() as service:
            slow = submission(service, prompt_of(1, 40), 200)
            async with aclosing(service.submit(slow)) as stream:
                first = await anext(stream)
                fast = [submission(service, prompt_of(i, 50), 40) for i in range(8)]
                texts = await asyncio.gather(*(collect(service, w) for w in fast))
                assert texts == [wanted_of(w) for w in fast]
                await until(lambda: service.status().requests_running == 0)
                rest = [chunk async for chunk in stream]
            ids = [*first.token_ids, *(i for chunk in rest for i in chunk.token_ids)]
            assert ids == expected(slow.payload, 0, 200)

    run(scenario())


def test_finish_reasons_logprobs_and_times() -> None:
    async def scenario() -> None:
        async with serving(shared=False) as service:
            plain = submission(service, prompt_of(5, 70), 20, logprobs=0)
            chunks = [chunk async for chunk in service.submit(plain)]
            ids = [i for chunk in chunks for i in chunk.token_ids]
            assert [entry.logprob for chunk in chunks for entry in chunk.logprobs] == [-float(i) for i in ids]
            last = chunks[-1]
            assert last.finish is FinishReason.LENGTH
            assert last.timeline is not None
            times = last.timeline
            stamps = [
                times.arrival_ns,
                times.placed_ns,
                times.prefill_ns,
                times.prefilled_ns,
                times.joined_ns,
            ]
            assert stamps == sorted(stamps)
            assert times.joined_ns < times.finished_ns
            assert times.blocks_moved > 0
            stopping = submission(service, prompt_of(5, 70), 20, stop_token_ids=(ids[9],))
            chunks = [chunk async for chunk in service.submit(stopping)]
            assert [i for chunk in chunks for i in chunk.token_ids] == ids[: ids.index(ids[9]) + 1]
            assert chunks[-1].finish is FinishReason.STOP
            assert service.status().counters["tokens_prompt_hit"] > 0

    run(scenario())


# Start and end


def test_draining_finishes_what_is_there_and_takes_nothing_new() -> None:
    async def scenario() -> None:
        async with serving(options={"step_s": 0.002}) as service:
            wanted = submission(service, prompt_of(1, 40), 50)
            text = asyncio.create_task(collect(service, wanted))
            await until(lambda: service.status().counters.get("tokens_generated", 0) > 5)
            drained = asyncio.create_task(service.drain())
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await collect(service, submission(service, prompt_of(2, 40), 5))
            assert await drained
            assert await text == wanted_of(wanted)

    run(scenario())


def test_draining_does_not_wait_for_ever() -> None:
    async def scenario() -> None:
        async with serving(options={"step_s": 0.002}, shutdown_ns=100_000_000) as service:
            text = asyncio.create_task(collect(service, submission(service, prompt_of(1, 40), 3000)))
            await until(lambda: service.status().requests_running == 1)
            assert not await service.drain()
            await service.stop()
            with pytest.raises(RequestFailed, match="shut down"):
                await text

    run(scenario())


@pytest.mark.parametrize(
    ("odd", "field"),
    [
        ({"fingerprint": "other"}, "model fingerprint"),
        ({"numerics": "other"}, "numerics id"),
        ({"vocabulary": 7}, "vocabulary"),
    ],
)
def test_a_worker_that_differs_is_refused_by_the_fields_name(odd: dict[str, object], field: str) -> None:
    async def scenario() -> None:
        service = Service(config_for(options={"odd_worker": "decode-0", "odd": odd}), MODEL, COMMAND)
        # With other arithmetic it is whoever comes second that is refused.
        with pytest.raises(HeadraceError, match=f"-0 does not start: the {field} differs"):
            await service.start()

    run(scenario())


def test_a_worker_that_cannot_load_says_why() -> None:
    async def scenario() -> None:
        config = config_for(options={"start_fault": "decode-0"}, backoff_ns=1_000_000)
        with pytest.raises(
            HeadraceError, match=r"decode-0 does not start(.|\n)*3 times(.|\n)*cannot be loaded"
        ):
            await Service(config, MODEL, COMMAND).start()

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_bytes": 2**50}, "--kv-memory asks for"),
        ({"kv_bytes": 100}, "--kv-memory 100 bytes"),
        ({"workers": ()}, "at least one worker"),
        ({"workers": (WorkerSettings(name="router"),)}, "'router' is taken"),
        ({"workers": MIXED * 2}, "'w0' is taken"),
        ({"workers": (WorkerSettings(name="w0", leaning="both"),)}, "none of prefill"),
        ({"transfer": TransferSettings(transport="pigeon")}, "pigeon"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, object], message: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match=message):
            await Service(config_for(**fields), MODEL, COMMAND).start()

    run(scenario())


# Processes


SERVE = """
import asyncio, json, sys, uvloop
from tests.live.serving import serving, SPLIT, submission, prompt_of
async def main():
    async with serving(shared=False, options={"step_s": 0.002}) as service:
        stream = service.submit(submission(service, prompt_of(1, 60), 3000))
        await anext(stream)
        pids = [service.launcher.pid(m.address) for m in service.members]
        print(json.dumps(pids), flush=True)
        if sys.argv[1] == "busy":
            async for chunk in stream: pass
        await stream.aclose()
        await asyncio.Event().wait()
uvloop.run(main())
"""


def start_serving(mode: str) -> tuple[subprocess.Popen[str], list[int]]:
    environment = {**os.environ, **config_for().environment}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, mode],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def processor_ms(pid: int) -> int:
    """Time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 // os.sysconf("SC_CLK_TCK")


def test_killing_the_server_leaves_no_child_and_no_socket() -> None:
    process, pids = start_serving("busy")
    sockets = f"@headrace-{process.pid}-"
    assert sockets in Path("/proc/net/unix").read_text()

    async def scenario() -> None:
        ends = [os.pidfd_open(pid) for pid in pids]
        process.kill()
        process.wait()
        loop = asyncio.get_running_loop()
        for end in ends:
            gone = asyncio.Event()
            loop.add_reader(end, gone.set)
            await gone.wait()
            loop.remove_reader(end)
            os.close(end)

    run(scenario())
    assert sockets not in Path("/proc/net/unix").read_text()
    assert process.stdout is not None
    process.stdout.close()


def test_an_idle_service_uses_no_processor_time() -> None:
    process, pids = start_serving("idle")
    try:

        async def scenario() -> None:
            while True:
                # What the request left to be done takes as long as it takes; then there is nothing more.
                before = [processor_ms(pid) for pid in (process.pid, *pids)]
                await asyncio.sleep(1.0)
                after = [processor_ms(pid) for pid in (process.pid, *pids)]
                if all(b - a <= 10 for a, b in zip(before, after, strict=True)):
                    break

        run(scenario())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
