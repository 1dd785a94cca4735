"""One deployment, live under several loads and simulated under the same: the parts of `fidelity`."""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import median

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
from headrace.workload.client import Progress, Target, as_run, ask_model, run_plan
from headrace.workload.load import LoadConfig, LoadRequest
from headrace.workload.traces import read
from headrace.workload.transform import take

MODELS: dict[str, dict[str, int]] = {
    "small": {"layers": 8, "hidden": 768, "heads": 12, "kv_heads": 4, "head_dim": 64, "intermediate": 2304},
    "0.6b": {},
}
"""Sizes by name; `tools/make_model.py` has those left out. A decode step of the small one takes about 10 ms with one thread."""
WARMUPS = 3
ALONE = "one at a time"
FACTORS = (0.5, 4.0)
"""Between these the calibration is looked for."""
HALVINGS = 12


def model(name: str) -> Path:
    """The folder of a model with random weights, and a tokenizer of which every token is a word. Made on the first call."""
    folder = HERE / ".cache" / f"fidelity-{name}"
    if not (folder / "model.safetensors").exists():
        make(folder, **MODELS[name])
    words = {"<|endoftext|>": 0} | {f"\u0120w{i}": i for i in range(1, VOCABULARY)}
    spaces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": spaces,
        "decoder": spaces,
        "model": {"type": "BPE", "vocab": words, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the loads. Lengths are drawn evenly around these."""

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
    """Requests at once, from which the capacity is taken."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Loads, as shares of the capacity."""

    calibration: float
    held_out: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked in each repeat."""

    name: str
    rate: float
    """Requests a second, a Poisson process; 0: all at once, or one after the other."""
    requests: int
    repeats: int
    sample: str = "held out"
    """"held out" | "in sample of the profile", which has seen its like | "in sample of the calibration"."""


@dataclass(frozen=True, slots=True)
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
    """Requests a second."""
    runs: dict[str, list[Run]] = field(default_factory=dict[str, list[Run]])
    """By load."""


def loads_of(shares: Shares, capacity: float, sizes: Sizes) -> list[Load]:
    """One at a time, and at each share of `capacity` (requests a second)."""
    found = [Load(ALONE, 0.0, sizes.alone, sizes.repeats, "in sample of the profile")]
    for share in sorted((shares.calibration, *shares.held_out)):
        rate = share * capacity
        count = max(5, min(sizes.requests_max, round(rate * sizes.seconds)))
        fitted = share == shares.calibration
        repeats = min(2, sizes.repeats) if fitted else sizes.repeats
        sample = "in sample of the calibration" if fitted else "held out"
        found.append(Load(f"{share:.0%}", rate, count, repeats, sample))
    return found


def plan(load: Load, sizes: Sizes, repeat: int, vocabulary: int) -> list[LoadRequest]:
    """The same lengths and times in each repeat, with other tokens: nothing is found in the cache."""
    rng, tokens = Random(f"fidelity/{load.name}"), Random(f"fidelity/{load.name}/{repeat}")
    now, made = 0.0, list[LoadRequest]()
    for _ in range(load.requests):
        prompt, output = (
            rng.randint(round(middle * (1 - sizes.spread)), round(middle * (1 + sizes.spread)))
            for middle in (sizes.prompt, sizes.output)
        )
        made.append(LoadRequest(now, [tokens.randrange(1, vocabulary) for _ in range(prompt)], output))
        now += rng.expovariate(load.rate) if load.rate else 0.0
    return made


class Client:
    """Asks one server, and counts what it has asked."""

    def __init__(self, target: Target, config: LoadConfig, vocabulary: int, sizes: Sizes) -> None:
        self._target = target
        self._vocabulary = vocabulary
        self._config = config
        self._sizes = sizes
        self.asked = 0

    async def ask(self, load: Load, repeat: int, progress: Progress = lambda done, total: None) -> Run:
        """Raises HeadraceError if a request fails."""
        first = self.asked
        asked = plan(load, self._sizes, repeat, self._vocabulary)
        together = 1 if load.name == ALONE else None
        outcomes = await run_plan(asked, self._target, together, progress)
        self.asked += len(asked)
        made = as_run(self._config, load.name, outcomes, min(outcome.begun_s for outcome in outcomes))
        if not made.outcomes.succeeded.all():
            raise HeadraceError(
                f"the server failed requests: {', '.join(filter(None, made.outcomes.errors))}"
            )
        return Run(made, first)


@asynccontextmanager
async def client(url: str, sizes: Sizes) -> AsyncIterator[Client]:
    """Of a server that is ready."""
    config = LoadConfig(url=url)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        name, vocabulary = await ask_model(config, session)
        yield Client(Target(config, session, name), config, vocabulary, sizes)


def capacity_of(burst: RunData) -> float:
    """Requests a second of a whole burst. Not of its middle: instances that prefill all and then decode all end nearly all at once."""
    outcomes = burst.outcomes
    took_s = (int(outcomes.finished_ns.max()) - int(outcomes.arrival_ns.min())) * 1e-9
    return len(outcomes) / max(1e-3, took_s)


async def measure(
    name: str, flags: Sequence[str], record: Path, sizes: Sizes, shares: Shares, progress: Progress
) -> Deployment:
    """All loads in turn, again and again, so that a machine that gets slower or faster does so for all. `progress` counts requests.

    Raises HeadraceError.
    """
    async with server((*flags, "--record", str(record))) as url, client(url, sizes) as asking:
        await asking.ask(Load(ALONE, 0.0, WARMUPS, 1), -1)
        burst = await asking.ask(Load("burst", 0.0, sizes.burst, 1), 0)
        capacity = capacity_of(burst.client)
        made = Deployment(name, record, loads_of(shares, capacity, sizes), capacity)
        done, total = 0, sum(load.requests * load.repeats for load in made.loads)
        for repeat in range(sizes.repeats):
            for load in (load for load in made.loads if repeat < load.repeats):
                before = done
                ran = await asking.ask(
                    load, repeat, lambda now, _, before=before: progress(before + now, total)
                )
                done += load.requests
                made.runs.setdefault(load.name, []).append(ran)
    return made


# The other side


def simulated_cluster(deployment: Deployment, profile: Path) -> Cluster:
    """From the settings that the service recorded, and the profile: nothing is restated by hand."""
    return cluster_of(resolve(ClusterOptions, deployment.record / CLUSTER, {"profile": profile}))


def slowed(cluster: Cluster, factor: float) -> Cluster:
    """Each step takes so many times as long."""
    return replace(cluster, members=tuple(replace(member, slow=factor) for member in cluster.members))


def calibrated(cluster: Cluster, trace: Trace, live: Sequence[RunData]) -> float:
    """By which factor all steps must take longer for the mean time end to end to be that of the live runs: what the API and the client take
    from workers that share the cores with them, and no profile of lone workers knows."""
    wanted = median(float(each.outcomes.e2e_s().mean()) for each in live)
    low, high = FACTORS
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = float(run(slowed(cluster, middle), trace).outcomes.e2e_s().mean()) < wanted
        low, high = (middle, high) if short else (low, middle)
    return (low + high) / 2


def service_view(lines: list[RecordedRequest]) -> RunData:
    """A run as the service's clock has it: from the API's reading of a request to its being handed the tokens."""
    begin_ns = lines[0].arrival_ns
    outcomes = Outcomes.empty(len(lines))
    outcomes.arrival_ns[:] = [line.arrival_ns - begin_ns for line in lines]
    outcomes.first_ns[:] = [line.choices[0].first_ns - begin_ns for line in lines]
    outcomes.finished_ns[:] = [line.choices[0].finished_ns - begin_ns for line in lines]
    outcomes.prompt[:] = [line.prompt for line in lines]
    outcomes.output[:] = [line.output[0] for line in lines]
    span_s = int(outcomes.finished_ns.max()) * 1e-9
    return RunData("service", 0, "wall", outcomes, Series(np.zeros(0, dtype=np.int64)), {}, span_s)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One load: all live repeats, and simulations of the first one's arrivals."""

    load: Load
    live: list[RunData]
    """The client's view. A request arrives when it was sent."""
    simulated: RunData
    """From the profile alone; its time around a request is before and after the service."""
    calibrated: RunData
    """The same, with longer steps."""
    live_service: list[RunData]
    """The service's view."""
    simulated_service: RunData
    """From the profile alone: arrivals as recorded, without the time around a request."""


class Counterpart:
    """Simulates what a deployment was asked."""

    def __init__(self, deployment: Deployment, profile: Path) -> None:
        """Raises ConfigError, HeadraceError."""
        self._deployment = deployment
        self._cluster = simulated_cluster(deployment, profile)
        path = deployment.record / TRACE
        self._lines = [msgspec.json.decode(s, type=RecordedRequest) for s in path.read_bytes().splitlines()]
        self._trace, _ = read(path, "recorded")
        if len(self._trace) != len(self._lines):
            raise HeadraceError(
                f"{path}: {len(self._lines)} lines, of which {len(self._trace)} could be used"
            )
        fitted = next(load for load in deployment.loads if load.sample.endswith("calibration"))
        self.factor = calibrated(self._cluster, self._sent(fitted), self._live(fitted))
        """Of the calibration."""

    def comparisons(self) -> Iterator[Comparison]:
        """Of each load."""
        inside = replace(self._cluster, ingress_ns=0, egress_ns=0)
        for load in self._deployment.loads:
            sent, runs = self._sent(load), self._deployment.runs[load.name]
            service = [service_view(self._lines[r.first : r.first + load.requests]) for r in runs]
            yield Comparison(
                load,
                self._live(load),
                run(self._cluster, sent),
                run(slowed(self._cluster, self.factor), sent),
                service,
                run(inside, replace(sent, arrival_ns=service[0].outcomes.arrival_ns)),
            )

    def _live(self, load: Load) -> list[RunData]:
        return [each.client for each in self._deployment.runs[load.name]]

    def _sent(self, load: Load) -> Trace:
        """The first repeat's requests, by the time at which the client sent each."""
        first = self._deployment.runs[load.name][0]
        asked = take(self._trace, range(first.first, first.first + load.requests))
        return replace(asked, arrival_ns=np.sort(first.client.outcomes.arrival_ns))
