"""The four caching steps on conversations, split over two pools: the same text, and each step computes or moves less."""

from collections import Counter
from dataclasses import replace

from msgspec.structs import replace as change

from headrace.nodes.limits import Caching
from headrace.sim.faults import FaultPlan
from headrace.sim.memory import expected_tokens
from headrace.sim.network import NetworkConfig
from headrace.sim.run import Outcome, simulate
from headrace.sim.scenarios import MILLI, Ask, World, draw_world
from headrace.sim.shell import ShellConfig
from headrace.types.hashing import block_hashes, chain_root
from headrace.types.ids import RequestId
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from headrace.types.payload import SamplingParams, SequencePayload
from headrace.types.request import NEVER_NS, Request

FULL = KVGroup(GroupKind.FULL, (0, 1), 1, 1)
WINDOW = KVGroup(GroupKind.WINDOW, (2,), 1, 1, window=6)
SPEC = KVSpec((FULL,), 4, "float32")
MIXED = KVSpec((FULL, WINDOW), 4, "float32")
TURNS = 3


def conversations(spec: KVSpec, count: int) -> tuple[Ask, ...]:
    """Of each, every turn's prompt begins with the one before and its answer."""
    root, asks = chain_root("sim", ""), list[Ask]()
    for talk in range(count):
        prompt = [1000 * (talk + 1) + i for i in range(10)]
        for turn in range(TURNS):
            sampling = SamplingParams(seed=talk, ignore_eos=True, min_tokens=14, tokens_max=14)
            payload = SequencePayload(root, list(prompt), len(prompt), sampling)
            request = Request(
                id=RequestId(1 + talk * TURNS + turn),
                prompt=len(prompt),
                hashes=tuple(block_hashes(root, prompt, spec.block_size)),
                tokens_max=14,
                arrival_ns=(1 + 4 * turn) * MILLI + talk,
                deadline_ns=NEVER_NS,
            )
            asks.append(Ask(request, payload))
            answer, _ = expected_tokens(payload, 14, spec)
            prompt += [*answer, 7, 8, 9]
    return tuple(asks)


def world(caching: Caching, spec: KVSpec = SPEC, *, shared: bool = False, talks: int = 3) -> World:
    drawn = draw_world(0)
    instance = change(drawn.instance, caching=caching, tokens_max=16, sequences_max=8, waiting_max=64)
    instance = change(
        instance, hold_ns=10**12, receive_ns=10**12, stuck_ns=10**12, lease_blocks=4, fetch_ns=10**9
    )
    blocks = (400,) * len(spec.groups)
    return replace(
        drawn,
        spec=spec,
        asks=conversations(spec, talks),
        instance=instance,
        places=((0, "prefill"), (0 if shared else 1, "decode")),
        pools=(blocks,) if shared else (blocks, blocks),
        policies={**_calm(drawn.policies), "cluster.placement": "least_load"},
        options={},
        network=NetworkConfig(),
        shell=ShellConfig(depth=instance.depth),
        faults=FaultPlan(heal_ns=MILLI),
    )


def _calm(policies: dict[str, str]) -> dict[str, str]:
    return {
        axis: name for axis, name in policies.items() if axis not in ("cluster.rebalance", "cluster.roles")
    }


def counters(outcome: Outcome) -> Counter[str]:
    return Counter(outcome.shell.router.state.counters)


def test_each_step_saves_more_and_says_the_same():
    for spec in (SPEC, MIXED):
        outcomes = {step: simulate(world(step, spec)) for step in Caching}
        none, prefill, increment, back = (counters(outcomes[step]) for step in Caching)
        assert len({outcome.texts for outcome in outcomes.values()}) == 1
        assert none["tokens_prompt_hit"] == 0
        assert none["tokens_prompt_computed"] > prefill["tokens_prompt_computed"]
        assert none["transfer_bytes"] == prefill["transfer_bytes"] > increment["transfer_bytes"]
        assert prefill["tokens_prompt_computed"] == increment["tokens_prompt_computed"]
        assert increment["tokens_prompt_computed"] > back["tokens_prompt_computed"]
        assert increment["transfer_bytes"] == back["transfer_bytes"]
        assert back["tokens_returned"] > 0 and back["returned_bytes"] > 0
        assert not (none + prefill + increment)["tokens_returned"]


def test_only_what_the_prefill_instance_lacks_comes_back():
    """Of 23, 40 and 57 tokens with KV, 5, 10 and 14 blocks are full; P has those of the prompts of 10, 27 and 44."""
    done = counters(simulate(world(Caching.RETURN, talks=1)))
    assert done["tokens_returned"] == 4 * (5 - 2 + 10 - 6 + 14 - 11)
    assert done["returned_bytes"] == done["tokens_returned"] // 4 * SPEC.block_bytes(0)


def test_in_one_pool_nothing_need_return():
    shared = {step: simulate(world(step, shared=True)) for step in Caching}
    assert len({outcome.texts for outcome in shared.values()}) == 1
    assert not counters(shared[Caching.RETURN])["tokens_returned"]
    computed = [counters(shared[step])["tokens_prompt_computed"] for step in Caching]
    assert computed[0] > computed[1] > computed[2] == computed[3]
