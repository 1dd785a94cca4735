"""What every policy of every axis keeps to, whatever its axis."""

import ast
from importlib import import_module
from inspect import getsource
from typing import Any

import msgspec
import pytest

from headrace import registry
from headrace.types.errors import ConfigError


def policies(axis: str) -> list[Any]:
    """Every policy of an axis with its default configuration, for `pytest.mark.parametrize`."""
    return [pytest.param(registry.load(axis, name), id=name) for name in registry.names(axis)]


def check_module(axis: str, name: str) -> None:
    """It says what it is and what it leaves out, and has a frozen `Config` and a `Policy`."""
    module = import_module(f"headrace.{axis}.{name}")
    assert module.__doc__ and "Leaves out:" in module.__doc__
    assert issubclass(module.Config, msgspec.Struct) and module.Config.__struct_config__.frozen
    module.Policy(module.Config())
    names = {node.name for node in ast.parse(getsource(module)).body if isinstance(node, ast.ClassDef)}
    assert {"Config", "Policy"} <= names


def check_config(axis: str, name: str) -> None:
    """A wrong setting is an error that names it."""
    with pytest.raises(ConfigError, match=rf"{name} has no setting 'no_such_setting'"):
        registry.load(axis, name, {"no_such_setting": 1})
    fields = import_module(f"headrace.{axis}.{name}").Config.__struct_fields__
    for field in fields:
        with pytest.raises(ConfigError, match=field):
            registry.load(axis, name, {field: [["wrong"]]})
