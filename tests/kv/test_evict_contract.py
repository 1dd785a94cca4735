"""Contract of `kv/evict`: whatever the policy, locked blocks stay, prefixes stay whole, and all that is idle can go."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.kv.tree import Entry, Eviction, PrefixTree
from headrace.types.ids import BlockHash
from tests.contract import policies

EVERY = pytest.mark.parametrize("policy", policies("kv.evict"))
PATHS = st.lists(st.tuples(st.text("ab", min_size=1, max_size=4), st.integers(0, 3)), min_size=1, max_size=12)


def entry_of(path: str, block: int) -> Entry:
    parent = BlockHash(path[:-1].encode()) if len(path) > 1 else None
    return Entry(block, BlockHash(path.encode()), parent, len(path) - 1, refs=1, uses=1)


def tree_of(policy: Eviction, paths: list[tuple[str, int]]) -> tuple[PrefixTree, set[BlockHash]]:
    """A tree of these paths; those with 0 stay locked, the others were used so many times."""
    tree, locked = PrefixTree(policy, rooted=True), set[BlockHash]()
    for now_ns, (path, uses) in enumerate(paths):
        entries: list[Entry] = []
        for end in range(1, len(path) + 1):
            entry = tree.get(BlockHash(path[:end].encode()))
            if entry is None:
                entry = entry_of(path[:end], len(tree))
                tree.insert(entry)
            else:
                tree.lock(entry)
            entries.append(entry)
        for turn in range(uses):
            for entry in entries:
                if turn:
                    tree.lock(entry)
                tree.unlock(entry, now_ns + turn)
        if not uses:
            locked |= {entry.hash for entry in entries}
    return tree, locked


@EVERY
@given(paths=PATHS)
def test_leaves_go_first_and_everything_idle_can_go(policy: Any, paths: list[tuple[str, int]]):
    tree, locked = tree_of(policy, paths)
    gone = list[int]()
    while tree.evictable:
        gone.append(tree.evict())
        names = {entry.hash for entry in tree}
        assert all(entry.parent is None or entry.parent in names for entry in tree)
    assert {entry.hash for entry in tree} == locked and len(set(gone)) == len(gone)


@EVERY
@given(paths=PATHS)
def test_the_same_tree_goes_in_the_same_order(policy: Any, paths: list[tuple[str, int]]):
    first, second = tree_of(policy, paths)[0], tree_of(policy, paths)[0]
    assert first.clear() == second.clear()


@EVERY
def test_a_rank_is_pure_and_can_be_compared(policy: Any):
    tree, _ = tree_of(policy, [("ab", 1), ("b", 3), ("ba", 1)])
    entries = list(tree)
    before = [(e.block, e.refs, e.used_ns, e.uses, e.depth) for e in entries]
    ranks = [policy.rank(e) for e in entries]
    assert ranks == [policy.rank(e) for e in entries] and sorted(ranks)
    assert before == [(e.block, e.refs, e.used_ns, e.uses, e.depth) for e in entries]
