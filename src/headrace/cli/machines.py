"""What instances run on: devices of the catalogue, or a machine that was measured. Their costs, memory, places and links."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from headrace.cli import catalogue
from headrace.cli.networks import LinkOptions, Network
from headrace.cli.options import ClusterOptions, Hosts
from headrace.cli.sizes import parse_size
from headrace.cost.hardware import Hardware
from headrace.cost.measured import Measured
from headrace.cost.memory import check_fits, memory_bytes_for_kv
from headrace.cost.roofline import Roofline
from headrace.cost.shape import ModelShape
from headrace.live.settings import WorkerSettings
from headrace.sim.topology import NAMES, Level, Step, Topology, regular, validate
from headrace.types.costs import Costs
from headrace.types.errors import ConfigError
from headrace.types.kv import KVSpec
from headrace.types.profile import FORMAT, Profile

COST_ERRORS = Path(__file__).parent.parent / "assets" / "cost_errors.yaml"

MESSAGE_NS = 50_000
PROBE_BYTES = 64 * 2**20
"""What the rate of a measured copy is taken from."""

Team = Sequence[WorkerSettings]
Devices = dict[str, tuple[Hardware, int]]
"""By leaning: what an instance runs on, and how many of it."""


@dataclass(frozen=True, slots=True)
class Machines:
    """What the instances run on."""

    costs: dict[str, Costs]
    """By leaning."""
    blocks: dict[str, int]
    """Of an instance's pool, by leaning; of a shared pool, each leaning says the same."""
    shared: bool
    topology: Topology
    places: list[tuple[int, int]]
    message_ns: int = MESSAGE_NS
    request_ns: int = 0
    """Of a request, outside the service."""
    measured: Measured | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


# A machine that was measured


def read_profile(path: Path) -> Profile:
    """Raises ConfigError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--profile {path}: {error}; `headrace profile` writes one") from error
    if found.format != FORMAT:
        raise ConfigError(f"--profile {path}: has format {found.format}, this version reads {FORMAT}")
    return found


def measured_machine(
    options: ClusterOptions,
    team: Team,
    shape: ModelShape,
    spec: KVSpec,
    profile: Profile,
) -> Machines:
    if options.hardware is not None or options.hosts is not None:
        key = "hardware" if options.hardware is not None else "hosts"
        raise ConfigError(
            f"--profile is of one machine, so --{key} has no meaning with it; give one or the other"
        )
    measured = Measured(profile)
    if shape != measured.shape:
        raise ConfigError(
            f"--profile {options.profile} is of {profile.model}, whose arithmetic is not that of the model asked for: "
            "profile that one, or leave out --model"
        )
    if options.kv_memory == "auto":
        raise ConfigError("--profile says nothing of memory: give --kv-memory, of each pool, as serve has it")
    blocks = blocks_in(options, spec, parse_size(options.kv_memory), profile.model)
    shared = not options.separate_pools
    inner = _copies(measured) if profile.copies or not shared else LinkOptions(bandwidth=1e12)
    levels = _levels({"device": inner, "host": inner}, options.network or Network())
    errors = measured.errors()
    return Machines(
        costs={worker.leaning: measured for worker in team},
        blocks={worker.leaning: blocks for worker in team},
        shared=shared,
        topology=_topology(levels, 1, len(team), Hosts(), options.network),
        places=[(0, number) for number in range(len(team))],
        message_ns=_message_ns(options, measured.message_ns),
        request_ns=measured.request_overhead_ns,
        measured=measured,
        facts={
            "cost_model": f"profile of {profile.model} on {profile.device}, {profile.threads} threads a worker",
            "cost_error": {
                "held-out median of": {
                    f"{kind} steps": errors[kind]["median"]
                    for kind in ("prefill", "decode", "mixed")
                    if kind in errors
                }
            },
        },
    )


def _copies(measured: Measured) -> LinkOptions:
    """As one copy at a time went."""
    start_ns = measured.copy_ns(0, 1)
    taken_ns = max(1, measured.copy_ns(PROBE_BYTES, 1) - start_ns)
    return LinkOptions(bandwidth=PROBE_BYTES / taken_ns * 1e9, latency=start_ns / 1e9)


# Devices of the catalogue


def catalogued(options: ClusterOptions, team: Team, shape: ModelShape, spec: KVSpec) -> Machines:
    """Raises ConfigError, also for a model that does not fit: what is short, by how much."""
    leanings = list(dict.fromkeys(worker.leaning for worker in team))
    devices = {leaning: _device(options, leaning) for leaning in leanings}
    memory = {leaning: _memory(options, shape, *devices[leaning]) for leaning in leanings}
    shared, hosts = options.separate_pools is False, options.hosts or Hosts()
    if shared:
        memory = dict.fromkeys(memory, min(memory.values()))
        hosts = hosts.model_copy(update={"instances": hosts.instances or len(team)})
    places, slots = _places(team, devices, hosts)
    if shared and places[-1][0]:
        raise ConfigError("separate-pools is off, but instances of several hosts cannot share a pool")
    levels = _levels(_links(devices), options.network or Network())
    names = {leaning: f"{count} x {device.name}" for leaning, (device, count) in devices.items()}
    where = (
        ", ".join(f"{name} ({leaning})" for leaning, name in names.items())
        if len(set(names.values())) > 1
        else names[leanings[0]]
    )
    return Machines(
        costs={
            leaning: Roofline(shape, device, count, kv_element_bytes=spec.dtype_bytes)
            for leaning, (device, count) in devices.items()
        },
        blocks={
            leaning: blocks_in(options, spec, memory[leaning], f"{shape.architecture} on {names[leaning]}")
            for leaning in leanings
        },
        shared=shared,
        topology=_topology(levels, places[-1][0] + 1, slots, hosts, options.network),
        places=places,
        message_ns=_message_ns(options, MESSAGE_NS),
        facts={
            "cost_model": f"catalogue, {shape.architecture} on {where}",
            "cost_error": _known_errors(shape, {device.name: device for device, _ in devices.values()}),
        },
    )


def _memory(options: ClusterOptions, shape: ModelShape, device: Hardware, count: int) -> int:
    """Bytes for KV of an instance: as asked, else what the devices have left."""
    limits: dict[str, Any] = {
        "utilization": options.gpu_memory_utilization,
        "tokens_max": options.max_num_batched_tokens,
    }
    check_fits(shape, device, count, context_tokens=options.max_model_len or options.block_size, **limits)
    if options.kv_memory != "auto":
        return parse_size(options.kv_memory)
    return memory_bytes_for_kv(shape, device, count, **limits)


def _device(options: ClusterOptions, leaning: str) -> tuple[Hardware, int]:
    """What instances of a leaning run on: the device, and how many of it."""
    if options.hardware is None:
        raise ConfigError(
            "what does it run on? give --hardware, one of: "
            f"{', '.join(catalogue.names())}; or --profile, what `headrace profile` measured"
        )
    return (
        catalogue.hardware(_by_role("hardware", options.hardware, leaning)),
        _by_role("tensor-parallel", options.tensor_parallel, leaning),
    )


def _by_role(key: str, said: Any, leaning: str) -> Any:
    if not isinstance(said, dict):
        return said
    if leaning not in said:
        raise ConfigError(
            f"--{key} names {', '.join(said)}, but there are {leaning} instances, too: add {leaning}"
        )
    return said[leaning]


def _places(team: Team, devices: Devices, hosts: Hosts) -> tuple[list[tuple[int, int]], int]:
    """(host, slot) of each instance, and the slots of a host. A host has one kind of device, and is filled before the next."""
    rooms = {
        leaning: hosts.instances or max(1, device.devices_per_host // count)
        for leaning, (device, count) in devices.items()
    }
    places: list[tuple[int, int]] = []
    host, slot, kind = 0, 0, devices[team[0].leaning]
    for worker in team:
        if slot >= rooms[worker.leaning] or (places and devices[worker.leaning][0].name != kind[0].name):
            host, slot = host + 1, 0
        kind = devices[worker.leaning]
        places.append((host, slot))
        slot += 1
    return places, max(slot for _, slot in places) + 1


def _links(devices: Devices) -> dict[str, LinkOptions]:
    """Of an instance inside its host, and of a host: where devices differ, the slower ones' (both ends of a way count)."""
    return {
        "device": LinkOptions(
            bandwidth=min(device.link.bandwidth * count for device, count in devices.values()),
            latency=max(device.link.latency_s for device, _ in devices.values()),
        ),
        "host": LinkOptions(
            bandwidth=min(device.nic.bandwidth * device.devices_per_host for device, _ in devices.values()),
            latency=max(device.nic.latency_s for device, _ in devices.values()),
        ),
    }


def _known_errors(shape: ModelShape, devices: dict[str, Hardware]) -> Any:
    """Of the constants, as far as the devices were measured."""
    known: dict[str, dict[str, float]] = yaml.safe_load(COST_ERRORS.read_text())
    found: dict[str, Any] = {}
    for name, device in devices.items():
        errors = known.get(name)
        if errors is None:
            found[name] = f"not measured (efficiency: {device.source['efficiency']})"
            continue
        other = "products_fp8" if shape.arithmetic == "bf16" else "products_bf16"
        kinds = {kind.replace("_", " "): value for kind, value in errors.items() if kind != other}
        found[name] = {"held-out median of": kinds}
    return found[name] if len(found) == 1 else found


# Both


def blocks_in(options: ClusterOptions, spec: KVSpec, memory: int, where: str) -> int:
    """Of each group, in so many bytes. Raises ConfigError if a sequence of the length asked for does not fit."""
    each = sum(spec.block_bytes(group) for group in range(len(spec.groups)))
    blocks = max(memory, 0) // each if each else 0
    tokens = options.max_model_len or 1
    short = spec.blocks_for(tokens) - blocks
    if short > 0:
        raise ConfigError(
            f"--kv-memory: {memory / 2**20:.1f} MiB for {where} hold {blocks} blocks of {options.block_size} tokens; a sequence of "
            f"{tokens} tokens needs {short} more, {short * each / 2**20:.1f} MiB: give more, or lower --max-model-len"
        )
    return blocks


def _levels(defaults: dict[str, LinkOptions], network: Network) -> tuple[Level, ...]:
    found: list[Level] = []
    for name in NAMES:
        link: LinkOptions | None = getattr(network, name) or defaults.get(name)
        if link is not None:
            rate = int(link.bandwidth)
            found.append(Level(name, rate, rate, ns(link.latency)))
    return tuple(found)


def _topology(
    levels: tuple[Level, ...], hosts: int, slots: int, layout: Hosts, network: Network | None
) -> Topology:
    """Raises ConfigError for one that cannot be."""
    steps = tuple(
        Step(ns(step.at), step.level, step.factor, step.unit) for step in (network.steps if network else ())
    )
    count = layout.count or hosts
    if count < hosts:
        raise ConfigError(
            f"hosts: count is {count}, but the instances take {hosts} hosts of {slots}: give more hosts, or more instances to each"
        )
    found = regular(
        levels, count, slots, layout.per_rack, layout.racks_per_cluster, layout.clusters_per_datacentre, steps
    )
    validate(found)
    return found


def _message_ns(options: ClusterOptions, known_ns: int) -> int:
    return known_ns if options.message_latency is None else max(1, ns(options.message_latency))


def ns(seconds: float) -> int:
    return round(seconds * 1e9)
