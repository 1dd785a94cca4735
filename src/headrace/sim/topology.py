"""Where the devices of a fleet lie, and the links between them.

A unit of each level (a device, a host, a rack, a cluster, a datacentre) has one link out and one link in. What goes from device to device

1. of one host takes the inner fabric (NVLink, PCIe): the source's link out, the target's link in;
2. of two hosts takes each level at which the two lie apart, from the host upwards: the NICs; also the racks' uplinks if the racks differ;
   also the clusters'; also the datacentres'. The inner fabric is not on this way: NICs read and write device memory themselves.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

import msgspec

from headrace.types.errors import ConfigError

LevelName = Literal["device", "host", "rack", "cluster", "datacentre"]
NAMES: tuple[LevelName, ...] = get_args(LevelName)
"""From the inside out."""


class Level(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The links of each unit of one level."""

    name: LevelName
    out_bytes_per_s: int
    """Out of one unit."""
    in_bytes_per_s: int
    """Into one unit."""
    latency_ns: int = 0
    """One way, out of one unit and into another. The latencies of a path's levels add up."""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rack: int = 0
    devices: int = 1


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `at_ns` on, links have this share of their level's bandwidth. It replaces what earlier steps said of the same links."""

    at_ns: int
    level: LevelName
    factor: float
    """0: nothing gets through."""
    unit: int | None = None
    """Both links of this unit; None: those of every unit. Devices are counted through all hosts."""


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hosts, racks, clusters and datacentres are numbered from 0, in the order in which they are given."""

    levels: tuple[Level, ...]
    hosts: tuple[Host, ...]
    racks: tuple[int, ...] = (0,)
    """The cluster of each rack."""
    clusters: tuple[int, ...] = (0,)
    """The datacentre of each cluster."""
    datacentres: int = 1
    steps: tuple[Step, ...] = ()
    """In any order; of two for one link at one time the later in the list holds."""

    def counts(self) -> dict[LevelName, int]:
        """Units of each level."""
        devices = sum(host.devices for host in self.hosts)
        numbers = (devices, len(self.hosts), len(self.racks), len(self.clusters), self.datacentres)
        return dict(zip(NAMES, numbers, strict=True))

    def place(self, host: int) -> tuple[int, int, int, int]:
        """A host, its rack, its cluster, its datacentre."""
        rack = self.hosts[host].rack
        cluster = self.racks[rack]
        return host, rack, cluster, self.clusters[cluster]


def regular(
    levels: tuple[Level, ...],
    hosts: int,
    devices: int = 1,
    hosts_per_rack: int | None = None,
    racks_per_cluster: int | None = None,
    clusters_per_datacentre: int | None = None,
    steps: tuple[Step, ...] = (),
) -> Topology:
    """Equal hosts and units; None: all in one unit. The last unit may be less full. Raises ConfigError for a number below 1."""
    named = (hosts, devices, hosts_per_rack, racks_per_cluster, clusters_per_datacentre)
    if any(number is not None and number < 1 for number in named):
        raise ConfigError(f"topology: hosts, devices and units per unit must be at least 1, not {named}")
    rack_of = _grouped(hosts, hosts_per_rack)
    cluster_of = _grouped(rack_of[-1] + 1, racks_per_cluster)
    datacentre_of = _grouped(cluster_of[-1] + 1, clusters_per_datacentre)
    machines = tuple(Host(rack, devices) for rack in rack_of)
    return Topology(levels, machines, cluster_of, datacentre_of, datacentre_of[-1] + 1, steps)


def _grouped(count: int, size: int | None) -> tuple[int, ...]:
    return tuple(i // (size or count) for i in range(count))


# Validation


def validate(topology: Topology) -> None:
    """Raises ConfigError for what cannot be: it names the entry and says what to change."""
    if not topology.hosts:
        raise ConfigError("topology: there are no hosts: list at least one under `hosts`")
    for i, host in enumerate(topology.hosts):
        if host.devices < 1:
            raise ConfigError(f"topology: host {i} has {host.devices} devices: give it at least 1")
        _exists(f"host {i}", "rack", host.rack, len(topology.racks))
    for i, cluster in enumerate(topology.racks):
        _exists(f"rack {i}", "cluster", cluster, len(topology.clusters))
    for i, datacentre in enumerate(topology.clusters):
        _exists(f"cluster {i}", "datacentre", datacentre, topology.datacentres)
    _validate_levels(topology)
    for step in topology.steps:
        _validate_step(topology, step)


def _exists(what: str, within: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ConfigError(
            f"topology: {what} lies in {within} {index}, which does not exist: "
            f"there are {count}, numbered from 0; add it to `{within}s` or correct the number"
        )


def _validate_levels(topology: Topology) -> None:
    names = [level.name for level in topology.levels]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"topology: level `{name}` is given twice: keep one")
    for level in topology.levels:
        for way, rate in (("out", level.out_bytes_per_s), ("in", level.in_bytes_per_s)):
            if rate <= 0:
                raise ConfigError(
                    f"topology: level `{level.name}` has {way}_bytes_per_s {rate}: it must be positive "
                    "(a link that is down for a time is a step with factor 0)"
                )
        if level.latency_ns < 0:
            raise ConfigError(f"topology: level `{level.name}` has latency_ns {level.latency_ns}: at least 0")
    wide = next((i for i, host in enumerate(topology.hosts) if host.devices > 1), None)
    if wide is not None and "device" not in names:
        raise ConfigError(
            f"topology: the {topology.hosts[wide].devices} devices of host {wide} have no links to each other: "
            "add the level `device` (the fabric inside a host)"
        )
    first = topology.place(0)
    for depth, name in enumerate(NAMES[1:]):
        apart = next(
            (i for i in range(len(topology.hosts)) if topology.place(i)[depth] != first[depth]), None
        )
        if apart is not None and name not in names:
            raise ConfigError(
                f"topology: hosts 0 and {apart} lie in different {name}s with no link between them: "
                f"add the level `{name}`"
            )


def _validate_step(topology: Topology, step: Step) -> None:
    what = f"topology: the step of level `{step.level}` at {step.at_ns} ns"
    if step.at_ns < 0:
        raise ConfigError(f"{what}: at_ns must be at least 0")
    if not (0 <= step.factor < math.inf):
        raise ConfigError(f"{what} has factor {step.factor}: it must be at least 0, and finite")
    if all(level.name != step.level for level in topology.levels):
        raise ConfigError(f"{what}: there is no such level: add it to `levels` or drop the step")
    count = topology.counts()[step.level]
    if step.unit is not None and not 0 <= step.unit < count:
        raise ConfigError(f"{what} is of unit {step.unit}: there are {count}, numbered from 0")


# Paths


class Path(NamedTuple):
    links: tuple[int, ...]
    """In the order in which they are crossed; none from a device to itself."""
    latency_ns: int


class Change(NamedTuple):
    at_ns: int
    link: int
    bytes_per_s: int


class Links:
    """The links of a topology. They are numbered level by level from the inside out, unit by unit, out before in.

    Raises ConfigError where the topology is impossible.
    """

    def __init__(self, topology: Topology) -> None:
        validate(topology)
        self.topology = topology
        self.names: list[str] = []
        """For people: `rack 3 out`."""
        self.capacities: list[int] = []
        """Bytes per second of each link, before any step."""
        self._first: dict[LevelName, int] = {}
        self._latency_ns: dict[LevelName, int] = {}
        levels = {level.name: level for level in topology.levels}
        counts = topology.counts()
        for name in NAMES:
            if name in levels:
                self._lay(levels[name], counts[name])
        self._devices = tuple(accumulate((host.devices for host in topology.hosts), initial=0))
        """Number of each host's first device."""
        self._places = [topology.place(host) for host in range(len(topology.hosts))]
        self._ways = [self._way(place) for place in self._places]

    def path(self, source: tuple[int, int], target: tuple[int, int]) -> Path:
        """From (host, device of it) to another. See `check` for places that come from a user.

        Nothing is kept by pair: each host's way up and way down is laid out once, and a path is a piece of each.
        """
        host, device = source
        other, other_device = target
        if host == other:
            if device == other_device:
                return Path((), 0)
            first = self._first["device"] + 2 * self._devices[host]
            return Path((first + 2 * device, first + 2 * other_device + 1), self._latency_ns["device"])
        here, there = self._places[host], self._places[other]
        depth = 1
        while depth < 4 and here[depth] != there[depth]:
            depth += 1
        up, _, latency_ns = self._ways[host][depth - 1]
        _, down, _ = self._ways[other][depth - 1]
        return Path(up + down, latency_ns)

    def check(self, places: Iterable[tuple[int, int]]) -> None:
        """Raises ConfigError for a (host, device) that is not there."""
        hosts = self.topology.hosts
        for host, device in places:
            if not 0 <= host < len(hosts):
                raise ConfigError(
                    f"topology: an instance is on host {host}, but there are {len(hosts)} hosts, "
                    "numbered from 0: add hosts or run fewer instances"
                )
            if not 0 <= device < hosts[host].devices:
                raise ConfigError(
                    f"topology: an instance is on device {device} of host {host}, which has "
                    f"{hosts[host].devices}, numbered from 0: raise `devices` or spread the instances over more hosts"
                )

    def changes(self) -> list[Change]:
        """What the steps make of the links, by time, then link."""
        latest: dict[tuple[int, int], int] = {}
        counts = self.topology.counts()
        for step in sorted(self.topology.steps, key=lambda step: step.at_ns):
            units = range(counts[step.level]) if step.unit is None else (step.unit,)
            for unit in units:
                for link in (first := self._first[step.level] + 2 * unit, first + 1):
                    latest[step.at_ns, link] = round(self.capacities[link] * Fraction(step.factor))
        return [Change(at_ns, link, rate) for (at_ns, link), rate in sorted(latest.items())]

    def _lay(self, level: Level, count: int) -> None:
        self._first[level.name] = len(self.names)
        self._latency_ns[level.name] = level.latency_ns
        for unit in range(count):
            self.names += (f"{level.name} {unit} out", f"{level.name} {unit} in")
            self.capacities += (level.out_bytes_per_s, level.in_bytes_per_s)

    def _way(self, place: tuple[int, int, int, int]) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """For each level from the host upwards: links up to it, links down from it, latency of both together."""
        up: tuple[int, ...] = ()
        down: tuple[int, ...] = ()
        latency_ns = 0
        way: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        for name, unit in zip(NAMES[1:], place, strict=True):
            if name not in self._first:
                break  # then no two hosts lie apart here or further out
            first = self._first[name] + 2 * unit
            up, down = (*up, first), (first + 1, *down)
            latency_ns += self._latency_ns[name]
            way.append((up, down, latency_ns))
        return way
