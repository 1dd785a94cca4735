"""One generation request from job to last byte, and its end when the client leaves or stops reading."""

import asyncio
import logging
from contextlib import aclosing

from msgspec.structs import replace
from starlette.types import Receive, Scope, Send

from headrace.api.answers import Format, Usage
from headrace.api.errors import ApiError, from_service
from headrace.api.generation import Generation, Piece
from headrace.api.jobs import Job
from headrace.api.metrics import Meter, Metrics
from headrace.api.settings import ApiSettings
from headrace.api.timings import timings_of
from headrace.types.errors import HeadraceError, RequestFailed

ABORT = "headrace.abort"
"""ASGI extension: a callable that drops the connection at once, unsent bytes included (see `server`)."""
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

log = logging.getLogger("headrace.api")


class ClientGone(Exception):
    """Nobody is left to answer."""


class ClientStalled(Exception):
    """The client has read nothing for too long."""


async def body_of(scope: Scope, receive: Receive, size_max: int, timeout_s: float) -> bytes:
    """The request's body. Raises ApiError 413 and 408, ClientGone."""
    too_large = ApiError(413, f"the body must have at most {size_max} bytes", code="body_too_large")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > size_max:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                message = await receive()
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time", code="body_timeout") from error
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > size_max:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def client_gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Responder:
    """Answers one job on one connection."""

    def __init__(
        self,
        job: Job,
        form: Format,
        generation: Generation,
        meter: Meter,
        metrics: Metrics,
        settings: ApiSettings,
    ) -> None:
        self._job = job
        self._form = form
        self._generation = generation
        self._meter = meter
        self._metrics = metrics
        self._settings = settings
        self._started = False

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send. The client's leaving cancels; an error before the first byte is raised as ApiError."""
        work = asyncio.create_task(self._stream(send) if self._job.stream else self._whole(send))
        gone = asyncio.create_task(client_gone(receive))
        limit_s = self._generation.seconds_left() + self._settings.deadline_grace_s
        try:
            await asyncio.wait((work, gone), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            late = not gone.done()
            if not late and not work.done():
                self._metrics.disconnects.inc()
        finally:
            await finish(work, gone)
            self._meter.ended("abort")  # of what is not counted yet
        error = None if work.cancelled() else work.exception()
        if late and work.cancelled():
            error = await self._end_late(send)
        if isinstance(error, ClientStalled):
            self._metrics.stalls.inc()
            scope.get("extensions", {}).get(ABORT, lambda: None)()
        elif error is not None:
            raise error

    async def _end_late(self, send: Send) -> Exception | None:
        """The service should have ended the request at its deadline. A request never hangs, whatever others do."""
        log.error("request %s was not ended at its deadline", self._job.id)
        error = from_service(RequestFailed("the service did not end it"), late=True)
        if not self._started:
            return error
        try:
            await self._send(send, b"data: %b\n\n" % error.body(), last=True)
        except ClientStalled as stall:
            return stall
        return None

    async def _whole(self, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in self._generation.choices]
        try:
            async with aclosing(self._generation.pieces()) as stream:
                async for piece in stream:
                    self._form.drawn_by(piece.weights)
                    pieces[piece.index].append(piece)
        except Exception as error:
            raise self._failed(error) from error
        content = self._form.whole(pieces, self._usage())
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, content, last=True)

    async def _stream(self, send: Send) -> None:
        """Headers go out with the first token: until then an error still has a status."""
        try:
            async with aclosing(self._generation.pieces()) as stream:
                async for piece in stream:
                    if not self._started:
                        await self._open(send)
                    self._form.drawn_by(piece.weights)
                    usage = self._usage() if self._job.continuous_usage else None
                    event = self._form.event(piece, usage)
                    if event:
                        await self._send(send, event)
        except ClientStalled:
            raise
        except Exception as error:
            failure = self._failed(error)
            if not self._started:
                raise failure from error
            await self._send(send, b"data: %b\n\n" % failure.body(), last=True)
            return
        end = self._form.usage_event(self._usage()) if self._job.include_usage else b""
        await self._send(send, end + DONE, last=True)

    async def _open(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        opening = b"".join(self._form.opening())
        if opening:
            await self._send(send, opening)

    async def _send(self, send: Send, content: bytes, last: bool = False) -> None:
        """Waits while the client's buffers are full, which stops the reading of further chunks."""
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                await send({"type": "http.response.body", "body": content, "more_body": not last})
        except TimeoutError as error:
            raise ClientStalled from error

    def _usage(self) -> Usage:
        usage = Usage.of(*self._generation.counts())
        weights = self._generation.weights()
        if any(weights):
            usage = replace(usage, weights=weights)
        if not self._job.return_timings:
            return usage
        return replace(usage, timings=[timings_of(c.timeline, c.tokens) for c in self._generation.choices])

    def _failed(self, error: Exception) -> ApiError:
        self._meter.ended("error")
        failure = from_service(error, self._generation.late)
        if not isinstance(error, HeadraceError):
            log.error("request %s failed", self._job.id, exc_info=error)
        return failure


async def finish(*tasks: asyncio.Task[None]) -> None:
    """Cancel what still runs, and wait until nothing does."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
