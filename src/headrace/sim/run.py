"""One run of one world: build it, let the faults pass, heal, and wait until every request has ended and everything is at rest."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import PurePath
from typing import Any

from headrace import registry
from headrace.engine.policies import EnginePolicies
from headrace.nodes.instance import Instance
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.sim.checkers import Checker, Violation, check_content, check_idle
from headrace.sim.clients import Clients
from headrace.sim.faults import Faults
from headrace.sim.loop import Loop
from headrace.sim.memory import Memory
from headrace.sim.network import Network
from headrace.sim.nodes import ContentWorker, Node
from headrace.sim.rng import KeyedRng
from headrace.sim.scatter import Scatter, ScatterMoves, ScatterRoles
from headrace.sim.scenarios import MILLI, SCATTER, World, draw_world
from headrace.sim.shell import ROUTER, Place, Shell, pool_address
from headrace.sim.swaps import Outlook
from headrace.sim.tiers import ContentTiers
from headrace.types.events import Command, Event
from headrace.types.ids import Address, PoolId
from headrace.types.messages import InstanceInfo
from headrace.types.plan import StepPlan
from headrace.types.swaps import SwapIn, SwapOut

HANG_NS = 600 * MILLI
"""After healing, everything ends far earlier."""
EVENTS_MAX = 200_000

Trace = Callable[[str], None]


class Failure(AssertionError):
    """A seed that found something. Says how to see it again."""


class Cores:
    """Makes the cores of a world by address: for a run, for each next incarnation, and to repeat a journal."""

    def __init__(self, world: World) -> None:
        self._world = world
        axes = ("batching", "admission", "ordering", "preemption")
        self._policies = EnginePolicies(*(self._policy(f"engine.{axis}") for axis in axes))

    def at(self, address: Address) -> Core:
        world = self._world
        if address == ROUTER:
            return Router(
                address,
                self._policy("cluster.placement"),
                world.router,
                roles=self._control("cluster.roles", ScatterRoles),
                rebalance=self._control("cluster.rebalance", ScatterMoves),
            )
        kind, number = address.name[0], int(address.name[len(address.name.rstrip("0123456789")) :])
        if kind == "p":
            eviction = self._policy("kv.evict")
            blocks = world.pools[number]
            given = {"listener": ROUTER, "tiers": world.tiers}
            return PoolCore(address, PoolId(number), world.spec, blocks, eviction, **given)
        return Instance(address, ROUTER, self.info(number), world.spec, self._policies, world.instance)

    def info(self, number: int) -> InstanceInfo:
        pool, leaning = self._world.places[number]
        return InstanceInfo(
            pool=PoolId(pool),
            pool_address=pool_address(PoolId(pool)),
            leaning=leaning,
            sequences_max=self._world.instance.sequences_max,
            blocks_total=self._world.pools[pool],
            block_size=self._world.spec.block_size,
        )

    def _control(self, axis: str, scatter: Callable[[KeyedRng], Any]) -> Any:
        """A policy that is asked every so often; most worlds have none."""
        name = self._world.policies.get(axis)
        return scatter(KeyedRng(self._world.seed)) if name == SCATTER else name and self._policy(axis)

    def _policy(self, axis: str) -> Any:
        name = self._world.policies[axis]
        if name == SCATTER:
            return Scatter(KeyedRng(self._world.seed))
        options = self._world.options.get(axis, {})
        fields = registry.settings(axis, name)
        return registry.load(
            axis, name, {field: value for field, value in options.items() if field in fields}
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    digest: str
    """Of all events and commands of all nodes."""
    texts: tuple[tuple[int, int, tuple[int, ...]], ...]
    """(Request, choice, what its client was given)."""
    ended_ns: int
    events: int
    steps: int
    counts: dict[str, int]
    """Things that happened, to see that the scenarios reach them."""
    shell: Shell


def run(seed: int, trace: Trace | None = None) -> Outcome:
    return simulate(draw_world(seed), trace)


def simulate(world: World, trace: Trace | None = None) -> Outcome:
    try:
        shell = build(world, trace)
        _play(world, shell)
        check_idle(shell)
        check_content(shell)
    except Exception as error:
        raise Failure(
            f"seed {world.seed}: {_in_one_line(error)}\nSee it: headrace fuzz --seed {world.seed} --trace"
        ) from error
    return _outcome(world, shell)


def _in_one_line(error: Exception) -> str:
    """What it says, and where it was raised."""
    said = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said} ({PurePath(frame.filename).name}:{frame.lineno} in {frame.name})"


def build(world: World, trace: Trace | None = None) -> Shell:
    shell = _shell(world)
    checker = Checker(shell)

    def watch(node: Node, now_ns: int, event: Event | None, commands: list[Command] | None) -> None:
        if trace is not None:
            if event is not None:
                trace(f"{now_ns:>12,} {node.address!s:>12} < {event}")
            for command in commands or ():
                trace(f"{now_ns:>12,} {node.address!s:>12} > {command}")
        checker(node, now_ns, event, commands)

    shell.watch = watch if trace is not None else checker
    cores = Cores(world)
    shell.add_router(cores.at(ROUTER))
    for number, blocks in enumerate(world.pools):
        pool = PoolId(number)
        memory = Memory(world.spec, blocks)
        node = shell.add_pool(pool, cores.at(pool_address(pool)), memory)
        if world.tiers is not None:
            below = ContentTiers(node, memory, shell.loop, shell.rng, world.tiers, world.tier_faults)
            shell.tiers[node.address] = below
    for number in range(len(world.places)):
        shell.start(Place(f"i{number}", cores.info(number), cores.at))
    for ask in world.asks:
        shell.clients.submit(ask.request, ask.payload)
        shell.submit(ask.request)
    Faults(shell, world.faults, trace)
    return shell


def _shell(world: World) -> Shell:
    loop, rng, clients = Loop(), KeyedRng(world.seed), Clients(world.spec)
    network = Network(loop, rng, world.network)

    def duration_ns(index: int, plan: StepPlan) -> int:
        tokens = sum(work.count for work in plan.work)
        jitter = 0.5 + rng.uniform("step", index, plan.step)
        factor = jitter * shell.slow[shell.nodes[index].address.name]
        took_ns = 1 + int((world.shell.step_ns + world.shell.token_ns * tokens) * factor)
        return network.on_grid(loop.now_ns + took_ns) - loop.now_ns

    def outlook(index: int, command: SwapOut | SwapIn) -> Outlook:
        config, key = world.shell, (index, command.swap)
        slow = 100 if rng.uniform("slow copy", *key) < config.slow_copy_share else 1
        copy_ns = int(config.copy_ns * (0.5 + rng.uniform("copy", *key)) * slow)
        ok = (
            loop.now_ns > world.faults.heal_ns or rng.uniform("failed copy", *key) >= config.failed_copy_share
        )
        return Outlook(1 + copy_ns * len(command.runs), ok)

    def make_worker(index: int, address: Address, core: Core, info: InstanceInfo) -> ContentWorker:
        return ContentWorker(
            index,
            address,
            core,
            loop,
            info,
            memory=shell.pools[info.pool][1],
            duration_ns=duration_ns,
            depth=world.instance.depth,
            broken=clients.doomed,
            switch_ns=world.shell.switch_ns,
            host_blocks=world.instance.swap_blocks,
            outlook=outlook,
            holder=partial(_answers, shell, network, address),
        )

    shell = Shell(loop, rng, world.shell, clients, network, make_worker)
    return shell


def _answers(shell: Shell, network: Network, asker: Address, holder: Address) -> Memory | None:
    """The memory of a peer that is asked for partial results; None if it is dead or cannot be reached in time."""
    peer = shell.workers[holder]
    now_ns = shell.loop.now_ns
    if not peer.alive or network.open_ns(shell.workers[asker], peer, now_ns) > now_ns:
        return None
    return peer.memory


def _play(world: World, shell: Shell) -> None:
    loop = shell.loop
    while loop.instant():
        if shell.clients.unfinished and loop.now_ns > world.faults.heal_ns + HANG_NS:
            raise Violation(
                f"requests {[c.request.id for c in shell.clients.all.values() if not c.ended]} hang"
            )
        if loop.events > EVENTS_MAX:
            raise Violation(f"{EVENTS_MAX} events and no end")


def _outcome(world: World, shell: Shell) -> Outcome:
    digest = blake2b(digest_size=16)
    for node in shell.nodes:
        digest.update(f"{node.address} {node.digest}".encode())
    clients = shell.clients.all.values()
    texts = tuple(
        (c.request.id, choice, tuple(s.token_ids)) for c in clients for choice, s in enumerate(c.streams)
    )
    return Outcome(
        seed=world.seed,
        digest=digest.hexdigest(),
        texts=texts,
        ended_ns=shell.loop.now_ns,
        events=shell.loop.events,
        steps=sum(int(w.executor.last) for w in shell.workers.values()),
        counts=dict(shell.counts),
        shell=shell,
    )
