"""The cores of the serve process, on its loop: one for each pool, and the router."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from socket import gethostname

from headrace.live.journal import Header, Journal, PoolSettings, RouterSettings, remake
from headrace.live.loop import CoreLoop, Node
from headrace.live.policies import policy
from headrace.live.pools import Pool, check_memory, layout_for, layout_of
from headrace.live.settings import Model, ServiceConfig
from headrace.nodes.limits import TierConfig
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.types.events import Command, Event, PeerLost, PeerUp
from headrace.types.ids import Address, PoolId
from headrace.types.messages import InstanceInfo

ROUTER = Address("router")

Carry = Callable[[Address, Command], None]
"""Carry out what the core of this address wants."""


class Cores:
    """See the module. `failed` gets an error of a core: nothing runs from then on."""

    def __init__(
        self,
        config: ServiceConfig,
        model: Model,
        journals: str,
        carry: Carry,
        failed: Callable[[Exception], None],
    ) -> None:
        """`journals`: folder for the cores' journals; empty: none are kept."""
        self._config = config
        self._model = model
        self._journals = journals
        self._carry = carry
        self._loop = CoreLoop(failed)
        self._cleanup = ExitStack()
        self._nodes: dict[Address, Node] = {}
        self.pools: dict[PoolId, Pool] = {}
        self.pool_cores: dict[PoolId, PoolCore] = {}
        self.router: Router
        """Set by `make`."""
        self._numbers = itertools.count()
        """Of pools. None is used again."""

    def __contains__(self, address: Address) -> bool:
        return address in self._nodes

    def make(self) -> None:
        """One pool for all workers, or one each; their cores; the router. Raises ConfigError for memory that is not there."""
        config = self._config
        count = min(1, len(config.workers)) if config.shared else len(config.workers)
        layout = layout_for(self._model.spec, config.kv_bytes)
        swap_blocks = config.instance.swap_blocks
        swap = layout_of(self._model.spec, swap_blocks).total if any(swap_blocks) else 0
        check_memory(layout.total, count, swap * len(config.workers))
        for _ in range(count):
            number = PoolId(next(self._numbers))
            pool = self.pools[number] = Pool.create(f"pool{number}", layout)
            self._cleanup.callback(pool.close)
            if config.fill:
                pool.fill()
        for number, pool in self.pools.items():
            self._add_pool(number, pool.layout.blocks, config.tiers)
        router = self._add(
            Header(ROUTER, RouterSettings(config.placement, config.router, config.roles, config.rebalance))
        )
        assert isinstance(router, Router)
        self.router = router

    def joining(self, leaning: str, blocks: tuple[int, ...], host: str) -> InstanceInfo:
        """Of a worker of another host, with a pool of its own."""
        return self._info(PoolId(next(self._numbers)), leaning, blocks, host)

    def add_pool(self, info: InstanceInfo, peers: Mapping[Address, InstanceInfo]) -> None:
        """The core of its pool. `peers` are those that are up."""
        self._add_pool(info.pool, info.blocks_total, None)
        for peer, known in peers.items():
            self.post(info.pool_address, PeerUp(peer, known))

    def drop_pool(self, info: InstanceInfo) -> None:
        """Its memory is gone, and its core with it; the router is told."""
        node = self._nodes.pop(info.pool_address, None)
        if node is not None:
            node.close()
            del self.pool_cores[info.pool]
            self.post(ROUTER, PeerLost(info.pool_address, info))

    def post(self, address: Address, event: Event) -> None:
        """To one core; dropped if there is none of this address."""
        node = self._nodes.get(address)
        if node is not None:
            node.post(event)

    def post_pools(self, event: Event) -> None:
        for pool in self.pool_cores:
            self._nodes[pool_address(pool)].post(event)

    def post_all(self, event: Event) -> None:
        for node in self._nodes.values():
            node.post(event)

    def info(self, index: int) -> InstanceInfo:
        """Of the worker with this number in the configuration."""
        pool = PoolId(0 if self._config.shared else index)
        leaning = self._config.workers[index].leaning
        host = gethostname() if self._config.listen else "local"
        return self._info(pool, leaning, self.pools[pool].layout.blocks, host)

    def _info(self, pool: PoolId, leaning: str, blocks: tuple[int, ...], host: str) -> InstanceInfo:
        spec = self._model.spec
        return InstanceInfo(
            pool=pool,
            pool_address=pool_address(pool),
            leaning=leaning,
            sequences_max=self._config.instance.sequences_max,
            blocks_total=blocks,
            host=host,
            block_size=spec.block_size,
            block_bytes=sum(spec.block_bytes(group) for group in range(len(spec.groups))),
        )

    def tier_counters(self) -> Counter[str]:
        """What has gone to the tiers below all pools, and come from there."""
        tierings = [core.tiering for core in self.pool_cores.values() if core.tiering is not None]
        return sum((Counter(tiering.counters) for tiering in tierings), Counter[str]())

    def close(self) -> None:
        """Free all memory."""
        for node in self._nodes.values():
            node.close()
        self._cleanup.close()

    def _add_pool(self, number: PoolId, blocks: tuple[int, ...], tiers: TierConfig | None) -> None:
        config = self._config
        listener = ROUTER if policy("cluster.placement", config.placement).reads_prefixes else None
        settings = PoolSettings(number, self._model.spec, blocks, config.eviction, listener, tiers)
        core = self._add(Header(pool_address(number), settings))
        assert isinstance(core, PoolCore)
        self.pool_cores[number] = core

    def _add(self, header: Header) -> Core:
        """Make a core and run it on the loop."""
        core = shown = remake(header)
        if self._journals:
            shown = Journal(core, Path(self._journals), header)
            self._cleanup.callback(shown.close)
        self._nodes[header.address] = self._loop.add(shown, partial(self._carry, header.address))
        return core


def pool_address(pool: PoolId) -> Address:
    return Address(f"pool{pool}")
