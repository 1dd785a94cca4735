"""One run of one world: build it, let the faults pass, heal, and wait until every request has ended and everything is at rest."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from headrace import registry
from headrace.engine.policies import EnginePolicies
from headrace.nodes.instance import Instance
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.sim.checkers import Checker, Violation, check_content, check_idle
from headrace.sim.faults import Faults
from headrace.sim.nodes import Node
from headrace.sim.rng import KeyedRng
from headrace.sim.scatter import Scatter
from headrace.sim.scenarios import MILLI, SCATTER, World, draw_world
from headrace.sim.shell import ROUTER, Place, Shell, pool_address
from headrace.types.events import Command, Event
from headrace.types.ids import Address, PoolId
from headrace.types.messages import InstanceInfo

HANG_NS = 600 * MILLI
"""After healing, everything ends far earlier."""
EVENTS_MAX = 60_000

Trace = Callable[[str], None]


class Failure(AssertionError):
    """A seed that found something. Says how to see it again."""


@dataclass(frozen=True, slots=True)
class Cores:
    """What a run is made of; a test of the tests puts a broken one in."""

    instance: Callable[..., Core] = Instance
    pool: Callable[..., Core] = PoolCore
    router: Callable[..., Core] = Router


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


def simulate(world: World, trace: Trace | None = None, cores: Cores | None = None) -> Outcome:
    try:
        shell = build(world, cores or Cores(), trace)
        _play(world, shell)
        check_idle(shell)
        check_content(shell)
    except Exception as error:
        raise Failure(
            f"seed {world.seed}: {type(error).__name__}: {error}\nSee it: python -m headrace.sim {world.seed} --trace"
        ) from error
    return _outcome(world, shell)


def build(world: World, cores: Cores, trace: Trace | None = None) -> Shell:
    shell = Shell(world.spec, world.seed, world.shell, world.network)
    checker = Checker(shell)

    def watch(node: Node, now_ns: int, event: Event | None, commands: list[Command] | None) -> None:
        if trace is not None:
            if event is not None:
                trace(f"{now_ns:>12,} {node.address!s:>12} < {event}")
            for command in commands or ():
                trace(f"{now_ns:>12,} {node.address!s:>12} > {command}")
        checker(node, now_ns, event, commands)

    shell.watch = watch if trace is not None else checker
    policies = EnginePolicies(
        *(policy(world, f"engine.{axis}") for axis in ("batching", "admission", "ordering", "preemption"))
    )
    shell.add_router(cores.router(ROUTER, policy(world, "cluster.placement"), world.router))
    for number, blocks in enumerate(world.pools):
        pool = PoolId(number)
        core = cores.pool(pool_address(pool), pool, world.spec, blocks, policy(world, "kv.evict"))
        shell.add_pool(pool, blocks, core)

    def make(address: Address, router: Address, info: InstanceInfo) -> Core:
        return cores.instance(address, router, info, world.spec, policies, world.instance)

    for number, (pool, leaning) in enumerate(world.places):
        info = InstanceInfo(
            pool=PoolId(pool),
            pool_address=pool_address(PoolId(pool)),
            leaning=leaning,
            sequences_max=world.instance.sequences_max,
            blocks_total=world.pools[pool],
        )
        shell.start(Place(f"i{number}", info, make))
    for ask in world.asks:
        shell.submit(ask.request, ask.payload)
    Faults(shell, world.faults)
    return shell


def policy(world: World, axis: str) -> Any:
    if world.policies[axis] == SCATTER:
        return Scatter(KeyedRng(world.seed))
    return registry.load(axis, world.policies[axis], world.options.get(axis))


def _play(world: World, shell: Shell) -> None:
    loop = shell.loop
    while loop.instant():
        if loop.now_ns > world.faults.heal_ns + HANG_NS:
            unfinished = [c.request.id for c in shell.clients.all.values() if not c.ended]
            raise Violation(
                f"requests {unfinished} hang" if unfinished else "the system does not come to rest"
            )
        if loop.events > EVENTS_MAX:
            raise Violation(f"{EVENTS_MAX} events and no end")


def _outcome(world: World, shell: Shell) -> Outcome:
    digest = blake2b(digest_size=16)
    for node in shell.nodes:
        digest.update(f"{node.address} {node.core.digest}".encode())
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
