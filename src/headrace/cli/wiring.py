"""From options to objects: which model, how many workers, how much memory, which policies."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from headrace.cli.options import (
    DeploymentOptions,
    EngineOptions,
    ModelOptions,
    PolicyChoice,
    ServeOptions,
    WorkerOptions,
    check_policies,
)
from headrace.cli.sizes import parse_size
from headrace.cli.tiering import tier_config
from headrace.cli.transferring import transfer_settings
from headrace.live.memory import available_bytes
from headrace.live.policies import policy
from headrace.live.service import Service
from headrace.live.settings import (
    GIB,
    EngineSettings,
    Model,
    PolicySettings,
    RecordSettings,
    ServiceConfig,
    WorkerSettings,
    lease_blocks,
)
from headrace.nodes.limits import PARTITION, Caching, InstanceConfig, RouterConfig, Stream
from headrace.types.errors import CheckpointError, ConfigError
from headrace.types.kv import KVSpec, Layout
from headrace.types.weights import Tensor

BUNDLED = Path(__file__).parent.parent / "assets" / "headrace-python-5m"
WORKER = (sys.executable, "-m", "headrace.cli.worker")

SEQUENCES_AUTO = 64
"""`--kv-memory auto` has room for so many sequences of full length,"""
SHARE_AUTO = 0.4
"""but takes at most this share of the memory that is free."""

UNRECORDED = {
    "record",
    "record_text",
    "api_key",
    "push_key",
    "host",
    "port",
    "uds",
    "allowed_origins",
    "listen",
    "secret_file",
    "transfer_hosts",
    "transfer_tls",
}
"""Settings that a recording leaves out: secrets, and where the service was found."""

LAYOUTS = {"paged": Layout.HEAD_MAJOR, "virtual": Layout.TOKEN_MAJOR}
"""Order of the pools' memory, by `--memory`."""


class Probe(msgspec.Struct, frozen=True):
    """What a checkpoint is, as its configuration says."""

    fingerprint: str
    spec: KVSpec
    vocabulary: int
    length_max: int
    """Tokens of a sequence: as asked, else as the model is meant for."""
    tensors: tuple[Tensor, ...] = ()
    """Of the checkpoint, without what is derived from the configuration."""
    scheme: str = ""
    """How its weights are quantized; empty: they are not."""


async def probe(options: EngineOptions | WorkerOptions) -> Probe:
    """Ask a process of its own. Raises CheckpointError with its words."""
    arguments = (
        str(folder(options)),
        options.dtype,
        str(options.block_size),
        str(options.max_model_len or 0),
        LAYOUTS[options.memory].value,
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "headrace.cli.probe", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaint = await process.communicate()
    if process.returncode == 0:
        return msgspec.json.decode(said, type=Probe)
    raise CheckpointError(complaint.decode(errors="replace").strip() or f"{arguments[0]} could not be read")


def folder(options: ModelOptions) -> Path:
    """The checkpoint's folder. Raises ConfigError if there is none."""
    path = options.model or BUNDLED
    if not path.is_dir():
        raise ConfigError(
            f"MODEL {path} is not a folder; give a Hugging Face checkpoint folder, nothing is downloaded"
        )
    return path.resolve()


def listens(options: DeploymentOptions) -> str:
    """HOST:PORT for workers of other hosts, if there may be any."""
    return (options.listen or "") if isinstance(options, ServeOptions) else ""


def workers(options: DeploymentOptions) -> tuple[WorkerSettings, ...]:
    """One prefill and one decode worker, unless told otherwise."""
    if options.instances is not None:
        if options.prefill or options.decode:
            raise ConfigError("--instances replaces --prefill and --decode; give one or the other")
        return tuple(WorkerSettings(name=f"worker{i}", leaning="mixed") for i in range(options.instances))
    unsaid = options.prefill is None and options.decode is None
    prefill, decode = (1, 1) if unsaid else (options.prefill or 0, options.decode or 0)
    if prefill + decode == 0 and not listens(options):
        raise ConfigError("--prefill 0 --decode 0 leaves no worker; or --listen for those of other hosts")
    leanings = [("prefill", i) for i in range(prefill)] + [("decode", i) for i in range(decode)]
    return tuple(WorkerSettings(name=f"{leaning}{i}", leaning=leaning) for leaning, i in leanings)


def kv_bytes(options: ModelOptions, found: Probe, pools: int) -> int:
    """Of each pool. Raises ConfigError if not even one sequence of full length fits."""
    spec = found.spec
    sequence = sum(spec.blocks_for(found.length_max) * spec.block_bytes(g) for g in range(len(spec.groups)))
    if options.kv_memory == "auto":
        return max(sequence, min(SEQUENCES_AUTO * sequence, int(available_bytes() * SHARE_AUTO) // pools))
    asked = parse_size(options.kv_memory)
    held, lent = asked, ""
    if isinstance(options, EngineOptions) and options.lend_kv:
        held, lent = lent_bytes(options, found, pools, asked), f", with what {pools - 1} peers lend,"
    if held < sequence:
        raise ConfigError(
            f"--kv-memory {options.kv_memory}{lent} holds less than one sequence of {found.length_max} tokens, which takes "
            f"{sequence / 2**20:.1f} MiB; give more, or lower --max-model-len"
        )
    return asked


def lent_bytes(options: EngineOptions, found: Probe, pools: int, each: int) -> int:
    """How much of one sequence a pool of so many bytes and what the others lend hold. Raises ConfigError if they cannot lend."""
    spec = found.spec
    partition = sum(spec.block_bytes(g) for g in range(len(spec.groups))) * (PARTITION // spec.block_size)
    if not options.separate_pools or pools < 2:
        raise ConfigError(
            "--lend-kv is between workers with a pool each: give --separate-pools and at least two workers"
        )
    if options.memory == "virtual":
        raise ConfigError("--lend-kv: with --memory virtual all of a sequence is in one place; use paged")
    if any(g.window for g in spec.groups) or PARTITION % spec.block_size:
        raise ConfigError(
            f"--lend-kv is for models without window attention, and a --block-size that divides {PARTITION}"
        )
    least = 2 * partition + 2 * options.max_num_batched_tokens * partition // PARTITION
    if each < least:
        raise ConfigError(
            f"--kv-memory {options.kv_memory} is too little to borrow more: with --max-num-batched-tokens "
            f"{options.max_num_batched_tokens} a worker needs {least / 2**20:.1f} MiB of its own"
        )
    return each + (pools - 1) * (int(options.lend_kv * each) // partition * partition)


def service_config(
    options: EngineOptions,
    found: Probe,
    *,
    choices_max: int = 4096,
    shutdown_s: float = 10.0,
    push_key: str = "",
) -> ServiceConfig:
    """All of the service but the API. Raises ConfigError naming the flag."""
    check_policies(options)
    if push_key and found.scheme:
        raise ConfigError(
            f"--push-key: weights can be pushed to a model that is not quantized, but {folder(options)} is ({found.scheme})"
        )
    check_ranges(found.spec)
    team = workers(options)
    pools = max(1, len(team)) if options.separate_pools else 1
    memory = kv_bytes(options, found, pools)
    blocks = memory // sum(found.spec.block_bytes(g) for g in range(len(found.spec.groups)))
    return ServiceConfig(
        tiers=tier_config(options, found.spec, blocks),
        disk_cache="" if options.disk_cache is None else str(options.disk_cache.absolute()),
        workers=team,
        shared=not options.separate_pools,
        listen=listens(options),
        kv_bytes=memory,
        engine=EngineSettings(
            batching=_policy(options.batching),
            admission=_policy(options.admission),
            ordering=_policy(options.scheduling_policy),
            preemption=_policy(options.preemption),
        ),
        placement=_policy(options.placement),
        roles=None if options.roles is None else _policy(options.roles),
        rebalance=None if options.rebalance is None else _policy(options.rebalance),
        eviction=_policy(options.evict),
        instance=replace(
            instance_config(options, found.spec, blocks, sharers=max(1, len(team) // pools)),
            lend_share=options.lend_kv,
        ),
        router=RouterConfig(choices_max=choices_max),
        transfer=transfer_settings(options, listens(options)),
        threads=threads(options, len(team)),
        start_ns=int(options.worker_timeout * 1e9),
        step_ns=int(options.worker_timeout * 1e9),
        shutdown_ns=int(shutdown_s * 1e9),
        mixed_numerics=options.mixed_numerics,
        record=recorded(options, found, memory),
        push_key=push_key,
        options={
            "folder": str(folder(options)),
            "dtype": options.dtype,
            "shared_prefixes": options.shared_prefixes,
        },
    )


def check_ranges(spec: KVSpec) -> None:
    """Raises ConfigError if `--memory virtual` is asked for, and cannot be had with blocks of this size."""
    if spec.layout is not Layout.TOKEN_MAJOR:
        return
    step = spec.block_size_step(PAGESIZE)
    if spec.block_size % step:
        sizes = ", ".join(str(spec.block_bytes(g)) for g in range(len(spec.groups)))
        raise ConfigError(
            f"--memory virtual maps whole pages of {PAGESIZE} bytes, but a KV block of {spec.block_size} tokens takes {sizes} "
            f"bytes: give --block-size {-(-spec.block_size // step) * step}, or --memory paged"
        )


def instance_config(options: DeploymentOptions, spec: KVSpec, blocks: int, sharers: int) -> InstanceConfig:
    """Of each instance; `sharers` of them use one pool of so many blocks. Raises ConfigError."""
    return InstanceConfig(
        tokens_max=options.max_num_batched_tokens,
        sequences_max=options.max_num_seqs,
        caching=Caching(options.caching),
        stream_interval=options.stream_interval,
        stream=Stream(options.kv_stream),
        lease_blocks=lease_blocks(blocks, sharers),
        swap_blocks=swap_blocks(options, spec),
    )


def swap_blocks(options: DeploymentOptions, spec: KVSpec) -> tuple[int, ...]:
    """Of each worker's host area, per group: as many in each; none where nothing is swapped. Raises ConfigError if not one fits."""
    if policy("engine.preemption", _policy(options.preemption)).swapping is None:
        return ()
    count = int(options.swap_space * GIB) // sum(spec.block_bytes(g) for g in range(len(spec.groups)))
    if not count:
        raise ConfigError(
            f"--swap-space {options.swap_space:g} GiB holds not one block; give more, or --preemption recompute"
        )
    return (count,) * len(spec.groups)


def recorded(options: EngineOptions, found: Probe, memory: int) -> RecordSettings | None:
    """What `--record` asks for; `memory`: bytes of each pool."""
    if options.record is None:
        if options.record_text:
            raise ConfigError("--record-text says what --record keeps; give --record DIR, too")
        return None
    return RecordSettings(
        folder=str(options.record),
        text=options.record_text,
        settings=settled(options, found, memory),
        config=config_of(options),
    )


def config_of(options: EngineOptions) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return msgspec.json.decode((folder(options) / "config.json").read_bytes())


def settled(options: EngineOptions, found: Probe, memory: int) -> dict[str, Any]:
    """The settings as a `--config` file has them, with what was chosen in place of what was left open; `memory`: bytes of each pool."""
    team = workers(options)
    chosen = {
        "model": str(folder(options)),
        "dtype": found.spec.dtype,
        "max_model_len": found.length_max,
        "kv_memory": str(memory),
        "threads": threads(options, len(team)),
    }
    if options.instances is None:
        chosen |= {leaning: sum(w.leaning == leaning for w in team) for leaning in ("prefill", "decode")}
    stated = options.model_dump(mode="json", exclude=UNRECORDED) | chosen
    return {k.replace("_", "-"): v for k, v in stated.items() if v is not None}


def threads(options: EngineOptions, workers: int) -> int:
    """Of each worker."""
    return options.threads or max(1, (os.cpu_count() or 1) // max(1, workers))


def model(options: EngineOptions, found: Probe, name: str | None = None) -> Model:
    """What the service says that it serves; its name is the folder's unless told otherwise."""
    return Model(
        name=name or folder(options).name,
        fingerprint=found.fingerprint,
        spec=found.spec,
        vocabulary=found.vocabulary,
        length_max=found.length_max,
        tensors=found.tensors,
    )


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[Service]:
    """Started on entry; on exit what is at hand is finished (within the shutdown limit) and all workers have ended."""
    await service.start()
    try:
        yield service
        await service.drain()
    finally:
        await service.stop()


def _policy(choice: PolicyChoice) -> PolicySettings:
    return PolicySettings(choice.name, choice.config)
