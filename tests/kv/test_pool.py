import pytest

from headrace.kv.evict import lru
from headrace.kv.pool import BlockPool, first_block_needed
from headrace.types.ids import Address, BlockHash, PoolId, RequestId, SequenceKey
from headrace.types.kv import BlockRun, GroupKind, KVGroup, KVSpec, TableRun

A, B = Address("a"), Address("b")
FULL = KVGroup(GroupKind.FULL, (0,), 1, 8)
WINDOW = KVGroup(GroupKind.WINDOW, (1,), 1, 8, window=8)
SIZE = 4


def pool_of(*blocks: int, groups: tuple[KVGroup, ...] = (FULL,)) -> BlockPool:
    eviction = lru.Policy(lru.Config())
    pool = BlockPool(PoolId(0), KVSpec(groups, SIZE, "float32"), blocks, eviction)
    pool.join(A)
    pool.join(B)
    return pool


def key(n: int) -> SequenceKey:
    return SequenceKey(RequestId(n))


def chain(text: str) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(text[: i + 1].encode()) for i in range(len(text)))


def publish(pool: BlockPool, holder: Address, n: int, text: str, at: int = 0, group: int = 0) -> list[int]:
    """Lease and publish the blocks from `at` on of a chain; their ids."""
    blocks: list[int] = []
    for i in range(at, len(text)):
        (run,) = pool.grant(holder, group, 1)
        pool.publish(holder, key(n), (TableRun(group, i, run.first, 1),), chain(text))
        blocks.append(run.first)
    pool.audit()
    return blocks


def test_grants_are_leased_and_come_back():
    pool = pool_of(10)
    (run,) = pool.grant(A, 0, 4)
    assert run == BlockRun(PoolId(0), 0, 0, 4)
    assert pool.available() == (6,)
    pool.audit()
    pool.take_back(A, (BlockRun(PoolId(0), 0, 1, 2),))
    assert pool.available() == (8,)
    with pytest.raises(AssertionError):
        pool.take_back(B, (BlockRun(PoolId(0), 0, 0, 1),))
    pool.audit()


def test_a_grant_gives_what_there_is_and_evicts_for_it():
    pool = pool_of(4)
    publish(pool, A, 1, "abc")
    assert sum(r.count for r in pool.grant(B, 0, 9)) == 1
    pool.release(A, key(1), 5)
    assert pool.available() == (3,)
    assert sum(r.count for r in pool.grant(B, 0, 2)) == 2
    assert pool.match(A, key(2), chain("abc"), 99, 6)[0] == SIZE
    pool.audit()


def test_the_longest_cached_prefix_is_locked_within_the_limit():
    pool = pool_of(8)
    blocks = publish(pool, A, 1, "abc")
    assert pool.match(B, key(2), chain("abcd"), 100, 0) == (12, (TableRun(0, 0, blocks[0], 3),))
    assert pool.match(B, key(3), chain("abcd"), 11, 0)[0] == 8
    assert pool.match(B, key(4), chain("xbc"), 100, 0) == (0, ())
    assert (B, key(4)) not in pool.handles
    assert sum(r.count for r in pool.grant(B, 0, 99)) == 5
    pool.audit()


def test_locked_blocks_are_never_evicted_and_released_ones_stay_as_cache():
    pool = pool_of(3)
    publish(pool, A, 1, "ab")
    pool.match(B, key(2), chain("a"), 99, 1)
    pool.release(A, key(1), 2)
    assert pool.available() == (2,)
    assert sum(r.count for r in pool.grant(B, 0, 3)) == 2
    assert pool.trees[0].get(chain("ab")[0]) is not None
    pool.release(B, key(2), 3)
    assert pool.available() == (1,)
    pool.audit()


def test_releasing_what_nobody_holds_is_fine():
    pool = pool_of(2)
    pool.release(A, key(7), 0)
    pool.audit()


def test_a_second_copy_serves_its_own_sequence_only():
    pool = pool_of(6)
    first, second = publish(pool, A, 1, "ab"), publish(pool, B, 2, "abc")
    assert pool.match(A, key(3), chain("abc"), 99, 0)[1] == (
        TableRun(0, 0, first[0], 2),
        TableRun(0, 2, second[2], 1),
    )
    pool.release(A, key(3), 1)
    pool.release(B, key(2), 2)
    assert pool.available() == (4,), "copies are free, the third block is cached"
    pool.audit()


def test_a_lone_sequence_is_never_short_of_the_copies_that_it_once_had():
    pool = pool_of(6)
    publish(pool, A, 1, "abc")
    publish(pool, A, 2, "abc")
    assert pool.available() == (0,)
    pool.release(A, key(1), 1)
    assert pool.available() == (3,)
    publish(pool, A, 2, "abcdef", at=3)
    pool.audit()


def test_a_handle_is_published_in_order():
    pool = pool_of(6)
    publish(pool, A, 1, "a")
    (run,) = pool.grant(A, 0, 1)
    with pytest.raises(AssertionError, match="in order"):
        pool.publish(A, key(1), (TableRun(0, 2, run.first, 1),), chain("abc"))


def test_what_is_not_leased_cannot_be_published():
    pool = pool_of(6)
    pool.grant(A, 0, 1)
    with pytest.raises(AssertionError):
        pool.publish(B, key(1), (TableRun(0, 0, 0, 1),), chain("a"))


def test_windows_serve_only_edges_whose_last_tokens_they_hold():
    pool = pool_of(8, groups=(WINDOW,))
    blocks = publish(pool, A, 1, "abcde")
    pool.trim(A, key(1), 0, 2, 1)
    pool.release(A, key(1), 2)
    # The oldest go first: "a", "b".
    pool.grant(B, 0, 5)
    assert [pool.trees[0].get(h) is not None for h in chain("abcde")] == [False, False, True, True, True]
    # An edge at block n needs the blocks of its last 7 tokens: n - 2 and n - 1.
    assert pool.match(A, key(2), chain("abc"), 99, 3) == (0, ())
    assert pool.match(A, key(3), chain("abcd"), 99, 3) == (16, (TableRun(0, 2, blocks[2], 2),))
    pool.audit()


def test_mixed_groups_serve_what_all_of_them_can():
    pool = pool_of(8, 8, groups=(FULL, WINDOW))
    publish(pool, A, 1, "abcd")
    publish(pool, A, 1, "ab", group=1)
    tokens, table = pool.match(B, key(2), chain("abcd"), 99, 0)
    assert tokens == 8 and [(r.group, r.at, r.count) for r in table] == [(0, 0, 2), (1, 0, 2)]
    pool.audit()


def test_trimmed_locks_are_dropped_once_and_publishing_goes_on():
    pool = pool_of(8, groups=(WINDOW,))
    publish(pool, A, 1, "abc")
    pool.trim(A, key(1), 0, 2, 1)
    pool.trim(A, key(1), 0, 1, 1)
    assert pool.available() == (7,)
    publish(pool, A, 1, "abcd", at=3)
    pool.trim(A, key(1), 0, 9, 2)
    publish(pool, A, 1, "abcdefg", at=6)
    assert pool.available() == (7,)
    pool.release(A, key(1), 3)
    assert pool.available() == (8,)
    pool.audit()


def test_a_handle_and_its_private_blocks_move_as_one():
    pool = pool_of(8)
    blocks = publish(pool, A, 1, "ab")
    (run,) = pool.grant(A, 0, 2)
    private = (TableRun(0, 2, run.first, 2),)
    table, published = pool.hand_over(A, B, key(1), private)
    assert table == (TableRun(0, 0, blocks[0], 2), *private) and published == (2,)
    pool.audit()
    pool.release(A, key(1), 1)
    assert pool.available() == (4,)
    pool.take_back(B, (BlockRun(PoolId(0), 0, run.first, 2),))
    pool.release(B, key(1), 2)
    assert pool.available() == (8,)
    pool.audit()


def test_a_sequence_that_published_nothing_is_handed_over_too():
    pool = pool_of(8, 8, groups=(FULL, WINDOW))
    (run,) = pool.grant(A, 0, 1)
    assert pool.hand_over(A, B, key(1), (TableRun(0, 0, run.first, 1),)) == (
        (TableRun(0, 0, run.first, 1),),
        (0, 0),
    )
    pool.audit()


def test_what_a_dead_holder_published_stays_and_the_rest_waits():
    pool = pool_of(6)
    publish(pool, A, 1, "ab")
    pool.grant(A, 0, 2)
    pool.forget(A, 9)
    pool.audit()
    assert pool.available() == (4,)
    assert pool.match(B, key(2), chain("ab"), 99, 10)[0] == 8
    pool.end_quarantine(A)
    assert pool.available() == (4,)
    pool.audit()


def test_what_a_dead_holder_used_last_is_not_the_first_to_go():
    """Its sequences start again elsewhere with the same prefix."""
    pool = pool_of(3)
    publish(pool, B, 1, "x")
    pool.release(B, key(1), 5)
    publish(pool, A, 2, "a")
    pool.forget(A, 9)
    pool.grant(B, 0, 2)
    assert pool.trees[0].get(chain("a")[0]) is not None and pool.trees[0].get(chain("x")[0]) is None


@pytest.mark.parametrize("damage", ["lost", "twice", "locks", "count"])
def test_an_audit_finds(damage: str):
    pool = pool_of(4)
    publish(pool, A, 1, "ab")
    entry = next(iter(pool.trees[0]))
    if damage == "lost":
        pool.free[0].remove(3, 1)
    elif damage == "twice":
        pool.free[0].add(entry.block, 1)
    elif damage == "locks":
        entry.refs += 1
    else:
        pool.trees[0].evictable += 1
    with pytest.raises(AssertionError, match=r"block|idle"):
        pool.audit()


def test_a_window_needs_the_blocks_of_its_last_tokens():
    for window in range(2, 12):
        for tokens in range(40):
            first = max(0, tokens - window + 1)
            assert first_block_needed(window, tokens, SIZE) == first // SIZE
    assert first_block_needed(0, 40, SIZE) == 0
