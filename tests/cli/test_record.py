"""`headrace serve --record`: real processes, the real `openai` client, a worker killed under way, and the journals fed back."""

import asyncio
import io
import os
import signal
from pathlib import Path
from shutil import copytree
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI, OpenAI
from rich.console import Console

from headrace.cli.options import ServeOptions, resolve
from headrace.cli.verify import verify_recording
from headrace.types.errors import ConfigError
from headrace.types.recording import RecordedRequest, Recording
from tests.cli.running import Server, serving

MODEL = "headrace-python-5m"
LONG = 320
"""Tokens of the streams among which a worker is killed."""
PROMPT = "import os\n\n\ndef walk(folder):\n" * 12
FLAGS = ("--prefill", "1", "--decode", "1", "--separate-pools", "--max-num-batched-tokens", "64")


def ask(server: Server, **stated: Any) -> str:
    request: dict[str, Any] = {"max_tokens": 8, "temperature": 0, **stated}
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
        answer = asking.completions.create(model=MODEL, **request)
    return answer.choices[0].text


async def stream(asking: AsyncOpenAI, number: int, tokens: int, begun: asyncio.Event) -> int:
    """How many pieces came."""
    pieces = await asking.completions.create(
        model=MODEL,
        prompt=f"value_{number} = {number}\n{PROMPT}",
        max_tokens=tokens,
        stream=True,
        user="somebody@example.org",
        extra_body={"ignore_eos": True, "category": "code"},
    )
    count = 0
    async for piece in pieces:
        count += bool(piece.choices)
        begun.set()
    return count


async def streams_with_a_death(server: Server) -> None:
    """The decode worker is killed in mid-stream."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
        # It is known by then whom to kill, so the others are far from their end when the short one is through.
        pid = server.pid("decode")
        begun = [asyncio.Event() for _ in range(6)]
        tasks = [asyncio.create_task(stream(asking, i, LONG, each)) for i, each in enumerate(begun)]
        await stream(asking, 99, 4, asyncio.Event())
        for each in begun:
            await each.wait()
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*tasks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = tmp_path_factory.mktemp("recordings") / "one"
    with serving(*FLAGS, "--record", str(record)) as server:
        text = ask(server, prompt=PROMPT, max_tokens=40, extra_body={"ignore_eos": True})
        ask(server, prompt=PROMPT + text)
        ask(server, prompt=PROMPT, n=2, temperature=1, seed=3, stop=["\n", " ", "(", "."], max_tokens=800)
        asyncio.run(streams_with_a_death(server))
        server.wait_ready()
    return record


def requests(folder: Path) -> list[RecordedRequest]:
    raw = (folder / "trace.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=RecordedRequest) for line in raw]


def verified(folder: Path) -> tuple[bool, str]:
    """Whether all is as recorded, and what is said of it."""
    said = io.StringIO()
    return verify_recording(folder, Console(file=said, width=200)), said.getvalue()


def test_every_request_is_in_the_trace(folder: Path) -> None:
    first, second, both, *streams = requests(folder)
    assert [r.number for r in (first, second, both)] == [1, 2, 3] and len(streams) == 7
    assert len(first.prompt_blocks) == 4 == len({*first.prompt_blocks}) and len(first.output_blocks[0]) >= 1
    assert second.prompt_blocks[:4] == first.prompt_blocks == both.prompt_blocks
    assert first.output == (40,) and first.choices[0].bytes_moved > 0
    assert both.finish == ("stop", "stop")
    assert [r.arrival_ns for r in streams] == sorted(r.arrival_ns for r in streams)
    assert both.choices[0].cached >= 32
    assert {r.category for r in streams} == {"code"} and len({r.tenant for r in streams}) == 1
    assert sorted(r.output for r in streams) == [(4,), *[(LONG,)] * 6]
    assert max(r.choices[0].attempts for r in streams) == 2
    for request in (first, second, both, *streams):
        for choice in request.choices:
            assert request.arrival_ns <= choice.placed_ns < choice.first_ns <= choice.finished_ns
            assert (choice.prefill, choice.decode) == ("prefill0", "decode0") or choice.attempts == 2


def test_nothing_of_the_text_is_kept(folder: Path) -> None:
    kept = (folder / "trace.jsonl").read_text()
    assert "example.org" not in kept and "walk" not in kept and "_ids" not in kept


def test_the_journals_replay_after_a_kill(folder: Path) -> None:
    ok, said = verified(folder)
    assert ok, said
    for core in ("router#0", "pool0#0", "pool1#0", "prefill0#0", "decode0#0", "decode0#1"):
        assert core in said
    assert said.count(" ok") == 6


def test_one_changed_byte_is_found(folder: Path, tmp_path: Path) -> None:
    copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "journal" / "router#0.journal"
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"Submitted") + 30
    raw[at] ^= 1
    path.write_bytes(raw)
    ok, said = verified(tmp_path / "copy")
    assert not ok and "was changed" in said and said.count(" ok") == 5
    path.write_bytes(bytes(raw[:11]))
    ok, said = verified(tmp_path / "copy")
    assert not ok and "is no journal" in said
    with pytest.raises(ConfigError, match="holds no journals"):
        verified(tmp_path)


def test_the_settings_start_the_same_deployment_again(folder: Path) -> None:
    options = resolve(ServeOptions, folder / "cluster.yaml", {})
    assert (options.prefill, options.decode, options.separate_pools) == (1, 1, True)
    assert options.max_num_batched_tokens == 64 and options.threads >= 1 and options.dtype == "bfloat16"
    assert options.record is None
    recording = msgspec.json.decode((folder / "meta.json").read_bytes(), type=Recording)
    assert recording.model == MODEL and recording.config["num_hidden_layers"] == 6
    assert recording.spec.block_size == options.block_size == 32
    assert [i.name for i in recording.instances] == ["prefill0", "decode0"] and len(recording.pools) == 2
    assert recording.numerics and recording.fingerprint and recording.threads == options.threads
