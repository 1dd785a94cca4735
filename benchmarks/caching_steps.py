"""MemServe's four caching steps on conversations: what is computed, what moves, and how long the first token takes, live and simulated.

    make bench NAME=caching_steps [ARGS="--talks 4 --turns 4"]

Live: a small model of random weights, one prefill and one decode worker with a pool each; several conversations at once, each turn's prompt
is the one before, its answer and new words. Greedy answers must be equal in all four. Simulated: the same steps for an 8B model on two
H100, conversations as `workload` generates them.
"""

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _model
from _report import target, write
from _service import complete, service

from headrace.cli.cluster import cluster_of
from headrace.cli.options import ClusterOptions
from headrace.cli.workload import Workload, load
from headrace.live.service import Service
from headrace.nodes.limits import Caching
from headrace.sim.cluster import run

FIRST, SAID, WORDS = 384, 96, 64
"""Tokens of a first prompt, of an answer, and of what a user adds."""
COUNTERS = (
    "tokens_prompt_computed",
    "tokens_prompt_hit",
    "transfer_bytes",
    "tokens_returned",
    "returned_bytes",
)


async def talk(running: Service, number: int, turns: int) -> tuple[list[list[int]], list[float]]:
    """Answers, and milliseconds to each turn's first token."""
    prompt = _model.prompt(number, FIRST)
    answers, ttft = list[list[int]](), list[float]()
    for turn in range(turns):
        answer, line = await complete(running, prompt, SAID)
        answers.append(answer)
        ttft.append((line.prefilled_ns - line.arrival_ns) / 1e6)
        prompt = [*prompt, *answer, *_model.prompt(1000 * (number + 1) + turn, WORDS)]
        # A user reads before he goes on.
        await asyncio.sleep(0.3)
    return answers, ttft


async def live(
    folder: Path, caching: str, talks: int, turns: int
) -> tuple[list[list[list[int]]], dict[str, Any]]:
    options = {"model": folder, "separate_pools": True, "caching": caching, "kv_memory": "512MiB"}
    async with service(**options, max_model_len=2048) as running:
        done = await asyncio.gather(*(talk(running, number, turns) for number in range(talks)))
        counters = running.status().counters
    later = [ms for _, ttft in done for ms in ttft[1:]]
    figures: dict[str, Any] = {name: counters.get(name, 0) for name in COUNTERS}
    figures["ttft_ms of later turns, median"] = round(statistics.median(later), 2)
    return [answers for answers, _ in done], figures


def simulated(caching: str, conversations: int) -> dict[str, Any]:
    options = ClusterOptions(
        model=Path("llama-3.1-8b"),
        hardware="h100-sxm",
        prefill=1,
        decode=1,
        separate_pools=True,
        caching=caching,
    )
    trace, _ = load(Workload(f"conversations:conversations={conversations}"), 0)
    data = run(cluster_of(options), trace)
    figures: dict[str, Any] = {name: data.counters.get(name, 0) for name in COUNTERS}
    ttft = data.outcomes.first_ns - data.outcomes.arrival_ns
    figures["ttft_ms, mean"] = round(float(ttft.mean()) / 1e6, 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--talks", type=int, default=4)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--conversations", type=int, default=200)
    said = parser.parse_args()
    steps = [step.value for step in Caching]
    figures: dict[str, Any] = {"live": {}, "simulated": {}}
    answers = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "small"
        _model.make(folder, hidden=256, layers=8, vocabulary=_model.VOCABULARY)
        for step in steps:
            told, figures["live"][step] = asyncio.run(live(folder, step, said.talks, said.turns))
            answers.append(told)
    for step in steps:
        figures["simulated"][step] = simulated(step, said.conversations)
    equal = all(told == answers[0] for told in answers)
    targets = [target("greedy answers are equal in all four", [float(equal)], "", "1", met=equal)]
    for where in ("live", "simulated"):
        none, prefill, increment, back = (figures[where][step] for step in steps)
        for what, better, worse, name in (
            ("computed, prefill against none", prefill, none, "tokens_prompt_computed"),
            ("bytes moved, increment against prefill", increment, prefill, "transfer_bytes"),
            ("computed, return against increment", back, increment, "tokens_prompt_computed"),
        ):
            ratio = better[name] / max(1, worse[name])
            targets.append(target(f"{where}: {what}", [ratio], "x", "below 1", met=ratio < 1))
    write("caching_steps", figures, targets, {}, "Figures of time are of one run each; counts are exact.")


if __name__ == "__main__":
    main()
