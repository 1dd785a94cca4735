"""Chat templates: messages to the model's prompt, with jinja2 sandboxed, as `transformers` renders them."""

import json
import time
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from headrace.types.errors import CheckpointError

CONTINUE = "HEADRACE_CONTINUES_HERE"
"""Appended to the final message when it is to be continued; the prompt ends where it stands."""


class ChatError(ValueError):
    """The template refused these messages; the message says why."""


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it renders its content."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class SafeNamespace(Namespace):
    """jinja2's `namespace()`, without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=…)` is legal in a template
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            SafeNamespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        SafeNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a chat template cannot store the underscore name {name!r}")


def safe_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict` as a function: the class itself would hand templates its methods."""
    return dict(*args, **kwargs)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which templates do not want."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(form: str) -> str:
    return time.strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    """What a template may see and do."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=safe_dict, namespace=SafeNamespace
    )
    return env


class ChatTemplate:
    """One compiled template, and the special tokens it may name (`bos_token`, …)."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        try:
            self._template = environment().from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._tokens = tokens

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: dict[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`. `options` are the template's own switches. Raises ChatError."""
        if continue_final_message:
            messages = [
                *messages[:-1],
                {**messages[-1], "content": (messages[-1]["content"] or "") + CONTINUE},
            ]
        try:
            text: str = self._template.render(
                **{
                    **self._tokens,
                    "tools": None,
                    "documents": None,
                    **(options or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except ChatError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise ChatError(f"{error}" or type(error).__name__) from error
        if not continue_final_message:
            return text
        at = text.rfind(CONTINUE)
        if at < 0:
            raise ChatError("the chat template drops the end of the final message, so it cannot be continued")
        return text[:at]
