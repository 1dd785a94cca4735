"""A deployment on virtual time: the real cores, a cost model for steps, a network of links, and the clients of a trace.

    run(cluster, trace, seed) -> RunData

is what `headrace simulate`, `compare` and `replay` call, and the benchmarks and reproductions. See `sim.timing` for how steps are skipped;
`every_step=True` runs each one, and gives the same times, placements and block tables to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import msgspec
import numpy as np

from headrace import registry
from headrace.engine.policies import EnginePolicies
from headrace.nodes.instance import Instance
from headrace.nodes.limits import SECOND, Caching, InstanceConfig, RouterConfig, TierConfig
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.sim.audience import Audience
from headrace.sim.fabric import Fabric, Place
from headrace.sim.loop import Loop
from headrace.sim.nodes import Node, Worker
from headrace.sim.rng import KeyedRng
from headrace.sim.samples import Samples
from headrace.sim.shell import ROUTER, Shell, ShellConfig, pool_address
from headrace.sim.shell import Place as Position
from headrace.sim.swaps import CopyCosts
from headrace.sim.tiers import TierSpeeds, TimedTiers
from headrace.sim.timing import PERMILLE, Host, TimingWorker
from headrace.sim.topology import Links, Topology
from headrace.types.costs import Costs
from headrace.types.errors import ConfigError, HeadraceError
from headrace.types.events import DrainAsked
from headrace.types.ids import Address, PoolId
from headrace.types.kv import KVSpec
from headrace.types.messages import InstanceInfo
from headrace.types.outcomes import RunData, goal_columns
from headrace.types.trace import Trace

BEGIN_NS = 10 * SECOND
"""The trace begins then: all instances are up, and known to all."""
STUCK_NS = 900 * SECOND
"""Nothing at all has come to any client for so long while requests wait: nothing will."""
REPEATS_MAX = 2**40
SAMPLES = 240

Progress = Callable[[int, int], None]
"""Told (requests that have ended, all requests) now and then."""


class PolicyChoice(msgspec.Struct, frozen=True):
    name: str
    settings: dict[str, Any] = {}


DEFAULT_POLICIES = {
    "engine.batching": PolicyChoice("splitfuse"),
    "engine.admission": PolicyChoice("aggressive"),
    "engine.ordering": PolicyChoice("fcfs"),
    "engine.preemption": PolicyChoice("recompute"),
    "cluster.placement": PolicyChoice("least_load"),
    "kv.evict": PolicyChoice("lru"),
}


@dataclass(frozen=True, slots=True)
class Member:
    """One instance."""

    name: str
    leaning: str
    """"prefill" | "decode" | "mixed"."""
    costs: Costs
    blocks: tuple[int, ...]
    """Of its pool, per KV group."""
    place: Place = (0, 0)
    """Host, and first device of it."""
    pool: int | None = None
    """Members that say the same number share one pool; None: its own."""
    slow: float = 1.0
    """Factor on all its step times."""


@dataclass(frozen=True, slots=True)
class Mishaps:
    """What goes wrong, at times of the trace, nanoseconds."""

    kills: tuple[tuple[int, str], ...] = ()
    drains: tuple[tuple[int, str], ...] = ()
    restart_ns: int = 10 * SECOND
    """From a death's discovery to the next incarnation, at most."""
    notice_ns: int = SECOND // 10
    """Until a death is known to others."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Everything that a simulation is made from, but the trace."""

    spec: KVSpec
    members: tuple[Member, ...]
    topology: Topology
    policies: dict[str, PolicyChoice] = field(default_factory=dict[str, PolicyChoice])
    """By axis; `DEFAULT_POLICIES` where nothing is said."""
    instance: InstanceConfig = field(default_factory=InstanceConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    tiers: TierConfig | None = None
    """Below each pool."""
    tier_speeds: TierSpeeds = field(default_factory=TierSpeeds)
    message_ns: int = 50_000
    """Between any two nodes of one host, one way; others add the links' latency."""
    ingress_ns: int = 0
    """From a request's arrival to the router,"""
    egress_ns: int = 0
    """and from the router to the client."""
    report_ns: int = SECOND // 10
    """Instances report this often, if a policy reads reports."""
    slowdown: Callable[[str, tuple[str, ...]], float] | None = None
    """Of steps beside others on one host; None: they do not disturb each other."""
    copies: CopyCosts = field(default_factory=CopyCosts)
    """Of swapping to host memory."""
    output_limit: int | None = None
    """What requests ask for at most; None: each asks for what it will get."""
    deadline_ns: int | None = None
    """From a request's arrival until it is given up."""
    mishaps: Mishaps = Mishaps()
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """As the user wrote them, for reports."""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the cost model, for reports."""

    def policy(self, axis: str) -> PolicyChoice | None:
        return self.policies.get(axis) or DEFAULT_POLICIES.get(axis)


class Stuck(HeadraceError):
    """The simulation cannot go on; the message names who waits for what."""


@dataclass(slots=True, eq=False)
class Simulation:
    """A cluster that is set up. `run` is the usual way; tests look inside."""

    cluster: Cluster
    shell: Shell[Audience, Fabric, TimingWorker]
    audience: Audience
    router: Router
    samples: Samples


def check(cluster: Cluster, trace: Trace) -> None:
    """Raises ConfigError for what cannot work, before anything runs."""
    if not cluster.members:
        raise ConfigError("the cluster has no instance: set instances, or prefill and decode")
    names = [m.name for m in cluster.members]
    for _, name in (*cluster.mishaps.kills, *cluster.mishaps.drains):
        if name not in names:
            raise ConfigError(f"faults: there is no instance {name!r}; there are {', '.join(names[:8])}")
    doomed = {name for _, name in cluster.mishaps.kills}
    if doomed == set(names) and cluster.mishaps.restart_ns >= STUCK_NS:
        raise ConfigError("faults: every instance is killed and none comes back: lower restart, or spare one")
    if {name for _, name in cluster.mishaps.drains} == set(names):
        raise ConfigError("faults: every instance is drained: nobody is left to serve; spare one")
    ours, theirs = cluster.spec.block_size, trace.block_size
    if theirs and max(ours, theirs) % min(ours, theirs):
        raise ConfigError(
            f"the trace's blocks of {theirs} tokens and the pools' of {ours} do not divide each other: choose another --block-size"
        )
    _check_lengths(cluster, trace)


def _check_lengths(cluster: Cluster, trace: Trace) -> None:
    size = cluster.spec.block_size
    full = [i for i, group in enumerate(cluster.spec.groups) if not group.window]
    most = max(min((m.blocks[i] for i in full), default=2**40) for m in cluster.members) * size
    need = trace.prompt + trace.output
    over = np.flatnonzero(need > most)
    if len(over):
        row = int(over[0])
        raise ConfigError(
            f"{len(over)} of {len(trace)} requests do not fit any instance's KV memory of {most} tokens, the first is row {row} with "
            f"{int(trace.prompt[row])} in and {int(trace.output[row])} out: give more memory, or clip the trace's lengths"
        )


def build(cluster: Cluster, trace: Trace, seed: int, *, every_step: bool = False) -> Simulation:
    """Set it up. Raises ConfigError."""
    check(cluster, trace)
    loop = Loop()
    names = tuple(m.name for m in cluster.members)
    make = _Maker(cluster, loop, every_step=every_step)
    audience = Audience(
        trace,
        cluster.spec.block_size,
        names,
        begin_ns=BEGIN_NS,
        ingress_ns=cluster.ingress_ns,
        egress_ns=cluster.egress_ns,
        output_limit=cluster.output_limit,
        deadline_ns=cluster.deadline_ns,
    )
    links = Links(cluster.topology)
    links.check(m.place for m in cluster.members)
    groups = range(len(cluster.spec.groups))
    fabric = Fabric(
        loop,
        links,
        {m.name: m.place for m in cluster.members},
        message_ns=cluster.message_ns,
        block_bytes=tuple(cluster.spec.block_bytes(g) for g in groups),
        layers=tuple(len(g.layers) for g in cluster.spec.groups),
    )
    router = make.router()
    shell = Shell(
        loop,
        KeyedRng(seed),
        ShellConfig(
            depth=cluster.instance.depth,
            report_ns=cluster.report_ns if make.reports else 0,
            report_growth=2**62,
            notice_ns=cluster.mishaps.notice_ns,
            last_words_ns=cluster.message_ns + sum(level.latency_ns for level in cluster.topology.levels),
            restart_ns=cluster.mishaps.restart_ns,
        ),
        audience,
        fabric,
        make.worker,
        journal=False,
        acquainted=make.acquainted,
    )
    shell.add_router(router)
    for pool, blocks in make.pools.items():
        node = shell.add_pool(PoolId(pool), make.pool(pool, blocks))
        if cluster.tiers is not None:
            size = cluster.spec.block_bytes(0)
            shell.tiers[node.address] = TimedTiers(node, loop, size, cluster.tier_speeds)
    for number, member in enumerate(cluster.members):
        shell.start(Position(member.name, make.info(number), make.instance))
    for at_ns, name in cluster.mishaps.kills:
        loop.at(BEGIN_NS + at_ns, _kill, shell, name)
    for at_ns, name in cluster.mishaps.drains:
        loop.at(BEGIN_NS + at_ns, _drain, shell, name)
    if len(trace):
        loop.at(audience.due_ns(0), _arrive, shell, 0)
    period_ns = max(1_000_000, trace.duration_ns // SAMPLES)
    samples = Samples(shell, fabric.flows, period_ns, BEGIN_NS)
    return Simulation(cluster, shell, audience, router, samples)


def run(
    cluster: Cluster,
    trace: Trace,
    seed: int = 0,
    *,
    name: str = "",
    every_step: bool = False,
    progress: Progress | None = None,
) -> RunData:
    """Simulate to the last request's end. Raises ConfigError for what cannot work, Stuck if nothing moves any more."""
    begun_s = process_time()
    simulation = build(cluster, trace, seed, every_step=every_step)
    play(simulation, progress)
    return _data(simulation, name, seed, process_time() - begun_s)


def play(simulation: Simulation, progress: Progress | None = None) -> None:
    """Until every request has ended. Raises Stuck."""
    shell, audience = simulation.shell, simulation.audience
    loop, total = shell.loop, len(audience.trace)
    while audience.unfinished:
        for _ in range(20_000):
            if not loop.instant() or not audience.unfinished:
                break
        if progress is not None:
            progress(total - audience.unfinished, total)
        idle_ns = loop.now_ns - max(audience.progress_ns, BEGIN_NS)
        pending = audience.waiting()
        if audience.unfinished and (not len(loop) or (pending and idle_ns > STUCK_NS)):
            raise Stuck(_stuck(simulation))


def _stuck(simulation: Simulation) -> str:
    waiting = simulation.audience.waiting()
    if not waiting:
        return f"{simulation.audience.unfinished} requests were never made: the trace's arrivals are out of order"
    first = waiting[0]
    choice = simulation.router.choices[first][0]
    where = f" on {choice.decode or choice.prefill}" if choice.prefill else ""
    return (
        f"nothing moves any more at {simulation.shell.loop.now_ns / SECOND:.3f} s: {len(waiting)} requests wait, the first is {first}, "
        f"{choice.stage.value}{where} ({choice.request.prompt} tokens in, {choice.next} of {choice.request.tokens_max} out, attempt "
        f"{choice.attempt + 1})"
    )


def _data(simulation: Simulation, name: str, seed: int, cpu_s: float) -> RunData:
    cluster, shell, outcomes = simulation.cluster, simulation.shell, simulation.audience.outcomes
    trace = simulation.audience.trace
    last_ns = int(outcomes.finished_ns.max()) if len(outcomes) else 0
    return RunData(
        name=name,
        seed=seed,
        clock="virtual",
        outcomes=outcomes,
        series=simulation.samples.series(),
        counters=dict(simulation.router.counters),
        duration_s=(last_ns - int(trace.arrival_ns[0])) / SECOND if len(trace) else 0.0,
        settings=cluster.settings,
        facts={
            "trace": trace.name,
            "instances": len(cluster.members),
            "cpu_s": round(cpu_s, 3),
            "events": shell.loop.events,
            "steps": sum(w.steps for w in shell.workers.values()),
            "deaths": shell.counts["deaths"],
            **cluster.facts,
        },
        goals=goal_columns(trace.goal, trace.goals)
        if any(g != trace.goals[0] or g.ttft_ns or g.tpot_ns for g in trace.goals)
        else None,
    )


class _Maker:
    """Cores and workers of a cluster, for its first incarnations and all later ones."""

    def __init__(self, cluster: Cluster, loop: Loop, *, every_step: bool) -> None:
        self._cluster = cluster
        self._loop = loop
        self._numbers = {m.name: i for i, m in enumerate(cluster.members)}
        self._pool_of = _pools(cluster.members)
        self.pools = {pool: m.blocks for m, pool in zip(cluster.members, self._pool_of, strict=True)}
        self._hosts: dict[int, Host] = {}
        if cluster.slowdown is not None:
            self._hosts = {m.place[0]: Host(cluster.slowdown) for m in cluster.members}
        self._placement = self._load("cluster.placement")
        returns = cluster.instance.caching is Caching.RETURN
        self._config = msgspec.structs.replace(
            cluster.instance,
            # What returns takes blocks at moments that skipped steps would shift: then each step is run.
            repeats_max=1 if every_step or returns else REPEATS_MAX,
            overheard=self._placement.reads_prefixes,
        )
        self._roles = self._load("cluster.roles")
        self._rebalance = self._load("cluster.rebalance")
        self._wide = returns or self._rebalance is not None or self._placement.reads_prefixes
        controls = (self._roles, self._rebalance)
        self.reports = self._placement.reads_reports or any(policy is not None for policy in controls)

    def router(self) -> Router:
        return Router(
            ROUTER,
            self._placement,
            self._cluster.router,
            roles=self._roles,
            rebalance=self._rebalance,
            costs={m.name: m.costs for m in self._cluster.members},
        )

    def pool(self, pool: int, blocks: tuple[int, ...]) -> PoolCore:
        number = PoolId(pool)
        return PoolCore(
            pool_address(number),
            number,
            self._cluster.spec,
            blocks,
            self._load("kv.evict"),
            listener=ROUTER if self._placement.reads_prefixes else None,
            tiers=self._cluster.tiers,
        )

    def instance(self, address: Address) -> Instance:
        number = self._numbers[address.name]
        engine = [
            self._load(f"engine.{axis}") for axis in ("batching", "admission", "ordering", "preemption")
        ]
        return Instance(
            address, ROUTER, self.info(number), self._cluster.spec, EnginePolicies(*engine), self._config
        )

    def info(self, number: int) -> InstanceInfo:
        member, pool = self._cluster.members[number], PoolId(self._pool_of[number])
        spec = self._cluster.spec
        return InstanceInfo(
            pool=pool,
            pool_address=pool_address(pool),
            leaning=member.leaning,
            sequences_max=self._config.sequences_max,
            blocks_total=member.blocks,
            host=str(member.place[0]),
            block_size=spec.block_size,
            block_bytes=sum(spec.block_bytes(group) for group in range(len(spec.groups))),
        )

    def acquainted(self, worker: Worker, node: Node) -> bool:
        """Who deals with whom beyond what messages say: the router with all, those of one pool with each other, and all instances where
        sequences move, or prefixes are fetched or returned."""
        if isinstance(node, Worker):
            return self._wide or node.info.pool == worker.info.pool
        return node.address in (ROUTER, worker.info.pool_address)

    def worker(self, index: int, address: Address, core: Core, info: InstanceInfo) -> TimingWorker:
        member = self._cluster.members[self._numbers[address.name]]
        spec, copies = self._cluster.spec, self._cluster.copies
        block_bytes = tuple(spec.block_bytes(group) for group in range(len(spec.groups)))
        return TimingWorker(
            index,
            address,
            core,
            self._loop,
            info,
            costs=member.costs,
            depth=self._config.depth,
            block_size=spec.block_size,
            layers=sum(len(g.layers) for g in spec.groups),
            copies=lambda command: copies.duration_ns(command, block_bytes),
            pace=int(member.slow * PERMILLE),
            host=self._hosts.get(member.place[0]),
        )

    def _load(self, axis: str) -> Any:
        """A policy of its own; None: the axis has none."""
        choice = self._cluster.policy(axis)
        return None if choice is None else registry.load(axis, choice.name, choice.settings)


def _pools(members: tuple[Member, ...]) -> list[int]:
    """A number for each member's pool."""
    named: dict[int, int] = {}
    numbers: list[int] = []
    count = 0
    for member in members:
        if member.pool is None or member.pool not in named:
            if member.pool is not None:
                named[member.pool] = count
            numbers.append(count)
            count += 1
        else:
            numbers.append(named[member.pool])
    return numbers


def _arrive(shell: Shell[Audience, Fabric, TimingWorker], row: int) -> None:
    audience = shell.clients
    shell.ask(audience.request(row))
    if row + 1 < len(audience.trace):
        shell.loop.at(max(audience.due_ns(row + 1), shell.loop.now_ns + 1), _arrive, shell, row + 1)


def _kill(shell: Shell[Audience, Fabric, TimingWorker], name: str) -> None:
    for address in [a for a, worker in shell.workers.items() if a.name == name and worker.alive]:
        shell.kill(address)


def _drain(shell: Shell[Audience, Fabric, TimingWorker], name: str) -> None:
    for address in [a for a, worker in shell.workers.items() if a.name == name and worker.alive]:
        shell.router.receive(DrainAsked(address), shell.loop.now_ns)
