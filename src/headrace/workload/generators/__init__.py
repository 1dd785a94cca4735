"""Traces made by rule. A generator is one module here, and its name is the module's: `headrace trace generate synthetic`.

Such a module has a frozen `Config` and `generate(config, seed) -> Trace`. The seed decides everything; each column draws from a stream of
its own, so that another length does not move an arrival.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from headrace import registry
from headrace.types.errors import ConfigError
from headrace.types.trace import Trace
from headrace.workload.settings import settings

__all__ = ["generate", "names"]


def names() -> list[str]:
    """Generators, sorted."""
    return registry.names("workload.generators")


def generate(name: str, values: Mapping[str, Any], seed: int) -> Trace:
    """A trace by the generator's name and settings. Raises ConfigError naming what is wrong with them, or if they give no request."""
    if name not in names():
        raise ConfigError(f"no trace generator {name!r}; there are: {', '.join(names())}")
    module = import_module(f"headrace.workload.generators.{name}")
    trace = module.generate(settings(f"generator {name}", module.Config, values), seed)
    if not len(trace):
        raise ConfigError(f"generator {name}: these settings give no request")
    return trace
