"""What a write copies: makers against brute force, merging, bounds, and dealing over lanes."""

import random

import numpy as np
import pytest

from headrace.live.transfer import pieces
from headrace.types.errors import TransferError


def moved(source: np.ndarray, made: pieces.Pieces) -> np.ndarray:
    target = np.zeros_like(source)
    for start, to, size in made.tolist():
        target[to : to + size] = source[start : start + size]
    return target


@pytest.mark.parametrize("seed", range(20))
def test_makers_do_what_they_say_and_merge(seed: int) -> None:
    draw = random.Random(seed)
    source = np.frombuffer(draw.randbytes(4096), np.uint8)
    pages = draw.sample(range(32), 12)
    others = sorted(draw.sample(range(32), 12))
    made = pieces.paged(pages, others, 128, offset=8, nbytes=100)
    expected = np.zeros_like(source)
    for page, other in zip(pages, others, strict=True):
        expected[other * 128 + 8 : other * 128 + 108] = source[page * 128 + 8 : page * 128 + 108]
    assert (moved(source, made) == expected).all() and pieces.total(made) == 1200
    strided = pieces.strided(3, 7, 10, 20, 40, 30)
    assert strided.tolist() == [[3 + 40 * i, 7 + 30 * i, 20] for i in range(10)]
    whole = pieces.paged(range(4, 9), range(1, 6), 128)
    assert whole.tolist() == [[512, 128, 640]] == pieces.strided(512, 128, 5, 128, 128, 128).tolist()
    # Adjacent on one side only: nothing to merge.
    assert len(pieces.paged([1, 2], [5, 7], 64)) == 2 == len(pieces.paged([1, 3], [5, 6], 64))
    assert pieces.scatter([(0, 5, 0), (1, 2, 3), (4, 5, 1)]).tolist() == [[1, 2, 4]]


def test_lists_of_different_length_cannot_be_paged() -> None:
    with pytest.raises(TransferError, match="3 source pages cannot go to 2"):
        pieces.paged([1, 2, 3], [1, 2], 64)


@pytest.mark.parametrize("seed", range(40))
def test_shards_keep_bytes_and_weight(seed: int) -> None:
    draw = random.Random(seed)
    page = draw.choice([4096, 32768, 1 << 20])
    count = draw.randint(1, 300)
    sources, targets = draw.sample(range(400), count), draw.sample(range(400), count)
    made = pieces.paged(sources, targets, page)
    weight, lanes = draw.choice([0, 1, 2, 5, 65535]), draw.randint(1, 8)
    shards = pieces.shard(made, weight, lanes)
    assert 1 <= len(shards) <= lanes
    assert sum(share for _, share in shards) == weight
    assert not weight or (len(shards) <= weight and min(share for _, share in shards) >= 1)
    again = pieces.merge(np.concatenate([part for part, _ in shards]))
    assert again.tolist() == made.tolist()
    if len(shards) > 1:
        sizes = [pieces.total(part) for part, _ in shards]
        assert max(sizes) - min(sizes[:-1]) <= pieces.SHARD_ALIGNMENT and all(sizes)


def test_bounds_do_not_wrap() -> None:
    for row in ((0, 0, 11), (-1, 0, 1), (0, 2**63 - 1, 5), (0, 0, -1), (2**62, 0, 2**62)):
        with pytest.raises(TransferError, match="are not in the"):
            pieces.check(np.array([row], np.int64), 10, 10)
    pieces.check(np.array([(0, 5, 5), (9, 0, 1)], np.int64), 10, 10)
