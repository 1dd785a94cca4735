"""The HTTP application: routes, and what they share. `create_app` is all that `cli` needs; `server.serve_api` runs it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from headrace import __version__
from headrace.api.answers import ChatFormat, CompletionFormat, Format
from headrace.api.edge import Edge, error_response, request_id
from headrace.api.errors import ApiError, invalid
from headrace.api.generation import Generation
from headrace.api.jobs import JobBuilder, offload
from headrace.api.metrics import Meter, Metrics
from headrace.api.protocol import AnyBody, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from headrace.api.respond import ClientGone, Responder, body_of
from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import Tokenizer
from headrace.api.weights import WeightsApi
from headrace.ports import Gateway, WeightsDoor
from headrace.types.service import ServiceInfo


class Api:
    """One service as HTTP shows it."""

    def __init__(self, gateway: Gateway, tokenizer: Tokenizer, settings: ApiSettings) -> None:
        self.gateway = gateway
        self.tokenizer = tokenizer
        self.settings = settings
        self.metrics = Metrics(gateway)
        self.jobs = JobBuilder(gateway, tokenizer, settings)
        self.draining = False
        self.idle = asyncio.Event()
        """No generation request is under way."""
        self.idle.set()
        self._active = 0
        self._created = int(time.time())

    @property
    def info(self) -> ServiceInfo:
        return self.gateway.info()

    def drain(self) -> None:
        """Take no more generation requests; those at hand finish (`idle`)."""
        self.draining = True

    @property
    def active(self) -> int:
        """Generation requests under way."""
        return self._active

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Holds one place for a generation request. Raises ApiError 503."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry=True)
        if self._active >= self.settings.requests_max:
            message = f"the server already has {self.settings.requests_max} requests"
            raise ApiError(503, message, code="overloaded", retry=True)
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._active += change
        self.metrics.active(self._active)
        (self.idle.clear if self._active else self.idle.set)()

    async def body(self, scope: Scope, receive: Receive, kind: type[AnyBody]) -> tuple[AnyBody, int]:
        """The body and its size. Raises ApiError, ClientGone."""
        raw = await body_of(scope, receive, self.settings.body_max, self.settings.body_timeout_s)
        return await offload(len(raw), parse, raw, kind), len(raw)

    # Endpoints that generate nothing

    async def health(self, request: Request) -> Response:
        """Liveness: the process answers."""
        return answer({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Readiness: requests would be served."""
        status = self.gateway.status()
        ready = status.ready and not self.draining
        content = {
            "ready": ready,
            "reason": "draining" if self.draining else status.reason,
            "model": self.info.model,
            "numerics": self.info.numerics,
            "promise": self.info.promise,
            "weights": status.weights,
            "requests": {
                "running": status.requests_running,
                "waiting": status.requests_waiting,
                "http": self._active,
            },
            "blocks": {"total": status.blocks_total, "free": status.blocks_free},
            "instances": [
                {
                    "name": i.name,
                    "epoch": i.epoch,
                    "leaning": i.leaning,
                    "state": i.state,
                    "pid": i.pid,
                    **({"host": i.host} if i.host else {}),
                    "weights": i.report.version if i.report is not None else status.weights,
                }
                for i in status.instances
            ],
        }
        return answer(content, 200 if ready else 503)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        return answer({"version": __version__})

    async def models(self, request: Request) -> Response:
        return answer({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self.jobs.check_model(request.path_params["name"])
        return answer(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.info.model,
            "object": "model",
            "created": self._created,
            "owned_by": "headrace",
            "root": self.info.model,
            "parent": None,
            "max_model_len": self.info.length_max,
            "vocabulary": self.info.vocabulary,
            "permission": [],
        }

    async def tokenize(self, request: Request) -> Response:
        """vLLM's: token ids of a text, or of messages as the chat template writes them."""
        body, size = await self.body(request.scope, request.receive, TokenizeBody)
        self.jobs.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either prompt or messages", code="invalid_value")
        if body.messages is not None:
            ids = (await offload(size, self.jobs.prompter.chat, body)).token_ids
        else:
            ids = await offload(
                size, self.tokenizer.encode, body.prompt or "", body.add_special_tokens is not False
            )
        strings = [self.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        content = {
            "count": len(ids),
            "max_model_len": self.info.length_max,
            "tokens": ids,
            "token_strs": strings,
        }
        return answer(content)

    async def detokenize(self, request: Request) -> Response:
        body, size = await self.body(request.scope, request.receive, DetokenizeBody)
        self.jobs.check_model(body.model)
        for i, token_id in enumerate(body.tokens):
            if not 0 <= token_id < self.info.vocabulary:
                message = f"must be a token id from 0 to {self.info.vocabulary - 1}"
                raise invalid(f"tokens[{i}]", message, code="invalid_value")
        return answer({"prompt": await offload(size, self.tokenizer.decode, body.tokens, False)})


class GenerationEndpoint:
    """`/v1/completions` or `/v1/chat/completions`, as an ASGI application."""

    def __init__(self, api: Api, kind: type[CompletionBody] | type[ChatBody], form: type[Format]) -> None:
        self._api = api
        self._kind = kind
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        api = self._api
        arrival_s = time.monotonic()
        async with api.admitted():
            body, size = await api.body(scope, receive, self._kind)
            job = await api.jobs.build(body, request_id(scope), size, arrival_s)
            lengths = [len(prompt.token_ids) for prompt in job.prompts]
            tokens_max = max(submission.request.tokens_max for submission in job.submissions)
            meter = Meter(api.metrics, lengths, job.n, tokens_max, arrival_s)
            generation = Generation(api.gateway, api.tokenizer, job, meter)
            form = self._form(job, api.tokenizer)
            responder = Responder(job, form, generation, meter, api.metrics, api.settings)
            await responder.run(scope, receive, send)


def answer(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def create_app(
    gateway: Gateway,
    tokenizer: Tokenizer,
    settings: ApiSettings | None = None,
    weights: WeightsDoor | None = None,
) -> Starlette:
    """The application for one running service. Its `Api` is `app.state.api`; more routes may be added to it.

    `weights`: lets trainers push new ones.
    """
    settings = settings or ApiSettings()
    api = Api(gateway, tokenizer, settings)

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error, settings.retry_after_s)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        response = error_response(ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    async def on_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the count of answers does

    async def on_bug(request: Request, error: Exception) -> Response:
        return error_response(
            ApiError(500, "internal error; the server's log has the details", code="internal_error")
        )

    routes = [
        Route("/v1/completions", GenerationEndpoint(api, CompletionBody, CompletionFormat), methods=["POST"]),
        Route("/v1/chat/completions", GenerationEndpoint(api, ChatBody, ChatFormat), methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/metrics", api.metrics_text),
        Route("/version", api.version),
        *(WeightsApi(weights, settings).routes if weights is not None else ()),
    ]
    middleware = [
        Middleware(
            Edge, metrics=api.metrics, api_keys=settings.api_keys, paths=frozenset(r.path for r in routes)
        )
    ]
    if settings.allowed_origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            ),
        )
    handlers: dict[Any, Any] = {
        ApiError: on_api_error,
        ClientGone: on_client_gone,
        HTTPException: on_http_error,
        Exception: on_bug,
    }
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.state.api = api
    return app
