"""Two hosts as network namespaces: `headrace serve --listen` in one, `headrace worker --join` in the other, the real `openai` client.

Each namespace has only a loopback of its own and one end of a cable. The client reaches the server by its Unix socket.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import AF_UNIX
from socket import socket as socket_of
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.cli.running import pause

MODEL = "headrace-python-5m"
HERE, THERE = "10.86.0.1", "10.86.0.2"
DOOR = f"{HERE}:7000"
LONG = "import os\n\n\ndef walk(folder):\n" * 12
START_S = 120.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def permitted() -> bool:
    if os.geteuid() or shutil.which("ip") is None:
        return False
    name = f"headrace-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "del", name)
    return made


class Hosts:
    """Two namespaces and the cable between them."""

    def __init__(self) -> None:
        mark = f"{os.getpid()}{secrets.token_hex(2)}"
        self.here, self.there = f"headrace-{mark}-a", f"headrace-{mark}-b"

    def lay(self, cleanup: ExitStack) -> None:
        for name in (self.here, self.there):
            ip("netns", "add", name)
            cleanup.callback(ip, "netns", "del", name)
        ip("-n", self.here, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", self.there)
        for name, address in ((self.here, HERE), (self.there, THERE)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")

    def cut(self) -> None:
        ip("-n", self.there, "link", "set", "cable", "down")

    def mend(self) -> None:
        ip("-n", self.there, "link", "set", "cable", "up")

    def start(self, name: str, cleanup: ExitStack, log: Path, *command: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as words:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "headrace.cli.main", *command],
                stderr=words,
            )
        cleanup.callback(_end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


class Service:
    """What a client sees."""

    def __init__(self, socket: Path, log: Path, server: subprocess.Popen[bytes]) -> None:
        self.server = server
        self._log = log
        self._socket = socket
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=60)
        self.openai = OpenAI(base_url="http://host/v1", api_key="none", max_retries=0, http_client=self.http)

    def ready(self) -> dict[str, Any]:
        # Nobody is asked who may not listen yet: httpx leaves a socket behind that could not connect.
        return self.http.get("http://host/ready").json() if self._listens() else {}

    def _listens(self) -> bool:
        with socket_of(AF_UNIX) as probe:
            return probe.connect_ex(str(self._socket)) == 0

    def workers(self) -> dict[str, int]:
        """Epochs of those that are ready, by name."""
        return {i["name"]: i["epoch"] for i in self.ready().get("instances", ()) if i["state"] == "ready"}

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + START_S
        while not condition():
            assert self.server.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self.ready()
            pause()

    def ask(self, **asked: Any) -> tuple[str, list[dict[str, Any]]]:
        answer = self.openai.completions.create(
            model=MODEL,
            extra_body={"return_timings": True, "ignore_eos": True},
            **{"max_tokens": 24, "temperature": 0.8, "seed": 5} | asked,
        )
        assert answer.usage is not None and answer.usage.model_extra is not None
        return answer.choices[0].text, answer.usage.model_extra["timings"]


def secret_of(folder: Path) -> tuple[str, str]:
    """The flag."""
    file = folder / "secret"
    if not file.exists():
        file.write_text(secrets.token_hex(32))
    return "--secret-file", str(file)


@contextmanager
def two_hosts(folder: Path, *flags: str) -> Iterator[tuple[Hosts, Service, ExitStack]]:
    hosts = Hosts()
    with ExitStack() as cleanup:
        hosts.lay(cleanup)
        socket, log = folder / "api", folder / "serve.log"
        serving = ("serve", "--uds", str(socket), "--listen", DOOR, *secret_of(folder), *flags)
        service = Service(socket, log, hosts.start(hosts.here, cleanup, log, *serving))
        cleanup.callback(service.http.close)
        yield hosts, service, cleanup


@pytest.mark.skipif(not permitted(), reason="network namespaces need root and the `ip` command")
def test_prefill_on_one_host_and_decode_on_another(tmp_path: Path) -> None:
    joining = ("worker", "--join", DOOR, *secret_of(tmp_path), "--leaning", "decode", "--name", "far")
    with two_hosts(tmp_path, "--prefill", "1", "--decode", "0") as (hosts, service, cleanup):
        service.until(lambda: service.workers() == {"prefill0": 0})
        alone = [service.ask(prompt=LONG, seed=seed)[0] for seed in range(4)]
        worker = hosts.start(hosts.there, cleanup, tmp_path / "worker.log", *joining)
        service.until(lambda: service.workers() == {"prefill0": 0, "far": 0})
        host = [i["host"] for i in service.ready()["instances"] if i["name"] == "far"]
        assert host and host[0]

        together = [service.ask(prompt=LONG, seed=seed) for seed in range(4)]
        assert [text for text, _ in together] == alone
        moved = [timing for _, timings in together for timing in timings]
        assert all(timing["bytes_moved"] > 0 and timing["writes"] > 0 for timing in moved)

        whole, _ = service.ask(prompt=LONG, max_tokens=400)
        stream = service.openai.completions.create(
            model=MODEL,
            prompt=LONG,
            max_tokens=400,
            temperature=0.8,
            seed=5,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        for number, chunk in enumerate(stream):
            text += chunk.choices[0].text
            if number == 5:
                hosts.cut()
        assert text == whole
        service.until(lambda: service.workers() == {"prefill0": 0})
        hosts.mend()
        # A later life than 1 if the cable was not quite there when it joined first.
        service.until(lambda: service.workers().get("far", 0) >= 1)
        assert service.ask(prompt=LONG, seed=0)[0] == alone[0]

        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        service.until(lambda: service.workers() == {"prefill0": 0})
        service.server.send_signal(signal.SIGTERM)
        assert service.server.wait(60) == 0
