"""Chains of block ids: told apart where a file reuses ids, and which earlier turn a prompt goes on from."""

from dataclasses import replace

import numpy as np

from headrace.types.trace import Trace


def rechained(trace: Trace) -> tuple[Trace, int]:
    """The trace with ids that name everything before them too, and how many ids did not (0: the same trace)."""
    ids, starts = trace.hash_ids, trace.hash_starts
    if not len(ids):
        return trace, 0
    _, number = np.unique(ids, return_inverse=True)
    parent = np.concatenate(([-1], number[:-1]))
    parent[starts[:-1][np.diff(starts) > 0]] = -1
    width = int(number.max()) + 2
    links = np.unique(number * width + parent + 1)
    _, followers = np.unique(links // width, return_counts=True)
    wrong = int((followers > 1).sum())
    if not wrong:
        return trace, 0
    names: dict[tuple[int, int], int] = {}
    renamed = np.empty_like(ids)
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        before = -1
        for at in range(begin, end):
            before = names.setdefault((before, int(ids[at])), len(names))
            renamed[at] = before
    return replace(trace, hash_ids=renamed), wrong


def earlier_turns(trace: Trace) -> Trace:
    """The trace with `follows` found from its chains.

    Row i is the earlier turn of row j > i if i's chain of full blocks (one at least) is the beginning of j's, j has more blocks and is at
    least as long as i's prompt and output together, and these fill the next block, m. A block that was known before i is not i's answer,
    and one answer has one continuation: where rows go on with different blocks m, only the first to come is taken for the next turn. Of
    several rows i the one with the longest chain is taken, of equal chains the latest.
    """
    size = trace.block_size
    follows = np.full(len(trace), -1, dtype=np.int64)
    latest: dict[int, int] = {}
    first_seen: dict[int, int] = {}
    next_block: dict[int, int] = {}
    flat, starts = trace.hash_ids.tolist(), trace.hash_starts.tolist()
    prompts, totals = trace.prompt.tolist(), (trace.prompt + trace.output).tolist()
    for row in range(len(trace)):
        ids = flat[starts[row] : starts[row + 1]]
        for place in range(len(ids) - 1, 0, -1):
            block = ids[place]
            earlier = latest.get(ids[place - 1], -1)
            if earlier < 0 or not (place + 1) * size <= totals[earlier] <= prompts[row]:
                continue
            if first_seen.get(block, row) <= earlier or next_block.setdefault(earlier, block) != block:
                continue
            follows[row] = earlier
            break
        for block in ids:
            first_seen.setdefault(block, row)
        if ids:
            latest[ids[-1]] = row
    return replace(trace, follows=follows)
