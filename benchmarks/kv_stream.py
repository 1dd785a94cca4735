"""From the end of a prefill to the first decode step: KV sent after each chunk, layer by layer, or when the whole prompt is computed.

    make bench NAME=kv_stream [ARGS="--rounds 7"]

Three services stand side by side, each with one prefill and one decode worker and a pool each, and are asked in turn. The wait is from the
first token drawn (prefill worker's clock) until the decode worker holds all KV (its own clock, the same on one host). A prompt is
computed in chunks, and once more in one piece: there a chunk is the whole prompt, and only layers can leave before its end.
"""

import argparse
import asyncio
import statistics
from contextlib import AsyncExitStack

from _model import prompt, qwen3_shape
from _report import target, write
from _service import complete, service

from headrace.types.request import Timeline

STREAMS = ("chunk", "layer", "request")


async def measure(tokens: int, rounds: int, chunk: int) -> dict[str, list[Timeline]]:
    """Timelines by stream, of `rounds` prompts that share nothing, asked in turn."""
    async with AsyncExitStack() as stack:
        asked = {
            stream: await stack.enter_async_context(
                service(
                    model=qwen3_shape(),
                    max_model_len=4096,
                    kv_memory="768MiB",
                    prefill=1,
                    decode=1,
                    threads=1,
                    separate_pools=True,
                    max_num_batched_tokens=chunk,
                    kv_stream=stream,
                )
            )
            for stream in STREAMS
        }
        for running in asked.values():
            await complete(running, prompt(99, 64), 2, "warm-up")
        timelines: dict[str, list[Timeline]] = {stream: [] for stream in STREAMS}
        for round_ in range(rounds):
            for stream, running in asked.items():
                _, timeline = await complete(running, prompt(round_, tokens), 2, f"round {round_}")
                timelines[stream].append(timeline)
        return timelines


def figures_of(timelines: list[Timeline]) -> dict[str, object]:
    return {
        "wait_ms": [round((t.joined_ns - t.prefilled_ns) / 1e6, 2) for t in timelines],
        "prefill_ms": [round((t.prefilled_ns - t.prefill_ns) / 1e6, 1) for t in timelines],
        "writes": timelines[0].writes,
        "bytes": timelines[0].bytes_moved,
    }


def ratios(timelines: dict[str, list[Timeline]], stream: str, baseline: str) -> list[float]:
    """Wait of one stream per that of another, round by round."""
    pairs = zip(timelines[stream], timelines[baseline], strict=True)
    return [(a.joined_ns - a.prefilled_ns) / (b.joined_ns - b.prefilled_ns) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"tokens": 512, "rounds": 5, "chunk": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    chunked = asyncio.run(measure(o.tokens, o.rounds, o.chunk))
    whole = asyncio.run(measure(o.tokens, o.rounds, o.tokens))
    figures = {
        "in_chunks": {stream: figures_of(lines) for stream, lines in chunked.items()},
        "in_one_piece": {stream: figures_of(lines) for stream, lines in whole.items()},
        "sizes": vars(o),
    }
    wanted = (
        ("in chunks: wait by chunk / by request", ratios(chunked, "chunk", "request"), "< 1"),
        ("in chunks: wait by layer / by chunk", ratios(chunked, "layer", "chunk"), "< 1"),
        ("in one piece: wait by layer / by chunk", ratios(whole, "layer", "chunk"), "< 1"),
    )
    targets = [target(what, got, "", goal, met=statistics.median(got) < 1) for what, got, goal in wanted]
    notes = "Qwen3-0.6B's shape, bf16, 32 tokens a block; one thread a worker, three services of which two are idle."
    write("kv_stream", figures, targets, {}, notes)


if __name__ == "__main__":
    main()
