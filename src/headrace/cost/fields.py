"""Reading a config.json as data: each look-up says which key is missing or wrong."""

from collections.abc import Mapping
from typing import Any, cast

from headrace.types.errors import ConfigError


class Fields:
    """A mapping of a configuration file. Each method takes a key and, if it may be absent or null, a default."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Present and not null."""
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or (value < least and value != default):
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected an integer of at least {least}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected true or false")
        return value

    def words(self, key: str) -> list[str]:
        """A list of strings; absent: empty."""
        return [str(value) for value in self._items(key)]

    def numbers(self, key: str) -> list[int]:
        """A list of integers; absent: empty."""
        items = self._items(key)
        if any(isinstance(value, bool) or not isinstance(value, int) for value in items):
            raise ConfigError(f"{self.where}: {key} is {items!r}, expected a list of integers")
        return [int(value) for value in items]

    def within(self, key: str) -> "Fields":
        """A mapping in the mapping; absent: an empty one."""
        value: object = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected a mapping")
        return Fields(cast("dict[str, Any]", value), f"{self.where}: {key}")

    def _items(self, key: str) -> list[Any]:
        value: object = self.values.get(key) or []
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected a list")
        return list(cast("list[Any]", value))

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing; this architecture needs it")
        return value
