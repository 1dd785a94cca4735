"""Settings of formats and generators, as values or from `--set key=value`."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

import msgspec

from headrace.types.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Size = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


def settings(of: str, kind: type[T], values: Mapping[str, Any]) -> T:
    """`kind` with these values, given as they are or as text. Raises ConfigError naming the one that is wrong."""
    fields = kind.__struct_fields__
    for name in values:
        if name not in fields:
            near = get_close_matches(name, fields, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{of} has no setting {name!r}{hint}; it has: {', '.join(fields) or 'none'}")
    defaults = msgspec.to_builtins(kind())
    try:
        return msgspec.convert({k: _merged(defaults[k], v) for k, v in values.items()}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{of}: {error}") from error


def _merged(default: Any, value: Any) -> Any:
    """A part that does not say of which kind it is, is of the default's, and the rest of it stays."""
    part = isinstance(default, dict) and isinstance(value, dict) and "kind" not in value
    return default | value if part else value


def pairs(given: Iterable[str]) -> dict[str, Any]:
    """Nested values from `a.b=1`, as `--set` gives them. Raises ConfigError for what is no pair."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: give key=value")
        *path, last = key.split(".")
        inner = found
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {text}: {name} has been given a value of its own")
        inner[last] = _value(value)
    return found


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, lists, null), else the text itself."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
