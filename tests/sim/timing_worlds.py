"""From one integer to one small cluster and trace of the timing simulation, and everything that a run of it can be compared by.

Limits are small, so that memory runs out, buckets and windows are crossed, and batches change all the time. Half of the worlds lie on a
grid: there all durations are multiples of one number, so that events meet at the very end of a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
from msgspec.structs import asdict, replace

from headrace import registry
from headrace.cli import catalogue
from headrace.cost.arithmetic import shape_of
from headrace.cost.roofline import Roofline
from headrace.engine.memory import Memory
from headrace.engine.sequence import Sequence as Running
from headrace.nodes.instance import Instance
from headrace.nodes.limits import Caching, InstanceConfig, RouterConfig, Stream
from headrace.nodes.pool import PoolCore
from headrace.sim.audience import Audience
from headrace.sim.cluster import Cluster, Member, Mishaps, PolicyChoice, Simulation, Stuck, build, play
from headrace.sim.rng import Draws, KeyedRng
from headrace.sim.swaps import CopyCosts
from headrace.sim.topology import Level, regular
from headrace.types.costs import Costs, DecodeCost
from headrace.types.ids import Address, PoolId
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from headrace.types.messages import Start
from headrace.types.outcomes import COUNTS, TIMES
from headrace.types.trace import Trace, make_trace
from tests.cost.models import QWEN3_06B

MICRO_PS = 1_000_000
GRID_NS = 10_000
BEGIN_NS = 10_000_000
EVENTS_MAX = 300_000
CACHING = (
    Caching.INCREMENT,
    Caching.INCREMENT,
    Caching.RETURN,
    Caching.RETURN,
    Caching.PREFILL,
    Caching.NONE,
)
AXES = ("engine.batching", "engine.admission", "engine.ordering", "engine.preemption")


@dataclass(frozen=True, slots=True)
class Stairs:
    """Exact costs: affine in context within buckets of `width` tokens, `rise_ps` dearer in each further one."""

    fixed_ps: int
    row_ps: int
    slope_ps: int
    width: int
    rise_ps: int
    token_ps: int
    """Of a chunk, per token."""

    def decode(self, rows: int, context: int) -> DecodeCost:
        level = context // self.width
        fixed_ps = self.fixed_ps + rows * self.row_ps + level * self.rise_ps
        return DecodeCost(fixed_ps, self.slope_ps * (1 + min(level, 3)), (level + 1) * self.width)

    def step_ps(self, prefills: Sequence[tuple[int, int]], rows: int, context: int) -> int:
        cost = self.decode(rows, context)
        chunks_ps = sum(tokens * self.token_ps + seen * self.slope_ps for tokens, seen in prefills)
        return cost.fixed_ps + cost.slope_ps * context + chunks_ps

    def transfer_ns(self, nbytes: int) -> int:
        return nbytes


@dataclass(frozen=True, slots=True)
class TimingWorld:
    seed: int
    cluster: Cluster
    trace: Trace


def draw_world(seed: int) -> TimingWorld:
    rng = KeyedRng(seed)
    draws = Draws(rng, "world")
    grid = draws.chance(0.5)
    spec = draw_spec(Draws(rng, "spec"))
    trace = draw_trace(Draws(rng, "trace"), spec.block_size, grid)
    swapping = Draws(rng, "swapping")
    instance = replace(
        draw_instance(Draws(rng, "instance"), Draws(rng, "caching").pick(CACHING)),
        swap_blocks=(swapping.pick((0, 4, 20, 100)),) * len(spec.groups),
    )
    members = draw_members(Draws(rng, "members"), spec, trace, instance.tokens_max, grid)
    hosts = 1 + max(m.place[0] for m in members)
    devices = 1 + max(m.place[1] for m in members)
    rate = draws.pick((100_000_000, 10_000_000_000))
    topology = regular((Level("device", rate, rate, 1000), Level("host", rate, rate, 5000)), hosts, devices)
    deadline_ns = draws.between(1, 300) * 100_000 if draws.chance(0.25) else None
    cluster = Cluster(
        spec=spec,
        members=members,
        topology=topology,
        policies=with_settings(draw_policies(Draws(rng, "policies")), swapping),
        copies=CopyCosts(swapping.pick((1, GRID_NS, 40_000)), swapping.pick((10**6, 10**9))),
        instance=instance,
        router=RouterConfig(
            attempts_max=draws.pick((3, 40)),
            deaths_max=draws.pick((2, 100)),
            split_failures_max=draws.pick((1, 2, 50)),
            refused_ns=draws.pick((50_000, 1_000_000)),
        ),
        message_ns=draws.pick((1, 1_000, GRID_NS, 50_000)),
        ingress_ns=draws.pick((0, GRID_NS)),
        egress_ns=draws.pick((0, GRID_NS)),
        report_ns=draws.pick((0, 100_000, 1_000_000)),
        slowdown=crowding if draws.chance(0.3) else None,
        output_limit=draws.pick((None, None, 4, 60)),
        deadline_ns=deadline_ns,
        mishaps=draw_mishaps(Draws(rng, "mishaps"), members, trace),
    )
    return TimingWorld(seed, cluster, trace)


def crowding(kind: str, beside: tuple[str, ...]) -> float:
    """A slowdown that depends on both sides."""
    return 1 + len(beside) * (0.25 if kind == "decode" else 0.1) + 0.5 * ("prefill" in beside)


def draw_spec(draws: Draws) -> KVSpec:
    full = KVGroup(GroupKind.FULL, tuple(range(draws.between(1, 3))), 1, 8)
    window = KVGroup(GroupKind.WINDOW, (8, 9), 1, 8, window=draws.between(1, 60))
    groups = draws.pick(((full,), (full,), (full,), (window,), (full, window), (window, full)))
    return KVSpec(groups, draws.pick((2, 4, 8, 16, 32)), "bfloat16")


def draw_costs(draws: Draws, grid: bool) -> Costs:
    if draws.chance(0.15):
        return roofline()
    unit = GRID_NS * 1000 if grid else 1
    fixed = draws.pick((1, 2, 5)) * unit if grid else draws.between(MICRO_PS, 60 * MICRO_PS)
    slope = draws.pick((0, 0, unit)) if grid else draws.pick((0, 1, 37, 1009, 100_003))
    row = draws.pick((0, unit)) if grid else draws.between(0, 3 * MICRO_PS)
    return Stairs(
        fixed_ps=fixed,
        row_ps=row,
        slope_ps=slope,
        width=draws.pick((1, 7, 64, 200, 10**6)),
        rise_ps=draws.pick((0, unit)) if grid else draws.between(0, MICRO_PS),
        token_ps=draws.pick((0, unit)) if grid else draws.between(0, 2 * MICRO_PS),
    )


def draw_instance(draws: Draws, caching: Caching) -> InstanceConfig:
    return InstanceConfig(
        tokens_max=draws.pick((4, 8, 16, 64, 2048)),
        sequences_max=draws.pick((1, 2, 3, 8, 64)),
        waiting_max=draws.pick((2, 64, 64)),
        depth=draws.pick((1, 2, 2)),
        stream_interval=draws.pick((1, 1, 2, 5, 2**30)),
        caching=caching,
        lease_blocks=draws.pick((0, 1, 4, 16, 100)),
        hold_ns=draws.pick((3_000_000, 60_000_000)),
        receive_ns=draws.pick((8_000_000, 80_000_000)),
        fence_ns=draws.pick((100_000, 5_000_000)),
        stuck_ns=draws.pick((200_000, 2_000_000)),
        stream=draws.pick((Stream.CHUNK, Stream.CHUNK, Stream.LAYER, Stream.REQUEST)),
    )


def draw_members(draws: Draws, spec: KVSpec, trace: Trace, tokens_max: int, grid: bool) -> tuple[Member, ...]:
    count = draws.between(1, 5)
    layout = draws.pick(("own", "own", "shared", "pairs"))
    pools = {"own": [None] * count, "shared": [0] * count, "pairs": [i // 2 for i in range(count)]}[layout]
    leanings = draws.pick((("mixed",), ("mixed",), ("prefill", "decode"), ("prefill", "decode", "mixed")))
    hosts = draws.pick((1, 2, count))
    longest = int((trace.prompt + trace.output).max())
    whole = spec.blocks_for(longest)
    near = Memory(spec, PoolId(0), (0,) * len(spec.groups), 0).demand(longest, tokens_max)
    blocks = {
        pool: tuple(max(whole, least) + draws.pick((0, 1, 3, 10, 40, 400)) for least in near)
        for pool in dict.fromkeys([*range(count)] if layout == "own" else pools)
    }
    costs = draw_costs(draws, grid)
    alike = draws.chance(0.6)
    return tuple(
        Member(
            name=f"i{i}",
            leaning=leanings[i % len(leanings)],
            costs=costs if alike else draw_costs(draws, grid),
            blocks=blocks[i if layout == "own" else pools[i]],
            place=(i % hosts, i // hosts),
            pool=pools[i],
            slow=draws.pick((1.0, 1.0, 1.0, 2.0, 1.337)),
        )
        for i in range(count)
    )


def draw_policies(draws: Draws) -> dict[str, PolicyChoice]:
    axes = (*AXES, "cluster.placement", "kv.evict")
    policies = {axis: PolicyChoice(draws.pick(registry.names(axis))) for axis in axes}
    if policies["cluster.placement"].name == "least_load" and draws.chance(0.4):
        policies["cluster.placement"] = PolicyChoice("least_load", {"bind": "late"})
    return policies


def with_settings(policies: dict[str, PolicyChoice], draws: Draws) -> dict[str, PolicyChoice]:
    """Swapping and fairness, where they are drawn, in all their ways."""
    swap = {part: draws.chance(0.6) for part in ("groups", "background", "reuse")}
    fair = {
        "pattern": draws.pick(("served", "random", "markov")),
        "frequency": draws.pick((0.05, 0.3, 1.0)),
        "quantum": draws.pick((1, 7, 64)),
    }
    drawn = {
        "swap": swap | {"group_blocks": draws.pick((1, 3, 60)), "tokens_min": draws.pick((0, 20))},
        "fair": fair,
    }
    return {axis: PolicyChoice(p.name, drawn.get(p.name, p.settings)) for axis, p in policies.items()}


def draw_mishaps(draws: Draws, members: tuple[Member, ...], trace: Trace) -> Mishaps:
    span_ns = trace.duration_ns + 5_000_000
    names = [m.name for m in members]
    kills = drains = ()
    if draws.chance(0.3):
        kills = tuple(
            (1 + draws.between(0, span_ns // GRID_NS) * GRID_NS, draws.pick(names))
            for _ in range(draws.between(1, 3))
        )
    if len(names) > 1 and draws.chance(0.2):
        drains = ((1 + draws.between(0, span_ns), names[0]),)
    return Mishaps(kills, drains, draws.pick((100_000, 3_000_000)), draws.pick((1_000, 100_000, 3_000_000)))


def draw_trace(draws: Draws, block_size: int, grid: bool) -> Trace:
    """Requests in bursts, some of which begin as others did, or go on where others ended (perhaps before those end)."""
    rows = draws.pick((1, 2, 4, 7, 12))
    hashed = draws.chance(0.6)
    size = draws.pick((block_size, block_size, 2 * block_size, max(1, block_size // 2)))
    long = draws.pick((10, 40, 200))
    gap_ns = draws.pick((GRID_NS, 300_000, 3_000_000))
    at_ns, arrivals, follows = 0, [], []
    prompts, outputs, contents = [], [], []
    for row in range(rows):
        if not draws.chance(0.4):
            at_ns += draws.between(1, 20) * (gap_ns // 10) if grid else draws.between(1, 2 * gap_ns)
        arrivals.append(at_ns)
        earlier = draws.between(0, row - 1) if row and draws.chance(0.5) else -1
        how = draws.pick(("again", "alike", "goes on", "goes on"))
        if earlier >= 0 and how == "goes on" and prompts[earlier] < 400:
            follows.append(earlier)
            begin = prompts[earlier] + outputs[earlier]
            prompts.append(begin + draws.between(1, long))
            # Who goes on from equal turns says the same there.
            told = [("out", contents[earlier][0], i) for i in range(400)]
            contents.append((row, contents[earlier][1][: prompts[earlier] // size] + told))
        elif earlier >= 0 and how in ("again", "alike"):
            follows.append(follows[earlier] if how == "again" else -1)
            prompts.append(prompts[earlier] if how == "again" else draws.between(1, long))
            contents.append((contents[earlier][0] if how == "again" else row, list(contents[earlier][1])))
        else:
            follows.append(-1)
            prompts.append(draws.between(1, long))
            contents.append((row, [("in", row, i) for i in range(400)]))
        outputs.append(outputs[earlier] if how == "again" and earlier >= 0 else draws.pick((1, 2, 5, 20, 60)))
    more: dict[str, Any] = {}
    if hashed:
        more = _named(prompts, [c for _, c in contents], size)
        more["follows"] = np.array(follows, dtype=np.int64)
    if draws.chance(0.5):
        more["priority"] = np.array([draws.pick((0, 0, 1, -1)) for _ in range(rows)], dtype=np.int64)
    columns = [np.array(c, dtype=np.int64) for c in (arrivals, prompts, outputs)]
    return make_trace("drawn", *columns, **more)


def _named(prompts: list[int], contents: list[list[Any]], size: int) -> dict[str, Any]:
    """Ids of all full blocks: one for each content and all before it."""
    ids: dict[Any, int] = {}
    found: list[int] = []
    starts = [0]
    for prompt, blocks in zip(prompts, contents, strict=True):
        parent = -1
        for i in range(prompt // size):
            content = blocks[i] if i < len(blocks) else ("end", len(starts), i)
            parent = ids.setdefault((parent, content), len(ids))
            found.append(parent)
        starts.append(len(found))
    return {
        "block_size": size,
        "hash_ids": np.array(found, dtype=np.int64),
        "hash_starts": np.array(starts, dtype=np.int64),
    }


@cache
def roofline() -> Roofline:
    """A small model on a real device: its steps take some tens of microseconds."""
    return Roofline(shape_of(QWEN3_06B), catalogue.hardware("h100-sxm"))


# Runs


@dataclass(slots=True)
class Seen:
    """What a run came to, all of which must be equal."""

    columns: dict[str, list[int]]
    errors: list[str]
    counters: dict[str, int]
    placements: list[tuple[Any, ...]]
    """(Row, role, instance, attempt's history), in order."""
    tables: dict[str, list[Any]]
    """By incarnation: what entered sequences' tables and left them, in order."""
    pools: dict[str, Any]
    """At rest: free runs and index."""
    memories: dict[str, Any]
    """At rest, by incarnation: what is in hand, and what is known of the pool."""
    swaps: dict[str, dict[str, int]]
    """By incarnation: what was swapped."""
    stuck: str = ""
    events: int = 0
    steps: int = 0


def observe(world: TimingWorld, *, every_step: bool) -> Seen:
    """Run it to rest and look at everything."""
    with _logged() as log:
        simulation = build(world.cluster, world.trace, world.seed, every_step=every_step)
        stuck = ""
        try:
            play(simulation)
        except Stuck as error:
            stuck = str(error)
        loop = simulation.shell.loop
        while loop.events < EVENTS_MAX and loop.instant():
            pass
    assert stuck or loop.events < EVENTS_MAX, f"seed {world.seed} does not come to rest"
    return _seen(simulation, log, stuck)


def _seen(simulation: Simulation, log: "Log", stuck: str) -> Seen:
    shell, outcomes = simulation.shell, simulation.audience.outcomes
    memories = {str(a): w.core.memory for a, w in shell.workers.items() if isinstance(w.core, Instance)}
    return Seen(
        columns={name: getattr(outcomes, name).tolist() for name in TIMES + COUNTS},
        errors=outcomes.errors,
        counters=dict(simulation.router.counters),
        placements=log.placements,
        tables={name: log.tables.get(id(memory), []) for name, memory in memories.items()},
        pools={str(node.address): _pool(node.core) for node, _ in shell.pools.values()},
        memories={
            name: ([s.runs() for s in m.spare], m.pool_free, m.short, m.pressed)
            for name, m in memories.items()
        },
        swaps={
            str(a): asdict(w.core.swapping.counts)
            for a, w in shell.workers.items()
            if isinstance(w.core, Instance)
        },
        stuck=stuck,
        events=shell.loop.events,
        steps=sum(w.steps for w in shell.workers.values()),
    )


def _pool(core: Any) -> Any:
    assert isinstance(core, PoolCore)
    blocks = core.blocks
    index = [
        sorted((e.hash, e.block, e.parent or b"", e.depth, e.refs, e.uses, e.used_ns) for e in tree)
        for tree in blocks.trees
    ]
    leases = {str(holder): [s.runs() for s in lease] for holder, lease in blocks.leases.items()}
    return [segments.runs() for segments in blocks.free], index, leases


@dataclass(slots=True)
class Log:
    tables: dict[int, list[Any]] = field(default_factory=dict[int, list[Any]])
    kept: list[Memory] = field(default_factory=list[Memory])
    """So that no id comes twice."""
    placements: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])

    def of(self, memory: Memory) -> list[Any]:
        if id(memory) not in self.tables:
            self.kept.append(memory)
            self.tables[id(memory)] = []
        return self.tables[id(memory)]


@contextmanager
def _logged() -> Iterator[Log]:
    """While it lasts, what enters and leaves block tables is written down, and what is given to whom."""
    log = Log()
    grow, extend, adopt, free, trim, payload_for = (
        Memory.grow,
        Memory.extend,
        Memory.adopt,
        Memory.free,
        Memory.trim,
        Audience.payload_for,
    )

    def lengths(sequence: Running) -> list[int]:
        return [len(table) for table in sequence.tables]

    def added(memory: Memory, what: str, sequence: Running, before: list[int]) -> None:
        for group, (table, at) in enumerate(zip(sequence.tables, before, strict=True)):
            for i in range(at, len(table)):
                log.of(memory).append((what, sequence.key, group, i, table[i]))

    def logged_grow(memory: Memory, sequence: Running, blocks: list[int]) -> Any:
        before = lengths(sequence)
        grown = grow(memory, sequence, blocks)
        added(memory, "grown", sequence, before)
        return grown

    def logged_extend(memory: Memory, sequence: Running) -> None:
        before = lengths(sequence)
        extend(memory, sequence)
        added(memory, "grown", sequence, before)

    def logged_adopt(memory: Memory, sequence: Running, table: Any, covered: list[int]) -> None:
        before = lengths(sequence)
        adopt(memory, sequence, table, covered)
        added(memory, "adopted", sequence, before)

    def logged_free(memory: Memory, sequence: Running) -> None:
        log.of(memory).append(
            ("freed", sequence.key, [list(t) for t in sequence.tables], list(sequence.published))
        )
        free(memory, sequence)

    def logged_trim(memory: Memory, sequence: Running, tokens: int) -> Any:
        trims = trim(memory, sequence, tokens)
        if trims:
            log.of(memory).append(("trimmed", sequence.key, list(sequence.trimmed)))
        return trims

    def logged_payload(audience: Audience, start: Start, target: Address) -> Any:
        log.placements.append((start.key, start.role, str(target), start.history))
        return payload_for(audience, start, target)

    with (
        # Else most of a small world would be reports of idle instances.
        mock.patch("headrace.sim.cluster.BEGIN_NS", BEGIN_NS),
        mock.patch.object(Memory, "grow", logged_grow),
        mock.patch.object(Memory, "extend", logged_extend),
        mock.patch.object(Memory, "adopt", logged_adopt),
        mock.patch.object(Memory, "free", logged_free),
        mock.patch.object(Memory, "trim", logged_trim),
        mock.patch.object(Audience, "payload_for", logged_payload),
    ):
        yield log


def differences(fast: Seen, slow: Seen) -> list[str]:
    """What is not equal, in words."""
    found: list[str] = []
    for name, column in fast.columns.items():
        found += [
            f"{name}[{row}]: {a} fast, {b} stepped"
            for row, (a, b) in enumerate(zip(column, slow.columns[name], strict=True))
            if a != b
        ]
    if any(slow.columns["error"]):
        # Tokens drawn and not told when a request is given up are not counted, and in whole strides fewer are told.
        for seen in (fast, slow):
            seen.counters.pop("tokens_generated", None)
    for name in ("errors", "stuck", "counters", "placements", "tables", "pools", "memories", "swaps"):
        a, b = getattr(fast, name), getattr(slow, name)
        if a != b:
            found.append(f"{name}: {_apart(a, b)}")
    return found


def _apart(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        return "; ".join(f"{k}: {_apart(a.get(k), b.get(k))}" for k in keys)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return f"[{at}] {_apart(a[at] if at < len(a) else None, b[at] if at < len(b) else None)}"
    return f"{a} fast, {b} stepped"
