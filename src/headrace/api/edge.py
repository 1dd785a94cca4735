"""What every request passes: its id, the API key, the count of answers. Plain ASGI, because a stream passes it once a token."""

import hmac
import re
import uuid

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api.errors import ApiError
from headrace.api.metrics import Metrics

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Asked by probes and scrapers, which have no key."""


def error_response(error: ApiError, retry_after_s: int = 1) -> Response:
    headers = {"retry-after": str(retry_after_s)} if error.retry else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error.body(), error.status, headers, "application/json")


def request_id(scope: Scope) -> str:
    """The id this request is known by; set by `Edge`."""
    name: str = scope["state"]["request_id"]
    return name


class Edge:
    """Outermost layer. `paths`: those counted by name."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, api_keys: tuple[str, ...], paths: frozenset[str]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._api_keys = [key.encode() for key in api_keys]
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"")
        name = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = name.decode()
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name)]}
                self._metrics.responded(path, message["status"])
            await send(message)

        if (
            self._api_keys
            and scope["path"] not in OPEN_PATHS
            and not self._known(headers.get(b"authorization", b""))
        ):
            error = ApiError(
                401, "no valid API key: send it as `Authorization: Bearer KEY`", code="invalid_api_key"
            )
            await error_response(error)(scope, receive, send_marked)
            return
        await self._app(scope, receive, send_marked)

    def _known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._api_keys]
        return scheme.lower() == b"bearer" and any(matches)
