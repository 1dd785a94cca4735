"""A device as a cost model sees it: what the vendor states, and what its kernels reach of it.

The files are in `assets/hardware`, one YAML each; `cli.catalogue` reads them. `tools/fit_cost.py` fits the constants in `Efficiency`.
"""

from collections.abc import Mapping
from typing import cast

import msgspec

from headrace.types.errors import ConfigError

SOURCED = ("rates", "memory", "link", "nic", "price", "power", "efficiency", "host")


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dense matrix arithmetic, FLOP/s (or operations/s), float32 accumulation. 0: the device has no such units."""

    bf16: float
    fp8: float
    int8: float


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device's, in one direction: bytes/s, and seconds until the first byte."""

    bandwidth: float
    latency_s: float


class Gemm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A product takes `launch_s + (x^sharpness + y^sharpness)^(1/sharpness) + z`: x its FLOPs at `compute` of the rate, y its bytes at
    `memory` of the bandwidth, z `inputs` passes over its 16-bit input (which 8-bit arithmetic quantizes first). A large sharpness is
    the maximum of x and y, 1 their sum."""

    launch_s: float
    compute: float
    memory: float
    sharpness: float
    inputs: float


class PrefillAttention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one layer: `launch_s`, FLOPs at `compute` of the rate, Q, K, V and output bytes at `memory` of the bandwidth, `head_s` per
    sequence and query head, and `token_s` per token of the longest chunk (the keys of one tile of rows come one after another)."""

    launch_s: float
    compute: float
    memory: float
    head_s: float
    token_s: float


class DecodeAttention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one layer: `launch_s`, `kv_head_s` per row and KV head, `head_s` per row and query head, and KV bytes read.

    The other four are multiples of bytes / bandwidth: of all bytes, of all bytes where a row counts as at least 128 tokens, and what the
    first MiB and the first 16 MiB of a layer cost more than those after them. So the bandwidth reached depends on rows and context.
    """

    launch_s: float
    kv_head_s: float
    head_s: float
    read: float
    read_rows: float
    first_mib: float
    first_16_mib: float


class Elementwise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Norms, rotation, activation and additions of one layer: `launch_s`, plus bytes at `memory` of the bandwidth."""

    launch_s: float
    memory: float


class AllReduce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Over so many devices: `latency_s`, plus message bytes / `bandwidth`, plus what the first MiB costs more, up to `first_mib_s`."""

    latency_s: float
    bandwidth: float
    first_mib_s: float

    def seconds(self, nbytes: int) -> float:
        return self.latency_s + nbytes / self.bandwidth + self.first_mib_s * min(nbytes / 2**20, 1.0)


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine's own time: per step, and per sequence that emits a token."""

    step_s: float
    row_s: float


class Efficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gemm: dict[str, Gemm]
    """By arithmetic: "bf16", and where they were measured "fp8", "int8"."""
    prefill: PrefillAttention
    decode: DecodeAttention
    elementwise: Elementwise
    all_reduce: dict[int, AllReduce]
    """By the number of devices."""


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device of a host with `devices_per_host` of them."""

    name: str
    rates: Rates
    memory_bytes: int
    """As the driver reports it."""
    reserved_bytes: int
    """Taken before any weights: the driver's context, captured graphs, workspaces."""
    memory_bandwidth: float
    """Bytes/s."""
    link: Link
    """To the other devices of its host."""
    nic: Link
    """To other hosts: this device's share."""
    devices_per_host: int
    price_usd_per_hour: float
    power_w: float
    efficiency: Efficiency
    host: Host
    source: dict[str, str]
    """Where each group of figures is from: the keys of `SOURCED`."""

    def __post_init__(self) -> None:
        """Raises ValueError (msgspec reports it with the field) for figures that no device can have."""
        missing = [key for key in SOURCED if not self.source.get(key)]
        if missing:
            raise ValueError(f"source names nothing for: {', '.join(missing)}")
        if "bf16" not in self.efficiency.gemm:
            raise ValueError("efficiency.gemm needs bf16")
        if self.devices_per_host < 1 or not 0 <= self.reserved_bytes < self.memory_bytes:
            raise ValueError("devices_per_host or reserved_bytes is out of range")
        for name, value in _numbers("", msgspec.to_builtins(self, str_keys=True)):
            if value < 0 or (value == 0 and name.endswith(NEVER_ZERO)):
                raise ValueError(f"{name[1:]} is {value}, which no device has")

    def rate(self, arithmetic: str) -> float:
        """FLOP/s of "bf16", "fp8" or "int8" products; without such units they run in bf16."""
        return (
            self.rates.fp8 if arithmetic == "fp8" else self.rates.int8 if arithmetic == "int8" else 0
        ) or (self.rates.bf16)

    def gemm(self, arithmetic: str) -> Gemm:
        """Constants of such products: its own, or those of the nearest arithmetic that was measured."""
        found = self.efficiency.gemm
        if self.rate(arithmetic) == self.rates.bf16 or not (found.get(arithmetic) or found.get("fp8")):
            return found["bf16"]
        return found.get(arithmetic) or found["fp8"]

    def all_reduce(self, devices: int) -> AllReduce:
        """Over `devices` devices of one host; of the next larger number known. Raises ConfigError if a host has not so many."""
        if devices > self.devices_per_host:
            raise ConfigError(
                f"tensor_parallel {devices} exceeds the {self.devices_per_host} devices that a host of "
                f"{self.name} has; collectives across hosts are not modelled"
            )
        known = [number for number in sorted(self.efficiency.all_reduce) if number >= devices]
        if not known:
            raise ConfigError(f"{self.name} has no all_reduce constants for {devices} devices")
        return self.efficiency.all_reduce[known[0]]


NEVER_ZERO = ("bandwidth", "bf16", "compute", "memory", "sharpness")


def _numbers(path: str, tree: object) -> list[tuple[str, float]]:
    """Every number of a tree of mappings, by its dotted path."""
    if isinstance(tree, Mapping):
        items = cast("Mapping[str, object]", tree)
        return [found for key, value in items.items() for found in _numbers(f"{path}.{key}", value)]
    return [(path, tree)] if isinstance(tree, int | float) else []
