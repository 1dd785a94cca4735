"""The pool core and what lies below it, the tiers played by the test."""

import pytest

from headrace.kv.evict import lru
from headrace.nodes.limits import TierConfig
from headrace.nodes.pool import PoolCore
from headrace.types.events import PeerLost, PeerUp, WakeAt
from headrace.types.ids import BlockHash
from headrace.types.kv import BlockRun, TableRun
from headrace.types.messages import Indexed, Lease, Leased, Match, Matched, Publish, Release, Return
from headrace.types.tiers import (
    Drop,
    FlushAsked,
    Flushed,
    Load,
    Loaded,
    Piece,
    Recovered,
    Save,
    Saved,
    Spill,
    Spilled,
    Tier,
)
from tests.nodes.harness import POOL, ROUTER, SPEC, Bench, D, P, hashes, info, key

NAMES = hashes(1, 6)


class PoolBench(Bench):
    core: PoolCore

    def __init__(self, blocks: int = 10, **limits: int) -> None:
        config = TierConfig(**{"host_blocks": 8, "ahead_blocks": 2, **limits})
        eviction = lru.Policy(lru.Config())
        super().__init__(
            PoolCore(POOL, info().pool, SPEC, (blocks,), eviction, listener=ROUTER, tiers=config)
        )
        self.tell(PeerUp(P, info()), PeerUp(D, info()))

    def lease(self, count: int, holder=P) -> list[int]:
        self.hear(holder, Lease((count,), (count,)))
        return [b for run in self.one(Leased, holder).runs for b in range(run.first, run.first + run.count)]

    def cache(self, names: tuple[BlockHash, ...] = NAMES, n: int = 1) -> list[int]:
        """A sequence has come and gone: its blocks are cached."""
        blocks = self.lease(len(names))
        runs = tuple(TableRun(0, at, block, 1) for at, block in enumerate(blocks))
        self.hear(P, Publish(key(n), runs, names), Release(key(n)))
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        self.hear(P, Return(tuple(BlockRun(info().pool, 0, block, 1) for block in blocks)))

    def drop_all(self) -> None:
        """All six are in host memory, and in the pool no more."""
        self.cache()
        while self.core.blocks.trees[0].evictable:
            held = self.lease(self.core.blocks.free[0].total)
            while self.commands(Save):
                (save,) = self.commands(Save)
                self.tell(Saved(save.ticket, (True,) * len(save.pieces)))
            self.give_back(held)
            if not held:
                break

    @property
    def free(self) -> int:
        return self.core.blocks.free[0].total

    @property
    def away(self) -> int:
        return self.core.blocks.away[0].total


def below(count: int = 6, blocks: int = 10, disk: bool = False, **limits: int) -> PoolBench:
    """A pool that has nothing cached, and tiers that have the first so many blocks of the chain."""
    node = PoolBench(blocks, disk_blocks=20, **limits)
    if disk:
        node.tell(Recovered(NAMES[:count]))
        return node
    for name in NAMES[:count]:
        assert node.core.tiering is not None
        node.core.tiering.tiers.save(name)
        node.core.tiering.tiers.saved(name, ok=True)
    return node


def ask(node: PoolBench, holder=P, n: int = 1, limit: int = 100) -> None:
    node.hear(holder, Match(key(n), NAMES, limit))


# Down


def test_cached_blocks_are_saved_ahead_of_need_and_free_only_then():
    node = PoolBench(blocks=7)
    blocks = node.cache()
    (save,) = node.commands(Save)
    assert save.pieces == (Piece(NAMES[5], blocks[5]),), (
        "one is free, two should be: the end of the chain goes"
    )
    assert node.free == 1 and node.away == 1
    node.core.blocks.audit()
    node.tell(Saved(save.ticket, (True,)))
    assert node.free == 2 and not node.away and not node.commands(Save)


def test_a_lease_waits_for_no_copy():
    node = PoolBench(blocks=7)
    node.cache()
    assert len(node.lease(6)) == 6, "all but the one that is being copied"
    assert node.core.tiering is not None
    assert node.core.tiering.counters["tier_blocks_passed_over"] == 5


def test_a_copy_that_failed_is_not_kept_and_its_block_is_free():
    node = PoolBench(blocks=7)
    node.cache()
    (save,) = node.commands(Save)
    node.tell(Saved(save.ticket, (False,)))
    assert node.free == 2
    assert node.core.tiering is not None and NAMES[5] not in node.core.tiering.tiers


def test_what_is_below_already_is_not_copied_again():
    node = below(blocks=7)
    node.cache()
    assert not node.commands(Save) and node.free == 2 and not node.away


def test_an_old_copy_is_dropped_before_a_new_one_is_made():
    node = PoolBench(blocks=7, host_blocks=2, ahead_blocks=3)
    assert node.core.tiering is not None
    for name in (NAMES[4], BlockHash(b"another")):
        node.core.tiering.tiers.save(name)
        node.core.tiering.tiers.saved(name, ok=True)
    node.cache()
    drop, save = (command for command in node.said if isinstance(command, Drop | Save))
    assert isinstance(drop, Drop) and NAMES[4] in drop.names, "it made room for the one before"
    assert isinstance(save, Save) and NAMES[4] in [piece.name for piece in save.pieces]


def test_no_more_are_away_than_one_batch():
    node = PoolBench(blocks=6, ahead_blocks=6, batch_blocks=2)
    node.cache()
    (save,) = node.commands(Save)
    assert len(save.pieces) == 2 and node.away == 2
    node.tell(Saved(save.ticket, (True, True)))
    assert len(node.commands(Save)) == 1 and node.free == 2 and node.away == 2


def test_a_full_host_memory_drops_before_it_takes():
    node = PoolBench(blocks=6, host_blocks=2, ahead_blocks=2, batch_blocks=2)
    node.cache()
    (save,) = node.commands(Save)
    node.tell(Saved(save.ticket, (True, True)))
    node.lease(2)
    (drop,), (again,) = node.commands(Drop), node.commands(Save)
    assert drop == Drop(Tier.HOST, tuple(piece.name for piece in save.pieces)[::-1])
    assert node.said.index(drop) < node.said.index(again) and len(again.pieces) == 2


def test_what_is_locked_stays():
    node = PoolBench(blocks=7)
    blocks = node.lease(6)
    runs = tuple(TableRun(0, at, block, 1) for at, block in enumerate(blocks))
    node.hear(P, Publish(key(), runs, NAMES))
    assert not node.commands(Save)


def test_what_goes_below_goes_on_to_disk():
    node = below(count=6, host_blocks=6, batch_blocks=4)
    node.tell()
    (spill,) = node.commands(Spill)
    assert spill.names == NAMES[:4]
    node.tell(Spilled(spill.ticket, (True, True, True, False)))
    assert not node.commands(Spill), "a disk that failed is asked no more"
    assert node.commands(Drop) == [Drop(Tier.DISK, (NAMES[3],))]
    assert node.core.tiering is not None and node.core.tiering.counters["tier_spills_failed"] == 1


# Up


@pytest.mark.parametrize("disk", [False, True])
def test_a_prefix_that_goes_on_below_is_loaded(disk: bool):
    node = below(disk=disk)
    ask(node)
    (load,) = node.commands(Load)
    assert load.tier is (Tier.DISK if disk else Tier.HOST)
    assert [piece.name for piece in load.pieces] == list(NAMES[:5]), (
        "half of what could be leased is taken for it"
    )
    assert not node.sent(Matched) and node.away == 5 and WakeAt(node.now_ns + 10**9) in node.said
    node.core.blocks.audit()
    node.tell(Loaded(load.ticket, (True,) * 5))
    matched = node.one(Matched, P)
    assert matched.tokens == 20 and [r.first for r in matched.table] == [load.pieces[0].block]
    assert not node.away and node.core.tiering is not None
    assert node.core.tiering.counters[f"tokens_hit_{'disk' if disk else 'host'}"] == 20
    node.core.blocks.audit()
    node.hear(P, Release(key()))
    ask(node, n=2, limit=20)
    assert node.one(Matched, P).tokens == 20 and not node.commands(Load), "it is cached now"


def test_what_the_pool_has_is_locked_meanwhile():
    node = below()
    node.cache(NAMES[:2])
    ask(node)
    (load,) = node.commands(Load)
    assert [piece.name for piece in load.pieces] == list(NAMES[2:6])
    assert node.core.blocks.available() == (4,)
    node.tell(Loaded(load.ticket, (True,) * 4))
    assert node.one(Matched).tokens == 24


def test_only_what_is_whole_up_to_the_first_gap_is_served():
    node = below(blocks=20)
    ask(node)
    (load,) = node.commands(Load)
    node.tell(Loaded(load.ticket, (True, True, False, True, True, True)))
    assert node.one(Matched).tokens == 8 and node.free == 18 and not node.away
    assert node.commands(Drop) == [Drop(Tier.HOST, (NAMES[2],))], "it was not what it is called"
    assert node.one(Indexed, ROUTER).removed == (NAMES[2],)


def test_a_chain_over_two_tiers_is_complete_when_both_have_answered():
    node = below(count=2, blocks=20)
    node.tell(Recovered(NAMES[2:]))
    ask(node)
    host, disk = node.commands(Load)
    assert (len(host.pieces), host.tier, len(disk.pieces), disk.tier) == (2, Tier.HOST, 4, Tier.DISK)
    node.tell(Loaded(disk.ticket, (True,) * 4))
    assert not node.sent(Matched)
    node.tell(Loaded(host.ticket, (True, True)))
    assert node.one(Matched).tokens == 24


def test_who_asks_for_what_is_being_loaded_waits_for_it():
    node = below(blocks=20)
    ask(node)
    (load,) = node.commands(Load)
    ask(node, D, n=2)
    assert not node.commands(Load) and not node.sent(Matched)
    node.tell(Loaded(load.ticket, (True,) * 6))
    assert node.one(Matched, P).tokens == node.one(Matched, D).tokens == 24
    node.core.blocks.audit()


def test_who_has_waited_too_long_is_told_of_what_is_there():
    node = below(blocks=20, load_ns=100)
    node.cache(NAMES[:1])
    ask(node)
    (load,) = node.commands(Load)
    node.tell(at_ns=node.now_ns + 100)
    assert node.one(Matched).tokens == 4
    node.tell(Loaded(load.ticket, (True,) * 5))
    assert not node.sent(Matched)
    node.hear(P, Release(key()))
    ask(node, n=2)
    assert node.one(Matched).tokens == 24, "what came late is cache for the next"


def test_the_end_of_who_waits_changes_nothing_for_the_blocks():
    node = below(blocks=20)
    ask(node)
    (load,) = node.commands(Load)
    node.tell(PeerLost(P, info()))
    node.tell(Loaded(load.ticket, (True,) * 6))
    assert not node.sent(Matched) and not node.away and node.core.blocks.trees[0].evictable == 6
    node.core.blocks.audit()


def test_who_lets_go_while_it_waits_is_not_answered():
    node = below(blocks=20)
    ask(node)
    (load,) = node.commands(Load)
    node.hear(P, Release(key()))
    node.tell(Loaded(load.ticket, (True,) * 6))
    assert not node.sent(Matched) and not node.core.blocks.handles


def test_where_somebody_is_short_nothing_is_loaded():
    node = below(blocks=8)
    node.lease(7)
    node.hear(D, Lease((3,), (3,)))
    ask(node)
    assert node.one(Matched).tokens == 0 and not node.commands(Load)


def test_a_tier_that_is_slower_than_computing_is_not_read():
    node = below(blocks=20, recompute_ns=10)
    ask(node, limit=8)
    (load,) = node.commands(Load)
    node.tell(Loaded(load.ticket, (True, True)), at_ns=node.now_ns + 1000)
    node.hear(P, Release(key()))
    ask(node, n=2)
    assert node.one(Matched).tokens == 8 and not node.commands(Load)


# What others know, and the end


def test_the_router_takes_the_tiers_for_a_part_of_the_pool():
    node = PoolBench(blocks=7, host_blocks=1)
    node.cache()
    assert node.one(Indexed, ROUTER).stored == NAMES
    node.tell(Saved(1, (True,)))
    assert not node.sent(Indexed), "the last one is below"
    node.lease(2)
    assert node.one(Indexed, ROUTER).removed == (NAMES[3], NAMES[5]), (
        "the one between has taken the place there"
    )


def test_at_the_end_what_is_cached_goes_to_disk_where_it_lies():
    node = PoolBench(blocks=10, host_blocks=4, disk_blocks=20, batch_blocks=3)
    node.cache()
    node.tell(PeerLost(P, info()), PeerLost(D, info()))
    node.tell(FlushAsked())
    order: list[BlockHash] = []
    while not node.commands(Flushed):
        replies = [Saved(c.ticket, (True,) * len(c.pieces)) for c in node.commands(Save)]
        replies += [Spilled(c.ticket, (True,) * len(c.names)) for c in node.commands(Spill)]
        order += [name for c in node.commands(Spill) for name in c.names]
        assert replies, "it goes on"
        node.tell(*replies)
    assert sorted(order) == sorted(NAMES) and order[0] == NAMES[0]
    node.core.blocks.audit()


def test_without_a_disk_the_end_is_at_once():
    node = PoolBench()
    node.cache()
    node.tell(FlushAsked())
    assert node.commands(Flushed)


def test_a_disk_that_fails_at_the_end_does_not_hold_it_up():
    node = PoolBench(blocks=10, disk_blocks=20)
    node.cache()
    node.tell(PeerLost(P, info()), PeerLost(D, info()))
    node.tell(FlushAsked())
    (save,) = node.commands(Save)
    node.tell(Saved(save.ticket, (True,) * len(save.pieces)))
    (spill,) = node.commands(Spill)
    node.tell(Spilled(spill.ticket, (False,) * len(spill.names)))
    assert node.commands(Flushed)
