"""What requests are: categories, tenants, priorities and goals, mixed by weight; and the streams that generators draw from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from headrace.types.draws import bits
from headrace.types.errors import ConfigError
from headrace.types.request import Slo
from headrace.types.trace import Trace


class Class(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of request."""

    weight: float = 1.0
    category: str = ""
    tenant: str = ""
    priority: int = 0
    """Lower runs first."""
    ttft_ms: float | None = None
    """Goals; None: none."""
    tpot_ms: float | None = None

    @property
    def goal(self) -> Slo:
        ttft, tpot = (None if ms is None else round(ms * 1e6) for ms in (self.ttft_ms, self.tpot_ms))
        return Slo(ttft_ns=ttft, tpot_ns=tpot)


def stream(seed: int, name: str) -> np.random.Generator:
    """Draws for one purpose, whatever else is drawn."""
    return np.random.Generator(np.random.PCG64(bits(seed, f"generate {name}")))


def assign(trace: Trace, classes: Sequence[Class], seed: int) -> Trace:
    """The trace with a class for each request, by weight. Requests of one session are of one class. No classes: the trace as it is.

    Where no class names a category (or tenant) the trace's own stay.
    """
    if not classes:
        return trace
    weights = np.array([kind.weight for kind in classes])
    if (weights < 0).any() or not weights.sum() > 0:
        raise ConfigError("classes: no weight is negative, and one is above 0")
    edges = np.cumsum(weights / weights.sum())
    rng = stream(seed, "classes")
    of_row = np.searchsorted(edges, rng.random(len(trace)), side="right").clip(max=len(classes) - 1)
    if len(trace) and trace.session.max() >= 0:
        sessions, number = np.unique(trace.session, return_inverse=True)
        of_session = np.searchsorted(edges, rng.random(len(sessions)), side="right").clip(
            max=len(classes) - 1
        )
        of_row = np.where(trace.session >= 0, of_session[number], of_row)
    goals = tuple(dict.fromkeys(kind.goal for kind in classes))
    numbers = {
        "priority": [kind.priority for kind in classes],
        "goal": [goals.index(kind.goal) for kind in classes],
    }
    names: dict[str, tuple[str, ...]] = {}
    for column, plural in (("category", "categories"), ("tenant", "tenants")):
        given = [getattr(kind, column) for kind in classes]
        if any(given):
            names[plural] = tuple(dict.fromkeys(given))
            numbers[column] = [names[plural].index(name) for name in given]
    chosen: dict[str, Any] = {
        name: np.array(values, dtype=np.int64)[of_row] for name, values in numbers.items()
    }
    return replace(trace, goals=goals, **names, **chosen)
