"""What lies in the tiers below a pool: order, capacities, pins."""

import random

import pytest

from headrace.kv.tiers import Tiers
from headrace.types.ids import BlockHash
from headrace.types.tiers import Tier


def name(n: int) -> BlockHash:
    return BlockHash(bytes([n]) * 16)


def kept(tiers: Tiers, *numbers: int) -> None:
    for n in numbers:
        assert tiers.save(name(n))
        tiers.saved(name(n), ok=True)


def numbers(shelf) -> list[int]:
    return [n[0] for n in shelf]


def test_what_is_on_its_way_cannot_be_loaded_and_counts():
    tiers = Tiers(2, 0)
    assert tiers.save(name(1)) and tiers.where(name(1)) is None and name(1) in tiers
    kept(tiers, 2)
    assert tiers.save(name(3)), "the second one can go"
    assert numbers(tiers.host) == [1, 3] and tiers.dropped() == {Tier.HOST: (name(2),)} and tiers.lost == 1
    assert not tiers.save(name(4)), "both are on their way"
    tiers.saved(name(1), ok=True)
    tiers.saved(name(3), ok=False)
    assert tiers.where(name(1)) is Tier.HOST and name(3) not in tiers


def test_the_one_used_longest_ago_goes_first():
    tiers = Tiers(3, 0)
    kept(tiers, 1, 2, 3)
    tiers.touch([name(1), name(2)])
    kept(tiers, 4, 5)
    assert numbers(tiers.host) == [1, 4, 5], "of a chain the end goes first"


def test_what_is_pinned_stays():
    tiers = Tiers(2, 0)
    kept(tiers, 1, 2)
    tiers.host.pin(name(1))
    kept(tiers, 3)
    assert numbers(tiers.host) == [1, 3]
    tiers.host.pin(name(3))
    assert not tiers.save(name(4))
    tiers.host.unpin(name(1))
    assert tiers.save(name(4)) and name(1) not in tiers


def test_disk_takes_what_host_memory_will_lose_next():
    tiers = Tiers(3, 2)
    kept(tiers, 1, 2, 3)
    assert tiers.spills(blocks_max=1, ahead=2) == [name(1)]
    assert tiers.spills(blocks_max=4, ahead=2) == [name(2)], "one is on its way"
    assert tiers.spills(blocks_max=4, ahead=2) == []
    assert not tiers.host.idle(name(1)), "it is read"
    tiers.spilled(name(1), ok=True)
    tiers.spilled(name(2), ok=True)
    kept(tiers, 4)
    assert tiers.where(name(1)) is Tier.DISK and tiers.where(name(2)) is Tier.HOST and not tiers.lost


def test_a_full_disk_gives_up_what_was_used_longest_ago_but_nothing_twice():
    tiers = Tiers(2, 2)
    for n in range(1, 5):
        kept(tiers, n)
        for spilled in tiers.spills(blocks_max=4, ahead=2):
            tiers.spilled(spilled, ok=True)
    assert numbers(tiers.host) == [3, 4] and numbers(tiers.disk) == [3, 4] and tiers.lost == 2
    assert tiers.dropped()[Tier.DISK] == (name(1), name(2))
    smaller = Tiers(3, 1)
    kept(smaller, 1, 2, 3)
    assert smaller.spills(blocks_max=4, ahead=3) == [name(1)]
    smaller.spilled(name(1), ok=True)
    assert smaller.spills(blocks_max=4, ahead=3) == [], "the two do not take turns for ever"


def test_a_disk_that_fails_takes_nothing_more_and_serves_what_it_has():
    tiers = Tiers(4, 8)
    kept(tiers, 1, 2, 3)
    first, second = tiers.spills(blocks_max=2, ahead=4)[:1], tiers.spills(blocks_max=1, ahead=4)
    tiers.spilled(first[0], ok=True)
    for failed in second:
        tiers.spilled(failed, ok=False)
    assert not tiers.spilling or not second
    tiers.closed = True
    kept(tiers, 4, 5, 6)
    assert tiers.spills(blocks_max=8, ahead=4) == []
    assert tiers.where(name(1)) is not None


def test_what_an_earlier_life_left_is_there_up_to_the_capacity():
    tiers = Tiers(1, 3)
    tiers.recovered(tuple(name(n) for n in range(5)))
    assert numbers(tiers.disk) == [2, 3, 4] and tiers.dropped() == {Tier.DISK: (name(0), name(1))}
    assert tiers.where(name(4)) is Tier.DISK and list(tiers.changes)[-1] == name(4)


@pytest.mark.parametrize("seed", range(20))
def test_capacities_hold_whatever_happens(seed: int):
    draws = random.Random(seed)
    tiers = Tiers(draws.randint(1, 6), draws.choice((0, 1, 5)))
    saving: list[BlockHash] = []
    spilling: list[BlockHash] = []
    pinned: list[tuple[Tier, BlockHash]] = []
    for _ in range(400):
        n = name(draws.randrange(20))
        match draws.randrange(7):
            case 0 | 1:
                if n not in tiers and tiers.save(n):
                    saving.append(n)
            case 2 if saving:
                tiers.saved(saving.pop(draws.randrange(len(saving))), ok=draws.random() < 0.9)
            case 3:
                spilling += tiers.spills(draws.randint(0, 3), draws.randint(0, 6))
            case 4 if spilling:
                tiers.spilled(spilling.pop(draws.randrange(len(spilling))), ok=draws.random() < 0.99)
            case 5:
                tier = tiers.where(n)
                if tier is not None:
                    tiers.shelf(tier).pin(n)
                    pinned.append((tier, n))
            case 6 if pinned:
                tier, held = pinned.pop()
                tiers.shelf(tier).unpin(held)
            case _:
                tiers.touch([n])
        for tier in Tier:
            assert len(tiers.shelf(tier)) <= tiers.shelf(tier).blocks_max
        assert all(held in tiers.shelf(tier) for tier, held in pinned)
        assert all(held in tiers.host for held in (*saving, *spilling))
