"""From a body to what the model reads: token ids, within the context's length."""

import json
from typing import Any

import msgspec

from headrace.api.chat import ChatError
from headrace.api.errors import ApiError, invalid
from headrace.api.protocol import ChatBody, CompletionBody, TokenizeBody
from headrace.api.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Prompt(msgspec.Struct, frozen=True):
    """One prompt: token ids, and its text if it came as text."""

    token_ids: list[int]
    text: str | None = None


def too_long(param: str, prompt: str, tokens_max: int | None, length_max: int) -> ApiError:
    """The context's numbers, as OpenAI words them. `prompt`: its tokens, or a bound."""
    asked = "" if tokens_max is None else f" and {tokens_max} new tokens"
    return ApiError(
        400,
        f"{param}: this model's maximum context length is {length_max} tokens, prompt and new tokens together; "
        f"you asked for {prompt} prompt tokens{asked}",
        param=param,
        code="context_length_exceeded",
    )


class Prompter:
    """Makes prompts for one model."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, length_max: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._length_max = length_max

    def completion(self, body: CompletionBody, prompts_max: int) -> list[Prompt]:
        """The prompts of a completion: text, token ids, or a list of either."""
        prompt = body.prompt
        special = body.add_special_tokens is not False
        if prompt is None:
            raise invalid("prompt", "this field is required", code="missing_required_parameter")
        if isinstance(prompt, str):
            return [self.from_text(prompt, "prompt", special)]
        if not isinstance(prompt, list):
            raise invalid("prompt", "must be a string, token ids, or a list of either", code="invalid_value")
        if not prompt:
            raise invalid("prompt", "must not be empty", code="invalid_value")
        if type(prompt[0]) is int:
            return [self.from_ids(prompt, "prompt")]
        if len(prompt) > prompts_max:
            raise invalid(
                "prompt",
                f"at most {prompts_max} prompts with this n, got {len(prompt)}",
                code="invalid_value",
            )
        return [self._one(part, f"prompt[{i}]", special) for i, part in enumerate(prompt)]

    def _one(self, part: Any, param: str, special: bool) -> Prompt:
        if isinstance(part, str):
            return self.from_text(part, param, special)
        if isinstance(part, list):
            return self.from_ids(part, param)
        raise invalid(param, "must be a string or a list of token ids", code="invalid_value")

    def from_text(self, text: str, param: str, special: bool) -> Prompt:
        if not text:
            raise invalid(
                param,
                "must not be empty; to begin from nothing send the first token's id",
                code="invalid_value",
            )
        least = -(-len(text) // self._tokenizer.token_chars_max)
        if least > self._length_max:  # spares tokenizing megabytes that cannot fit
            raise too_long(param, f"at least {least}", None, self._length_max)
        ids = self._tokenizer.encode(text, special)
        if not ids:
            raise invalid(param, "has no tokens", code="invalid_value")
        return Prompt(ids, text)

    def from_ids(self, ids: list[Any], param: str) -> Prompt:
        if not ids:
            raise invalid(param, "must not be empty", code="invalid_value")
        if len(ids) > self._length_max:
            raise too_long(param, str(len(ids)), None, self._length_max)
        for i, token_id in enumerate(ids):
            if type(token_id) is not int or not 0 <= token_id < self._vocabulary:
                message = f"must be a token id from 0 to {self._vocabulary - 1}"
                raise invalid(f"{param}[{i}]", message, code="invalid_value")
        return Prompt(ids)

    def chat(self, body: ChatBody | TokenizeBody) -> Prompt:
        """The prompt that the chat template makes of `messages`."""
        if self._tokenizer.chat is None:
            message = "this model has no chat template; use /v1/completions, or serve it with --chat-template"
            raise invalid("messages", message, code="chat_template_missing")
        messages = [message_of(entry, f"messages[{i}]") for i, entry in enumerate(body.messages or [])]
        if not messages:
            raise invalid("messages", "must not be empty", code="invalid_value")
        if body.continue_final_message and body.add_generation_prompt:
            raise invalid("continue_final_message", "excludes add_generation_prompt", code="invalid_value")
        if body.continue_final_message and messages[-1]["role"] != "assistant":
            raise invalid(
                "continue_final_message", "the final message is not the assistant's", code="invalid_value"
            )
        try:
            text = self._tokenizer.chat.render(
                messages,
                add_generation_prompt=body.add_generation_prompt is not False
                and not body.continue_final_message,
                continue_final_message=bool(body.continue_final_message),
                options=body.chat_template_kwargs,
            )
        except ChatError as error:
            raise invalid(
                "messages", f"the chat template refuses them: {error}", code="chat_template_error"
            ) from error
        return self.from_text(text, "messages", body.add_special_tokens is True)


def message_of(entry: dict[str, Any], param: str) -> dict[str, Any]:
    """A message as templates expect it: content as one string, arguments of tool calls as objects."""
    role = entry.get("role")
    if role is None:
        raise invalid(f"{param}.role", "this field is required", code="missing_required_parameter")
    if role not in ROLES:
        raise invalid(f"{param}.role", f"must be one of {', '.join(ROLES)}", code="invalid_value")
    if entry.get("audio") is not None:
        raise invalid(f"{param}.audio", "not supported by this server", code="unsupported_parameter")
    calls = entry.get("tool_calls")
    if entry.get("content") is None and not calls and entry.get("function_call") is None:
        raise invalid(f"{param}.content", "this field is required", code="missing_required_parameter")
    message = {name: value for name, value in entry.items() if value is not None}
    message["content"] = content_text(entry.get("content"), f"{param}.content")
    if calls is not None:
        message["tool_calls"] = tool_calls(calls, f"{param}.tool_calls")
    return message


def content_text(content: Any, param: str) -> str:
    """A message's text: a string, or text parts, which are joined by newlines."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise invalid(param, "must be a string or a list of text parts", code="invalid_value")
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            message = f"only text is supported, got {kind!r}"
            raise invalid(f"{param}[{i}].type", message, code="unsupported_parameter")
        text = part.get(kind)
        if not isinstance(text, str):
            raise invalid(f"{param}[{i}].{kind}", "must be a string", code="invalid_value")
        texts.append(text)
    return "\n".join(texts)


def tool_calls(calls: Any, param: str) -> list[dict[str, Any]]:
    """Earlier tool calls of the assistant, with `arguments` decoded: OpenAI sends a string, templates take an object."""
    if not isinstance(calls, list):
        raise invalid(param, "must be a list", code="invalid_value")
    plain: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise invalid(
                f"{param}[{i}].function", "this field is required", code="missing_required_parameter"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise invalid(
                    f"{param}[{i}].function.arguments", "is no valid JSON", code="invalid_value"
                ) from error
        plain.append({**call, "function": {**function, "arguments": arguments}})
    return plain
