"""From one integer to one world: fleet, memory, policies, limits, requests, faults. Small limits find more than big loads.

A run has a fault phase and a healing phase, in which every request must end and everything alive must come to rest. Each kind of fault
(`World.kinds`) is on in about a quarter of the seeds, so that one cannot hide another and each meets each.
"""

from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from headrace import registry
from headrace.engine.memory import Memory
from headrace.nodes.limits import Caching, InstanceConfig, Stream, TierConfig
from headrace.nodes.router import RouterConfig
from headrace.sim.faults import Ambush, Break, FaultPlan, Slowdown, Victim, draw_switches, early
from headrace.sim.lending import LENDING, Pools, draw_lending
from headrace.sim.network import NetworkConfig, Partition
from headrace.sim.rng import Draws, KeyedRng
from headrace.sim.shell import ROUTER, ShellConfig, pool_address
from headrace.sim.swaps import draw_settings
from headrace.sim.tiers import TierFaults, draw_tier_faults, draw_tiers
from headrace.types.hashing import block_hashes, chain_root
from headrace.types.ids import PoolId, RequestId
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from headrace.types.payload import SamplingParams, SequencePayload
from headrace.types.request import NEVER_NS, Request

SCATTER = "scatter"
"""Placement at random (`sim.scatter`): not a policy that anybody would want, but one that leaves no path out."""

MICRO = 1_000
MILLI = 1_000_000

STREAMS = (Stream.CHUNK, Stream.CHUNK, Stream.LAYER, Stream.LAYER, Stream.REQUEST)

SHARE = 0.25
"""Of the seeds, that have one kind of fault."""
KINDS = (
    "delay",
    "skew",
    "stale view",
    "break",
    "partition",
    "crash",
    "slow node",
    "slow write",
    "failed write",
    "slow copy",
    "failed copy",
    "client leaves",
    "deadline",
    "drain",
    "broken request",
    "new weights",
    "slow tier",
    "failed tier",
)
"""What may go wrong in a world. Deadlines, drains and requests that cannot be served are no faults, but they end things as those do."""
DRAMATIC = (
    "Abandon",
    "Adopted",
    "Fenced",
    "Handover",
    "Joined",
    "Lease",
    "Match",
    "Matched",
    "Prefilled",
    "Publish",
    "Recall",
    "Refused",
    "Release",
    "Resume",
    "Start",
    "Tail",
    "Tokens",
    "Unfenced",
)
"""Messages in whose midst something may be struck, beside `Dispatch`."""
SWAPPING = ("SwapOut", "SwapIn")
"""The same, in worlds in which sequences are swapped."""
MOVING = ("Migrate", "Offer", "Dispatch", "More", "Tail", "Moved", "Stayed", "Fetch", "Found", "Keep")
"""The same, in worlds in which sequences move,"""
SWITCHING = ("Switch", "Switched", "Dispatch", "Tail", "Joined", "Matched", "Tokens")
"""and in worlds in which the weights change."""


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
    pools: Pools
    places: tuple[tuple[int, str], ...]
    """Pool and leaning, by instance."""
    policies: dict[str, str]
    instance: InstanceConfig
    router: RouterConfig
    shell: ShellConfig
    network: NetworkConfig
    asks: tuple[Ask, ...]
    faults: FaultPlan
    tiers: TierConfig | None = None
    """Below each pool."""
    tier_faults: TierFaults = field(default_factory=TierFaults)
    options: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Of policies, by axis."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of KINDS that are on."""
        tiers = self.tier_faults
        network, faults, victims = self.network, self.faults, {a.victim for a in self.faults.ambushes}
        on = (
            network.late_share,
            network.skew_ns,
            network.stale_ns,
            faults.breaks or Victim.SESSION in victims,
            faults.partitions or Victim.WAY in victims,
            faults.kills or victims & {Victim.SENDER, Victim.RECEIVER},
            any(factor > 1 for factor in self.shell.slow) or faults.slowdowns,
            network.slow_write_share,
            network.failed_share,
            self.shell.slow_copy_share,
            self.shell.failed_copy_share,
            faults.leaves or Victim.CLIENT in victims,
            any(ask.request.deadline_ns < NEVER_NS for ask in self.asks),
            faults.drains,
            faults.doomed,
            faults.switches,
            self.tiers and tiers.slow_share,
            self.tiers and (tiers.failed_share or tiers.torn_share),
        )
        return tuple(kind for kind, is_on in zip(KINDS, on, strict=True) if is_on)


def draw_world(seed: int) -> World:
    rng = KeyedRng(seed)
    spec = _draw_spec(Draws(rng, "spec"))
    draws = Draws(rng, "world")
    crowd = draws.chance(0.03)
    asks = _draw_asks(Draws(rng, "asks"), spec, 24 if crowd else draws.pick((2, 4, 6, 8)))
    tiers = draw_tiers(Draws(rng, "tiers"), spec)
    if tiers is not None:
        asks += _draw_again(Draws(rng, "asks again"), spec, asks)
    instances = 6 if crowd else draws.pick((1, 2, 2, 2, 3, 3, 3, 4, 4))
    places = _draw_places(Draws(rng, "places"), instances)
    instance = replace(
        _draw_instance(Draws(rng, "instance")),
        **_draw_stages(Draws(rng, "stages")),
        caching=_draw_caching(Draws(rng, "caching")),
        stream=Draws(rng, "stream").pick(STREAMS),
    )
    longest = max(a.request.prompt + a.request.tokens_max for a in asks)
    demand = Memory(spec, PoolId(0), (0,) * len(spec.groups), 0).demand(longest, instance.tokens_max)
    pools = tuple(
        tuple(least + draws.pick((0, 1, 2, 3, 6, 12, 40)) for least in demand)
        for _ in range(1 + max(pool for pool, _ in places))
    )
    policies = _draw_policies(Draws(rng, "policies")) | _draw_control(Draws(rng, "control"))
    swapping = Draws(rng, "swapping")
    instance = replace(instance, swap_blocks=(swapping.pick((0, 3, 8, 20, 60)),) * len(spec.groups))
    lends = draw_lending(Draws(rng, "lending"), spec, len(places), longest, instance, pools)
    instance, pools = lends or (instance, pools)
    late_bind = policies["cluster.placement"] == "least_load" and draws.chance(0.4)
    names = [f"i{number}" for number in range(instances)]
    serve = (ROUTER.name, *(pool_address(PoolId(number)).name for number in range(len(pools))))
    network = _draw_network(Draws(rng, "network"))
    shell = ShellConfig(
        depth=instance.depth,
        report_ns=draws.pick((20, 100, 500)) * MICRO,
        step_ns=draws.pick((5, 20, 60)) * MICRO,
        token_ns=draws.pick((0, 500, 3000)),
        notice_ns=draws.pick((1, 30, 300)) * MICRO,
        restart_ns=draws.pick((10, 300)) * MICRO,
        slow=tuple(draws.pick((1.0, 8.0)) for _ in range(instances)) if draws.chance(SHARE) else (),
        switch_ns=Draws(rng, "switch time").pick((1, 30, 400)) * MICRO,
        copy_ns=swapping.pick((1, 5, 20, 100)) * MICRO,
        slow_copy_share=swapping.pick((0.1, 0.5)) if swapping.chance(SHARE) else 0,
        failed_copy_share=swapping.pick((0.05, 0.3)) if swapping.chance(SHARE) else 0,
    )
    return World(
        seed=seed,
        spec=spec,
        pools=pools,
        places=places,
        policies=policies,
        options=({"cluster.placement": {"bind": "late"}} if late_bind else {}) | draw_settings(swapping),
        instance=instance,
        router=_draw_router(Draws(rng, "router"), lends=lends is not None),
        shell=shell,
        network=network,
        tiers=tiers,
        tier_faults=draw_tier_faults(Draws(rng, "tier faults")),
        asks=asks,
        faults=_draw_faults(rng, asks, names, serve, network.write_ns, policies, lends=lends is not None),
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


def _draw_stages(draws: Draws) -> dict[str, int]:
    """Of live migrations, and of fetched prefixes."""
    return {
        "move_blocks_last": draws.pick((0, 1, 2, 16)),
        "move_stages_max": draws.pick((0, 1, 3)),
        "move_ns": draws.pick((100, 1000, 20_000)) * MICRO,
        "fetch_ns": draws.pick((50, 500, 20_000)) * MICRO,
    }


def _draw_caching(draws: Draws) -> Caching:
    steps = (Caching.INCREMENT, Caching.RETURN)
    return draws.pick((*steps, *steps, Caching.PREFILL, Caching.NONE))


def _draw_router(draws: Draws, *, lends: bool) -> RouterConfig:
    return RouterConfig(
        attempts_max=10_000 if lends else draws.pick((40, 100)),
        deaths_max=100,
        split_failures_max=1 if lends else draws.pick((1, 2, 50)),
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
    if draws.chance(0.5):
        policies["cluster.placement"] = SCATTER
    return policies


def _draw_control(draws: Draws) -> dict[str, str]:
    """Policies that are asked every so often: in a quarter of the worlds leanings turn, in a quarter sequences move."""
    axes = ("cluster.roles", "cluster.rebalance")
    return {axis: SCATTER for axis in axes if draws.chance(SHARE)}


def _draw_network(draws: Draws) -> NetworkConfig:
    def sometimes(*values: float) -> float:
        value = draws.pick(values)
        return value if draws.chance(SHARE) else 0

    return NetworkConfig(
        latency_ns=draws.pick((1, 2, 5, 20)) * MICRO,
        late_ns=draws.pick((50, 200, 1000)) * MICRO,
        late_share=sometimes(0.02, 0.1, 0.3),
        skew_ns=int(sometimes(20, 100, 500) * MICRO),
        grid_ns=draws.pick((1, 1, 1, 1000, 10_000)),
        stale_ns=int(sometimes(200, 1000, 5000) * MICRO),
        write_ns=draws.pick((1, 10, 60, 300)) * MICRO,
        slow_write_share=sometimes(0.1, 0.5),
        failed_share=sometimes(0.02, 0.1, 0.4),
    )


def _draw_faults(
    rng: KeyedRng,
    asks: tuple[Ask, ...],
    names: list[str],
    serve: tuple[str, ...],
    write_ns: int,
    policies: dict[str, str],
    *,
    lends: bool,
) -> FaultPlan:
    draws = Draws(rng, "faults")
    heal_ns = draws.between(1, 3) * MILLI
    broken = draws.pick(asks).request
    doomed_at = draws.between(0, broken.tokens_max - 1)
    ambushes = _draw_ambushes(Draws(rng, "ambushes"), write_ns, DRAMATIC)
    if "cluster.rebalance" in policies:
        ambushes += _draw_ambushes(Draws(rng, "moving ambushes"), write_ns, MOVING)
    switches = draw_switches(Draws(rng, "switches"), heal_ns, SHARE)
    if switches:
        ambushes += _draw_ambushes(Draws(rng, "switching ambushes"), write_ns, SWITCHING)
    if policies["engine.preemption"] == "swap":
        ambushes += _draw_ambushes(Draws(rng, "swapping ambushes"), write_ns, SWAPPING)
    if lends:
        ambushes += _draw_ambushes(Draws(rng, "lending ambushes"), write_ns, LENDING)
    # Who is drained lends no more: then there may be too little for the longest.
    drains = len(names) > 1 and draws.chance(SHARE) and not lends
    return FaultPlan(
        switches=switches,
        kills=_draw_kills(Draws(rng, "kills"), names, heal_ns),
        drains=((draws.between(1, heal_ns), "i0"),) if drains else (),
        leaves=_draw_leaves(Draws(rng, "leaves"), asks),
        ambushes=ambushes,
        breaks=_draw_breaks(Draws(rng, "breaks"), names, serve, heal_ns),
        partitions=_draw_partitions(Draws(rng, "partitions"), names, serve, heal_ns),
        slowdowns=_draw_slowdowns(Draws(rng, "slowdowns"), names, heal_ns),
        doomed={broken.id: doomed_at} if draws.chance(SHARE / 2) else {},
        heal_ns=heal_ns,
    )


def _draw_kills(draws: Draws, names: list[str], heal_ns: int) -> tuple[tuple[int, str], ...]:
    """Some instances, or all at one blow."""
    if not draws.chance(SHARE * 0.7):
        return ()
    if draws.chance(0.1):
        at_ns = early(draws, heal_ns)
        return tuple((at_ns, name) for name in names)
    return tuple((early(draws, heal_ns), draws.pick(names)) for _ in range(draws.between(1, 3)))


def _draw_leaves(draws: Draws, asks: tuple[Ask, ...]) -> tuple[tuple[int, RequestId, int | None], ...]:
    if not draws.chance(SHARE * 0.8):
        return ()
    return tuple(
        (
            a.request.arrival_ns + draws.between(1, 1500) * MICRO,
            a.request.id,
            draws.between(0, a.request.choices - 1) if draws.chance(0.3) else None,
        )
        for a in asks
        if draws.chance(0.5)
    )


def _draw_ambushes(draws: Draws, write_ns: int, messages: tuple[str, ...]) -> tuple[Ambush, ...]:
    if not draws.chance(SHARE):
        return ()
    return tuple(
        Ambush(
            draws.pick(messages) if draws.chance(0.6) else "Dispatch",
            1 + int(draws.uniform() ** 2 * 6),
            draws.pick((Victim.SENDER, Victim.RECEIVER, *Victim)),
            1 + int(draws.uniform() ** 2 * (100 * MICRO + 6 * write_ns)),
            1 + int(draws.uniform() ** 2 * MILLI),
        )
        for _ in range(draws.between(1, 4))
    )


def _draw_breaks(draws: Draws, names: list[str], serve: tuple[str, ...], heal_ns: int) -> tuple[Break, ...]:
    """Between two instances, one and the serving process, or one and all."""
    if not draws.chance(SHARE * 0.7):
        return ()
    breaks: list[Break] = []
    for _ in range(draws.between(1, 8)):
        at_ns = early(draws, heal_ns)
        until_ns = min(heal_ns, at_ns + 1 + int(draws.uniform() ** 2 * MILLI))
        one = draws.pick(names)
        others = draws.pick(((draws.pick(names),), serve, (*serve, *names)))
        breaks.append(Break(at_ns, until_ns, (one,), others))
    return tuple(breaks)


def _draw_partitions(
    draws: Draws, names: list[str], serve: tuple[str, ...], heal_ns: int
) -> tuple[Partition, ...]:
    """Instances on either side; the serving process is on the right one, or between both."""
    if not draws.chance(SHARE * 0.7):
        return ()
    partitions: list[Partition] = []
    for _ in range(draws.between(1, 3)):
        start_ns = early(draws, heal_ns)
        end_ns = min(heal_ns, start_ns + 1 + int(draws.uniform() ** 2 * 2 * MILLI))
        on_left = [draws.chance(0.5) for _ in names]
        left = tuple(name for name, is_left in zip(names, on_left, strict=True) if is_left)
        right = tuple(name for name, is_left in zip(names, on_left, strict=True) if not is_left)
        right += serve if draws.chance(0.6) else ()
        if draws.chance(0.3):
            left, right = right, left
        partitions.append(Partition(start_ns, end_ns, left, right, draws.chance(0.6)))
    return tuple(partitions)


def _draw_slowdowns(draws: Draws, names: list[str], heal_ns: int) -> tuple[Slowdown, ...]:
    if not draws.chance(SHARE / 2):
        return ()
    slowdowns: list[Slowdown] = []
    for _ in range(draws.between(1, 3)):
        start_ns = draws.between(1, heal_ns - 1)
        end_ns, name = draws.between(start_ns + 1, heal_ns), draws.pick(names)
        # Two at once would multiply: one step could take longer than the run may.
        apart = all(s.name != name or s.end_ns <= start_ns or end_ns <= s.start_ns for s in slowdowns)
        factor = draws.pick((5.0, 30.0))
        slowdowns += [Slowdown(start_ns, end_ns, name, factor)] if apart else []
    return tuple(slowdowns)


def _draw_asks(draws: Draws, spec: KVSpec, count: int) -> tuple[Ask, ...]:
    """Requests whose prompts begin alike, so that prefixes are found, and whose clients may leave."""
    stems = [[draws.between(1, 40_000) for _ in range(draws.between(8, 32))] for _ in range(2)]
    spread_ns = draws.pick((1, 100, 1000)) * MICRO
    hasty = draws.chance(SHARE)
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
            deadline_ns=arrival_ns + draws.between(1, 2000) * MICRO
            if hasty and draws.chance(0.4)
            else NEVER_NS,
            priority=draws.pick((0, 0, 1, 2)),
        )
        asks.append(Ask(request, SequencePayload(root, prompt, len(prompt), sampling)))
    return tuple(asks)


def _draw_again(draws: Draws, spec: KVSpec, asks: tuple[Ask, ...]) -> tuple[Ask, ...]:
    """Later requests whose prompts begin as earlier ones do: by then, what those left has been moved down."""
    again: list[Ask] = []
    for ask in asks * 2:
        if draws.chance(0.3):
            continue
        prompt = ask.payload.token_ids + [draws.between(1, 40_000) for _ in range(draws.between(0, 4))]
        request = replace(
            ask.request,
            id=RequestId(1 + len(asks) + len(again)),
            prompt=len(prompt),
            hashes=tuple(block_hashes(ask.payload.root, prompt, spec.block_size)),
            arrival_ns=ask.request.arrival_ns + draws.between(100, 3000) * MICRO,
            deadline_ns=NEVER_NS,
        )
        again.append(Ask(request, replace(ask.payload, token_ids=prompt, prompt=len(prompt))))
    return tuple(again)
