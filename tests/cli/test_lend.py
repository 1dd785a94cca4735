"""A prompt longer than any worker's pool, served by real processes that lend each other memory."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from headrace.compute.ops.backend import native
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
        for victim in ("worker1", "worker0"):
            told: list[str] = []
            for chunk in asking.completions.create(**request):
                told += [choice.text for choice in chunk.choices]
                if len(told) == 40:
                    # No worker alone holds it: it waits until both are there again, and starts over.
                    pids = {instance["name"]: instance["pid"] for instance in server.instances()}
                    os.kill(pids[victim], signal.SIGKILL)
            assert "".join(told) == "".join(whole)
            server.wait_ready()
