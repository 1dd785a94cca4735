from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.kv.evict import lru
from headrace.kv.tree import Entry, PrefixTree
from headrace.types.ids import BlockHash


def name(path: str) -> BlockHash:
    return BlockHash(path.encode())


def tree_of(*, rooted: bool = True) -> PrefixTree:
    return PrefixTree(lru.Policy(lru.Config()), rooted)


@dataclass
class Holder:
    """Publishes and releases whole paths ("a", "ab", "abc") as sequences do."""

    tree: PrefixTree
    blocks: int = 0
    freed: list[int] = field(default_factory=list)

    def publish(self, path: str) -> list[Entry]:
        entries: list[Entry] = []
        for depth in range(len(path)):
            parent = name(path[:depth]) if depth else None
            entry = Entry(self.blocks, name(path[: depth + 1]), parent, depth, refs=1, uses=1)
            self.blocks += 1
            idle = self.tree.insert(entry)
            if idle is not None:
                self.freed.append(idle.block)
            entries.append(entry)
        return entries

    def match(self, path: str) -> list[Entry]:
        entries: list[Entry] = []
        for depth in range(len(path)):
            entry = self.tree.get(name(path[: depth + 1]))
            if entry is None:
                break
            self.tree.lock(entry)
            entries.append(entry)
        return entries

    def release(self, entries: list[Entry], now_ns: int) -> None:
        self.freed += [entry.block for entry in entries if self.tree.unlock(entry, now_ns)]


PATHS = st.text("ab", min_size=1, max_size=4)
SCRIPT = st.lists(st.tuples(st.sampled_from("pmrrex"), PATHS, st.integers(0, 9)), max_size=40)


@given(script=SCRIPT, rooted=st.booleans())
def test_every_block_is_held_once_and_what_can_go_is_counted(
    script: list[tuple[str, str, int]], rooted: bool
):
    holder = Holder(tree_of(rooted=rooted))
    tree, handles = holder.tree, list[list[Entry]]()
    for now_ns, (verb, path, pick) in enumerate(script):
        if verb == "p":
            handles.append(holder.publish(path))
        elif verb == "m":
            handles.append(holder.match(path))
        elif verb == "r" and handles:
            holder.release(handles.pop(pick % len(handles)), now_ns)
        elif verb == "e" and tree.evictable:
            holder.freed.append(tree.evict())
        elif verb == "x":
            holder.freed += tree.clear()
            assert tree.evictable == 0
        locked = [entry for handle in handles for entry in handle]
        check_books(holder, locked, rooted=rooted)
    for handle in handles:
        holder.release(handle, len(script))
    holder.freed += tree.clear()
    assert sorted(holder.freed) == list(range(holder.blocks)) and len(tree) == 0


def check_books(holder: Holder, locked: list[Entry], *, rooted: bool) -> None:
    tree = holder.tree
    indexed = list(tree)
    assert tree.evictable == sum(entry.refs == 0 for entry in indexed)
    assert all(entry.refs == sum(other is entry for other in locked) for entry in indexed)
    copies = [entry for entry in locked if not entry.indexed]
    held = [entry.block for entry in indexed] + [entry.block for entry in copies]
    assert sorted(held + holder.freed) == list(range(holder.blocks))
    for entry in copies:
        assert entry.original is tree.get(entry.hash) and entry.original.refs
    if rooted:
        names = {entry.hash: entry for entry in indexed}
        assert all(entry.parent is None or entry.parent in names for entry in indexed)
        assert all(names[e.parent].refs for e in locked if e.parent is not None)


def test_the_leaf_goes_before_its_root_and_the_oldest_first():
    holder = Holder(tree_of())
    old, new = holder.publish("abc"), holder.publish("x")
    holder.release(old, 1)
    holder.release(new, 2)
    assert [holder.tree.evict() for _ in range(4)] == [2, 1, 0, 3]


def test_without_roots_a_block_may_go_before_what_follows_it():
    holder = Holder(tree_of(rooted=False))
    entries = holder.publish("ab")
    holder.release(entries[:1], 1)
    assert holder.tree.evict() == 0
    assert holder.tree.get(name("ab")) is entries[1]


def test_use_makes_young_again():
    holder = Holder(tree_of())
    first, second = holder.publish("a"), holder.publish("b")
    holder.release(first, 1)
    holder.release(second, 2)
    holder.release(holder.match("a"), 3)
    assert [holder.tree.evict(), holder.tree.evict()] == [1, 0]


def test_a_second_copy_is_free_when_its_sequence_ends():
    holder = Holder(tree_of())
    first, second = holder.publish("a"), holder.publish("a")
    holder.release(second, 1)
    assert holder.freed == [1] and holder.tree.get(name("a")) is first[0]


def test_a_second_copy_takes_the_place_of_the_first():
    """Else a sequence whose prompt was computed twice would keep both copies, and might need more than the pool has."""
    holder = Holder(tree_of())
    first, second, third = holder.publish("ab"), holder.publish("abc"), holder.publish("a")
    holder.release(first, 1)
    assert holder.freed == [0, 1]
    assert [entry.indexed for entry in second] == [True] * 3 and not third[0].indexed
    holder.release(second, 2)
    assert holder.freed == [0, 1, 2] and holder.tree.get(name("a")) is third[0]
    holder.release(third, 3)
    assert [holder.tree.evict() for _ in range(3)] == [4, 3, 5]


def test_a_copy_of_what_nobody_uses_takes_its_place_at_once():
    holder = Holder(tree_of())
    holder.release(holder.publish("ab"), 1)
    again = holder.publish("a")
    assert holder.freed == [0] and holder.tree.get(name("a")) is again[0]
    assert holder.tree.evictable == 1 and holder.tree.evict() == 1


def test_a_block_that_is_used_all_the_time_costs_no_memory():
    holder = Holder(tree_of())
    holder.release(holder.publish("a"), 0)
    for now_ns in range(1000):
        holder.release(holder.match("a"), now_ns)
    assert len(holder.tree._idle) < 100
    assert holder.tree.evict() == 0


def test_an_unlocked_entry_cannot_be_unlocked():
    holder = Holder(tree_of())
    entries = holder.publish("a")
    holder.release(entries, 1)
    with pytest.raises(AssertionError):
        holder.tree.unlock(entries[0], 2)
