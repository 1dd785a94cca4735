"""What reproductions share: models, a cluster of the timing simulation, traces, and the form of a result."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from headrace.cli.catalogue import hardware
from headrace.cost.arithmetic import kv_spec, shape_of
from headrace.cost.roofline import Roofline
from headrace.nodes.limits import SECOND, InstanceConfig, RouterConfig
from headrace.sim.cluster import BEGIN_NS, Cluster, Member, PolicyChoice, Simulation, build, play
from headrace.sim.topology import Level, regular
from headrace.types.events import Deliver
from headrace.types.outcomes import Outcomes
from headrace.types.trace import Trace, make_trace

sys.path.append(str(Path(__file__).parents[1]))
report = import_module("_report")

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}
LLAMA_3_1_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
OPT_13B = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 5120,
    "ffn_dim": 20480,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}
BLOCK_SIZE = 16
FAR_NS = 20_000 * SECOND
"""Later than any closed loop ends."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one run."""

    outcomes: Outcomes
    series: dict[str, np.ndarray]
    """As `types.outcomes.Series`."""
    counters: dict[str, int]
    gaps_s: np.ndarray
    """The longest time between two tokens, by request."""
    cpu_s: float

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last end."""
        return float(self.outcomes.finished_ns.max() - self.outcomes.arrival_ns.min()) / SECOND


@dataclass(slots=True)
class Fleet:
    """Instances of one model, one on each host, joined by NICs."""

    config: dict[str, Any]
    device: str
    leanings: Sequence[str]
    tokens: int
    """KV of each instance."""
    policies: dict[str, PolicyChoice] = field(default_factory=dict[str, PolicyChoice])
    nic_bytes_per_s: int = 25_000_000_000
    output_limit: int | None = None
    instance: InstanceConfig = field(default_factory=InstanceConfig)

    def cluster(self) -> Cluster:
        shape = shape_of(self.config)
        costs = Roofline(shape, hardware(self.device))
        blocks = (self.tokens // BLOCK_SIZE,)
        members = tuple(
            Member(f"{leaning[0]}{i}", leaning, costs, blocks, (i, 0))
            for i, leaning in enumerate(self.leanings)
        )
        rate = self.nic_bytes_per_s
        return Cluster(
            spec=kv_spec(shape, BLOCK_SIZE),
            members=members,
            topology=regular((Level("host", rate, rate, 10_000),), hosts=len(members)),
            policies=self.policies,
            instance=self.instance,
            router=RouterConfig(choices_max=1 << 20),
            output_limit=self.output_limit,
        )


def simulate(cluster: Cluster, trace: Trace, seed: int = 0, clients: int = 0) -> Result:
    """One run, with the longest gap between two tokens of every request.

    `clients`: so many, each of which asks again as soon as it has its answer (closed loop); 0: arrivals are the trace's.
    """
    started = process_time()
    if clients:
        trace.arrival_ns[:clients] = np.arange(clients)
        trace.arrival_ns[clients:] = FAR_NS + np.arange(len(trace) - clients)
    simulation = build(cluster, trace, seed)
    watch = Watch(simulation, clients or len(trace))
    simulation.audience.deliver = watch.deliver  # pyright: ignore[reportAttributeAccessIssue]
    play(simulation)
    series = simulation.samples.series()
    outcomes = simulation.audience.outcomes
    assert not clients or outcomes.finished_ns.max() < FAR_NS, (
        "the closed loop ran into the trace's own arrivals"
    )
    return Result(
        outcomes,
        {"at_s": series.at_ns / SECOND} | series.values,
        dict(simulation.router.counters),
        watch.longest_ns / SECOND,
        process_time() - started,
    )


class Watch:
    """Sees every delivery, and lets the next request come when one ends.

    What comes together came in equal steps: an eviction's wait ends with a token that comes alone.
    """

    def __init__(self, simulation: Simulation, asked: int) -> None:
        self.longest_ns = np.zeros(len(simulation.audience.trace))
        self._latest_ns = np.zeros(len(simulation.audience.trace), dtype=np.int64)
        self._simulation = simulation
        self._deliver = simulation.audience.deliver
        self._asked = asked
        """Rows that were asked, or that the trace will ask."""

    def deliver(self, command: Deliver, now_ns: int) -> None:
        row = command.request - 1
        if command.first:
            gap = (now_ns - self._latest_ns[row]) / max(1, command.count)
            self.longest_ns[row] = max(self.longest_ns[row], gap)
        self._latest_ns[row] = now_ns
        self._deliver(command, now_ns)
        if command.finish is not None and self._asked < len(self.longest_ns):
            shell = self._simulation.shell
            shell.loop.at(shell.loop.now_ns + 1, self._ask, self._asked)
            self._asked += 1

    def _ask(self, row: int) -> None:
        shell, audience = self._simulation.shell, self._simulation.audience
        audience.trace.arrival_ns[row] = audience.outcomes.arrival_ns[row] = shell.loop.now_ns - BEGIN_NS
        shell.ask(audience.request(row))


def poisson(name: str, lengths: Sequence[tuple[int, int]], rate_per_s: float, seed: int) -> Trace:
    """Requests of these prompt and output lengths."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(SECOND / rate_per_s, len(lengths))
    arrival_ns = np.cumsum(np.maximum(gaps, 1)).astype(np.int64)
    prompt, output = np.array(lengths, dtype=np.int64).T
    return make_trace(name, arrival_ns, prompt, output)


def write(
    name: str, figures: dict[str, Any], targets: list[dict[str, Any]], claims: dict[str, Any], notes: str
) -> None:
    """As other benchmarks do, under `results/reproductions`."""
    (report.RESULTS / "reproductions").mkdir(parents=True, exist_ok=True)
    report.write(f"reproductions/{name}", figures, targets, claims, notes)


target = report.target
