"""MemServe's prompt-tree routing against least load and round robin, simulated (arXiv 2406.17565, sec. 5.2 and 8).

    make bench NAME=reproductions/memserve_routing [ARGS="--seeds 5"]

Claim: routing by the global prompt tree improves the P99 of TTFT by 59% over least load, on LooGLE with 80 sessions and 250 requests.
Here: Llama-2-13B on pairs of H100 (the paper had one host of eight H800), three instances that prefill and one that decodes, pools with a
prefix index. Two workloads: 80 sessions that ask about three questions each about a document of their own, and a chat of many more turns.
"""

import argparse
import statistics
from typing import Any

from _fleet import LLAMA_13B, figures, fleet
from _report import target, write

from headrace.sim.cluster import PolicyChoice, run
from headrace.types.trace import Trace
from headrace.workload.generators import generate

CLAIM = 59.0
ROUTERS = {
    "prompt_tree": PolicyChoice("prompt_tree"),
    "prompt_tree, no fetch": PolicyChoice("prompt_tree", {"fetch": False}),
    "least_load": PolicyChoice("least_load"),
    "round_robin": PolicyChoice("round_robin"),
}
LEANINGS = ("prefill", "prefill", "prefill", "decode")
DOCUMENTS = {
    "conversations": 80,
    "arrivals": {"kind": "poisson", "rate_per_s": 0.6},
    "turns": {"kind": "uniform", "low": 2, "high": 4},
    "system": {"kind": "constant", "value": 32},
    "tenants": 1,
    "first": {"kind": "uniform", "low": 6000, "high": 16000},
    "message": {"kind": "lognormal", "median": 24.0, "sigma": 0.5},
    "output": {"kind": "lognormal", "median": 48.0, "sigma": 0.8},
    "think_ms": {"kind": "lognormal", "median": 4000.0, "sigma": 0.7},
    "block_size": 16,
}
CHAT = {
    "conversations": 600,
    "arrivals": {"kind": "poisson", "rate_per_s": 2.0},
    "turns": {"kind": "zipf", "exponent": 0.8, "max": 16},
    "system": {"kind": "constant", "value": 512},
    "message": {"kind": "lognormal", "median": 120.0, "sigma": 1.0},
    "output": {"kind": "lognormal", "median": 160.0, "sigma": 0.8},
    "think_ms": {"kind": "lognormal", "median": 12000.0, "sigma": 0.8},
    "block_size": 16,
}
WORKLOADS = {"documents": DOCUMENTS, "chat": CHAT}


def measure(trace: Trace, router: PolicyChoice, seed: int) -> dict[str, float]:
    cluster = fleet(LLAMA_13B, "h100-sxm", LEANINGS, {"cluster.placement": router}, tensor_parallel=2)
    return figures(run(cluster, trace, seed))


def improvement(runs: dict[str, list[dict[str, float]]], over: str, figure: str) -> list[float]:
    """By how many percent the prompt tree is below another router, seed by seed."""
    pairs = zip(runs["prompt_tree"], runs[over], strict=True)
    return [100 * (1 - mine[figure] / other[figure]) for mine, other in pairs]


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def show(name: str, runs: dict[str, list[dict[str, float]]], trace: Trace) -> None:
    print(f"\n{name}: {len(trace)} requests, {int(trace.prompt.mean()):,} prompt tokens on average")
    print(f"{'router':24}{'TTFT P50':>10}{'P99':>9}{'hit rate':>10}{'E2E':>9}")
    for router, results in runs.items():
        m = middle(results)
        print(
            f"{router:24}{m['ttft_p50_s']:9.3f}s{m['ttft_p99_s']:8.3f}s{m['hit_rate']:10.1%}{m['e2e_mean_s']:8.2f}s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    shown: dict[str, Any] = {}
    targets: list[dict[str, Any]] = []
    for name, settings in WORKLOADS.items():
        traces = [generate("conversations", settings, seed) for seed in seeds]
        runs = {
            router: [measure(traces[seed], choice, seed) for seed in seeds]
            for router, choice in ROUTERS.items()
        }
        show(name, runs, traces[0])
        better = improvement(runs, "least_load", "ttft_p99_s")
        shown[name] = {router: middle(results) for router, results in runs.items()}
        shown[name]["p99_improvement_percent"] = {
            "over least_load": [round(value, 1) for value in better],
            "over round_robin": [round(v, 1) for v in improvement(runs, "round_robin", "ttft_p99_s")],
        }
        what = f"P99 TTFT below least load, {name}"
        met = statistics.median(better) > 0
        targets.append(target(what, better, "%", f"> 0 (the paper: {CLAIM:g})", met=met))
    notes = (
        "Simulated, on catalogued devices. Ours differs from the claim in the documents' lengths (LooGLE is not at hand; here uniform, "
        "6,000 to 16,000 tokens), in the load, which the paper does not give, and in the rule: load is part of the sum here."
    )
    write(
        "reproductions/memserve_routing", shown, targets, {"MemServe (published)": {"percent": CLAIM}}, notes
    )


if __name__ == "__main__":
    main()
