"""Sixteen prompts of 512 tokens in, 64 out: Headrace's engine against `transformers` `generate`, same model, same threads, one run.

make bench NAME=engine_offline [ARGS="--rounds 3"]
"""

import argparse
import asyncio
from time import perf_counter

import torch
from _model import prompt, qwen3_shape
from _report import target, write
from _service import complete_all, service
from transformers import AutoModelForCausalLM

PEERS = {
    "note": "measured earlier on a like machine, not in this run: total seconds for the same 16 requests",
    "OpenVINO GenAI 2026.4.1": 15.0,
    "vLLM CPU 0.32": 16.8,
    "llama.cpp bf16": 31.4,
    "transformers 5.23 generate": 57.8,
}


def transformers_seconds(
    prompts: list[list[int]], tokens: int, threads: int
) -> tuple[float, list[list[int]]]:
    """A static batch of equal lengths, greedy, all tokens forced."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(qwen3_shape(), dtype=torch.bfloat16).eval()
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        model.generate(ids[:1, :32], attention_mask=mask[:1, :32], max_new_tokens=4, do_sample=False)
        started = perf_counter()
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        taken = perf_counter() - started
    return taken, made[:, ids.shape[1] :].tolist()


async def headrace_seconds(
    prompts: list[list[int]], tokens: int, threads: int, rounds: int, batched: int
) -> tuple[list[float], list[list[int]]]:
    """One worker; every round has a cache salt of its own, so nothing is found in the prefix cache."""
    times: list[float] = []
    made: list[list[int]] = []
    async with service(
        model=qwen3_shape(), instances=1, threads=threads, max_num_batched_tokens=batched
    ) as running:
        await complete_all(running, [p[:32] for p in prompts], 4, "warm-up")
        for i in range(rounds):
            started = perf_counter()
            made = await complete_all(running, prompts, tokens, f"round {i}")
            times.append(perf_counter() - started)
    return times, made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"requests": 16, "input": 512, "output": 64, "rounds": 3, "threads": 2, "batched": 2048}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    prompts = [prompt(i, o.input) for i in range(o.requests)]
    ours, made = asyncio.run(headrace_seconds(prompts, o.output, o.threads, o.rounds, o.batched))
    theirs, reference = transformers_seconds(prompts, o.output, o.threads)
    agree = sum(a == b for x, y in zip(made, reference, strict=True) for a, b in zip(x, y, strict=True))
    ratios = [theirs / t for t in ours]
    figures = {
        "headrace_s": [round(t, 2) for t in ours],
        "transformers_s": round(theirs, 2),
        "headrace_output_tokens_per_s": round(o.requests * o.output / min(ours), 1),
        "tokens_equal_to_transformers": f"{agree}/{o.requests * o.output}",
        "sizes": vars(o),
    }
    goal = target(
        "times faster than transformers generate",
        ratios,
        "x",
        ">= 2",
        met=sorted(ratios)[len(ratios) // 2] >= 2,
    )
    notes = (
        "Random weights: bf16 ties flip greedy tokens between implementations; equality is shown, not a goal."
    )
    write("engine_offline", figures, [goal], PEERS, notes)


if __name__ == "__main__":
    main()
