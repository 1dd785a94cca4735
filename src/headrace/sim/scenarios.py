"""From one integer to one world: fleet, memory, policies, limits, requests, faults. Small limits find more than big loads.

A run has a fault phase (late messages, failed writes, deaths, clients that leave) and a healing phase, in which every request must end and
everything alive must come to rest. Each kind of fault is on in some seeds only, so that one cannot hide another.
"""

from dataclasses import dataclass, field
from typing import Any

from headrace import registry
from headrace.engine.memory import Memory
from headrace.nodes.instance import InstanceConfig
from headrace.nodes.router import RouterConfig
from headrace.sim.faults import Ambush, FaultPlan, Victim
from headrace.sim.network import NetworkConfig
from headrace.sim.rng import Draws, KeyedRng
from headrace.sim.shell import ShellConfig
from headrace.types.hashing import block_hashes, chain_root
from headrace.types.ids import PoolId, RequestId
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from headrace.types.payload import SamplingParams, SequencePayload
from headrace.types.request import Request

SCATTER = "scatter"
"""Placement at random (`sim.scatter`): not a policy that anybody would want, but one that leaves no path out."""

MICRO = 1_000
MILLI = 1_000_000


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    request: Request
    payload: SequencePayload


@dataclass(frozen=True, slots=True)
class World:
    """Everything a run is made from. `dataclasses.replace` makes its neighbours (one instance, another depth)."""

    seed: int
    spec: KVSpec
    pools: tuple[tuple[int, ...], ...]
    """Blocks per group, by pool."""
    places: tuple[tuple[int, str], ...]
    """Pool and leaning, by instance."""
    policies: dict[str, str]
    instance: InstanceConfig
    router: RouterConfig
    shell: ShellConfig
    network: NetworkConfig
    asks: tuple[Ask, ...]
    faults: FaultPlan
    options: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Of policies, by axis."""


def draw_world(seed: int) -> World:
    rng = KeyedRng(seed)
    spec = _draw_spec(Draws(rng, "spec"))
    draws = Draws(rng, "world")
    crowd = draws.chance(0.03)
    asks = _draw_asks(Draws(rng, "asks"), spec, 24 if crowd else draws.pick((2, 4, 6, 8)))
    instances = 6 if crowd else draws.pick((1, 2, 2, 2, 3, 3, 4))
    places = _draw_places(Draws(rng, "places"), instances)
    instance = _draw_instance(Draws(rng, "instance"))
    longest = max(a.request.prompt + a.request.tokens_max for a in asks)
    demand = Memory(spec, PoolId(0), (0,) * len(spec.groups), 0).demand(longest, instance.tokens_max)
    pools = tuple(
        tuple(least + draws.pick((0, 1, 2, 3, 6, 12, 40)) for least in demand)
        for _ in range(1 + max(pool for pool, _ in places))
    )
    policies = _draw_policies(Draws(rng, "policies"))
    late_bind = policies["cluster.placement"] == "least_load" and draws.chance(0.4)
    faulty = draws.chance(0.4)
    late = draws.chance(0.4)
    network = NetworkConfig(
        latency_ns=draws.pick((1, 2, 5, 20)) * MICRO,
        late_ns=draws.pick((50, 200, 1000)) * MICRO,
        late_share=draws.pick((0.02, 0.1, 0.3)) if late else 0.0,
        write_ns=draws.pick((1, 10, 60, 300)) * MICRO,
        failed_share=draws.pick((0.02, 0.2)) if faulty else 0.0,
    )
    shell = ShellConfig(
        depth=instance.depth,
        report_ns=draws.pick((20, 100, 500)) * MICRO,
        step_ns=draws.pick((5, 20, 60)) * MICRO,
        token_ns=draws.pick((0, 500, 3000)),
        notice_ns=draws.pick((1, 30, 300)) * MICRO,
        restart_ns=draws.pick((10, 300)) * MICRO,
        slow=tuple(draws.pick((1.0, 1.0, 1.0, 8.0)) for _ in range(instances)),
    )
    return World(
        seed=seed,
        spec=spec,
        pools=pools,
        places=places,
        policies=policies,
        options={"cluster.placement": {"bind": "late"}} if late_bind else {},
        instance=instance,
        router=_draw_router(Draws(rng, "router")),
        shell=shell,
        network=network,
        asks=asks,
        faults=_draw_faults(rng, asks, instances, network.write_ns),
    )


def _draw_spec(draws: Draws) -> KVSpec:
    full = KVGroup(GroupKind.FULL, tuple(range(draws.between(1, 3))), 1, 1)
    window = KVGroup(
        GroupKind.WINDOW, tuple(range(4, 4 + draws.between(1, 3))), 1, 1, window=draws.between(1, 14)
    )
    groups = draws.pick(((full,), (full,), (window,), (full, window), (window, full)))
    return KVSpec(groups, draws.pick((2, 3, 4, 8)), "float32")


def _draw_places(draws: Draws, instances: int) -> tuple[tuple[int, str], ...]:
    """Who maps which pool, and leans where."""
    layout = draws.pick(("own", "own", "own", "shared", "pairs"))
    pools = {"own": range(instances), "shared": [0] * instances, "pairs": [i // 2 for i in range(instances)]}
    leanings = draws.pick((("mixed",), ("prefill", "decode"), ("prefill", "decode", "mixed")))
    return tuple((pool, leanings[i % len(leanings)]) for i, pool in enumerate(pools[layout]))


def _draw_instance(draws: Draws) -> InstanceConfig:
    return InstanceConfig(
        tokens_max=draws.pick((4, 8, 16, 64)),
        sequences_max=draws.pick((1, 2, 3, 8)),
        waiting_max=draws.pick((2, 8, 64)),
        depth=draws.pick((1, 2, 2)),
        lease_blocks=draws.pick((0, 1, 4, 16)),
        hold_ns=draws.pick((3, 20, 60_000)) * MILLI,
        receive_ns=draws.pick((8, 40, 300_000)) * MILLI,
        stuck_ns=draws.pick((200, 2000)) * MICRO,
        fence_ns=draws.pick((100, 1000, 5000)) * MICRO,
    )


def _draw_router(draws: Draws) -> RouterConfig:
    return RouterConfig(
        attempts_max=draws.pick((40, 100)),
        deaths_max=100,
        split_failures_max=draws.pick((1, 2, 50)),
        refused_ns=draws.pick((50, 300)) * MICRO,
    )


def _draw_policies(draws: Draws) -> dict[str, str]:
    axes = (
        "engine.batching",
        "engine.admission",
        "engine.ordering",
        "engine.preemption",
        "cluster.placement",
        "kv.evict",
    )
    policies = {axis: draws.pick(registry.names(axis)) for axis in axes}
    if draws.chance(0.4):
        policies["cluster.placement"] = SCATTER
    return policies


def _draw_faults(rng: KeyedRng, asks: tuple[Ask, ...], instances: int, write_ns: int) -> FaultPlan:
    draws = Draws(rng, "faults")
    heal_ns = draws.between(1, 3) * MILLI
    names = [f"i{number}" for number in range(instances)]
    kills = [(draws.between(1, heal_ns), draws.pick(names)) for _ in range(draws.between(1, 3))]
    ambushes = [
        Ambush(
            draws.between(1, 6),
            draws.pick(tuple(Victim)),
            1 + int(draws.uniform() ** 2 * (100 * MICRO + 6 * write_ns)),
        )
        for _ in range(draws.between(1, 4))
    ]
    leaving = [a for a in asks if draws.chance(0.5)]
    leaves = [
        (
            a.request.arrival_ns + draws.between(1, 1500) * MICRO,
            a.request.id,
            draws.between(0, a.request.choices - 1) if draws.chance(0.3) else None,
        )
        for a in leaving
    ]
    broken = draws.pick(asks).request
    return FaultPlan(
        kills=tuple(kills) if draws.chance(0.3) else (),
        drains=((draws.between(1, heal_ns), "i0"),) if instances > 1 and draws.chance(0.15) else (),
        leaves=tuple(leaves) if draws.chance(0.35) else (),
        ambushes=tuple(ambushes) if draws.chance(0.3) else (),
        doomed={broken.id: draws.between(0, broken.tokens_max - 1)} if draws.chance(0.1) else {},
        heal_ns=heal_ns,
    )


def _draw_asks(draws: Draws, spec: KVSpec, count: int) -> tuple[Ask, ...]:
    """Requests whose prompts begin alike, so that prefixes are found, and whose clients may leave."""
    stems = [[draws.between(1, 40_000) for _ in range(draws.between(8, 32))] for _ in range(2)]
    spread_ns = draws.pick((1, 100, 1000)) * MICRO
    hasty = draws.chance(0.2)
    many = draws.chance(0.25)
    asks: list[Ask] = []
    for number in range(1, 1 + count):
        stem = draws.pick(stems)
        prompt = stem[: draws.between(0, len(stem))]
        prompt += [draws.between(1, 40_000) for _ in range(draws.between(0 if prompt else 1, 12))]
        root = chain_root("sim", "salt" if draws.chance(0.1) else "")
        tokens_max = draws.pick((1, 2, 6, 12, 20))
        sampling = SamplingParams(
            seed=draws.between(0, 3),
            ignore_eos=draws.chance(0.3),
            min_tokens=draws.pick((0, 0, 3)),
            tokens_max=tokens_max,
        )
        arrival_ns = draws.between(1, spread_ns)
        request = Request(
            id=RequestId(number),
            prompt=len(prompt),
            hashes=tuple(block_hashes(root, prompt, spec.block_size)),
            tokens_max=tokens_max,
            choices=draws.between(1, 3) if many else 1,
            arrival_ns=arrival_ns,
            deadline_ns=arrival_ns + draws.between(1, 2000) * MICRO if hasty and draws.chance(0.3) else 2**62,
            priority=draws.pick((0, 0, 1, 2)),
        )
        asks.append(Ask(request, SequencePayload(root, prompt, len(prompt), sampling)))
    return tuple(asks)
