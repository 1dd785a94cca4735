"""Cancels, stalled lanes, strangers, and peers killed at any point: nothing lands late, nothing waits for ever."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import active_count

import msgspec
import numpy as np
import pytest

from headrace.live.transfer import pieces, streams
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.inbound import Inbound
from headrace.live.transfer.regions import Card, Descriptor
from headrace.live.transports import Settings, loop, tcp
from headrace.types.errors import TransferError
from headrace.types.ids import Address
from tests.live.transports.harness import NAMES, SECRET, Turns, ends, run, until

A, B = Address("a", 3), Address("b", 1)
every = pytest.mark.parametrize("name", NAMES)
REPOSITORY = Path(__file__).parents[3]


# Cancel


def test_a_page_may_be_used_again_when_a_cancel_is_done_and_not_before() -> None:
    early = 0
    for seed in range(300):
        early += reuse(seed, at_once=True)
        assert not reuse(seed, at_once=False)
    # The control: who does not wait for the end finds old bytes in the page's new life.
    assert early > 50


def reuse(seed: int, *, at_once: bool) -> bool:
    """Cancel a write in the midst, give its pages to somebody else; is what they wrote spoilt?"""
    turns = Turns()
    with ends("loop", A, B, turns=turns, nbytes=4096, seed=seed, lanes=2, file=False) as (a, b):
        transfers = [a.write(b, pieces.single(i * 64, i * 64, 64), immediate(1, 1)) for i in range(8)]
        turns.run(20 + seed % 40)
        for transfer in transfers:
            a.engine.cancel(transfer)
        if not at_once:
            turns.run()
            assert len(a.ended) == 8
        b.memory[:512] = 255
        turns.run()
        assert len(a.ended) == 8
        landed = b.engine.counter().vacant(1)
        assert landed >= sum(error is None for error in a.ended)
        return bool((b.memory[:512] != 255).any())


@every
def test_a_cancelled_transfer_ends(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B, nbytes=4 << 20, lanes=2) as (a, b):
            transfers = [a.write(b, pieces.single(0, 0, 4 << 20), immediate(1, 2)) for _ in range(20)]
            for transfer in transfers[5:]:
                a.engine.cancel(transfer)
            await until(lambda: len(a.ended) == 20)
            assert all("was cancelled" in str(error) for error in a.ended if error is not None)
            b.memory[:] = 7
            a.write(b, pieces.single(9, 100, 8))
            await until(lambda: len(a.ended) == 21)
            assert a.ended[20] is None
            assert (b.memory[:100] == 7).all() and (b.memory[108:] == 7).all()

    run(scenario())


# Lanes that stall


def test_a_stalled_lane_fails_its_transfers_by_name_and_nothing_lands_later() -> None:
    async def scenario() -> None:
        turns = asyncio.get_running_loop()
        switch = loop.Switch(turns, 5)
        switch.held = lambda source, lane: source == A and lane == 1
        with ends("loop", A, B, lanes=2, switch=switch, stall_ns=200_000_000) as (a, b):
            for i in range(10):
                a.write(b, pieces.single(0, i * 64, 64), immediate(1, 1))
            await until(lambda: len(a.ended) == 10)
            failed = [str(error) for error in a.ended if error is not None]
            assert failed and all(
                "from a#3 to b#1 failed: lane 1 of 2 to b#1 has not moved" in f for f in failed
            )
            b.memory[:] = 1
            switch.held = lambda _source, _lane: False
            switch.release()
            a.ended.clear()
            a.write(b, pieces.single(0, 4096, 64))
            a.write(b, pieces.single(0, 4096, 64))
            await until(lambda: len(a.ended) == 2)
            assert a.ended == [None, None] and (b.memory[:4096] == 1).all()

    run(scenario())


def test_a_peer_that_does_not_read_stalls_its_lane_only(caplog: pytest.LogCaptureFixture) -> None:
    """Over a real socket: the target's process is stopped."""

    async def scenario() -> None:
        with (
            ends("tcp", A, nbytes=64 << 20, stall_ns=1_500_000_000, stall_name="--flag") as (a,),
            peer("tcp", B, 64 << 20) as (
                process,
                theirs,
            ),
        ):
            a.write(theirs, pieces.single(0, 0, 1 << 20))
            await until(lambda: a.ended == [None])
            process.send_signal(signal.SIGSTOP)
            a.write(theirs, pieces.single(0, 0, 64 << 20))
            a.write(theirs, pieces.empty(), immediate(1, 1))
            stalled = "lane 0 of 1 to b#1 has not moved for 1.5 s (--flag)"
            await until(lambda: stalled in caplog.text)
            # Nobody has said yet that it cannot land: the end waits for the fence.
            assert len(a.ended) == 1
            process.send_signal(signal.SIGCONT)
            await until(lambda: len(a.ended) == 3)
            assert all(stalled in str(e) for e in a.ended[1:])
            a.write(theirs, pieces.single(0, 0, 100))
            await until(lambda: len(a.ended) == 4)
            assert a.ended[3] is None

    run(scenario())


# Peers that are killed


class peer:
    """An engine in a process of its own, for as long as this lasts."""

    def __init__(self, name: str, address: Address, nbytes: int) -> None:
        self._arguments = [name, address.name, str(address.epoch), str(nbytes)]

    def __enter__(self) -> tuple[subprocess.Popen[bytes], Descriptor]:
        path = f"{REPOSITORY}:{REPOSITORY / 'src'}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.transports.target", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        return self._process, msgspec.json.decode(self._process.stdout.readline(), type=Descriptor)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_target_that_is_killed_after_any_message_fails_what_is_left_of_it(name: str) -> None:
    """Killed by the source's count of what has ended: after the handshake, in the midst, near the end."""

    async def scenario() -> None:
        with ends(name, A, B, nbytes=4 << 20, lanes=2) as (a, b):
            for number, kill_after in enumerate((0, 1, 7, 30)):
                address = Address("victim", number)
                with peer(name, address, 4 << 20) as (process, theirs):
                    a.ended.clear()
                    for i in range(40):
                        a.write(theirs, pieces.single(0, 0, (4 << 20) - i), immediate(1, 2))
                    await until(lambda least=kill_after: len(a.ended) >= least)
                    os.kill(process.pid, signal.SIGKILL)
                    await asyncio.to_thread(process.wait)
                    a.engine.forget(address)
                    await until(lambda: len(a.ended) == 40)
                    failed = [str(error) for error in a.ended if error is not None]
                    assert all(f"from a#3 to victim#{number} failed" in f for f in failed)
                # The survivor goes on.
                a.ended.clear()
                a.write(b, pieces.single(0, 0, 100))
                await until(lambda: a.ended == [None])

    run(scenario())


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_of_peers_that_came_and_went_nothing_is_left(name: str) -> None:
    """Neither descriptors and threads, nor what was granted to them."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        kinds = [type(thing) for thing in gc.get_objects()]
        return len(os.listdir("/proc/self/fd")), active_count(), kinds.count(Inbound)

    async def scenario() -> None:
        with ends(name, A, lanes=2) as (a,):

            async def meet(epoch: int) -> None:
                with ends(name, Address("b", epoch), lanes=2) as (b,):
                    for source, target in ((a, b), (b, a)):
                        source.write(target, pieces.single(0, 0, 100))
                        await until(lambda source=source: bool(source.ended))
                    a.ended.clear()
                a.engine.forget(Address("b", epoch))

            await meet(0)
            before = held()
            for epoch in range(1, 20):
                await meet(epoch)
            await until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))

    run(scenario())


# Strangers


def test_a_stranger_is_dropped_and_heard_of_only_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with ends("tcp", A, B) as (a, b):
            host, _, port = b.engine.card.ways[0].lanes[0].rpartition("|")

            def knock(said: bytes) -> bytes:
                with socket.create_connection((host, int(port))) as sock:
                    sock.sendall(said)
                    sock.settimeout(60)
                    heard = b""
                    try:
                        while more := sock.recv(1024):
                            heard += more
                    except ConnectionResetError:
                        pass
                    return heard

            for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, (2).to_bytes(4, "little") + b"{}"):
                heard = await asyncio.to_thread(knock, said)
                assert len(heard) < 200
            assert caplog.text.count("dropped a stranger at b#1") == 3
            a.write(b, pieces.single(0, 0, 100))
            await until(lambda: a.ended == [None])

    run(scenario())


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_strangers_who_say_nothing_keep_no_peer_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than may greet at once, and none gives up by himself."""
    monkeypatch.setattr(streams, "GREETING_MAX", 4)
    monkeypatch.setattr(streams, "HANDSHAKE_S", 600.0)

    async def scenario() -> None:
        with ends(name, A, B) as (a, b), ExitStack() as strangers:
            host, _, port = b.engine.card.ways[0].lanes[0].rpartition("|")
            for _ in range(12):
                sock = socket.socket(socket.AF_UNIX if name == "shm" else socket.AF_INET)
                strangers.enter_context(sock)
                sock.connect(f"\0{port}" if name == "shm" else (host, int(port)))
            a.write(b, pieces.single(0, 0, 100))
            await until(lambda: a.ended == [None])

    run(scenario())


def test_another_secret_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with (
            ends("tcp", A, stall_ns=2_000_000_000) as (a,),
            ends("tcp", B, secret="another") as (b,),
        ):
            a.write(b, pieces.single(0, 0, 100), immediate(1, 1))
            await until(lambda: bool(a.ended))
            assert "do their secrets differ?" in str(a.ended[0]) and "from a#3 to b#1" in str(a.ended[0])
            assert "it calls itself a#3 and does not know the secret" in caplog.text
            assert not b.engine.counter().vacant(1)

    run(scenario())


# TLS, pacing


def test_the_same_within_tls(tmp_path: Path) -> None:
    files = certificate(tmp_path)

    async def scenario() -> None:
        with ends("tcp", A, B, nbytes=3 << 20, lanes=2, tls=files) as (a, b):
            a.write(b, pieces.single(0, 0, 3 << 20), immediate(1, 9))
            await until(lambda: bool(a.ended))
            assert a.ended == [None] and (a.memory == b.memory).all()
            assert b.engine.counter().vacant(1) == 9
            with ends("tcp", Address("plain"), stall_ns=300_000_000) as (plain,):
                plain.write(b, pieces.single(0, 0, 10))
                await until(lambda: bool(plain.ended))
                assert isinstance(plain.ended[0], TransferError)

    run(scenario())


def certificate(folder: Path) -> tuple[str, str, str]:
    """One that is signed by itself."""
    made, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=test", "-keyout", str(key), "-out", str(made)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl command")
    return str(made), str(key), str(made)


def test_a_paced_sender_takes_its_time() -> None:
    async def scenario() -> None:
        with ends("tcp", A, B, nbytes=1 << 20, pace=4 << 20) as (a, b):
            began = asyncio.get_running_loop().time()
            a.write(b, pieces.single(0, 0, 1 << 20))
            await until(lambda: bool(a.ended))
            assert a.ended == [None] and (a.memory == b.memory).all()
            assert asyncio.get_running_loop().time() - began > 0.2

    run(scenario())


def test_without_the_native_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.live.transfer import channels, copying

    monkeypatch.setattr(channels, "native", None)
    monkeypatch.setattr(copying, "native", None)

    async def scenario() -> None:
        for name in ("shm", "tcp"):
            with ends(name, A, B, nbytes=1 << 20) as (a, b):
                moved = pieces.paged(range(0, 1024, 2), np.arange(511, -1, -1), 1024)
                a.write(b, moved, immediate(1, 1))
                await until(lambda a=a: bool(a.ended))
                assert a.ended == [None]
                expected = a.memory.reshape(-1, 1024)[::2]
                assert (b.memory.reshape(-1, 1024)[511::-1] == expected).all()

    run(scenario())


def test_cards_are_plain_data() -> None:
    card = Card(A, "here", ())
    described = Descriptor(card, 1, 2, "layout", "token")
    assert msgspec.json.decode(msgspec.json.encode(described), type=Descriptor) == described


def test_what_stays_on_its_host_is_not_paced_by_it() -> None:
    wire = tcp.Tcp(Settings(A, SECRET))
    ((listener, address),) = wire.listen()
    with listener:
        made: list[socket.socket] = []
        channel = wire.connect(address, made.append)
        there, _ = listener.accept()
        other = wire.accept(there)
        for sock in (made[0], there):
            chosen = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            assert chosen.rstrip(b"\0") == tcp.UNPACED
        channel.close()
        other.close()
