"""FastSwitch's swapping (arXiv 2411.18424): block groups, copies beside steps and reuse, each on and off, beside recomputing.

    make bench NAME=swap [ARGS="--conversations 40 --rounds 1"]

Conversations of several turns on one instance whose KV memory is too small for them, with priorities that change by themselves (random and
Markov traces of `engine.ordering.fair`, 0.04 updates a step), so that sequences are preempted and resumed.
- Simulated, step by step: Llama 3.1 8B's shape in bfloat16 on an RTX 4090 of the catalogue. Copies, bytes, runs and preemptions are
  counted, and are the same in every run. Times are modelled: a copy costs a constant and its bytes over a rate (`sim.swaps.CopyCosts`: PCI
  Express 4.0 x16), not measured. One plan is in flight (`--depth 1`), as in the paper's engine; with two, as Headrace runs, a copy that a
  step waits for is hidden behind the step before, and "sync" is hardly slower: that is shown, too.
- Live: a small model with random weights on this machine's processor, where device and host are one memory, so times say what copies cost
  here and no more. A round that is not counted touches all memory before; variants take turns, and medians of the rounds are told.
A stall is the time between two steps in which copies were under way. Even "sync", a copy out overlaps the step that was planned in the same
instant: what waits is the step after it, and whoever comes back.
"""

import argparse
import asyncio
import itertools
import statistics
from time import monotonic
from typing import Any

import numpy as np
from _model import HERE, make, prompt
from _report import target, write
from _service import service

from headrace.cli.catalogue import hardware
from headrace.cost.arithmetic import kv_spec, shape_of
from headrace.cost.roofline import Roofline
from headrace.live.service import Service
from headrace.nodes.instance import Instance
from headrace.nodes.limits import InstanceConfig
from headrace.sim.cluster import Cluster, Member, PolicyChoice, Simulation, build, play
from headrace.sim.timing import TimingWorker
from headrace.sim.topology import Level, regular
from headrace.types.events import Deliver
from headrace.types.hashing import block_hashes
from headrace.types.payload import SamplingParams, SequencePayload, Submission
from headrace.types.request import Request
from headrace.workload.generators import generate

PARTS = ("groups", "background", "reuse")
PATTERNS = ("random", "markov")
ALL, NONE = "group background reuse", "block sync afresh"
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
SIZE = 16
"""Tokens of a simulated block, as in the paper."""
SMALL = HERE / ".cache" / "swap-small"
SMALL_SIZES = {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 8, "head_dim": 128, "intermediate": 512}


def variants() -> dict[str, dict[str, Any]]:
    """By name: what preempts."""
    found: dict[str, dict[str, Any]] = {}
    for on in itertools.product((False, True), repeat=3):
        words = zip(("block", "sync", "afresh"), ("group", "background", "reuse"), on, strict=True)
        found[" ".join(yes if is_on else no for no, yes, is_on in words)] = dict(zip(PARTS, on, strict=True))
    return found


def p99_ms(nanoseconds: list[int]) -> float:
    return round(float(np.percentile(nanoseconds, 99)) / 1e6, 3) if nanoseconds else 0.0


# Simulated


class Watch:
    """When tokens come, and how long steps wait for copies."""

    def __init__(self, simulation: Simulation) -> None:
        self.gaps_ns: list[int] = []
        self.stalls_ns: list[int] = []
        self.tokens = 0
        self.first_ns = self.last_ns = 0
        self._came: dict[tuple[int, int], int] = {}
        self._deliver = simulation.audience.deliver
        simulation.audience.deliver = self._delivered  # type: ignore[method-assign]
        for worker in simulation.shell.workers.values():
            self._follow(worker)

    def _delivered(self, command: Deliver, now_ns: int) -> None:
        choice = (int(command.request), command.choice)
        if command.count:
            if choice in self._came:
                self.gaps_ns.append(now_ns - self._came[choice])
            self._came[choice] = self.last_ns = now_ns
            self.first_ns = self.first_ns or now_ns
            self.tokens += command.count
        self._deliver(command, now_ns)

    def _follow(self, worker: TimingWorker) -> None:
        execute, swapped, swap = worker.execute, worker._swapped, worker.swap
        under_way, begun_ns = 0, 0
        spans: list[tuple[int, int]] = []

        def given(command: Any) -> None:
            nonlocal under_way, begun_ns
            begun_ns = begun_ns if under_way else worker.loop.now_ns
            under_way += 1
            swap(command)

        def ended(command: Any) -> None:
            nonlocal under_way
            under_way -= 1
            if not under_way:
                spans.append((begun_ns, worker.loop.now_ns))
            swapped(command)

        def executed(plan: Any, now_ns: int) -> None:
            if worker._running is None and worker._free_ps:
                idle_ns = worker._free_ps // 1000
                now = [(begun_ns, now_ns)] if under_way else []
                stall_ns = sum(max(0, end - max(begin, idle_ns)) for begin, end in spans + now)
                if stall_ns:
                    self.stalls_ns.append(stall_ns)
            spans.clear()
            execute(plan, now_ns)

        worker.swap, worker._swapped, worker.execute = given, ended, executed  # type: ignore[method-assign]


def cluster(preemption: PolicyChoice, pattern: str, o: argparse.Namespace) -> Cluster:
    shape = shape_of(LLAMA_3_1_8B)
    spec = kv_spec(shape, SIZE, "bfloat16")
    blocks = o.kv_tokens // SIZE
    links = (Level("host", 25_000_000_000, 25_000_000_000, 5000),)
    fair = PolicyChoice("fair", {"pattern": pattern, "frequency": o.frequency})
    return Cluster(
        spec=spec,
        members=(Member("i0", "mixed", Roofline(shape, hardware("rtx-4090")), (blocks,), (0, 0)),),
        topology=regular(links, 1),
        policies={"engine.preemption": preemption, "engine.ordering": fair},
        instance=InstanceConfig(
            tokens_max=1024,
            sequences_max=64,
            lease_blocks=blocks // 16,
            depth=o.depth,
            swap_blocks=(o.host_tokens // SIZE,) if preemption.name == "swap" else (),
        ),
    )


def simulated(preemption: PolicyChoice, pattern: str, o: argparse.Namespace) -> dict[str, Any]:
    """One run, and what it came to."""
    settings = {
        "conversations": o.conversations,
        "arrivals": {"kind": "poisson", "rate_per_s": o.rate},
        "turns": {"kind": "uniform", "low": 3, "high": 8},
        "system": {"kind": "constant", "value": 64},
        "think_ms": {"kind": "lognormal", "median": 2000.0, "sigma": 0.8},
        "context_max": 4096,
        "block_size": SIZE,
    }
    trace = generate("conversations", settings, 1)
    simulation = build(cluster(preemption, pattern, o), trace, 0, every_step=True)
    watch = Watch(simulation)
    play(simulation)
    (worker,) = simulation.shell.workers.values()
    core = worker.core
    assert isinstance(core, Instance)
    counts = core.swapping.counts
    block_bytes = core.memory.spec.block_bytes(0)
    seconds = (watch.last_ns - watch.first_ns) / 1e9
    return {
        "preemptions": core.scheduler.preemptions,
        "swaps_out": counts.out,
        "swaps_in": counts.back,
        "recomputed_as_host_full": counts.full,
        "copies": counts.copies,
        "mib": round(counts.blocks * block_bytes / 2**20, 1),
        "blocks_per_copy": round(counts.blocks / max(1, counts.copies), 2),
        "blocks_not_copied_again": counts.reused,
        "blocks_still_in_the_pool": counts.found,
        "conflicts": counts.conflicts,
        "blocks_contaminated": core.swapping.area.contaminated,
        "stalled_ms": round(sum(watch.stalls_ns) / 1e6, 2),
        "stall_p99_ms": p99_ms(watch.stalls_ns),
        "gap_p99_ms": p99_ms(watch.gaps_ns),
        "ttft_p99_ms": round(float(np.nanpercentile(simulation.audience.outcomes.ttft_s(), 99)) * 1e3, 1),
        "tokens_per_s": round(watch.tokens / seconds, 1),
        "tokens_recomputed": int(simulation.audience.outcomes.recomputed.sum()),
    }


# Live


async def talk(running: Service, number: int, turns: int, tokens: int, gaps_ns: list[int], salt: str) -> int:
    """One conversation, each turn of which goes on from the one before. Its new tokens."""
    ids, drawn = prompt(number, 40 + 13 * (number % 7)), 0
    for _ in range(turns):
        root, now = running.root(salt), running.now_ns()
        sampling = SamplingParams(temperature=0, ignore_eos=True, tokens_max=tokens)
        hashes = tuple(block_hashes(root, ids, running.info().block_size))
        request = Request(running.next_id(), len(ids), hashes, tokens, arrival_ns=now)
        came_ns = 0
        async for chunk in running.submit(
            Submission(request, SequencePayload(root, ids, len(ids), sampling))
        ):
            now = running.now_ns()
            if came_ns and chunk.token_ids:
                gaps_ns.append(now - came_ns)
            came_ns = now
            ids = [*ids, *chunk.token_ids]
            drawn += len(chunk.token_ids)
        ids = [*ids, *prompt(1000 + number, 8)]
    return drawn


async def live(preemption: dict[str, Any], pattern: str, o: argparse.Namespace) -> dict[str, Any]:
    fair = {"name": "fair", "pattern": pattern, "frequency": o.frequency}
    options: dict[str, Any] = {
        "model": SMALL,
        "instances": 1,
        "threads": 1,
        "max_model_len": 512,
        "kv_memory": f"{o.live_kv_mib}MiB",
        "swap_space": 0.5,
        "scheduling_policy": fair,
        "preemption": preemption,
    }
    async with service(**options) as running:

        async def round_of(salt: str) -> tuple[list[int], int, float]:
            gaps_ns: list[int] = []
            began = monotonic()
            talks = (talk(running, n, o.turns, o.tokens, gaps_ns, salt) for n in range(o.requests))
            return gaps_ns, sum(await asyncio.gather(*talks)), monotonic() - began

        await round_of("warm-up")
        before = dict(running.status().counters)
        gaps_ns, tokens, seconds = await round_of("counted")
        await asyncio.sleep(0.2)  # the last report of the worker comes by then
        after = running.status().counters
    moved = {name: after[name] - before[name] for name in after if name.startswith(("swap", "preempt"))}
    return {**moved, "gap_p99_ms": p99_ms(gaps_ns), "tokens_per_s": round(tokens / seconds, 1)}


def talked(pattern: str, o: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Medians of what each variant came to live."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(o.rounds):
        for name, parts in {**variants(), "recompute": None}.items():
            chosen = {"name": "recompute"} if parts is None else {"name": "swap", **parts}
            row = asyncio.run(live(chosen, pattern, o))
            rows.setdefault(name, []).append(row)
            print(f"live {pattern:7} {name:24} {row}")
    return {
        name: {what: statistics.median(r[what] for r in of) for what in of[0]} for name, of in rows.items()
    }


# Both


def targets(runs: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each part alone against none of them, and all against none, over both patterns of priorities."""

    def ratios(what: str, above: str, below: str) -> list[float]:
        return [by[above][what] / by[below][what] for by in runs.values()]

    def goal(said: str, values: list[float], least: float) -> dict[str, Any]:
        return target(said, values, "x", f">= {least:g}", met=min(values) >= least)

    stalled = ratios("stalled_ms", "block background afresh", NONE)
    return [
        goal(
            "blocks a copy, by groups / one by one", ratios("blocks_per_copy", "group sync afresh", NONE), 4
        ),
        goal("MiB copied, afresh / with reuse", ratios("mib", NONE, "block sync reuse"), 1.2),
        target("time stalled, background / sync", stalled, "x", "<= 0.5", met=max(stalled) <= 0.5),
        goal("P99 gap, none / all three", ratios("gap_p99_ms", NONE, ALL), 1),
        goal("tokens/s, all three / none", ratios("tokens_per_s", ALL, NONE), 1),
        goal("tokens/s, all three / recompute", ratios("tokens_per_s", ALL, "recompute"), 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "conversations": 50,
        "kv_tokens": 12_000,
        "host_tokens": 60_000,
        "depth": 1,
        "requests": 8,
        "turns": 2,
        "tokens": 64,
        "live_kv_mib": 12,
        "rounds": 3,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=4.0, help="conversations a second, simulated")
    parser.add_argument("--frequency", type=float, default=0.04, help="updates of priorities a step")
    parser.add_argument("--no-live", action="store_true")
    o = parser.parse_args()
    modelled: dict[str, dict[str, dict[str, Any]]] = {}
    real: dict[str, dict[str, dict[str, Any]]] = {}
    for pattern in PATTERNS:
        modelled[pattern] = {
            name: simulated(PolicyChoice("swap", parts), pattern, o) for name, parts in variants().items()
        }
        modelled[pattern]["recompute"] = simulated(PolicyChoice("recompute"), pattern, o)
        for name, row in modelled[pattern].items():
            print(f"{pattern:7} {name:24} {row}")
    two = argparse.Namespace(**{**vars(o), "depth": 2})
    pipelined = {
        pattern: {
            name: simulated(PolicyChoice("swap", variants()[name]), pattern, two) for name in (NONE, ALL)
        }
        for pattern in PATTERNS
    }
    print("with two plans in flight", pipelined)
    if not o.no_live:
        if not (SMALL / "model.safetensors").exists():
            make(SMALL, **SMALL_SIZES)
        for pattern in PATTERNS:
            real[pattern] = talked(pattern, o)
    lost = [
        f"{kind} {pattern}: {name} {row['tokens_per_s']} tokens/s, recompute {by['recompute']['tokens_per_s']}"
        for kind, runs in (("modelled", modelled), ("live", real))
        for pattern, by in runs.items()
        for name, row in by.items()
        if row["tokens_per_s"] < by["recompute"]["tokens_per_s"]
    ]
    write(
        "swap",
        {
            "modelled": modelled,
            "modelled_depth_2": pipelined,
            "live": real,
            "slower_than_recomputing": lost,
            "sizes": vars(o),
        },
        targets(modelled),
        {},
        "Counts are exact and the same in every run; times of the simulation are modelled (10 us a copy, 25 GB/s). Live, device and "
        "host are one memory. Priorities follow the patterns as `engine.ordering.fair` assumes them: the paper's own could not be had.",
    )


if __name__ == "__main__":
    main()
