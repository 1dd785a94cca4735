"""`headrace bench`: drive an OpenAI-compatible server and show what it gave."""

import asyncio
from pathlib import Path

from rich.console import Console

from headrace.types.errors import ConfigError, RequestFailed
from headrace.workload.client import run_load
from headrace.workload.load import LoadConfig
from headrace.workload.report import progress_bar, render, summarize


async def bench(config: LoadConfig, save: Path | None) -> None:
    """Raises RequestFailed if nothing came back at all."""
    if save is not None and not save.parent.is_dir():
        raise ConfigError(f"--save {save}: the folder does not exist")
    console = Console()
    with progress_bar(Console(stderr=True)) as progress:
        run = await run_load(config, progress)
    report = summarize(run)
    console.print(render(report))
    if save is not None:
        await asyncio.to_thread(save.write_bytes, report.to_json() + b"\n")
        console.print(f"wrote {save}")
    if not report.completed:
        raise RequestFailed(f"no request to {config.url} was completed")
