"""What is queued at an instance, and its virtual usage: one number for every goal of a rebalancer (Llumnix, arXiv 2406.03243, alg. 1).

An instance's freeness is F = (M - sum of V) / B: blocks of its pool less the virtual usage of its sequences, over its running ones; the
blocks that each of them may still take. A running sequence's usage is what it holds; the first queued one's is what it asks for, so that
others make room; urgent ones share a headroom, so that others stay away; an instance that drains has one of infinite usage.
"""

import numpy as np

from headrace.types.views import ClusterView, Column


def queued_tokens(view: ClusterView) -> Column:
    """Tokens to prefill at every row: as reported; or, if that is more, of those sequences that were assigned and that no report covers."""
    known = np.nan_to_num(view.running) + np.nan_to_num(view.held) + np.nan_to_num(view.receiving)
    pending = np.maximum(view.assigned - known, 0.0) / np.maximum(view.assigned, 1.0)
    return np.fmax(view.tokens_waiting, pending * view.assigned_tokens)


def headroom(view: ClusterView, urgent_tokens: int) -> Column:
    """Blocks to keep free beside urgent sequences, so that an instance's real load stays at about `urgent_tokens`."""
    return np.maximum(view.blocks_total - urgent_tokens / view.block_size, 0.0)


def freeness(view: ClusterView, *, queued: bool, urgent_tokens: int) -> Column:
    """F of every row, in blocks; NaN: nothing was heard from it; minus infinite: it drains. Who runs nothing counts as running one.

    `queued`: the first waiting sequence's demand counts. `urgent_tokens` 0: urgent sequences have no headroom.
    """
    room = view.blocks_free - (view.blocks_demand if queued else 0.0)
    if urgent_tokens:
        room = room - np.where(view.urgent > 0, headroom(view, urgent_tokens), 0.0)
    free = room / np.maximum(view.running, 1.0)
    return np.where(view.draining & ~np.isnan(free), -np.inf, free)
