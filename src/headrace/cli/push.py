"""The trainer's side of a push: `headrace weights push`, and what a training script calls.

    from headrace.cli.push import push_weights
    push_weights(model.state_dict(), "http://127.0.0.1:8000", key="...")

1. Names and shapes go to the service, which answers with the static plan: where each tensor goes, and its slot.
2. In that order each tensor is read (converted to the served dtype), its digest taken, and written by the transfer engine, all three at
   once for different tensors; no more than `watermark` bytes are on their way.
3. The digests ask for the change. The answer comes when every worker computes with the new weights.
Whatever goes wrong before ends the push, and the old weights go on serving.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import msgspec

from headrace.live.staging import LAYOUT, digest_of, weight_of
from headrace.live.transfer import pieces
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.regions import Descriptor, Region
from headrace.live.transports import Settings, open_transports
from headrace.types.errors import HeadraceError, PushRefused, TransferError
from headrace.types.ids import Address
from headrace.types.weights import Place, Pushed, Running, Tensor, Ticket, WeightsStatus

WATERMARK = 256 * 2**20
"""Bytes of tensors that are read and not yet written, at most (one tensor at least)."""
T = TypeVar("T")


class Source(Protocol):
    """Where the weights come from (see `compute.sources`)."""

    def tensors(self) -> tuple[Tensor, ...]: ...

    def read(self, name: str, dtype: str) -> memoryview: ...


class PushReport(msgspec.Struct, frozen=True):
    """How it went, for the trainer."""

    pushed: Pushed
    nbytes: int
    write_s: float
    """From the first byte read until the last was acknowledged."""
    commit_s: float
    """From then until every worker computed with the new weights."""


def push_weights(
    weights: Path | str | Mapping[str, Any],
    url: str,
    *,
    key: str,
    running: Running = Running.KEEP,
    hold_s: float = 2.0,
    api_key: str = "",
    watermark: int = WATERMARK,
) -> PushReport:
    """Push a checkpoint folder, or a state dict of torch tensors. Raises HeadraceError: then the old weights go on serving."""
    from headrace.compute.sources import FolderSource, TensorSource

    source = TensorSource(weights) if isinstance(weights, Mapping) else FolderSource(weights)
    return asyncio.run(
        push(source, url, key, running=running, hold_s=hold_s, api_key=api_key, watermark=watermark)
    )


async def push(
    source: Source,
    url: str,
    key: str,
    *,
    running: Running = Running.KEEP,
    hold_s: float = 2.0,
    api_key: str = "",
    watermark: int = WATERMARK,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PushReport:
    """The same on a running loop. `progress(bytes written, of all)`."""
    headers = {"X-Push-Key": key} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    timeout = aiohttp.ClientTimeout(total=None, connect=30)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        door = Door(session, url)
        ticket = await door.begin(source.tensors(), running, hold_s)
        try:
            begun_s = time.monotonic()
            async with Writer(source, ticket, key, watermark, progress) as writer:
                digests = await writer.run()
            written_s = time.monotonic()
            pushed = await door.commit(ticket.push, digests)
        except BaseException:
            with suppress(HeadraceError, aiohttp.ClientError):
                await door.drop(ticket.push)
            raise
        nbytes = sum(place.nbytes for place in ticket.places)
        return PushReport(pushed, nbytes, written_s - begun_s, time.monotonic() - written_s)


async def weights_status(url: str, key: str) -> WeightsStatus:
    async with aiohttp.ClientSession(headers={"X-Push-Key": key}) as session:
        return await Door(session, url).ask("GET", "/weights", None, WeightsStatus)


class Door:
    """The service's `/weights`. Raises PushRefused with its words."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v1")

    async def begin(self, tensors: tuple[Tensor, ...], running: Running, hold_s: float) -> Ticket:
        body = {"tensors": tensors, "running": running, "hold_s": hold_s}
        return await self.ask("POST", "/weights/pushes", body, Ticket)

    async def commit(self, number: int, digests: list[str]) -> Pushed:
        return await self.ask("POST", f"/weights/pushes/{number}", {"digests": digests}, Pushed)

    async def drop(self, number: int) -> None:
        await self.ask("DELETE", f"/weights/pushes/{number}", None, None)

    async def ask(self, method: str, path: str, body: Any, kind: type[T] | None) -> Any:
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with self._session.request(method, self._url + path, data=data) as answer:
                raw, status = await answer.read(), answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise PushRefused(f"{self._url} does not answer: {error}") from error
        if status >= 300:
            raise PushRefused(_words(raw) or f"{self._url} answered {status}")
        return None if kind is None else msgspec.json.decode(raw, type=kind)


def _words(raw: bytes) -> str:
    try:
        return str(msgspec.json.decode(raw)["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return ""


class Writer:
    """Reads, digests and writes the tensors of one ticket, in the plan's order."""

    def __init__(
        self,
        source: Source,
        ticket: Ticket,
        key: str,
        watermark: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._source = source
        self._ticket = ticket
        self._watermark = watermark
        self._progress = progress
        self._target = msgspec.convert(ticket.target, Descriptor)
        self._loop = asyncio.get_running_loop()
        self._reader = ThreadPoolExecutor(1, "headrace-read")
        self._digester = ThreadPoolExecutor(1, "headrace-digest")
        address = Address(f"trainer-{secrets.token_hex(6)}")
        self._engine = TransferEngine(address, open_transports("auto", Settings(address, key)), self._loop)
        self._total = sum(place.nbytes for place in ticket.places)
        self._under_way = 0
        self._written = 0
        self._left = 0
        """Writes that have not ended."""
        self._error: TransferError | None = None
        self._news = asyncio.Event()

    async def __aenter__(self) -> "Writer":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.close()
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._digester.shutdown(wait=False, cancel_futures=True)

    async def run(self) -> list[str]:
        """Digests, in the plan's order. Raises TransferError."""
        digests: list[asyncio.Future[str]] = []
        for slot, place in enumerate(self._ticket.places):
            read = partial(self._source.read, place.name, self._ticket.dtype)
            memory = await self._loop.run_in_executor(self._reader, read)
            if memory.nbytes != place.nbytes:
                raise PushRefused(f"tensor {place.name!r} has {memory.nbytes} bytes, not {place.nbytes}")
            await self._until(partial(self._has_room, memory.nbytes))
            digests.append(self._loop.run_in_executor(self._digester, digest_of, memory))
            self._write(slot, place, memory)
        await self._until(lambda: self._left == 0)
        return [await digest for digest in digests]

    def _has_room(self, nbytes: int) -> bool:
        return not self._under_way or self._under_way + nbytes <= self._watermark

    def _write(self, slot: int, place: Place, memory: memoryview) -> None:
        region = self._engine.register(memory, LAYOUT) if place.nbytes else None
        run = pieces.single(0, place.offset, place.nbytes)
        self._under_way += place.nbytes
        self._left += 1
        done = partial(self._done, region, place.nbytes)
        self._engine.write(region, self._target, run, done, imm=immediate(slot, weight_of(place)))

    def _done(self, region: Region | None, nbytes: int, error: TransferError | None) -> None:
        if region is not None:
            self._engine.unregister(region)
        self._under_way -= nbytes
        self._written += nbytes
        self._left -= 1
        self._error = self._error or error
        self._progress(self._written, self._total)
        self._news.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while True:
            if self._error is not None:
                raise self._error
            if condition():
                return
            self._news.clear()
            await self._news.wait()
