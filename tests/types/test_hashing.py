from hypothesis import given
from hypothesis import strategies as st

from headrace.types.hashing import HASH_BYTES, block_hash, block_hashes, chain_root

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


def test_parts_of_a_root_do_not_run_together():
    assert chain_root("ab", "c") != chain_root("a", "bc")
    assert chain_root("ab") != chain_root("ab", "")
    assert len(chain_root()) == HASH_BYTES


def test_the_chain_is_the_same_on_every_machine():
    chain = block_hashes(chain_root("model"), [1, 2, 3, 4], 2)
    assert [name.hex()[:8] for name in chain] == ["90c90c46", "e00c2eaf"]


@given(ids=IDS, size=st.integers(1, 5))
def test_a_block_is_named_by_itself_and_all_before_it(ids: list[int], size: int):
    root = chain_root("model")
    chain = block_hashes(root, ids, size)
    assert len(chain) == len(ids) // size
    parent = root
    for at, name in enumerate(chain):
        assert name == block_hash(parent, ids[at * size : (at + 1) * size])
        parent = name


@given(ids=st.lists(st.integers(0, 9), min_size=6, max_size=12), at=st.integers(0, 5))
def test_a_changed_token_changes_its_block_and_all_after_it(ids: list[int], at: int):
    root = chain_root("model")
    other = [*ids[:at], ids[at] + 1, *ids[at + 1 :]]
    for i, (a, b) in enumerate(zip(block_hashes(root, ids, 2), block_hashes(root, other, 2), strict=True)):
        assert (a == b) == (i < at // 2)


def test_another_salt_shares_nothing():
    assert (
        block_hashes(chain_root("m", "a"), [1, 2], 1)[1] != block_hashes(chain_root("m", "b"), [1, 2], 1)[1]
    )
