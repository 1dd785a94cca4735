"""A prompt longer than any worker's pool, served by real processes that lend each other memory."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from openai import AsyncOpenAI, OpenAI

from headrace.cli.push import push_weights
from headrace.compute.ops.backend import native
from headrace.types.weights import Running
from tests.cli.running import Server, serving

pytestmark = pytest.mark.skipif(native is None, reason="equal bits are the native kernels' promise")

BLOCK = 6 * 2 * 2 * 32 * 32 * 2
"""Bytes of a block of the bundled model: layers, planes, heads, tokens, dim, bf16."""
COMMON = ("--max-model-len", "4200", "--max-num-batched-tokens", "256", "--threads", "1")
SMALL = ("--separate-pools", "--kv-memory", str(82 * BLOCK), "--lend-kv", "1", *COMMON)
"""2,624 tokens a pool."""
PROMPT = [5 + (17 * i + i // 100) % 4000 for i in range(3500)]
REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "max_tokens": 24, "logprobs": 2},
    {"temperature": 0.9, "seed": 3, "max_tokens": 24, "logprobs": 1},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model, for longer contexts than it was made for."""
    path = tmp_path_factory.mktemp("long") / "long"
    shutil.copytree(Path(str(files("headrace") / "assets" / "headrace-python-5m")), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return str(path)


@pytest.fixture(scope="module")
def expected(folder: str) -> Iterator[list[Any]]:
    with serving(folder, "--instances", "1", "--kv-memory", str(300 * BLOCK), *COMMON) as server:
        yield [ask(server, request) for request in REQUESTS]


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: Server, request: dict[str, Any]) -> Any:
    with client(server) as asking:
        answer = asking.completions.create(model="long", prompt=PROMPT, **request)
        (choice,) = answer.choices
        assert choice.logprobs is not None
        return choice.text, choice.finish_reason, choice.logprobs.model_dump()


def test_a_context_longer_than_any_pool_has_the_bits_of_one_large_pool(
    folder: str, expected: list[Any]
) -> None:
    with serving(folder, "--instances", "2", *SMALL) as server:
        assert [ask(server, request) for request in REQUESTS] == expected


def test_prefill_and_decode_workers_lend_too(folder: str, expected: list[Any]) -> None:
    with serving(folder, "--prefill", "1", "--decode", "1", *SMALL) as server:
        assert ask(server, REQUESTS[0]) == expected[0]


def test_a_stream_goes_on_when_its_holder_or_its_owner_is_killed(folder: str) -> None:
    request: Any = {"model": "long", "prompt": PROMPT, "max_tokens": 150, "temperature": 0, "stream": True}
    request["extra_body"] = {"ignore_eos": True}
    with serving(folder, "--instances", "2", *SMALL) as server, client(server) as asking:
        whole = [chunk.choices[0].text for chunk in asking.completions.create(**request) if chunk.choices]
        for victims in (["worker1"], ["worker0"], ["worker0", "worker1"]):
            told: list[str] = []
            for chunk in asking.completions.create(**request):
                told += [choice.text for choice in chunk.choices]
                if len(told) == 40:
                    # No worker alone holds it: it waits until both are there again, and starts over.
                    pids = {instance["name"]: instance["pid"] for instance in server.instances()}
                    for victim in victims:
                        os.kill(pids[victim], signal.SIGKILL)
            assert "".join(told) == "".join(whole)
            server.wait_ready()


@pytest.mark.parametrize("running", Running)
def test_weights_are_pushed_while_a_context_is_lent(
    folder: str, expected: list[Any], running: Running
) -> None:
    """They are the same weights, so they change no text, kept or computed again."""
    request: Any = {"model": "long", "prompt": PROMPT, "max_tokens": 500, "temperature": 0, "stream": True}
    request |= {"stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
    flags = ("--instances", "2", *SMALL, "--push-key", "key")
    with serving(folder, *flags) as server, client(server) as asking:
        whole = [chunk.choices[0].text for chunk in asking.completions.create(**request) if chunk.choices]
        told: list[str] = []
        seen: list[int] = []
        for chunk in asking.completions.create(**request):
            told += [choice.text for choice in chunk.choices]
            if len(told) == 1 and not chunk.usage:
                push_weights(Path(folder), server.url, key="key", running=running)
            if chunk.usage is not None:
                seen = (chunk.usage.model_extra or {}).get("weights", [])
        assert "".join(told) == "".join(whole)
        assert seen == [0, 1], "the push came before the end"
        assert ask(server, REQUESTS[0]) == expected[0]


def counted(server: Server, name: str) -> float:
    with urlopen(f"{server.url}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}_total{{"))


async def stream(asking: AsyncOpenAI, number: int) -> str:
    """Number 0 is longer than any pool. Half of all are greedy, half sampled."""
    prompt = PROMPT if number == 0 else [5 + number, *PROMPT[40 * number :][:400]]
    pieces = await asking.completions.create(
        model="long",
        prompt=prompt,
        max_tokens=120,
        temperature=0.9 if number % 2 else 0,
        seed=number,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([piece.choices[0].text async for piece in pieces if piece.choices])


async def crowd(server: Server) -> list[str]:
    """Many short ones beside a long one: more than all pools hold at once."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
        return await asyncio.gather(*(stream(asking, number) for number in range(13)))


def test_lending_beside_swapping_changes_no_text(folder: str) -> None:
    with serving(folder, "--instances", "1", "--kv-memory", str(600 * BLOCK), *COMMON) as server:
        wanted = asyncio.run(crowd(server))
    fair = '{"name": "fair", "pattern": "random", "frequency": 0.2}'
    flags = ("--scheduling-policy", fair, "--preemption", "swap", "--swap-space", "0.1")
    with serving(folder, "--instances", "2", *SMALL, *flags) as server:
        assert asyncio.run(crowd(server)) == wanted
        assert counted(server, "headrace:swaps_in") > 0


def test_lending_beside_tiers_changes_no_text(folder: str, expected: list[Any]) -> None:
    def short(number: int) -> tuple[str, int]:
        prompt = PROMPT[100 * number :][:700]
        answer = asking.completions.create(model="long", prompt=prompt, max_tokens=8, temperature=0)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0

    with (
        serving(folder, "--instances", "2", *SMALL, "--host-cache", "64MiB") as server,
        client(server) as asking,
    ):
        first = [short(number) for number in range(4)]
        # It takes both pools whole: what they had cached is now below.
        assert ask(server, REQUESTS[0]) == expected[0]
        assert [text for text, _ in map(short, range(4))] == [text for text, _ in first]
        assert counted(server, "headrace:tokens_hit_host") > 0
        assert ask(server, REQUESTS[1]) == expected[1]
