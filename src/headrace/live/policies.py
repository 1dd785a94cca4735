"""From names to policies."""

from typing import Any

from headrace.engine.policies import EnginePolicies
from headrace.live.settings import EngineSettings, PolicySettings
from headrace.registry import load


def policy(axis: str, settings: PolicySettings) -> Any:
    """Raises ConfigError."""
    return load(axis, settings.name, settings.config)


def engine_policies(settings: EngineSettings) -> EnginePolicies:
    """Raises ConfigError."""
    return EnginePolicies(
        batching=policy("engine.batching", settings.batching),
        admission=policy("engine.admission", settings.admission),
        ordering=policy("engine.ordering", settings.ordering),
        preemption=policy("engine.preemption", settings.preemption),
    )
