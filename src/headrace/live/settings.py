"""What the live shell can be told, and what it tells a worker. Plain structs: `cli` fills them from flags and `cluster.yaml`."""

from typing import Any

import msgspec

from headrace.nodes.limits import SECOND, InstanceConfig, RouterConfig, TierConfig
from headrace.types.ids import Address
from headrace.types.kv import KVSpec
from headrace.types.messages import InstanceInfo
from headrace.types.weights import Staged, Tensor

GIB = 2**30


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What is served. Every worker must say the same of what it has loaded, or it is refused."""

    name: str
    """Name under which it is served."""
    fingerprint: str
    """Of configuration and weights (`compute.checkpoint.Checkpoint.fingerprint`). Empty: the first worker's is taken."""
    spec: KVSpec
    vocabulary: int
    length_max: int
    """Prompt plus new tokens, at most."""
    tensors: tuple[Tensor, ...] = ()
    """Of the checkpoint: what a push of new weights must bring."""


class PolicySettings(msgspec.Struct, frozen=True):
    """One policy: its file's name, and the fields of its `Config`."""

    name: str
    config: dict[str, Any] = {}


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The policies of an instance."""

    batching: PolicySettings = PolicySettings("splitfuse")
    admission: PolicySettings = PolicySettings("aggressive")
    ordering: PolicySettings = PolicySettings("fcfs")
    preemption: PolicySettings = PolicySettings("recompute")


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One worker: a process with one instance."""

    name: str
    leaning: str = "mixed"
    """"prefill" | "decode" | "mixed"."""


class RecordSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What to keep of a service's life (see `types.recording`)."""

    folder: str
    """A new one, or empty."""
    text: bool = False
    """Keep token ids, and what tenants call themselves (`--record-text`)."""
    settings: dict[str, Any] = {}
    """For `cluster.yaml`: those of the service, keys named as the flags. Without secrets."""
    config: dict[str, Any] = {}
    """The checkpoint's config.json."""


LEASE_BLOCKS_MAX = 32
"""Blocks a worker keeps in hand, in a pool that is large enough for it."""


def lease_blocks(blocks: int, sharers: int) -> int:
    """That each of so many instances keeps in hand, of one pool of so many blocks."""
    return max(1, min(LEASE_BLOCKS_MAX, blocks // (16 * sharers)))


class TransferSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How KV moves between pools (`live.transports`)."""

    transport: str = "auto"
    """"auto": shared memory within a host, TCP between hosts."""
    path: str = "runs"
    """"runs": each run of blocks is a write; "gather": what is scattered goes through one buffer (`live.transfer.gather`)."""
    lanes: int = 1
    """Of each link: threads that copy, or connections."""
    hosts: tuple[str, ...] = ("127.0.0.1",)
    """Addresses of this host at which peers reach it; lanes go round them."""
    pace: int = 0
    """Bytes a second to each peer at most; 0: unlimited."""
    tls: tuple[str, str, str] | None = None
    """Files: certificate, key, and the authorities that peers' certificates are signed by."""
    stall_ns: int = 10 * SECOND
    """A lane that moves nothing for so long is broken, and what it carried fails."""


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The whole service. Times are nanoseconds."""

    workers: tuple[WorkerSettings, ...]
    shared: bool = True
    """All workers use one pool, so a handover moves nothing. False: one pool each (`--separate-pools`), and bytes really move."""
    listen: str = ""
    """HOST:PORT to listen on for workers of other hosts. Empty: there are none, and `workers` are all."""
    kv_bytes: int = 2 * GIB
    """Of each pool (`--kv-memory`)."""
    fill: bool = True
    """Touch the pools' memory in the background, so that no step pays for it."""
    engine: EngineSettings = EngineSettings()
    placement: PolicySettings = PolicySettings("least_load")
    roles: PolicySettings | None = None
    """None: workers lean as they began."""
    rebalance: PolicySettings | None = None
    """None: running sequences stay where they are."""
    eviction: PolicySettings = PolicySettings("lru")
    tiers: TierConfig | None = None
    """Below each pool of this host (`--host-cache`, `--disk-cache`)."""
    disk_cache: str = ""
    """Folder of the disk tier; empty: there is none."""
    instance: InstanceConfig = InstanceConfig()
    router: RouterConfig = RouterConfig()
    transfer: TransferSettings = TransferSettings()
    threads: int = 0
    """Of each worker; 0: the cores of this machine, shared out among the workers."""
    start_ns: int = 300 * SECOND
    """A worker has so long to load its model."""
    heartbeat_ns: int = SECOND
    """While there is work, workers are asked this often whether they live."""
    silence_ns: int = 10 * SECOND
    """One that then says nothing for so long is killed."""
    step_ns: int = 300 * SECOND
    """One whose step takes longer is killed, too."""
    backoff_ns: int = SECOND // 20
    """Before the first restart; doubled for each further one, until a worker has lived for `stable_ns`."""
    backoff_max_ns: int = 30 * SECOND
    stable_ns: int = 60 * SECOND
    starts_max: int = 3
    """A worker that fails so often in a row before it was ready is given up."""
    report_ns: int = SECOND // 20
    """While they work, workers tell how they are this often at most."""
    alone_ns: int = 60 * SECOND
    """Without any worker, a service that listens keeps its streams so long for one that joins."""
    shutdown_ns: int = 60 * SECOND
    """Draining takes so long at most (`--shutdown-timeout`)."""
    mixed_numerics: bool = False
    """Admit workers whose arithmetic differs; then equal requests need not give equal tokens."""
    record: RecordSettings | None = None
    """None: nothing is kept."""
    push_key: str = ""
    """Who pushes new weights must know it (`--push-key`); empty: nobody may."""
    environment: dict[str, str] = {}
    """Added to the workers' environment."""
    options: dict[str, Any] = {}
    """For the workers' `make_executor`: what the wiring wants to tell them (model folder, dtype, ...)."""


class PoolLayout(msgspec.Struct, frozen=True):
    """Where the groups of one pool lie in its memory, bytes. Block b of group g is `[offsets[g] + b * block_bytes(g), ...)`."""

    blocks: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int


class SharedPool(msgspec.Struct, frozen=True):
    """A pool as a worker gets it: an inherited file descriptor, and what is in it."""

    pool: int
    fd: int
    """-1: the worker makes the memory itself."""
    layout: PoolLayout


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker is told when it starts (JSON on its standard input)."""

    address: Address
    parent: int
    """Process id; the worker ends with it."""
    endpoint: str
    """Of the hub's socket."""
    secret: str
    """Proves to the hub that this process was started by it, or was offered its place."""
    router: Address
    info: InstanceInfo
    model: Model
    pool: SharedPool
    """Its own. Those of peers are theirs to grant (`live.transfer`)."""
    engine: EngineSettings
    instance: InstanceConfig
    transfer: TransferSettings
    threads: int
    report_ns: int
    journals: str
    """Folder for its core's journal; empty: none is kept."""
    options: dict[str, Any]
    weights: Staged | None = None
    """Pushed weights to begin with, in place of the folder's."""
