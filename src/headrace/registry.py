"""Policies by name: the module's name is the registry, so a new policy is one file and no table."""

from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from headrace.types.errors import ConfigError

ROOT = Path(__file__).parent


def names(axis: str) -> list[str]:
    """Policies of an axis such as "cluster.placement", sorted."""
    folder = ROOT.joinpath(*axis.split("."))
    return sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")


def load(axis: str, name: str, config: dict[str, Any] | None = None) -> Any:
    """The policy `name` of `axis`, configured. Raises ConfigError naming what exists, or the field that is wrong."""
    if name not in names(axis):
        raise ConfigError(f"no {axis} policy {name!r}; there are: {', '.join(names(axis))}")
    module = import_module(f"headrace.{axis}.{name}")
    fields = settings(axis, name)
    for field in config or {}:
        if field not in fields:
            raise ConfigError(
                f"{axis} {name} has no setting {field!r}; it has: {', '.join(fields) or 'none'}"
            )
    try:
        chosen = msgspec.convert(config or {}, module.Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{axis} {name}: {error}") from error
    return module.Policy(chosen)


def settings(axis: str, name: str) -> tuple[str, ...]:
    """What a policy can be told."""
    return import_module(f"headrace.{axis}.{name}").Config.__struct_fields__
