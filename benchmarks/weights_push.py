"""New weights for a running service: `headrace weights push` against copying the checkpoint and restarting the workers.

    make bench NAME=weights_push [ARGS="--rounds 3"]

The model has Qwen3-0.6B's shape; two workers serve it, and clients stream all the while. Rounds alternate: a push from this process (time
until every worker computes with the new weights), then a plain file copy into the served folder of a second, equal service and a restart of
its workers (time until both are ready). Beside the time: the longest gap that any client saw between two chunks, and requests that failed.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
from _model import prompt, qwen3_shape
from _report import target, write

from headrace.cli.push import PushReport, push
from headrace.compute.sources import FolderSource

KEY = "benchmark"


class Stream:
    """One client after another, as long as it runs: gaps between chunks, failures."""

    def __init__(self, session: aiohttp.ClientSession, url: str, number: int) -> None:
        self.session, self.url, self.number = session, url, number
        self.gap_s = 0.0
        self.failed = self.answers = 0
        self.task = asyncio.ensure_future(self.run())

    async def run(self) -> None:
        while True:
            self.answers += 1
            body = {
                "prompt": prompt(self.number * 1000 + self.answers, 64),
                "max_tokens": 48,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            last = perf_counter()
            try:
                async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            self.failed += b'"error"' in line
                            now = perf_counter()
                            self.gap_s, last = max(self.gap_s, now - last), now
                    self.failed += answer.status != 200
            except aiohttp.ClientError:
                self.failed += 1


READY_S = 120


async def ready(session: aiohttp.ClientSession, url: str, epochs: dict[str, int]) -> dict[str, int]:
    """Wait until all workers are, under later epochs than these; theirs. Raises TimeoutError."""
    async with asyncio.timeout(READY_S):
        return await reached(session, url, epochs)


async def reached(session: aiohttp.ClientSession, url: str, epochs: dict[str, int]) -> dict[str, int]:
    while True:
        try:
            async with session.get(f"{url}/ready") as answer:
                said = json.loads(await answer.read())
            workers = said["instances"]
            if all(w["state"] == "ready" and w["epoch"] > epochs.get(w["name"], -1) for w in workers):
                return {w["name"]: w["epoch"] for w in workers}
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.02)


async def during(
    session: aiohttp.ClientSession, url: str, clients: int, action: Any
) -> tuple[Any, float, int]:
    """What `action` returns, the longest gap of any stream meanwhile, and failures."""
    streams = [Stream(session, url, number) for number in range(clients)]
    await asyncio.sleep(1.0)
    for stream in streams:
        stream.gap_s = 0.0
    result = await action()
    await asyncio.sleep(0.5)
    for stream in streams:
        stream.task.cancel()
    await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)
    return result, max(stream.gap_s for stream in streams), sum(stream.failed for stream in streams)


async def reload(
    session: aiohttp.ClientSession, url: str, files: list[Path], served: Path
) -> tuple[float, float]:
    """Copy the files, then restart all workers. Seconds of either."""
    begun = perf_counter()
    for file in files:
        # In its place at once: running workers have the old file mapped.
        await asyncio.to_thread(shutil.copyfile, file, served / "coming")
        (served / "coming").replace(served / file.name)
    copied = perf_counter()
    epochs = await ready(session, url, {})
    async with session.get(f"{url}/ready") as answer:
        pids = [w["pid"] for w in json.loads(await answer.read())["instances"]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    await ready(session, url, epochs)
    return copied - begun, perf_counter() - copied


def serve(served: Path, port: int) -> subprocess.Popen[bytes]:
    flags = ["--port", str(port), "--push-key", KEY, "--threads", "1", "--max-model-len", "1024"]
    command = [sys.executable, "-m", "headrace.cli.main", "serve", str(served), *flags, "--kv-memory", "1GiB"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def measure(o: argparse.Namespace, new: Path, served: Path, ports: tuple[int, int]) -> dict[str, Any]:
    """One server is pushed to, the other one restarts: workers that begin after a push would begin with what was pushed."""
    pushed, reloaded = (f"http://127.0.0.1:{port}" for port in ports)
    found: dict[str, Any] = {
        "pushes": [],
        "reloads": [],
        "gaps": {"push": [], "reload": []},
        "failed": {"push": 0, "reload": 0},
    }
    files = sorted(new.glob("*.safetensors"))  # noqa: ASYNC240 (before anything is timed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for url in (pushed, reloaded):
            await ready(session, url, {})
        for round_ in range(o.rounds + 1):
            ways = {
                "push": (pushed, lambda: push(FolderSource(new), pushed, KEY)),
                "reload": (reloaded, lambda: reload(session, reloaded, files, served)),
            }
            for way, (url, action) in ways.items():
                print(f"round {round_} of {o.rounds} (0 warms up): {way}", file=sys.stderr, flush=True)
                result, gap, failed = await during(session, url, o.clients, action)
                if round_:
                    found["pushes" if way == "push" else "reloads"].append(result)
                    found["gaps"][way].append(gap)
                    found["failed"][way] += failed
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--model", type=Path, default=None, help="another checkpoint folder")
    o = parser.parse_args()
    new = o.model or qwen3_shape()
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder) / "served"
        shutil.copytree(new, served)
        ports = free_port(), free_port()
        servers = [serve(served, port) for port in ports]
        try:
            found = asyncio.run(measure(o, new, served, ports))
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait(30)
    pushes: list[PushReport] = found["pushes"]
    push_s = [p.write_s + p.commit_s for p in pushes]
    reload_s = [copy + restart for copy, restart in found["reloads"]]
    ratios = [r / p for p, r in zip(push_s, reload_s, strict=True)]
    gaps = found["gaps"]
    gap_ratios = [r / p for p, r in zip(gaps["push"], gaps["reload"], strict=True)]
    figures = {
        "bytes": pushes[0].nbytes,
        "push_s": push_s,
        "push_write_gb_s": [p.nbytes / 1e9 / p.write_s for p in pushes],
        "push_switch_ms": [p.pushed.switched_ms for p in pushes],
        "push_held_ms": [p.pushed.held_ms for p in pushes],
        "reload_copy_s": [copy for copy, _ in found["reloads"]],
        "reload_restart_s": [restart for _, restart in found["reloads"]],
        "longest_gap_s": gaps,
        "failed_requests": found["failed"],
    }
    print(json.dumps(figures, indent=1))
    targets = [
        target("copy and restart / push, time", ratios, "x", ">= 1", met=statistics.median(ratios) >= 1),
        target(
            "copy and restart / push, longest gap",
            gap_ratios,
            "x",
            ">= 1",
            met=statistics.median(gap_ratios) >= 1,
        ),
        target(
            "requests failed by pushes", [found["failed"]["push"]], "", "0", met=found["failed"]["push"] == 0
        ),
    ]
    write(
        "weights_push", figures, targets, {}, f"{o.clients} clients stream; two workers of one thread each."
    )


if __name__ == "__main__":
    main()
