"""From options to a cluster that can be simulated: model, machines, policies, limits, and what goes wrong.

What serve and a simulation have in common is read by the same code: workers, limits, policies (`cli.wiring`, `cli.options`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.cli import wiring
from headrace.cli.machines import catalogued, measured_machine, ns, read_profile
from headrace.cli.models import kv_dtype, model_config
from headrace.cli.options import AXES, ClusterOptions, Faults, check_policies
from headrace.cli.tiering import tier_config
from headrace.cost.arithmetic import kv_spec, shape_of
from headrace.nodes.limits import RouterConfig
from headrace.sim.cluster import Cluster, Member, Mishaps, PolicyChoice
from headrace.sim.swaps import CopyCosts
from headrace.types.errors import ConfigError

CHOICES_MAX = 4096


def cluster_of(options: ClusterOptions, config: Mapping[str, Any] | None = None) -> Cluster:
    """The deployment. `config`: the model's config.json, where it is known already. Raises ConfigError for what cannot work."""
    check_policies(options)
    team = wiring.workers(options)
    profile = read_profile(options.profile) if options.profile is not None else None
    config = config if config is not None else model_config(options, profile)
    shape = shape_of(config)
    spec = kv_spec(shape, options.block_size, kv_dtype(options, config, profile))
    machines = (
        catalogued(options, team, shape, spec)
        if profile is None
        else measured_machine(options, team, shape, spec, profile)
    )
    groups = len(spec.groups)
    faults = options.faults or Faults()
    members = tuple(
        Member(
            worker.name,
            worker.leaning,
            machines.costs[worker.leaning],
            (machines.blocks[worker.leaning],) * groups,
            place,
            0 if machines.shared else None,
            faults.slow.get(worker.name, 1.0),
        )
        for worker, place in zip(team, machines.places, strict=True)
    )
    _check_slow(faults, members)
    return Cluster(
        spec,
        members,
        machines.topology,
        policies=policies_of(options),
        instance=wiring.instance_config(
            options, spec, min(machines.blocks.values()), sharers=len(team) if machines.shared else 1
        ),
        tiers=tier_config(options, spec, min(machines.blocks.values())),
        router=RouterConfig(
            choices_max=options.max_requests or max(CHOICES_MAX, options.max_num_seqs * len(team))
        ),
        message_ns=machines.message_ns,
        ingress_ns=machines.request_ns // 2,
        egress_ns=machines.request_ns - machines.request_ns // 2,
        report_ns=ns(options.report_interval),
        copies=CopyCosts(ns(options.swap_latency), int(options.swap_bandwidth)),
        slowdown=machines.measured.slowdown if machines.measured is not None and len(team) > 1 else None,
        output_limit=options.max_tokens,
        deadline_ns=None if options.deadline is None else ns(options.deadline),
        mishaps=Mishaps(
            kills=tuple((ns(kill.at), kill.instance) for kill in faults.kills),
            drains=tuple((ns(drain.at), drain.instance) for drain in faults.drains),
            restart_ns=ns(faults.restart),
            notice_ns=ns(faults.notice),
        ),
        settings=stated(options),
        facts=machines.facts,
    )


def policies_of(options: ClusterOptions) -> dict[str, PolicyChoice]:
    """By axis."""
    chosen = {axis: getattr(options, name) for name, axis in AXES.items()}
    return {axis: PolicyChoice(c.name, c.config) for axis, c in chosen.items() if c is not None}


def stated(options: ClusterOptions) -> dict[str, Any]:
    """What the user has said, keys as in the file; a policy without settings is its name."""
    said = options.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return {
        name.replace("_", "-"): value["name"] if name in AXES and list(value) == ["name"] else value
        for name, value in said.items()
    }


def _check_slow(faults: Faults, members: Sequence[Member]) -> None:
    names = [member.name for member in members]
    for name, factor in faults.slow.items():
        if name not in names:
            raise ConfigError(
                f"faults: slow: there is no instance {name!r}; there are {', '.join(names[:8])}"
            )
        if not 0 < factor <= 1e6:
            raise ConfigError(f"faults: slow: {name} has the factor {factor:g}; give more than 0")
