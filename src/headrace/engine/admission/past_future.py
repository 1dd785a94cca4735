"""Past-Future admission (arXiv 2507.10150; constants and sampling of its artifact): start what fits at the peak that is to come.

Past: the output length of every sequence is drawn from the lengths of those that ended here, given that it is longer than what it has
generated already. Future: of the batch with those lengths, the highest memory use at any later instant is known in closed form
(`peak_tokens`). A sequence starts if the peak with it, the worst of a few independent draws, stays below the pool less a reserve. Both are
done anew at every step, so a wrong draw is soon forgotten. While few have ended, the history is filled up with the sequence's own limit.

Memory: a pool's free and evictable blocks and those that this instance's sequences hold can be used; what others hold cannot, nor what a
prefilled sequence keeps until it is fetched. Known tokens count in whole blocks. Blocks that several sequences share count for each of
them, both as held and as needed, so a peak in which one of them has gone is told slightly too low.
Leaves out: sliding windows (a group in which one has passed is judged by what fits now); the artifact's limit of one start per step;
weighing what an eviction costs.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.engine.policies import FINISHED_MAX, FOREVER, AdmissionView, StepView
from headrace.engine.sequence import Sequence, Status
from headrace.types.draws import uniform
from headrace.types.messages import Role

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Config(msgspec.Struct, frozen=True):
    window: Annotated[int, msgspec.Meta(ge=1, le=FINISHED_MAX)] = FINISHED_MAX
    """Ended sequences remembered. Half as many copies of a sequence's own limit stand in while there are few."""
    reserve: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.03
    """Share of the pool that a predicted peak must leave free."""
    lists_max: Annotated[int, msgspec.Meta(ge=1)] = 5
    """Independent draws of the whole batch, at most."""
    samples: Annotated[int, msgspec.Meta(ge=0)] = 200
    """Lengths to draw in all: a small batch is drawn more often."""
    seed: int = 0


class Policy:
    def __init__(self, config: Config) -> None:
        self._config = config

    def admit(self, view: AdmissionView, sequence: Sequence) -> bool:
        if any(need > free for need, free in zip(view.blocks_needed, view.blocks_free, strict=True)):
            return False
        others = [*view.running, *view.receiving]
        if not others:
            # Alone it may always start: whether it fits at all was asked when it came.
            return True
        batch = [*others, sequence]
        groups = [
            Group(view, batch, group, self._config.reserve)
            for group in range(len(view.blocks_total))
            if not any(s.trimmed[group] for s in batch)
        ]
        # The worst draw decides, so the first that does not fit ends it.
        return all(group.fits(remaining) for remaining in self._draws(view, batch) for group in groups)

    def horizon(self, view: StepView) -> int:
        return 1 if view.waiting else FOREVER

    def _draws(self, view: AdmissionView, batch: list[Sequence]) -> Iterator[Ints]:
        """Tokens still to come, by sequence, drawn a few times. The candidate is the last of the batch."""
        config = self._config
        ended = islice(view.finished, max(0, len(view.finished) - config.window), None)
        history = np.sort(np.fromiter(ended, dtype=np.int64))
        copies = min(config.window // 2, config.window - len(history))
        decoded = np.array([s.history + s.emitted + s.pending for s in batch], dtype=np.int64)
        limit = np.array([s.history + s.emit_limit for s in batch], dtype=np.int64)
        for at in range(min(config.lists_max, config.samples // len(batch) + 1)):
            u = np.array([self._uniform(view, s, at) for s in batch])
            lengths = lengths_given(history, copies, decoded, limit, u)
            if decoded[-1] == 0:
                lengths[-1] = length_of_new(history, copies, int(limit[-1]), float(u[-1]))
            yield np.maximum(lengths, np.minimum(decoded + 1, limit)) - decoded

    def _uniform(self, view: AdmissionView, sequence: Sequence, at: int) -> float:
        key = sequence.key
        return uniform(self._config.seed, "past_future", key.request, key.choice, key.attempt, view.steps, at)


class Group:
    """What a batch holds of one group of KV, and what it may use."""

    def __init__(self, view: AdmissionView, batch: list[Sequence], group: int, reserve: float) -> None:
        size = view.block_size
        own = sum(_held(s, group, size) for s in batch)
        self._room = (view.blocks_free[group] + own - reserve * view.blocks_total[group]) * size
        current = np.array([_known(s, group, size) for s in batch], dtype=np.int64) * size
        # What is only prefilled here is held until it is fetched: it neither grows nor goes.
        self._goes = np.array([s.role is not Role.PREFILL for s in batch], dtype=np.bool_)
        self._room -= int(current[~self._goes].sum())
        self._current = current[self._goes]

    def fits(self, remaining: Ints) -> bool:
        return peak_tokens(self._current, remaining[self._goes]) < self._room


def peak_tokens(current: Ints, remaining: Ints) -> int:
    """The most tokens that a batch holds at any instant, if each sequence has `current` now, gains one a step and goes after `remaining`.

    The most is held just before some sequence goes; then those with at least as many to come are there (section 4).
    """
    if not len(current):
        return 0
    order = np.argsort(-remaining, kind="stable")
    there = np.arange(1, len(order) + 1)
    return int(np.max(remaining[order] * there + np.cumsum(current[order])))


def lengths_given(history: Ints, copies: int, decoded: Ints, limit: Ints, u: Floats) -> Ints:
    """Output lengths drawn from `history` (sorted) and `copies` of `limit`, each given that it exceeds `decoded`.

    `u` in [0, 1) chooses a point on the line through `decoded`, the longer lengths (cut at `limit`), and `limit`. `decoded` and `limit` are
    by sequence, as `u` and the result.
    """
    first = np.searchsorted(history, decoded, side="right")
    longer = len(history) - first
    longest = np.minimum(history[-1], limit) if len(history) else decoded
    reaches = (copies > 0) | ((longer > 0) & (longest >= limit))
    point = u * (longer + copies + ~reaches)
    at = point.astype(np.int64)
    low = _along(history, first, decoded, limit, at)
    high = _along(history, first, decoded, limit, at + 1)
    drawn = np.rint(low + (high - low) * (point - at)).astype(np.int64)
    return np.minimum(drawn, limit)


def length_of_new(history: Ints, copies: int, limit: int, u: float) -> int:
    """The output length of a sequence that has generated nothing: one of `history` or of `copies` of its limit."""
    at = int(u * (len(history) + copies))
    return min(int(history[at]), limit) if at < len(history) else limit


def _along(history: Ints, first: Ints, decoded: Ints, limit: Ints, at: Ints) -> Ints:
    """The `at`-th of: `decoded`, what of `history` is longer, `limit` for ever."""
    index = first + at - 1
    if not len(history):
        return np.where(at == 0, decoded, limit)
    known = np.minimum(history[np.clip(index, 0, len(history) - 1)], limit)
    return np.where(at == 0, decoded, np.where(index < len(history), known, limit))


def _known(sequence: Sequence, group: int, block_size: int) -> int:
    """Blocks that its known tokens take."""
    return max(len(sequence.tables[group]), -(-(sequence.total + sequence.pending) // block_size))


def _held(sequence: Sequence, group: int, block_size: int) -> int:
    """Blocks that are taken for it already."""
    if sequence.status is Status.RECEIVING and not sequence.tables[group]:
        # Prefilled in the same pool: it will be handed blocks that are taken already.
        return -(-sequence.total // block_size)
    return len(sequence.tables[group])
