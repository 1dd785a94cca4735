"""Cached prefixes below the pool: over restarts, damaged files, kill -9, and pools that are too small."""

import signal
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from openai import OpenAI

from tests.cli.running import Server, serving, started

MODEL = "headrace-python-5m"
ONE = ("--instances", "1", "--max-model-len", "1024")
TEXT = "import os\n\n\ndef walk(folder):\n    return sorted(os.listdir(folder))\n" * 10


def ask(server: Server, prompt: str, tokens: int = 16) -> tuple[str, int]:
    """What is said, and how many tokens of the prompt were cached."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
        answer = asking.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0


def metric(server: Server, name: str) -> float:
    with urlopen(f"{server.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"headrace:{name}_total"))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


def test_a_restart_finds_what_was_cached_and_damage_is_never_served(tmp_path: Path) -> None:
    flags = (*ONE, "--disk-cache", str(tmp_path))
    with serving(*flags) as server:
        text, cached = ask(server, TEXT)
        assert cached == 0
    kept = files(tmp_path)
    assert kept and not list(tmp_path.rglob("*.tmp"))
    with serving(*flags) as server:
        again, cached = ask(server, TEXT)
        assert again == text and cached >= 32
        assert metric(server, "tokens_hit_disk") == cached and metric(server, "tier_blocks_recovered") > 0
    for number, path in enumerate(files(tmp_path)):
        raw = bytearray(path.read_bytes())
        raw[(number * 977 + 100) % len(raw)] ^= 1 << number % 8
        path.write_bytes(raw)
    with serving(*flags) as server:
        damaged, cached = ask(server, TEXT)
        assert damaged == text and cached == 0
        assert metric(server, "tier_files_damaged") > 0


def test_a_small_pool_finds_more_below_and_kill_9_while_it_is_written_leaves_nothing_wrong(
    tmp_path: Path,
) -> None:
    """The pool has room for little more than one sequence of full length."""
    flags = (*ONE, "--kv-memory", "2MiB", "--host-cache", "64MiB", "--disk-cache", str(tmp_path))
    prompts = [f"y = {number}\n" + TEXT for number in range(12)]
    with started(*flags) as server:
        first = [ask(server, prompt) for prompt in prompts]
        again = [ask(server, prompt) for prompt in prompts]
        assert [text for text, _ in again] == [text for text, _ in first]
        assert metric(server, "tokens_hit_host") > 0
        assert sum(cached for _, cached in again) > sum(cached for _, cached in first)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until("ended", lambda: files(tmp_path) or server.process.poll() is not None)
        server.process.kill()
        server.process.wait()
    assert files(tmp_path)
    with serving(*flags) as server:
        assert [ask(server, prompt)[0] for prompt in prompts] == [text for text, _ in first]


def test_a_cache_of_not_one_block_is_refused() -> None:
    flags: list[Any] = ["--host-cache", "1"]
    server = Server(*ONE, *flags)
    try:
        assert server.process.wait(60) == 2
        assert "holds not one block" in server.words()
    finally:
        server.close()
