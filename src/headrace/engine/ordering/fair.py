"""Fairness by changing priorities, for which running sequences are preempted (FastSwitch, arXiv 2411.18424).

`served`: whoever was served less comes first, by tokens computed for a tenant (for a request that names none, for itself), in units of
`quantum` so that ranks do not swing with every token. `random` and `markov` are the paper's offline traces: priorities that change by
themselves, `frequency` times a step (0.04: every 25 steps); every draw is keyed by (seed, request, update), so a trace is the same however
the system behaves. `random` draws each request's level anew at each update; `markov` keeps it with the probability `stay`, else draws anew.
A sequence that waits and has no room takes the place of one that runs and ranks behind it.
Assumed, as the paper's text could not be had: levels are equally likely, and the Markov chain is this one.
Leaves out: the requests' own priority; weights of tenants; what was served on other instances.
"""

from collections import Counter
from typing import Annotated, Literal

import msgspec

from headrace.engine.policies import FOREVER, Moment, StepView
from headrace.engine.sequence import Sequence
from headrace.engine.shares import share_of
from headrace.types.draws import uniform
from headrace.types.ids import SequenceKey

MEMORY_MAX = 256
"""Updates for which a level is kept at most."""


class Config(msgspec.Struct, frozen=True):
    pattern: Literal["served", "random", "markov"] = "served"
    quantum: Annotated[int, msgspec.Meta(ge=1)] = 512
    """Tokens."""
    frequency: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.04
    """Updates per step."""
    levels: Annotated[int, msgspec.Meta(ge=2)] = 8
    stay: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.75
    seed: int = 0


class Policy:
    displaces = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._period = max(1, round(1 / config.frequency))
        """Steps between two updates."""
        self.reads_served = config.pattern == "served"

    def rank(self, sequence: Sequence, moment: Moment) -> tuple[int, int, SequenceKey]:
        if self.reads_served:
            level = moment.served.get(share_of(sequence), 0) // self._config.quantum
        else:
            level = self._level(sequence.key.request, moment.steps // self._period)
        return (level, sequence.arrival_ns, sequence.key)

    def horizon(self, view: StepView) -> int:
        if not self.reads_served:
            return self._period - view.moment.steps % self._period
        if view.prefills:
            return 1
        rows = Counter(share_of(sequence) for sequence in view.decodes)
        quantum, served = self._config.quantum, view.moment.served
        left = (1 + (quantum - 1 - served.get(share, 0) % quantum) // count for share, count in rows.items())
        return min(left, default=FOREVER)

    def _level(self, request: int, update: int) -> int:
        config = self._config
        if config.pattern == "markov":
            last = max(0, update - MEMORY_MAX)
            while update > last and uniform(config.seed, "stay", request, update) < config.stay:
                update -= 1
        return int(config.levels * uniform(config.seed, "level", request, update))
