"""Workers started by hand that join a service: real processes, over TCP, with the fake executor."""

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import zmq

from headrace.live import wire
from headrace.live.bus import HUB, Link
from headrace.live.clock import Clock
from headrace.live.joining import approach
from headrace.live.keys import keys_of
from headrace.live.members import State
from headrace.live.service import Service
from headrace.live.settings import RecordSettings, TransferSettings, WorkerSettings
from headrace.types.errors import ConfigError, IncompatiblePeer, Overloaded, RequestFailed
from headrace.types.ids import Address
from headrace.types.messages import Drain
from headrace.types.payload import Submission
from tests.live.fake_joiner import joining_of
from tests.live.serving import (
    COMMAND,
    MODEL,
    REPOSITORY,
    SPLIT,
    collect,
    config_for,
    drawn,
    prompt_of,
    run,
    submission,
    until,
    wanted_of,
)

MS = 1_000_000
SECRET = "a secret that all hosts share"
SLOW = {"step_s": 0.004}
ONE = (WorkerSettings(name="w0"),)


@asynccontextmanager
async def listening(**fields: Any) -> AsyncIterator[Service]:
    config = config_for(**{"workers": (), "listen": "127.0.0.1:0", **fields})
    service = Service(config, MODEL, COMMAND, keys_of(SECRET.encode()))
    await service.start()
    try:
        yield service
        assert not service.failed.done(), service.failed.exception()
    finally:
        await service.stop()


def port_of(service: Service) -> int:
    return int(service.door.rpartition(":")[2])


@asynccontextmanager
async def joiner(port: int, secret: str = SECRET, **settings: Any) -> AsyncIterator[Process]:
    """A worker's process; what is left of it at the end is killed."""
    told = json.dumps({"port": port, "secret": secret, "options": SLOW, **settings})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.live.fake_joiner", told),
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"},
        stderr=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ready(service: Service, *names: str) -> None:
    await until(
        lambda: (
            [i.name for i in service.status().instances if i.state == "ready"] == sorted(names)
            or sorted(i.name for i in service.status().instances if i.state == "ready") == sorted(names)
        )
    )


def many(service: Service, count: int, tokens: int) -> list[Submission]:
    return [submission(service, prompt_of(i, 40 + i), tokens, seed=i) for i in range(count)]


async def say(process: Process) -> str:
    assert process.stderr is not None
    return (await process.stderr.read()).decode()


def test_a_service_of_joined_workers_alone() -> None:
    async def scenario() -> None:
        async with listening() as service:
            assert not service.status().ready
            assert f"waiting for workers to join at {service.door}" in service.status().reason
            with pytest.raises(Overloaded, match="no worker is here"):
                await collect(service, submission(service, prompt_of(1, 30), 5))
            async with joiner(port_of(service), name="far", leaning="decode") as process:
                await ready(service, "far")
                (instance,) = service.status().instances
                assert (instance.host, instance.leaning, instance.pid) == ("elsewhere", "decode", None)
                wanted = many(service, 8, 30)
                streams = [asyncio.create_task(collect(service, w)) for w in wanted]
                await until(lambda: drawn(service) > 5)
                process.send_signal(signal.SIGTERM)
                assert await asyncio.gather(*streams) == [wanted_of(w) for w in wanted]
                assert await process.wait() == 0
                await until(lambda: not service.status().instances)
                assert service.status().counters.get("failovers", 0) == 0
                assert service.status().blocks_total == 0

    run(scenario())


@pytest.mark.parametrize("far", ["prefill", "decode"])
def test_kv_is_handed_over_between_hosts(far: str) -> None:
    near = "decode" if far == "prefill" else "prefill"

    async def scenario() -> None:
        async with (
            listening(workers=(WorkerSettings(name="near", leaning=near),)) as service,
            joiner(port_of(service), name="far", leaning=far) as _,
        ):
            await ready(service, "far", "near")
            wanted = many(service, 12, 20)
            assert await asyncio.gather(*(collect(service, w) for w in wanted)) == [
                wanted_of(w) for w in wanted
            ]
            counters = service.status().counters
            assert counters["tokens_transferred"] > 0 and counters["transfer_bytes"] > 0
            assert not counters.get("failovers", 0)

    run(scenario())


def test_workers_here_and_elsewhere_share_the_work() -> None:
    async def scenario() -> None:
        async with (
            listening(workers=SPLIT, options=SLOW) as service,
            joiner(port_of(service), leaning="decode") as _,
        ):
            await ready(service, "prefill-0", "decode-0", "decode-elsewhere-0")
            wanted = many(service, 16, 40)
            assert await asyncio.gather(*(collect(service, w) for w in wanted)) == [
                wanted_of(w) for w in wanted
            ]

    run(scenario())


@pytest.mark.parametrize("leaning", ["mixed", "prefill", "decode"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told"])
def test_a_joined_worker_that_ends_costs_no_token(end: signal.Signals, leaning: str) -> None:
    """In the midst of handovers to it or from it, if it leans to one side."""

    async def scenario() -> None:
        other = {"mixed": "mixed", "prefill": "decode", "decode": "prefill"}[leaning]
        near = (WorkerSettings(name="w0", leaning=other),)
        async with listening(workers=near, options=SLOW) as service:
            async with joiner(port_of(service), name="far", leaning=leaning) as process:
                await ready(service, "w0", "far")
                wanted = many(service, 16, 60)
                streams = [asyncio.create_task(collect(service, w)) for w in wanted]
                await until(lambda: drawn(service) > 60)
                process.send_signal(end)
                assert await asyncio.gather(*streams) == [wanted_of(w) for w in wanted]
                await process.wait()
                await until(lambda: len(service.status().instances) == 1)
                assert len(service.pool_ids) == 1
            async with joiner(port_of(service), name="far"):
                await ready(service, "w0", "far")
                assert service.members.by_name["far"].epoch == 1
                assert list(service.pool_ids) == [0, 2]

    run(scenario())


def test_a_silent_worker_is_cut_off_and_starts_over() -> None:
    """As behind a partition: nothing comes, and its connections stay open."""

    async def scenario() -> None:
        limits = {"silence_ns": 1000 * MS, "heartbeat_ns": 100 * MS}
        async with (
            listening(workers=ONE, options=SLOW, **limits) as service,
            joiner(port_of(service), name="far", silence_ms=1000) as process,
        ):
            await ready(service, "w0", "far")
            wanted = many(service, 8, 60)
            streams = [asyncio.create_task(collect(service, w)) for w in wanted]
            await until(lambda: drawn(service) > 60)
            process.send_signal(signal.SIGSTOP)
            assert await asyncio.gather(*streams) == [wanted_of(w) for w in wanted]
            await until(lambda: "far" not in service.members.by_name)
            process.send_signal(signal.SIGCONT)
            await ready(service, "w0", "far")
            assert service.members.by_name["far"].epoch >= 1

    run(scenario())


def test_a_dismissed_worker_starts_over() -> None:
    async def scenario() -> None:
        async with listening() as service, joiner(port_of(service), name="far") as process:
            await ready(service, "far")
            service.members.expel(service.members.by_name["far"], "is not wanted")
            assert not service.status().instances
            await ready(service, "far")
            assert service.members.by_name["far"].epoch == 1
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            assert "far#0 was dismissed from the service: it is not wanted; starting over" in await say(
                process
            )

    run(scenario())


def test_streams_wait_for_another_worker() -> None:
    async def scenario() -> None:
        async with listening() as service:
            async with joiner(port_of(service), name="far"):
                await ready(service, "far")
                wanted = submission(service, prompt_of(1, 40), 60)
                stream = asyncio.create_task(collect(service, wanted))
                await until(lambda: drawn(service) > 10)
            async with joiner(port_of(service), name="other"):
                assert await stream == wanted_of(wanted)

    run(scenario())


def test_streams_do_not_wait_for_ever() -> None:
    async def scenario() -> None:
        async with listening(alone_ns=200 * MS) as service, joiner(port_of(service), name="far") as process:
            await ready(service, "far")
            stream = asyncio.create_task(collect(service, submission(service, prompt_of(2, 40), 3000)))
            await until(lambda: drawn(service) > 10)
            process.kill()
            with pytest.raises(RequestFailed, match=r"none has joined for 0\.2 s"):
                await stream

    run(scenario())


def test_a_worker_waits_for_a_service_that_starts_later() -> None:
    async def scenario() -> None:
        with socket.socket() as kept:
            # Nobody else gets the port meanwhile; who listens may share it.
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            kept.bind(("127.0.0.1", 0))
            port = kept.getsockname()[1]
            async with joiner(port, name="far") as process:
                assert process.stderr is not None
                assert b"nobody listens at" in await process.stderr.readline()
                async with listening(listen=f"127.0.0.1:{port}") as service:
                    await ready(service, "far")

    run(scenario())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"secret": "another secret, not the same"}, "drops us in the handshake"),
        ({"odd": {"fingerprint": "other"}}, "the model fingerprint differs"),
        ({"name": "router"}, "worker name 'router' is taken"),
    ],
    ids=["secret", "model", "name"],
)
def test_a_worker_that_cannot_join_says_why(settings: dict[str, Any], words: str) -> None:
    async def scenario() -> None:
        async with listening() as service:
            async with joiner(port_of(service), **settings) as process:
                assert await process.wait() == 2
                assert words in await say(process)
            assert not service.status().instances

    run(scenario())


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"protocol": 0}, "the protocol version differs: the worker has 0"),
        ({"fingerprint": "other"}, "the model fingerprint differs"),
        ({"dtype": "float32"}, "the dtype differs"),
        ({"block_size": 16}, "the block size differs"),
        ({"vocabulary": 7}, "the vocabulary differs"),
        ({"length_max": 64}, "the length limit --max-model-len differs"),
        ({"leaning": "upwards"}, "is none of prefill, decode, mixed"),
        ({"name": "../x"}, "not of letters"),
        ({"blocks": (1,)}, "does not fit the model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_named_before_anything_is_loaded(odd: dict[str, Any], words: str) -> None:
    async def scenario() -> None:
        async with listening() as service:
            with pytest.raises(IncompatiblePeer, match=words):
                await approach(joining_of(port_of(service), SECRET, {"odd": odd}), Clock())
            assert not service.status().instances

    run(scenario())


def test_a_name_that_is_taken_is_waited_for() -> None:
    async def scenario() -> None:
        async with listening(workers=ONE) as service:
            brief = joining_of(port_of(service), SECRET, {"name": "w0", "timeout_ms": 300})
            with pytest.raises(ConfigError, match="a worker named w0 is here; given up after 0 s"):
                await approach(brief, Clock())
            first, invitation = await approach(joining_of(port_of(service), SECRET, {"name": "far"}), Clock())
            assert invitation.config.address == Address("far", 0)
            second = asyncio.create_task(
                approach(joining_of(port_of(service), SECRET, {"name": "far"}), Clock())
            )
            await asyncio.sleep(0)
            first.link.close()
            late, invitation = await second
            assert invitation.config.address == Address("far", 1)
            late.link.close()

    run(scenario())


async def shout(port: int, noise: bytes) -> None:
    """Say it, and hear the other side hang up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    # It may hang up at any byte: what is said after that fails, with ENOTCONN where a half-close meets the end.
    with suppress(OSError):
        writer.write(noise)
        await writer.drain()
        writer.write_eof()
        while await reader.read(4096):
            pass
    writer.close()


def test_strangers_harm_nobody() -> None:
    async def scenario() -> None:
        async with listening(workers=ONE, options=SLOW) as service:
            wanted = many(service, 4, 80)
            streams = [asyncio.create_task(collect(service, w)) for w in wanted]
            greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0" + b"CURVE".ljust(20, b"\0") + b"\0" * 32
            for noise in (
                b"",
                b"GET / HTTP/1.0\r\n\r\n",
                secrets.token_bytes(4000),
                greeting + b"\x06" + (2**62).to_bytes(8, "big"),
                greeting + b"\x04\xc8\x05HELLO" + b"\1\0" + secrets.token_bytes(192),
                greeting.replace(b"CURVE", b"NULL\0") + b"\x04\x1a\x05READY",
            ):
                await shout(port_of(service), noise)
            context = zmq.Context()
            plain = context.socket(zmq.DEALER)
            plain.set(zmq.LINGER, 0)
            plain.connect(f"tcp://127.0.0.1:{port_of(service)}")
            plain.send_multipart(wire.encode(Address("far"), HUB, wire.Leave()))
            assert await asyncio.gather(*streams) == [wanted_of(w) for w in wanted]
            assert [i.name for i in service.status().instances] == ["w0"]
            plain.close()
            context.term()

    run(scenario())


def test_who_knows_the_secret_but_does_not_speak_our_language_is_told() -> None:
    async def scenario() -> None:
        async with listening(workers=ONE) as service:
            heard: asyncio.Queue[object] = asyncio.Queue()
            link = Link(
                Address("far"),
                f"tcp://127.0.0.1:{port_of(service)}",
                lambda source, target, message, payload: heard.put_nowait(message),
                heard.put_nowait,
                keys=keys_of(SECRET.encode()),
                silence_ms=30_000,
            )
            link.send(Address("router"), Drain())
            assert isinstance(await heard.get(), wire.Dismissed)
            link._socket.send([b"x", b"\xc1 no message", b""])
            answer = await heard.get()
            assert isinstance(answer, wire.NotWelcome) and "protocol version differs" in answer.reason
            link._socket.send([b"only one frame"])
            wanted = submission(service, prompt_of(1, 30), 5)
            assert await collect(service, wanted) == wanted_of(wanted)
            assert service.members.by_name["w0"].state is State.READY
            link.close()

    run(scenario())


@pytest.mark.parametrize("listen", ["nowhere.invalid:7000", "203.0.113.7:7000", "7000", "[::1:7000"])
def test_an_address_that_cannot_be_listened_on(listen: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match="--listen"):
            async with listening(listen=listen):
                pass

    run(scenario())


def test_what_cannot_go_together() -> None:
    with pytest.raises(ConfigError, match="--secret-file"):
        Service(config_for(listen="127.0.0.1:0"), MODEL, COMMAND)
    near = config_for(listen="127.0.0.1:0", transfer=TransferSettings(transport="shm"))
    with pytest.raises(ConfigError, match="--transport shm"):
        Service(near, MODEL, COMMAND, keys_of(SECRET.encode()))
    kept = config_for(listen="127.0.0.1:0", record=RecordSettings(folder="x"))
    with pytest.raises(ConfigError, match="--record"):
        Service(kept, MODEL, COMMAND, keys_of(SECRET.encode()))
    with pytest.raises(ConfigError, match="at least one worker"):
        Service(config_for(workers=()), MODEL, COMMAND)
