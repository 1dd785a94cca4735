"""Sockets, signals and the drain."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from headrace.api.app import create_app
from headrace.api.server import address_of, close, listen, listen_unix, serve_api
from headrace.api.tokenizer import Tokenizer
from headrace.types.errors import ConfigError
from tests.api.fakes import WAIT_S, FakeGateway, Pace, Running, serving

BODY = {"prompt": "fox", "max_tokens": 3, "ignore_eos": True}
SCRIPT = Path(__file__).with_name("serve_fake.py")


def slow(tokenizer: Tokenizer) -> FakeGateway:
    """It says one token, and waits."""
    gateway = FakeGateway(tokenizer)
    gateway.text("abcdef")
    gateway.pace = Pace(1)
    return gateway


@contextmanager
def streaming(address: str) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    with (
        httpx.Client(base_url=address, timeout=WAIT_S) as client,
        client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response,
    ):
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: {")
        yield lines


class TestDrain:
    def test_streams_go_on_to_their_end(self, tokenizer: Tokenizer) -> None:
        gateway = slow(tokenizer)
        with serving(gateway, tokenizer) as running, streaming(running.address) as lines:
            running.drain()
            ready = wait_for_draining(running)
            assert ready.json()["reason"] == "draining"
            refused = httpx.post(f"{running.address}/v1/completions", json=BODY, timeout=WAIT_S)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "draining"
            assert httpx.get(f"{running.address}/health", timeout=WAIT_S).status_code == 200
            assert gateway.pace is not None
            gateway.pace.allow(2)
            assert list(lines)[-1] == "data: [DONE]"
        assert not gateway.cancelled.is_set()

    def test_ends_streams_after_its_timeout(self, tokenizer: Tokenizer) -> None:
        gateway = slow(tokenizer)
        with (
            serving(gateway, tokenizer, drain_timeout_s=0.05) as running,
            streaming(running.address) as lines,
        ):
            running.drain()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert gateway.cancelled.is_set()
        assert gateway.open == 0

    def test_a_second_call_ends_at_once(self, tokenizer: Tokenizer) -> None:
        gateway = slow(tokenizer)
        with serving(gateway, tokenizer) as running, streaming(running.address) as lines:
            running.drain()
            running.drain()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert gateway.cancelled.is_set()


def wait_for_draining(running: Running) -> httpx.Response:
    with httpx.Client(timeout=WAIT_S) as client:
        for _ in range(5000):
            response = client.get(f"{running.address}/ready")
            if response.status_code == 503:
                return response
    raise AssertionError("still ready")


class TestSignals:
    @pytest.fixture
    def process(self) -> Iterator[subprocess.Popen[str]]:
        """A server in a process of its own; lines on its input let tokens through."""
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            yield process
            process.kill()

    def line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def allow(self, process: subprocess.Popen[str], tokens: int) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{tokens}\n")
        process.stdin.flush()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_drains(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        assert self.line(process) == "modules: ok"
        with streaming(self.line(process)) as lines:
            process.send_signal(number)
            assert self.line(process) == "draining: 1 requests are under way"
            self.allow(process, 10)
            assert list(lines)[-1] == "data: [DONE]"
        assert process.wait(WAIT_S) == 0
        assert self.line(process) == "cancelled: False"

    def test_two_signals_end_it(self, process: subprocess.Popen[str]) -> None:
        assert self.line(process) == "modules: ok"
        with streaming(self.line(process)) as lines:
            process.send_signal(signal.SIGTERM)
            assert self.line(process) == "draining: 1 requests are under way"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert process.wait(WAIT_S) == 0


class TestSockets:
    def test_a_port_in_use_names_the_flag(self) -> None:
        taken = listen("127.0.0.1", 0)
        taken.listen()
        port = taken.getsockname()[1]
        with taken, pytest.raises(ConfigError, match=rf"--port {port} .*in use"):
            listen("127.0.0.1", port)

    def test_a_port_taken_while_the_model_was_loaded(self, tokenizer: Tokenizer) -> None:
        with listen("127.0.0.1", 0) as ours, listen("127.0.0.1", ours.getsockname()[1]) as theirs:
            theirs.listen()
            app = create_app(FakeGateway(tokenizer), tokenizer)
            with pytest.raises(ConfigError, match="in use; choose another --port"):
                asyncio.run(serve_api(app, listener=ours))

    def test_an_unknown_host_names_the_flag(self) -> None:
        with pytest.raises(ConfigError, match=r"--host no\.such\.host\.invalid"):
            listen("no.such.host.invalid", 0)

    def test_addresses(self) -> None:
        for host, expected in (("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")):
            with listen(host, 0) as listener:
                assert address_of(listener).startswith(expected)

    def test_unix_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "api.sock"
        listener = listen_unix(path)
        assert address_of(listener) == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o600
        listener.listen()
        with pytest.raises(ConfigError, match="--uds"):
            listen_unix(path)
        listener.close()
        close(listen_unix(path))  # left over by a process that died
        assert not path.exists()

    def test_only_sockets_are_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text("mine")
        with pytest.raises(ConfigError, match="--uds"):
            listen_unix(path)
        assert path.read_text() == "mine"

    def test_a_vanished_client_is_noticed(self) -> None:
        with listen("127.0.0.1", 0) as listener:
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
