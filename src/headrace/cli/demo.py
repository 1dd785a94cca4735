"""`headrace demo`: a real server, a real client, where the time goes, and a decode worker killed in mid-stream.

Everything is what a user would do: the server is `headrace serve` in a process of its own, the client is `openai`.
"""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
from openai import AsyncOpenAI
from openai.types import Completion
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.cli import child
from headrace.types.errors import HeadraceError

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\nclass FileReader:\n    def __init__(self, path):\n",
    "def main():\n    parser = argparse.ArgumentParser()\n",
)
KILL_AFTER = 24
"""Tokens of the last stream after which its decode worker is killed."""


async def demo(model: Path | None, tokens: int) -> None:
    """Raises HeadraceError if what it shows is not so."""
    console = Console(highlight=False)
    console.rule("[bold]Headrace: prefill and decode on separate workers, the KV cache moves between them")
    async with server(model, console) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        name = (await client.models.list()).data[0].id
        table = timings_table()
        for prompt in PROMPTS:
            _, timings = await stream(client, name, prompt, tokens, console)
            add_timings(table, prompt, timings)
        console.print(table)
        await show_failover(client, name, url, tokens, console)
    console.print("[bold]The server has ended, its workers and their memory with it.")


@asynccontextmanager
async def server(model: Path | None, console: Console) -> AsyncIterator[str]:
    """`headrace serve` with one prefill and one decode worker, a KV pool each, so that bytes really move."""
    flags = [*([str(model)] if model else []), "--prefill", "1", "--decode", "1", "--separate-pools"]
    console.print(f"[dim]$ headrace serve {' '.join(flags)}")
    started = perf_counter()
    async with child.server(flags) as url:
        console.print(f"[dim]ready after {perf_counter() - started:.1f} s: {url}/v1\n")
        yield url


async def stream(
    client: AsyncOpenAI, model: str, prompt: str, tokens: int, console: Console, kill: Any = None
) -> tuple[str, dict[str, Any]]:
    """Print a completion as it comes: its text, and where the server says that the time went."""
    console.print(Text(prompt, style="bold"), end="")
    text, timings, count = "", {}, 0
    pieces = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0.7,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_timings": True, "ignore_eos": True},
    )
    async for piece in pieces:
        new = piece.choices[0].text if piece.choices else ""
        text += new
        count += bool(piece.choices)
        console.print(Text(new, style="green"), end="")
        timings = timings_of(piece) or timings
        if kill is not None and count == KILL_AFTER:
            await kill()
            kill = None
    console.print("\n")
    return text, timings


def timings_of(piece: Completion) -> dict[str, Any]:
    """The server's own account of a request; it comes with the usage."""
    extra = (piece.usage.model_extra or {}) if piece.usage is not None else {}
    return next(iter(extra.get("timings") or ()), {})


def timings_table() -> Table:
    table = Table(title="Where the time went, by the workers' own clocks")
    for name in ("prompt", "queue ms", "prefill ms", "transfer ms", "moved", "decode ms", "tokens/s"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    return table


def add_timings(table: Table, prompt: str, t: dict[str, Any]) -> None:
    if not t:
        raise HeadraceError("the server said nothing of where the time went")
    moved = f"{t['bytes_moved'] / 1024:.0f} KiB in {t['writes']} call{'s' if t['writes'] != 1 else ''}"
    rate = (t["completion_tokens"] - 1) / (t["decode_ms"] / 1000) if t["decode_ms"] else 0.0
    table.add_row(
        prompt.strip().splitlines()[-1].strip(),
        f"{t['queue_ms']:.1f}",
        f"{t['prefill_ms']:.1f}",
        f"{t['transfer_ms']:.1f}",
        moved,
        f"{t['decode_ms']:.1f}",
        f"{rate:.0f}",
    )


async def show_failover(client: AsyncOpenAI, model: str, url: str, tokens: int, console: Console) -> None:
    """The same sampled request twice: undisturbed, and with its decode worker killed in mid-stream."""
    console.rule("[bold]Now the decode worker is killed (SIGKILL) in mid-stream")
    undisturbed, _ = await stream(client, model, PROMPTS[0], tokens, Console(quiet=True))

    async def kill() -> None:
        pid = await decode_pid(url)
        os.kill(pid, signal.SIGKILL)
        console.print(Text(f"⟨process {pid} killed⟩", style="bold red"), end="")

    text, timings = await stream(client, model, PROMPTS[0], tokens, console, kill)
    if text != undisturbed:
        raise HeadraceError(f"the text changed:\n{text}\ninstead of\n{undisturbed}")
    console.print(
        f"[bold green]The text went on unchanged, token for token[/] ({len(text)} characters, "
        f"{timings.get('attempts', '?')} attempts, {timings.get('recomputed_tokens', '?')} tokens computed again).\n"
    )


async def decode_pid(url: str) -> int:
    """Process id of the decode worker, as `/ready` says."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/ready") as answer:
        instances = (await answer.json())["instances"]
    return next(i["pid"] for i in instances if i["leaning"] == "decode")
