"""The cores of the serve process, on its loop: one for each pool, and the router."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from headrace.live.journal import Header, Journal, PoolSettings, RouterSettings, remake
from headrace.live.loop import CoreLoop, Node
from headrace.live.policies import policy
from headrace.live.pools import Pool, check_memory, layout_for
from headrace.live.settings import Model, ServiceConfig
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.types.events import Command, Event
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

    def __contains__(self, address: Address) -> bool:
        return address in self._nodes

    def make(self) -> None:
        """One pool for all workers, or one each; their cores; the router. Raises ConfigError for memory that is not there."""
        config = self._config
        count = 1 if config.shared else len(config.workers)
        layout = layout_for(self._model.spec, config.kv_bytes)
        check_memory(layout.total, count)
        for index in range(count):
            pool = self.pools[PoolId(index)] = Pool.create(f"pool{index}", layout)
            self._cleanup.callback(pool.close)
            if config.fill:
                pool.fill()
        listener = ROUTER if policy("cluster.placement", config.placement).reads_prefixes else None
        for index, pool in self.pools.items():
            settings = PoolSettings(index, self._model.spec, pool.layout.blocks, config.eviction, listener)
            core = self._add(Header(pool_address(index), settings))
            assert isinstance(core, PoolCore)
            self.pool_cores[index] = core
        router = self._add(
            Header(ROUTER, RouterSettings(config.placement, config.router, config.roles, config.rebalance))
        )
        assert isinstance(router, Router)
        self.router = router

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
        pool, spec = PoolId(0 if self._config.shared else index), self._model.spec
        return InstanceInfo(
            pool=pool,
            pool_address=pool_address(pool),
            leaning=self._config.workers[index].leaning,
            sequences_max=self._config.instance.sequences_max,
            blocks_total=self.pools[pool].layout.blocks,
            block_size=spec.block_size,
            block_bytes=sum(spec.block_bytes(group) for group in range(len(spec.groups))),
        )

    def close(self) -> None:
        """Free all memory."""
        self._cleanup.close()

    def _add(self, header: Header) -> Core:
        """Make a core and run it on the loop."""
        core = shown = remake(header)
        if self._journals:
            shown = Journal(core, Path(self._journals), header)
            self._cleanup.callback(shown.close)
        node = self._nodes[header.address] = self._loop.add(shown, partial(self._carry, header.address))
        self._cleanup.callback(node.close)
        return core


def pool_address(pool: PoolId) -> Address:
    return Address(f"pool{pool}")
