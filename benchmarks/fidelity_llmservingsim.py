"""A public live run of vLLM, simulated from the model's config, the engine's limits and the device catalogue; nothing is fitted to it.

    HEADRACE_DATA=DIR make bench NAME=fidelity_llmservingsim

The run (casys-kaist/LLMServingSim, MIT): vLLM 0.19, Llama-3.1-8B in bf16 on one RTX PRO 6000, 300 ShareGPT requests at about 10 a second,
far more than it serves, so that most wait for one of the 128 places in the batch. docs/fidelity.md says what is compared and what is off.
"""

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _report import target, write
from msgspec import structs
from rich.console import Console

from headrace.cli.cluster import cluster_of
from headrace.cli.options import ClusterOptions
from headrace.sim.cluster import Cluster, run
from headrace.types.outcomes import Ints, Outcomes, RunData, Series
from headrace.types.trace import Trace, make_trace
from headrace.workload.fidelity import FidelityReport, fidelity, render_fidelity
from headrace.workload.traces import read

FOLDER = "llmservingsim"
LIVE = "live_vllm_RTXPRO6000_Llama-3.1-8B"
TRACE = "sharegpt-llama-3.1-8b-300.block16.jsonl.gz"
MODEL, DEVICE = "llama-3.1-8b", "rtx-pro-6000"
BLOCK_SIZE = 16
DEPTH = 2
"""Plans in flight: since 0.14 vLLM schedules one step ahead unless told otherwise. Prefix caching is on by default, too."""
GOALS = {"ttft_mean_ms": 0.12, "tpot_mean_ms": 0.05, "e2e_mean_ms": 0.07, "output_tokens_per_s": 0.05}
PEERS = {
    "what": "error of means; LLMServingSim on this run (its own summary), and a flat loop of 100 lines with a fitted step time",
    "LLMServingSim": {"ttft": -0.040, "tpot": -0.010, "e2e": -0.018},
    "flat loop": {"ttft": -0.101, "tpot": -0.035, "e2e": -0.052},
}
NOTES = (
    "Nothing was tuned on this run. The catalogue's efficiencies of this device are those of the H100, as its file says. "
    "`step_time_matched` is no prediction: every step takes longer by the factor that makes mean TPOT right, to show what remains then. "
    "The goals are those of profiled deployments; a catalogue is not asked to meet them."
)


def read_live(folder: Path) -> RunData:
    """The live run. A request arrives when the client says; the engine takes it in only between two steps.

    The client's clock is another one than the engine's: they are put together so that the quickest request took no time between them.
    """
    with (folder / f"{LIVE}.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = {key: np.array([float(row[key]) for row in rows]) for key in rows[0] if key != "request_id"}
    arrival_s = table["arrival_time"] + (table["queued_ts"] - table["arrival_time"]).min()
    order = np.argsort(arrival_s, kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        raise SystemExit(f"{LIVE}.csv is not in order of arrival")

    def instants(seconds: np.ndarray) -> Ints:
        return np.rint((seconds - arrival_s[0]) * 1e9).astype(np.int64)

    outcomes = Outcomes.empty(len(rows), ("vllm",))
    outcomes.arrival_ns = instants(arrival_s)
    outcomes.first_ns = instants(table["first_token_ts"])
    outcomes.finished_ns = instants(table["last_token_ts"])
    outcomes.prompt = table["input_toks"].astype(np.int64)
    outcomes.output = table["output_toks"].astype(np.int64)
    return RunData(
        name="vLLM",
        seed=0,
        clock="wall",
        outcomes=outcomes,
        series=Series(at_ns=np.zeros(0, dtype=np.int64)),
        counters={},
        duration_s=float(outcomes.finished_ns.max()) * 1e-9,
    )


def read_requests(folder: Path, live: RunData) -> Trace:
    """The trace with the live run's arrivals. Later turns share prompts with earlier ones only: the live answers were other ones than those
    that the trace's later prompts contain, so nothing of an answer was found again."""
    trace, _ = read(folder / TRACE)
    asked, given = live.outcomes.prompt, live.outcomes.output
    if not np.array_equal(trace.prompt, asked) or not np.array_equal(trace.output, given):
        raise SystemExit("the trace and the live run are not of the same requests")
    return replace(trace, arrival_ns=live.outcomes.arrival_ns, follows=np.full_like(trace.follows, -1))


def without_names(trace: Trace) -> Trace:
    """No two requests share a prefix."""
    return make_trace(trace.name, trace.arrival_ns, trace.prompt, trace.output)


def deployment(folder: Path, *, depth: int = DEPTH, slow: float = 1.0) -> Cluster:
    """One instance with the limits that the live run's description names, as `headrace simulate` makes it from such settings."""
    limits = json.loads((folder / f"{LIVE}.meta.json").read_text())["engine_kwargs"]
    stated = {
        "model": MODEL,
        "hardware": DEVICE,
        "instances": 1,
        "tensor_parallel": limits["tensor_parallel_size"],
        "max_num_seqs": limits["max_num_seqs"],
        "max_num_batched_tokens": limits["max_num_batched_tokens"],
        "block_size": BLOCK_SIZE,
        "faults": {"slow": {"worker0": slow}},
    }
    made = cluster_of(ClusterOptions.model_validate(stated))
    return replace(made, instance=structs.replace(made.instance, depth=depth))


def unqueued(live: RunData, simulated: RunData, instant_s: float) -> dict[str, float]:
    """Mean TTFT of the requests that came before `instant_s`: none of them waited for a place in the batch."""
    early = live.outcomes.arrival_ns < instant_s * 1e9
    means = [float(run.outcomes.ttft_s()[early].mean()) * 1e3 for run in (live, simulated)]
    return {
        "requests": int(early.sum()),
        "live_ms": round(means[0], 1),
        "simulated_ms": round(means[1], 1),
        "error": round(means[1] / means[0] - 1, 4),
    }


def drained(live: RunData, simulated: RunData, last: int) -> dict[str, float]:
    """How long the last `last` requests to end took from the last first token on: steps of decodes only."""
    spans: list[float] = []
    for each in (live, simulated):
        ends = np.sort(each.outcomes.finished_ns)
        begun = max(int(each.outcomes.first_ns.max()), int(ends[-last]))
        spans.append((int(ends[-1]) - begun) * 1e-9)
    return {"live_s": round(spans[0], 2), "simulated_s": round(spans[1], 2)}


def errors(report: FidelityReport) -> dict[str, float]:
    return {figure.key: round(figure.error, 4) for figure in report.figures}


def first_full_s(live: RunData, places: int) -> float:
    """When so many requests were running for the first time."""
    outcomes = live.outcomes
    for at_ns in np.sort(outcomes.first_ns).tolist():
        running = int(((outcomes.first_ns <= at_ns) & (outcomes.finished_ns > at_ns)).sum())
        if running >= places - 2:
            return at_ns * 1e-9
    return live.duration_s


def main() -> None:
    data = os.environ.get("HEADRACE_DATA")
    folder = Path(data or ".") / FOLDER
    if not (folder / f"{LIVE}.csv").is_file():
        print(f"skipped: set HEADRACE_DATA to a folder with {FOLDER}/{LIVE}.csv", file=sys.stderr)
        return
    live = read_live(folder)
    trace = read_requests(folder, live)
    simulated = run(deployment(folder), trace)
    report = fidelity([live], simulated)
    Console().print(render_fidelity(report))
    tpot = report.figure("tpot_mean_ms")
    assert tpot is not None
    matched = fidelity([live], run(deployment(folder, slow=tpot.live / tpot.simulated), trace))
    full_s = first_full_s(live, deployment(folder).instance.sequences_max)
    figures: dict[str, Any] = {
        "requests": len(trace),
        "metrics": [
            {
                "metric": f.key,
                "live": round(f.live, 2),
                "simulated": round(f.simulated, 2),
                "error": round(f.error, 4),
            }
            for f in report.figures
        ],
        "before_the_batch_was_full": {"until_s": round(full_s, 1)} | unqueued(live, simulated, full_s - 1),
        "decode_only_tail": drained(live, simulated, 100),
        "step_time_matched": {"factor": round(tpot.live / tpot.simulated, 4)} | errors(matched),
        "one_plan_in_flight": errors(fidelity([live], run(deployment(folder, depth=1), trace))),
        "no_prefix_cache": errors(fidelity([live], run(deployment(folder), without_names(trace)))),
        "cached_tokens": int(simulated.outcomes.cached.sum()),
        "steps": simulated.facts["steps"],
        "cpu_s": simulated.facts["cpu_s"],
    }
    for key in ("before_the_batch_was_full", "decode_only_tail", "step_time_matched"):
        print(f"{key}: {figures[key]}")
    targets = [
        target(
            f"error of {f.label}",
            [f.error * 100],
            "%",
            f"within {GOALS[f.key]:.0%}",
            met=f.within(GOALS[f.key]),
        )
        for f in report.figures
        if f.key in GOALS
    ]
    write("fidelity_llmservingsim", figures, targets, PEERS, NOTES)


if __name__ == "__main__":
    main()
