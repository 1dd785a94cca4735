"""Least recently used block first; of one sequence's blocks the last one first, so that prefixes outlive their ends.

Leaves out: what a block would cost to compute again.
"""

import msgspec

from headrace.kv.tree import Entry


class Config(msgspec.Struct, frozen=True):
    pass


class Policy:
    def __init__(self, config: Config) -> None:
        pass

    def rank(self, entry: Entry) -> tuple[int, int]:
        return (entry.used_ns, -entry.depth)
