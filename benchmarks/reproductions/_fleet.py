"""Simulated fleets for reproductions: a published model's shape on catalogued devices, one host a few instances."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.cli.catalogue import hardware
from headrace.cost.arithmetic import kv_spec, shape_of
from headrace.cost.memory import memory_bytes_for_kv
from headrace.cost.roofline import Roofline
from headrace.nodes.limits import InstanceConfig
from headrace.sim.cluster import Cluster, Member, PolicyChoice
from headrace.sim.topology import Level, regular
from headrace.types.outcomes import RunData

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}


def fleet(
    config: dict[str, Any],
    device: str,
    leanings: Sequence[str],
    policies: dict[str, PolicyChoice],
    *,
    tensor_parallel: int = 1,
    instances_per_host: int = 4,
    block_size: int = 16,
    instance: InstanceConfig | None = None,
) -> Cluster:
    """Instances named after their leanings, each with all KV memory that the device leaves."""
    shape, card = shape_of(config), hardware(device)
    spec = kv_spec(shape, block_size)
    costs = Roofline(shape, card, tensor_parallel)
    limits = instance or InstanceConfig()
    memory = memory_bytes_for_kv(shape, card, tensor_parallel, tokens_max=limits.tokens_max)
    blocks = memory // sum(spec.block_bytes(group) for group in range(len(spec.groups)))
    members = tuple(
        Member(
            name=f"{leaning}{i:02}",
            leaning=leaning,
            costs=costs,
            blocks=(blocks,) * len(spec.groups),
            place=(i // instances_per_host, i % instances_per_host * tensor_parallel),
        )
        for i, leaning in enumerate(leanings)
    )
    levels = tuple(
        Level(name, round(rate * devices), round(rate * devices), round(link.latency_s * 1e9))
        for name, link, devices in (("device", card.link, 1), ("host", card.nic, card.devices_per_host))
        for rate in (link.bandwidth,)
    )
    hosts = -(-len(members) // instances_per_host)
    topology = regular(levels, hosts, instances_per_host * tensor_parallel)
    return Cluster(spec, members, topology, policies, limits, facts={"blocks": blocks, "device": device})


def quantile(values: Any, q: float) -> float:
    return float(np.nanquantile(values, q))


def figures(run: RunData) -> dict[str, float]:
    """Of one run; times in seconds."""
    outcomes = run.outcomes
    ttft, tpot = outcomes.ttft_s(), outcomes.tpot_s()
    return {
        "ttft_mean_s": float(np.nanmean(ttft)),
        "ttft_p50_s": quantile(ttft, 0.5),
        "ttft_p99_s": quantile(ttft, 0.99),
        "tpot_mean_s": float(np.nanmean(tpot)),
        "tpot_p99_s": quantile(tpot, 0.99),
        "e2e_mean_s": float(np.nanmean(outcomes.e2e_s())),
        "hit_rate": float(outcomes.cached.sum() / outcomes.prompt.sum()),
        "recomputed_tokens": float(outcomes.recomputed.sum()),
        "failed": float((~outcomes.succeeded).sum()),
    }
