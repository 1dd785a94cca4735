"""`/weights`: where a trainer announces new weights, learns where to write them, and asks for the change. Tensors do not pass here.

    GET    /weights               which version is served, and the tensors that a push must bring
    POST   /weights/pushes        {tensors, running, hold_s}: a ticket with the plan; 422 names the tensor that does not fit
    POST   /weights/pushes/{n}    {digests}: answered when every worker computes with them
    DELETE /weights/pushes/{n}    give up
All want the header `X-Push-Key`.
"""

import hmac
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.api.errors import ApiError
from headrace.api.respond import body_of
from headrace.api.settings import ApiSettings
from headrace.ports import WeightsDoor
from headrace.types.errors import PushRefused
from headrace.types.weights import Running, Tensor

SECOND_NS = 1_000_000_000
B = TypeVar("B")


class PushBody(msgspec.Struct, frozen=True):
    tensors: list[Tensor]
    running: Running = Running.KEEP
    hold_s: float = 2.0


class CommitBody(msgspec.Struct, frozen=True):
    digests: list[str]


class WeightsApi:
    """The routes. `door` is the service's side."""

    def __init__(self, door: WeightsDoor, settings: ApiSettings) -> None:
        self._door = door
        self._settings = settings
        self.routes = [
            Route("/weights", self.status),
            Route("/weights/pushes", self.begin, methods=["POST"]),
            Route("/weights/pushes/{number:int}", self.commit, methods=["POST"]),
            Route("/weights/pushes/{number:int}", self.drop, methods=["DELETE"]),
        ]

    async def status(self, request: Request) -> Response:
        self._admit(request)
        return _answer(self._door.status())

    async def begin(self, request: Request) -> Response:
        self._admit(request)
        body = await self._body(request, PushBody)
        if not 0 <= body.hold_s <= 3600:
            raise ApiError(400, "hold_s: must be from 0 to 3600 seconds", param="hold_s")
        try:
            return _answer(self._door.begin(body.tensors, body.running, int(body.hold_s * SECOND_NS)))
        except PushRefused as error:
            raise ApiError(422, str(error), code="push_refused") from error

    async def commit(self, request: Request) -> Response:
        self._admit(request)
        body = await self._body(request, CommitBody)
        try:
            return _answer(await self._door.commit(request.path_params["number"], body.digests))
        except PushRefused as error:
            raise ApiError(409, str(error), code="push_refused") from error

    async def drop(self, request: Request) -> Response:
        self._admit(request)
        try:
            self._door.drop(request.path_params["number"])
        except PushRefused as error:
            raise ApiError(409, str(error), code="push_refused") from error
        return Response(status_code=204)

    def _admit(self, request: Request) -> None:
        known, given = self._settings.push_key, request.headers.get("x-push-key", "")
        if not known:
            raise ApiError(
                403, "this service takes no new weights: start it with --push-key", code="push_closed"
            )
        if not hmac.compare_digest(given.encode(), known.encode()):
            raise ApiError(403, "no valid push key: send it as X-Push-Key", code="invalid_push_key")

    async def _body(self, request: Request, kind: type[B]) -> B:
        settings = self._settings
        raw = await body_of(request.scope, request.receive, settings.body_max, settings.body_timeout_s)
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.MsgspecError as error:
            raise ApiError(400, f"the body cannot be read: {error}") from error


def _answer(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
