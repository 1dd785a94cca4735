"""`headrace serve --preemption swap` with priorities that change: KV goes to host memory and back, and no text changes."""

import asyncio
from urllib.request import urlopen

from openai import AsyncOpenAI

from tests.cli.running import Server, serving

MODEL = "headrace-python-5m"
STREAMS = 10
TOKENS = 240
CALM = ("--instances", "1", "--max-model-len", "512")
FAIR = '{"name": "fair", "pattern": "random", "frequency": 0.2}'
CROWDED = (
    *CALM,
    "--kv-memory",
    "2MiB",
    "--scheduling-policy",
    FAIR,
    "--preemption",
    "swap",
    "--swap-space",
    "0.1",
)


async def answer(asking: AsyncOpenAI, number: int) -> str:
    """Half of them greedy, half sampled, all different."""
    pieces = await asking.completions.create(
        model=MODEL,
        prompt=f"value_{number} = {number}\n" + "import os\n" * number,
        max_tokens=TOKENS,
        temperature=0.9 if number % 2 else 0,
        seed=number,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([piece.choices[0].text async for piece in pieces if piece.choices])


async def answers(server: Server) -> list[str]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
        return await asyncio.gather(*(answer(asking, number) for number in range(STREAMS)))


def counted(server: Server, name: str) -> float:
    with urlopen(f"{server.url}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}_total{{"))


def test_swapped_streams_say_what_unpreempted_ones_do() -> None:
    with serving(*CALM) as server:
        wanted = asyncio.run(answers(server))
        assert counted(server, "vllm:num_preemptions") == 0
    with serving(*CROWDED) as server:
        assert asyncio.run(answers(server)) == wanted
        assert counted(server, "vllm:num_preemptions") > 0
        assert counted(server, "headrace:swaps_in") > 0 and counted(server, "headrace:swap_bytes") > 0
