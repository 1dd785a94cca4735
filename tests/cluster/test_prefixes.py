from hypothesis import given
from hypothesis import strategies as st

from headrace.cluster.prefixes import Prefixes
from headrace.types.ids import BlockHash, PoolId
from tests.cluster.columns import chain

POOLS = st.integers(0, 39).map(PoolId)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["stored", "removed", "forget"]), POOLS, st.integers(0, 5), st.integers(0, 6)),
    max_size=60,
)


def told(rows: int) -> Prefixes:
    prefixes = Prefixes()
    prefixes.map_rows([PoolId(i) for i in range(rows)])
    return prefixes


def test_hits_are_leading_blocks():
    prefixes = told(4)
    prefixes.stored(PoolId(0), chain(3))
    prefixes.stored(PoolId(1), chain(5))
    prefixes.stored(PoolId(2), chain(5)[1:])
    assert prefixes.hits(chain(4)).tolist() == [3, 4, 0, 0]
    assert prefixes.hits(chain(9)).tolist() == [3, 5, 0, 0]
    assert prefixes.hits(chain(4, of=1)).tolist() == [0, 0, 0, 0]
    assert prefixes.hits(()).tolist() == [0, 0, 0, 0]


def test_what_leaves_a_pool_is_no_hit_there():
    prefixes = told(2)
    for pool in (PoolId(0), PoolId(1)):
        prefixes.stored(pool, chain(3))
    prefixes.removed(PoolId(0), chain(3)[2:])
    prefixes.removed(PoolId(0), chain(9, of=7))
    assert prefixes.hits(chain(3)).tolist() == [2, 3]
    prefixes.forget(PoolId(1))
    assert prefixes.hits(chain(3)).tolist() == [2, 0] and len(prefixes) == 2
    prefixes.removed(PoolId(0), chain(3))
    assert len(prefixes) == 0


def test_rows_may_come_in_any_order_and_share_a_pool():
    prefixes = Prefixes()
    prefixes.stored(PoolId(7), chain(2))
    prefixes.stored(PoolId(3), chain(1))
    assert prefixes.hits(chain(2)).tolist() == []
    prefixes.map_rows([PoolId(7), PoolId(3), PoolId(7), PoolId(0)])
    assert prefixes.hits(chain(2)).tolist() == [2, 1, 2, 0]
    prefixes.map_rows([PoolId(3)])
    assert prefixes.hits(chain(2)).tolist() == [1]
    prefixes.map_rows([])
    assert prefixes.hits(chain(2)).tolist() == []


@given(changes=CHANGES, rows=st.lists(POOLS, max_size=50), asked=st.lists(st.integers(0, 7), max_size=9))
def test_it_is_a_set_of_blocks_per_pool(
    changes: list[tuple[str, PoolId, int, int]], rows: list[PoolId], asked: list[int]
):
    """Against one set a pool, for chains that are whole and for some that are not."""
    prefixes, sets = Prefixes(), {PoolId(p): set[BlockHash]() for p in range(40)}
    prefixes.map_rows(rows)
    blocks = chain(8)
    for what, pool, first, count in changes:
        some = blocks[first : first + count]
        if what == "forget":
            prefixes.forget(pool)
            sets[pool].clear()
        elif what == "stored":
            prefixes.stored(pool, some)
            sets[pool].update(some)
        else:
            prefixes.removed(pool, some)
            sets[pool].difference_update(some)
    hashes = tuple(blocks[i] for i in asked)
    expected = [next((i for i, h in enumerate(hashes) if h not in sets[p]), len(hashes)) for p in rows]
    assert prefixes.hits(hashes).tolist() == expected
    assert len(prefixes) == len(set().union(*sets.values()))


def test_a_prefix_that_all_hold_is_written_at_once():
    prefixes = told(1024)
    for pool in range(1024):
        prefixes.stored(PoolId(pool), chain(1 + pool % 5))
    assert prefixes.hits(chain(4)).tolist() == [min(4, 1 + pool % 5) for pool in range(1024)]
