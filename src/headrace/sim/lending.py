"""Worlds in which no pool alone holds the longest sequence, and all together do."""

from msgspec.structs import replace

from headrace.nodes.instance import InstanceConfig
from headrace.sim.rng import Draws
from headrace.types.kv import KVSpec

MICRO, MILLI = 1_000, 1_000_000

LENDING = ("Borrow", "Lent", "Unlent", "Holding", "Repay", "CallIn")
"""Messages in whose midst something may be struck."""

Pools = tuple[tuple[int, ...], ...]
"""Blocks per group, by pool."""


def draw_lending(
    draws: Draws, spec: KVSpec, instances: int, longest: int, instance: InstanceConfig, pools: Pools
) -> tuple[InstanceConfig, Pools] | None:
    """What lends, and the pools; None: nothing does. `longest`: tokens of the longest sequence."""
    own = instances == len(pools) > 1
    if not own or any(g.window for g in spec.groups) or not draws.chance(0.5):
        return None
    each = draws.pick((1, 1, 2))
    tokens_max = min(instance.tokens_max, draws.pick((2, 4, 8)))
    least = spec.blocks_for(2 * (each * spec.block_size + tokens_max))
    blocks = spec.blocks_for(longest)
    share = draws.pick((0.5, 0.8, 1.0))
    size = least + draws.pick((0, 1, 3))
    while size + (len(pools) - 1) * (int(share * size) // each * each) < blocks:
        size += 1
    lends = replace(
        instance,
        tokens_max=tokens_max,
        lend_share=share,
        lend_ns=draws.pick((2, 20)) * MILLI,
        lend_retry_ns=draws.pick((20, 200)) * MICRO,
        lend_wait_ns=draws.pick((1000, 5000)) * MICRO,
        lend_blocks_step=draws.pick((1, 1, 4)),
        partition_tokens=each * spec.block_size,
    )
    return lends, ((size,),) * len(pools)
