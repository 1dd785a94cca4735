"""`headrace serve` as a child process, for commands that need a real server for a while."""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp

from headrace.api.server import listen
from headrace.types.errors import HeadraceError

START_S = 600.0
PAUSE_S = 0.02
LINES_KEPT = 20


@asynccontextmanager
async def server(flags: Sequence[str]) -> AsyncIterator[str]:
    """The address of a ready one; it is told to end on exit, and waited for. Raises HeadraceError with its words if it does not start."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.cli.main", "serve", "--port", str(port), *flags),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    lines: deque[str] = deque(maxlen=LINES_KEPT)
    reading = asyncio.create_task(_read(process, lines))
    url = f"http://127.0.0.1:{port}"
    try:
        await _until_ready(url, process, lines)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        await reading


async def _read(process: asyncio.subprocess.Process, lines: deque[str]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        lines.append(line.decode(errors="replace").rstrip())


async def _until_ready(url: str, process: asyncio.subprocess.Process, lines: deque[str]) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(START_S):
        while True:
            if process.returncode is not None:
                raise HeadraceError("the server did not start:\n" + "\n".join(lines))
            try:
                async with session.get(f"{url}/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(PAUSE_S)
