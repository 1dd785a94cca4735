"""Errors as OpenAI's clients know them: a status and `{"error": {message, type, param, code}}`."""

import msgspec

from headrace.types.errors import Overloaded, RequestFailed

TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""`error.type` by status; every other one is an `invalid_request_error`."""


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with `status`. `param` names the field of the body that is to blame, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry = retry
        """The same request may succeed later: the answer carries `Retry-After`."""

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "invalid_request_error")
        return msgspec.json.encode(ErrorBody(ErrorDetail(self.message, kind, self.param, self.code)))


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def from_service(error: Exception, late: bool) -> ApiError:
    """What the client is told of an error of the service; `late`: the request's deadline has passed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        message = f"the service takes no more requests now: {error}" if str(error) else "the service is full"
        return ApiError(503, message, code="overloaded", retry=True)
    if isinstance(error, RequestFailed) and late:
        return ApiError(504, f"the request's deadline has passed: {error}", code="deadline_exceeded")
    if isinstance(error, RequestFailed):
        return ApiError(500, str(error) or "the request failed", code="request_failed")
    return ApiError(
        500,
        f"internal error ({type(error).__name__}); the server's log has the details",
        code="internal_error",
    )
