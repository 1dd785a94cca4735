"""Virtual usage: running sequences leave instances that are short of room for those that have most (Llumnix, arXiv 2406.03243, alg. 1).

Every period, instances of a freeness F below `out` are sources, those above `into` targets; sources ascending and targets descending by F
are paired one to one, and each pair moves one sequence of the source's choice. What is wanted is said only through virtual usage (see
`cluster.usage`): balanced memory, room for the sequence that waits first (`defragment`: no memory lies free in pieces too small for it),
quiet for urgent sequences (`urgent_tokens`), and an end of instances that drain. Rows of which nothing was heard are left alone.
Leaves out: dispatch by freeness (that is `cluster/placement/freeness`), instances that have just preempted as sources of their own,
scaling by mean freeness, and how the source chooses (by its own rule: the lowest priority, then the shortest).
"""

import msgspec
import numpy as np

from headrace.cluster.usage import freeness
from headrace.types.errors import ConfigError
from headrace.types.views import ClusterView, Move


class Config(msgspec.Struct, frozen=True):
    period_s: float = 0.1
    out: float = 3.0
    """Blocks that each running sequence may still take."""
    into: float = 3.0
    defragment: bool = True
    urgent_tokens: int = 1600
    """Load at which an instance that runs urgent sequences counts as full; 0: it is like any other."""


class Policy:
    def __init__(self, config: Config) -> None:
        if config.out > config.into:
            raise ConfigError(
                f"cluster.rebalance virtual_usage: out ({config.out:g}) is above into ({config.into:g}), "
                "so that an instance could be both; make out the smaller one"
            )
        if not config.period_s > 0:
            raise ConfigError(
                f"cluster.rebalance virtual_usage: period_s is {config.period_s:g}; it must be above 0"
            )
        if config.urgent_tokens < 0:
            raise ConfigError(
                f"cluster.rebalance virtual_usage: urgent_tokens is {config.urgent_tokens}; give 0 or more"
            )
        self.period_ns = max(1, round(config.period_s * 1e9))
        self._config = config

    def moves(self, view: ClusterView) -> list[Move]:
        config = self._config
        free = freeness(view, queued=config.defragment, urgent_tokens=config.urgent_tokens)
        takers = np.zeros(len(free), dtype=np.bool_)
        takers[view.rows_for("decode")] = True
        sources = np.flatnonzero((free < config.out) & (view.running > 0) & (takers | view.draining))
        targets = np.flatnonzero((free > config.into) & takers & ~view.draining)
        sources = sources[np.argsort(free[sources], kind="stable")]
        targets = targets[np.argsort(-free[targets], kind="stable")]
        pairs = min(len(sources), len(targets))
        return [Move(view.addresses[sources.item(i)], view.addresses[targets.item(i)]) for i in range(pairs)]
