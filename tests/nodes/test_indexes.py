"""Whole worlds: what the router knows of the pools' prefix indexes is what they hold, once all has been heard."""

from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.sim.run import run
from headrace.types.kv import GroupKind


def test_the_router_knows_what_pools_hold():
    compared = 0
    for seed in range(60):
        outcome = run(seed)
        router = outcome.shell.router.state
        assert isinstance(router, Router)
        prefixes = router.fleet.view(0).prefixes
        if prefixes is None:
            continue
        for pool, _ in outcome.shell.pools.values():
            assert isinstance(pool.state, PoolCore)
            blocks = pool.state.blocks
            kinds = [g.kind for g in blocks.spec.groups]
            tree = blocks.trees[kinds.index(GroupKind.FULL) if GroupKind.FULL in kinds else 0]
            rows = [i for i, number in enumerate(router.fleet.view(0).pools) if number == blocks.pool]
            for entry in tree:
                held = prefixes.hits((entry.hash,))
                assert all(held[row] == 1 for row in rows), f"seed {seed}: {pool.address} has more"
            compared += len(tree)
            held = sum(bool(holders >> blocks.pool & 1) for holders in prefixes._holders.values())
            known = {entry.hash for entry in tree}
            if pool.state.tiering is not None:
                known.update((*pool.state.tiering.tiers.host, *pool.state.tiering.tiers.disk))
            assert held == len(known), f"seed {seed}: {pool.address} has less"
    assert compared > 500
