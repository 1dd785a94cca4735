"""What a simulated request costs: CPU microseconds and memory at two sizes, and where the time goes.

    make bench NAME=simulator_scale [ARGS="--requests 100000"]

1. Azure conversation lengths, Poisson at 3 requests/s an instance, 1,024 mixed instances (Llama-3.1-8B on H100), power of two choices: no
   prefix is shared. At `depth` 2 (as live) and 1.
2. The Mooncake conversation trace, tiled, on 64 instances with the prompt tree, at its own 512-token blocks and at 32.
Each runs in a process of its own, with the garbage collector off, no checkers, one digest of all outcomes. The shares by part come from a
second, shorter run that is sampled. The traces must be at hand (HEADRACE_DATA); where they are not, lengths of the same means are drawn.
"""

import argparse
import gc
import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from hashlib import blake2b
from time import process_time
from types import FrameType
from typing import Any

import numpy as np
from _report import target, write

from headrace.cli.catalogue import hardware
from headrace.cost.arithmetic import kv_spec, shape_of
from headrace.cost.roofline import Roofline
from headrace.nodes.limits import InstanceConfig, RouterConfig
from headrace.sim.cluster import Cluster, Member, PolicyChoice, build, play
from headrace.sim.topology import Level, regular
from headrace.types.errors import ConfigError
from headrace.types.outcomes import COUNTS, TIMES, Outcomes
from headrace.types.trace import Trace
from headrace.workload import traces
from headrace.workload.generators import generate
from headrace.workload.transform import at_rate, tile

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
KV_TOKENS = 400_000
"""Of each instance: 50 GB of an H100."""
PARTS = (
    ("scheduler and memory", ("headrace/engine/", "headrace/kv/segments")),
    (
        "instance core",
        ("headrace/nodes/instance", "headrace/nodes/s", "headrace/nodes/rec", "headrace/nodes/m"),
    ),
    ("router core", ("headrace/nodes/router", "headrace/nodes/", "headrace/cluster/")),
    ("pool core and index", ("headrace/kv/", "headrace/nodes/pool")),
    ("step times", ("headrace/cost/", "headrace/sim/timing")),
    ("loop, network, shell", ("headrace/sim/",)),
)


def cluster(instances: int, placement: str, block_size: int, depth: int) -> Cluster:
    shape = shape_of(LLAMA_3_1_8B)
    costs = Roofline(shape, hardware("h100-sxm"))
    spec = kv_spec(shape, block_size, "bfloat16")
    blocks = KV_TOKENS // block_size
    members = tuple(Member(f"i{n:04}", "mixed", costs, (blocks,), (n, 0)) for n in range(instances))
    links = (Level("host", 50_000_000_000, 50_000_000_000, 5000),)
    return Cluster(
        spec=spec,
        members=members,
        topology=regular(links, instances),
        policies={"cluster.placement": PolicyChoice(placement)},
        instance=InstanceConfig(depth=depth, lease_blocks=blocks // 4, stream_interval=2**30),
        router=RouterConfig(choices_max=10**9),
    )


def azure(requests: int, rate_per_s: float) -> Trace:
    arrivals = {"kind": "poisson", "rate_per_s": rate_per_s}
    try:
        lengths: dict[str, Any] = {"file": str(traces.find("azure2023/AzureLLMInferenceTrace_conv.csv"))}
    except ConfigError:
        drawn = {"kind": "lognormal", "sigma": 0.8}
        lengths = {"prompt": {**drawn, "median": 840.0}, "output": {**drawn, "median": 153.0}}
    return generate("synthetic", {"requests": requests, "arrivals": arrivals, **lengths}, 0)


def mooncake(requests: int, rate_per_s: float) -> Trace:
    trace, _ = traces.read(traces.find("mooncake/conversation_trace.jsonl"))
    return at_rate(tile(trace, requests, fresh=True), rate_per_s)


def world(case: str, requests: int, instances: int) -> tuple[Cluster, Trace]:
    if case.startswith("azure"):
        depth = int(case[-1])
        return cluster(instances, "power_of_two", 32, depth), azure(requests, 3.0 * instances)
    block_size = int(case.rsplit(" ", 1)[1])
    return cluster(64, "prompt_tree", block_size, 2), mooncake(requests, 0.6 * 64)


def digest(outcomes: Outcomes) -> str:
    whole = blake2b(digest_size=8)
    for name in TIMES + COUNTS:
        whole.update(np.ascontiguousarray(getattr(outcomes, name)).tobytes())
    return whole.hexdigest()


def measure(case: str, requests: int, instances: int, *, sampled: bool) -> dict[str, Any]:
    """In this process: one run."""
    members, trace = world(case, requests, instances)
    gc.disable()
    simulation = build(members, trace, 0)
    parts: Counter[str] = Counter()
    if sampled:
        signal.signal(signal.SIGPROF, lambda _, frame: parts.update([part_of(frame)]))
        signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
    begun_s = process_time()
    play(simulation)
    cpu_s = process_time() - begun_s
    signal.setitimer(signal.ITIMER_PROF, 0)
    outcomes = simulation.audience.outcomes
    loop = simulation.shell.loop
    return {
        "requests": requests,
        "instances": len(members.members),
        "cpu_s": round(cpu_s, 2),
        "us_per_request": round(1e6 * cpu_s / requests, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "events_per_request": round(loop.events / requests, 2),
        "simulated_s": round(loop.now_ns / 1e9, 1),
        "ttft_p50_ms": round(float(np.nanmedian(outcomes.ttft_s())) * 1e3, 2),
        "tpot_p50_ms": round(float(np.nanmedian(outcomes.tpot_s())) * 1e3, 2),
        "hit_share": round(float(outcomes.cached.sum() / outcomes.prompt.sum()), 4),
        "digest": digest(outcomes),
        "parts": dict(parts),
    }


def part_of(frame: FrameType | None) -> str:
    """The innermost of our files decides; library code counts for its caller."""
    while frame is not None:
        name = frame.f_code.co_filename
        for part, prefixes in PARTS:
            if any(prefix in name for prefix in prefixes):
                return part
        frame = frame.f_back
    return "other"


def child(case: str, requests: int, instances: int, *, sampled: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--requests", str(requests)]
    command += ["--instances", str(instances), *(["--sampled"] if sampled else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def by_part(figures: dict[str, Any], sampled: dict[str, Any]) -> dict[str, float]:
    """Microseconds a request by part."""
    total = sum(sampled["parts"].values()) or 1
    shares = sorted(sampled["parts"].items(), key=lambda item: -item[1])
    return {part: round(figures["us_per_request"] * count / total, 1) for part, count in shares}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=1024)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--sampled", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.case:
        print(json.dumps(measure(o.case, o.requests, o.instances, sampled=o.sampled)))
        return
    figures: dict[str, Any] = {}
    tiled = max(1000, o.requests // 10)
    cases = [("azure, depth 2", o.requests), ("azure, depth 1", tiled)]
    try:
        traces.find("mooncake/conversation_trace.jsonl")
        cases += [("mooncake, blocks of 512", tiled), ("mooncake, blocks of 32", tiled // 10)]
    except ConfigError as error:
        print(f"no Mooncake trace: {error}")
    for case, requests in cases:
        figures[case] = child(case, requests, o.instances, sampled=False)
        short = child(case, max(1000, requests // 20), min(o.instances, 128), sampled=True)
        figures[case]["us_by_part"] = by_part(figures[case], short)
        figures[case].pop("parts")
        print(case, json.dumps(figures[case], indent=1), flush=True)
    big = figures["azure, depth 2"]
    scale = 1_000_000 / big["requests"]
    cpu_s = big["cpu_s"] * scale
    targets = [
        target("CPU for 1,000,000 requests on 1,024 instances", [cpu_s], "s", "<= 150", met=cpu_s <= 150),
        target("peak memory of it", [big["peak_mib"]], "MiB", "<= 1024", met=big["peak_mib"] <= 1024),
    ]
    if "mooncake, blocks of 512" in figures:
        tiled_s = figures["mooncake, blocks of 512"]["us_per_request"] / 10
        targets.append(
            target("CPU for 100,000 Mooncake requests on 64", [tiled_s], "s", "<= 60", met=tiled_s <= 60)
        )
    peers = {
        "Dynamo mocker 1.5 (Rust), 512 workers": "489 us a request (measured before on a like machine, not here)",
        "vidur, 64 replicas": "3,400 us a request (measured before on a like machine, not here)",
    }
    notes = "One run each: CPU seconds of one process, which a busy machine stretches. The parts are of a shorter, sampled run."
    write("simulator_scale", figures, targets, peers, notes)


if __name__ == "__main__":
    main()
