"""The whole of it: `headrace serve` on the bundled model, real processes, the real `openai` client."""

import asyncio
import signal
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.running import Server, alive, children_of, serving, started

MODEL = "headrace-python-5m"
SPLIT = ("--prefill", "1", "--decode", "1", "--separate-pools", "--max-num-batched-tokens", "64")
LONG = "import os\n\n\ndef walk(folder):\n" * 12
"""Several chunks and several blocks."""
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "def main():\n", "temperature": 0},
    {"prompt": LONG, "temperature": 0, "logprobs": 3},
    {"prompt": LONG, "temperature": 0.9, "seed": 3, "n": 3},
    {"prompt": "class Reader:\n", "temperature": 1.1, "top_p": 0.9, "seed": 11, "logprobs": 1},
    {"prompt": ["x = 1\n", LONG], "temperature": 0.7, "seed": 5, "presence_penalty": 0.5},
    {
        "prompt": [5, 6, 7, 8],
        "temperature": 0.8,
        "seed": 2,
        "extra_body": {"top_k": 20, "repetition_penalty": 1.2},
    },
    {"prompt": LONG, "temperature": 0, "stop": ["\n\n", "return"]},
    {"prompt": "def f(", "max_tokens": 1, "temperature": 0},
    {
        "prompt": "a",
        "temperature": 0,
        "logit_bias": {"10": 50},
        "extra_body": {"min_tokens": 8, "ignore_eos": True},
    },
)


@pytest.fixture(scope="module")
def split() -> Iterator[Server]:
    with serving(*SPLIT) as server:
        yield server


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def answers(server: Server) -> list[Any]:
    """Everything that must not depend on how the service is laid out."""
    told: list[Any] = []
    with client(server) as asking:
        for request in REQUESTS:
            answer = asking.completions.create(model=MODEL, **{"max_tokens": 24} | request)
            choices = [
                (c.text, c.finish_reason, c.logprobs and c.logprobs.model_dump()) for c in answer.choices
            ]
            assert answer.usage is not None
            told.append((choices, answer.usage.prompt_tokens, answer.usage.completion_tokens))
    return told


def test_split_across_workers_answers_as_one_worker_does(split: Server) -> None:
    with serving("--instances", "1") as whole:
        alone = answers(whole)
    with serving(*SPLIT, "--kv-stream", "layer") as layered:
        assert answers(split) == alone == answers(layered)


def test_over_tcp_a_killed_worker_changes_no_token_either(split: Server) -> None:
    wanted = asyncio.run(streams(split, 48))
    with serving(*SPLIT, "--transport", "tcp", "--transfer-lanes", "2") as over_tcp:
        assert asyncio.run(streams(over_tcp, 48)) == wanted
        assert asyncio.run(streams(over_tcp, 48, "decode")) == wanted


def test_bytes_really_move_between_separate_pools(split: Server) -> None:
    with client(split) as asking:
        answer = asking.completions.create(
            model=MODEL, prompt="moved = " + LONG, max_tokens=4, extra_body={"return_timings": True}
        )
    assert answer.usage is not None and answer.usage.model_extra is not None
    timings = answer.usage.model_extra["timings"][0]
    assert timings["bytes_moved"] > 0 and timings["writes"] > 0 and timings["prefill_ms"] > 0


def test_a_second_turn_finds_the_first_in_the_cache(split: Server) -> None:
    with client(split) as asking:
        messages: list[Any] = [{"role": "user", "content": "cached = 1\n" + LONG}]
        first = asking.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
        again = asking.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    assert first.choices[0].message.content == again.choices[0].message.content
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached >= 32


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x " * 4000}, "prompt"),
        ({"prompt": "x", "max_tokens": 10**9}, "max_tokens"),
        ({"prompt": "x", "n": 10**6}, "n"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
    ],
)
def test_bad_input_is_named_and_the_server_goes_on(split: Server, wrong: dict[str, Any], field: str) -> None:
    with client(split) as asking:
        with pytest.raises(BadRequestError) as caught:
            asking.completions.create(model=MODEL, **wrong)
        assert caught.value.param is not None and caught.value.param.startswith(field)
        with pytest.raises(NotFoundError):
            asking.completions.create(model="no-such-model", prompt="x")
        assert asking.completions.create(model=MODEL, prompt="x = ", max_tokens=2).choices


async def stream(asking: AsyncOpenAI, number: int, tokens: int) -> str:
    """Half of them greedy, half sampled, all different."""
    pieces = await asking.completions.create(
        model=MODEL,
        prompt=f"value_{number} = {number}\n{LONG[: 40 + 7 * number]}",
        max_tokens=tokens,
        temperature=0.9 if number % 2 else 0,
        seed=number,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([piece.choices[0].text async for piece in pieces if piece.choices])


async def streams(server: Server, tokens: int, kill: str | None = None) -> list[str]:
    """32 at once; with `kill`, a worker that leans so is killed as soon as some text has come."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
        tasks = [asyncio.create_task(stream(asking, i, tokens)) for i in range(32)]
        if kill is not None:
            # The shortest of them is through: the others are in mid-stream.
            await stream(asking, 99, 4)
            await asyncio.to_thread(server.kill, kill)
        return await asyncio.gather(*tasks)


@pytest.mark.parametrize("leaning", ["decode", "prefill"])
def test_killing_a_worker_under_32_streams_changes_no_token(split: Server, leaning: str) -> None:
    undisturbed = asyncio.run(streams(split, 96))
    epochs = {i["name"]: i["epoch"] for i in split.instances()}
    assert asyncio.run(streams(split, 96, leaning)) == undisturbed
    split.wait_ready()
    assert sum(i["epoch"] > epochs[i["name"]] for i in split.instances()) == 1


def test_at_rest_every_block_is_free_or_in_hand(split: Server) -> None:
    """Whatever the tests before this one did. 320 more requests: one block lost by each would show."""
    for _ in range(10):
        asyncio.run(streams(split, 4))
    at_rest = {"running": 0, "waiting": 0, "http": 0}
    split.wait_until("at rest", lambda: split.ready().get("requests") == at_rest)

    def lent() -> int:
        blocks = split.ready()["blocks"]
        return blocks["total"] - blocks["free"]

    # Two workers keep four leases of 32 blocks each in hand at most.
    split.wait_until("back in the pool", lambda: lent() <= 2 * 4 * 32)


def test_virtual_ranges_answer_as_the_paged_pool_does(split: Server) -> None:
    with serving("--memory", "virtual", "--kv-stream", "layer", *SPLIT) as ranges:
        assert answers(ranges) == answers(split)
        undisturbed = asyncio.run(streams(split, 48))
        assert asyncio.run(streams(ranges, 48)) == undisturbed
        assert asyncio.run(streams(ranges, 48, "decode")) == undisturbed
        ranges.wait_ready()
        counts = range_counts(ranges, "prefill")
    assert counts["blocks_mapped_total"] > 0 and counts["blocks_in_place_total"] > 0
    assert counts["map_seconds_total"] > 0
    assert counts["held_bytes"] >= counts["used_bytes"] >= 0 and counts["mapped_bytes"] > 0
    assert counts["resident_bytes"] > 0


def range_counts(server: Server, leaning: str) -> dict[str, float]:
    """Of the worker that leans so, as Prometheus would read them."""
    with urlopen(f"{server.url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    prefix = "headrace:kv_range_"
    return {
        s.name.removeprefix(prefix): s.value
        for s in samples
        if s.name.startswith(prefix) and s.labels["leaning"] == leaning
    }


def test_sigkill_of_the_server_leaves_nothing_and_the_next_start_works() -> None:
    with started("--instances", "2") as first:
        children = children_of(first.process.pid)
        assert len([i for i in first.instances() if i["pid"] in children]) == 2
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        first.wait_until("ended", lambda: not [pid for pid in children if alive(pid)])
    with serving("--instances", "1") as second, client(second) as asking:
        assert asking.completions.create(model=MODEL, prompt="x = ", max_tokens=2).choices
