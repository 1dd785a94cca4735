"""Request bodies: OpenAI's fields and vLLM's extra ones. Whatever cannot be honoured is refused by name, never ignored.

A field that is null counts as left out. Numbers are not read from strings.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from headrace.api.errors import ApiError, invalid

Real = Annotated[float, AllowInfNan(False)]
TOP_LOGPROBS_MAX = 20
INT32 = 2**31 - 1
INT64 = 2**63 - 1

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI and vLLM that change the answer in ways not implemented, with the values that ask for nothing."""


def as_list(value: Any) -> Any:
    """`stop` may be one string."""
    return [value] if isinstance(value, str) else value


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    """A last chunk with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk."""


class GenerationBody(Body):
    """What completions and chat completions share."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Real | None = Field(None, ge=0)
    top_p: Real | None = Field(None, gt=0, le=1)
    presence_penalty: Real | None = Field(None, ge=-2, le=2)
    frequency_penalty: Real | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Real] | None = None
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    stop: Annotated[list[str] | None, BeforeValidator(as_list)] = None
    best_of: int | None = None

    # vLLM's
    top_k: int | None = Field(None, ge=-1, le=INT32)
    min_p: Real | None = Field(None, ge=0, le=1)
    repetition_penalty: Real | None = Field(None, gt=0, le=100)
    stop_token_ids: list[int] | None = Field(None, max_length=256)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    spaces_between_special_tokens: bool | None = None
    """Has no effect: fast tokenizers put no spaces there."""
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Logprobs name tokens as `token_id:123`."""
    priority: int | None = Field(None, ge=-INT32, le=INT32)
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    request_id: str | None = Field(None, min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")

    # Headrace's
    timeout: Real | None = Field(None, gt=0)
    """Seconds after which the request is ended with 504."""
    ttft_slo_ms: Real | None = Field(None, gt=0)
    tpot_slo_ms: Real | None = Field(None, gt=0)
    category: str | None = Field(None, max_length=128)
    return_timings: bool | None = None
    """Usage says where the time of every choice went (`timings.Timings`)."""

    # Taken and without effect on the answer
    user: str | None = Field(None, max_length=1024)
    """The tenant, for policies that know tenants."""
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(GenerationBody):
    prompt: Any = None
    """Text, token ids, or a list of either; see `prompts.completion_prompts`."""
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS_MAX)


class ChatBody(GenerationBody):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=65536)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS_MAX)
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: Literal[False] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """The body as `kind`. Raises ApiError naming the first field that is wrong."""
    fields = decode(raw)
    for name in [name for name in fields if name in NOT_SUPPORTED]:
        value = fields.pop(name)
        if value is not None and value not in NOT_SUPPORTED[name]:
            raise invalid(name, "not supported by this server", code="unsupported_parameter")
    try:
        return kind.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise explain(error) from error


def decode(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError."""
    try:
        content = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is no valid JSON: {why}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return content


def explain(error: ValidationError) -> ApiError:
    """The first complaint, in OpenAI's form."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    match first["type"]:
        case "missing":
            return invalid(param, "this field is required", code="missing_required_parameter")
        case "extra_forbidden":
            return invalid(param, "unknown field", code="unknown_parameter")
        case _:
            return invalid(param, first["msg"], code="invalid_value")
