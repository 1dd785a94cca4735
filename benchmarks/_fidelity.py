"""One deployment, live under several loads and simulated under the same: the parts of `fidelity`."""

import json
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec
import numpy as np
from _model import HERE, VOCABULARY, make

from headrace.cli.child import server
from headrace.cli.cluster import cluster_of
from headrace.cli.options import ClusterOptions, resolve
from headrace.live.record import CLUSTER, TRACE
from headrace.sim.cluster import Cluster, run
from headrace.types.errors import HeadraceError
from headrace.types.outcomes import Outcomes, RunData, Series
from headrace.types.recording import RecordedRequest
from headrace.types.trace import Trace
from headrace.workload.client import Target, as_run, run_plan
from headrace.workload.load import LoadConfig, LoadRequest
from headrace.workload.traces import read
from headrace.workload.transform import take

MODELS: dict[str, dict[str, int]] = {
    "small": {"layers": 8, "hidden": 768, "heads": 12, "kv_heads": 4, "head_dim": 64, "intermediate": 2304},
    "0.6b": {},
}
"""Sizes by name; `tools/make_model.py` has the others. A decode step of the small one takes about 10 ms with one thread."""
WARMUPS = 3
ALONE = "one at a time"

Tick = Callable[[int], None]


def model(name: str) -> Path:
    """The folder of a model with random weights, and a tokenizer of which every token is a word. Made on the first call."""
    folder = HERE / ".cache" / f"fidelity-{name}"
    if not (folder / "model.safetensors").exists():
        make(folder, **MODELS[name])
    words = {"<|endoftext|>": 0} | {f"\u0120w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": words, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the load. Lengths are drawn evenly around these."""

    prompt: int
    output: int
    spread: float
    seconds: float
    """Of arrivals, each run."""
    repeats: int
    alone: int
    """Requests of the load that asks one at a time."""
    requests_max: int
    burst: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked in each repeat."""

    name: str
    rate: float
    """Requests a second; 0: the next one when the one before has ended."""
    requests: int
    in_sample: bool
    """Its like gave constants of the profile."""


@dataclass(slots=True)
class Run:
    """One load, once. Rows are requests in order of arrival."""

    client: RunData
    """As the client saw it: from sending a request to reading its tokens."""
    first: int
    """Its first request's place in the recording, warm-ups and burst counted."""


@dataclass(slots=True)
class Deployment:
    """What was measured of it."""

    name: str
    record: Path
    loads: list[Load]
    capacity: float
    runs: dict[str, list[Run]] = field(default_factory=dict[str, list[Run]])
    """By load."""


def loads_of(shares: tuple[float, ...], capacity: float, sizes: Sizes) -> list[Load]:
    """One at a time, and at each share of `capacity` (requests a second)."""
    found = [Load(ALONE, 0.0, sizes.alone, in_sample=True)]
    for share in shares:
        rate = share * capacity
        count = max(5, min(sizes.requests_max, round(rate * sizes.seconds)))
        found.append(Load(f"{share:.0%}", rate, count, in_sample=False))
    return found


def plan(load: Load, sizes: Sizes, repeat: int) -> list[LoadRequest]:
    """The same lengths and times in each repeat, with other tokens: nothing is found in the cache."""
    rng, tokens = Random(f"fidelity/{load.name}"), Random(f"fidelity/{load.name}/{repeat}")
    now, made = 0.0, list[LoadRequest]()
    for _ in range(load.requests):
        prompt, output = (
            rng.randint(round(middle * (1 - sizes.spread)), round(middle * (1 + sizes.spread)))
            for middle in (sizes.prompt, sizes.output)
        )
        made.append(LoadRequest(now, [tokens.randrange(1, VOCABULARY) for _ in range(prompt)], output))
        now += rng.expovariate(load.rate) if load.rate else 0.0
    return made


class Client:
    """Asks one server, and counts what it has asked."""

    def __init__(self, target: Target, config: LoadConfig, sizes: Sizes, tick: Tick) -> None:
        self._target = target
        self._config = config
        self._sizes = sizes
        self._tick = tick
        self.asked = 0

    async def ask(self, load: Load, repeat: int) -> Run:
        """Raises HeadraceError if a request fails."""
        first, before = self.asked, 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            self._tick(done - before)
            before = done

        asked = plan(load, self._sizes, repeat)
        started = [LoadRequest(0.0, r.prompt, r.output_tokens) for r in asked] if not load.rate else asked
        together = 1 if load.name == ALONE else None
        outcomes = await run_plan(started, self._target, together, progress)
        self.asked += len(asked)
        begun_s = min(outcome.begun_s for outcome in outcomes)
        made = as_run(self._config, load.name, outcomes, begun_s)
        if not made.outcomes.succeeded.all():
            raise HeadraceError(f"the server failed requests: {', '.join(filter(None, made.outcomes.errors))}")
        return Run(made, first)


@asynccontextmanager
async def client(url: str, sizes: Sizes, tick: Tick) -> Any:
    """Of a server that is ready."""
    config = LoadConfig(url=url, vocabulary=VOCABULARY)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        async with session.get(f"{url}/v1/models") as answer:
            name = (await answer.json())["data"][0]["id"]
        yield Client(Target(config, session, name), config, sizes, tick)


def capacity_of(burst: RunData) -> float:
    """Requests a second while a burst's middle half ends."""
    ended_s = np.sort(burst.outcomes.finished_ns) * 1e-9
    low, high = len(ended_s) // 4, 3 * len(ended_s) // 4
    return float((high - low) / max(1e-3, ended_s[high] - ended_s[low]))


async def measure(
    name: str, flags: tuple[str, ...], record: Path, sizes: Sizes, shares: tuple[float, ...], tick: Tick
) -> Deployment:
    """All loads in turn, again and again, so that a machine that gets slower or faster does so for all. Raises HeadraceError."""
    async with (
        server((*flags, "--record", str(record))) as url,
        client(url, sizes, tick) as asking,
    ):
        await asking.ask(Load(ALONE, 0.0, WARMUPS, in_sample=True), -1)
        burst = await asking.ask(Load("burst", 0.0, sizes.burst, in_sample=False), 0)
        capacity = capacity_of(burst.client)
        made = Deployment(name, record, loads_of(shares, capacity, sizes), capacity)
        for repeat in range(sizes.repeats):
            for load in made.loads:
                made.runs.setdefault(load.name, []).append(await asking.ask(load, repeat))
    return made


# What the service recorded


def recorded(deployment: Deployment) -> tuple[Trace, list[RecordedRequest]]:
    """All requests, in order of arrival."""
    path = deployment.record / TRACE
    lines = [msgspec.json.decode(line, type=RecordedRequest) for line in path.read_bytes().splitlines()]
    trace, _ = read(path, "recorded")
    if len(trace) != len(lines):
        raise HeadraceError(f"{path} has {len(lines)} lines, of which {len(trace)} could be read")
    return trace, lines


def service_view(lines: list[RecordedRequest], clock_ns: int) -> RunData:
    """The same run as the service's clock has it: from the API's reading of a request to its being handed the tokens."""
    outcomes = Outcomes.empty(len(lines))
    outcomes.arrival_ns[:] = [line.arrival_ns - clock_ns for line in lines]
    outcomes.prefill_ns[:] = [line.choices[0].prefill_ns - clock_ns for line in lines]
    outcomes.first_ns[:] = [line.choices[0].first_ns - clock_ns for line in lines]
    outcomes.finished_ns[:] = [line.choices[0].finished_ns - clock_ns for line in lines]
    outcomes.prompt[:] = [line.prompt for line in lines]
    outcomes.output[:] = [line.output[0] for line in lines]
    outcomes.cached[:] = [line.choices[0].cached for line in lines]
    span_ns = int(outcomes.finished_ns.max() - outcomes.arrival_ns.min())
    return RunData("service", 0, "wall", outcomes, Series(np.zeros(0, dtype=np.int64)), {}, span_ns * 1e-9)


def simulated_cluster(deployment: Deployment, profile: Path) -> Cluster:
    """From the settings that the service recorded, and the profile: nothing is restated by hand."""
    return cluster_of(resolve(ClusterOptions, deployment.record / CLUSTER, {"profile": profile}))


@dataclass(frozen=True, slots=True)
class View:
    """A load from one side: all live repeats, and the simulation of the first one's arrivals."""

    live: list[RunData]
    simulated: RunData


def views(deployment: Deployment, cluster: Cluster) -> Iterator[tuple[Load, View, View]]:
    """Of each load, the client's view and the service's.

    For the client's, a request arrives when it was sent, and the profile's time around a request is before and after the service. For the
    service's, arrivals are the recorded ones and there is no such time.
    """
    trace, lines = recorded(deployment)
    inside = replace(cluster, ingress_ns=0, egress_ns=0)
    for load in deployment.loads:
        runs = deployment.runs[load.name]
        service = [
            service_view(lines[run.first : run.first + load.requests], lines[run.first].arrival_ns)
            for run in runs
        ]
        asked = take(trace, range(runs[0].first, runs[0].first + load.requests))
        sent = replace(asked, arrival_ns=np.sort(runs[0].client.outcomes.arrival_ns))
        heard = replace(asked, arrival_ns=service[0].outcomes.arrival_ns)
        yield (
            load,
            View([each.client for each in runs], run(cluster, sent)),
            View(service, run(inside, heard)),
        )
