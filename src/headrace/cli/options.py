"""Settings as users know them: one pydantic model is the flags, the `HEADRACE_*` variables and the keys of a settings file alike.

Flags win over variables, variables over the file, the file over defaults. One file serves all commands: a command leaves alone the keys
that only others read.
"""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from headrace import registry
from headrace.cli import transferring
from headrace.cli.networks import Network
from headrace.cli.sizes import parse_size
from headrace.types.errors import ConfigError

CLUSTERS = Path(__file__).parent.parent / "assets" / "clusters"
"""Example settings files, which simulations take by name."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
MemoryKind = Literal["paged", "virtual"]
MEMORY: Any = Field(
    "paged",
    description="How attention sees a sequence's KV: by its block table, or in one range of addresses",
)

SHARED_PREFIXES: Any = Field(
    True,
    description="Sequences of a step attend together to a prefix that they share, where that pays (same tokens)",
)


class PolicyChoice(BaseModel):
    """A policy and its settings: a bare name, or `{"name": ..., setting: ...}`."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelOptions(BaseModel):
    """A model and its KV."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: Path | None = Field(
        None, description="Checkpoint folder (Hugging Face format); default: the bundled one"
    )
    dtype: Dtype = Field("auto", description="Element type of weights and KV; auto: the checkpoint's")
    max_model_len: int | None = Field(
        None, ge=2, description="Prompt plus new tokens at most [default: the model's]"
    )
    block_size: int = Field(32, ge=16, le=512, description="Tokens in a KV block, a multiple of 16")
    kv_memory: str = Field(
        "auto", description="KV memory of each pool, e.g. 2GiB; auto: by model and free memory"
    )

    @field_validator("block_size")
    @classmethod
    def _aligned(cls, value: int) -> int:
        if value % 16:
            raise ValueError("must be a multiple of 16, the chunk in which attention walks keys")
        return value

    @field_validator("kv_memory")
    @classmethod
    def _size(cls, value: str) -> str:
        if value != "auto":
            parse_size(value)
        return value


class DeploymentOptions(ModelOptions):
    """What a deployment is told alike whether it is live or simulated."""

    prefill: int | None = Field(
        None, ge=0, description="Workers that lean to prefill [default: 1 if no --instances]"
    )
    decode: int | None = Field(
        None, ge=0, description="Workers that lean to decode [default: 1 if no --instances]"
    )
    instances: int | None = Field(
        None, ge=1, description="Workers that do both, in place of --prefill and --decode"
    )
    separate_pools: bool = Field(
        False, description="One KV pool per worker: handovers copy bytes (default: one for all)"
    )
    max_num_seqs: int = Field(256, ge=1, description="Sequences in a step of one worker")
    max_num_batched_tokens: int = Field(512, ge=1, description="Tokens in a step of one worker")
    caching: Literal["none", "prefill", "increment", "return"] = Field(
        "increment",
        description="Who keeps KV for later requests: nobody; prefill workers; decode workers, too; or "
        "these also return what they generate to prefill workers",
    )
    host_cache: str | None = Field(
        None, description="Host memory below each pool for cached blocks, e.g. 4GiB [default: none]"
    )
    disk_cache: Path | None = Field(
        None, description="Folder in which cached blocks outlive the service [default: none]"
    )
    disk_cache_size: str = Field("10GiB", description="Of --disk-cache, for each pool, at most")
    stream_interval: int = Field(
        1, ge=1, description="Send a sequence's tokens in groups of so many, but its first and last at once"
    )
    kv_stream: Literal["chunk", "layer", "request"] = Field(
        "chunk",
        description="KV leaves a prefill worker after each chunk, each layer of it, or the whole prompt",
    )
    batching: PolicyChoice = Field(PolicyChoice(name="splitfuse"), description="What goes into a step")
    admission: PolicyChoice = Field(PolicyChoice(name="aggressive"), description="When a sequence may start")
    scheduling_policy: PolicyChoice = Field(PolicyChoice(name="fcfs"), description="Who is looked at first")
    preemption: PolicyChoice = Field(
        PolicyChoice(name="recompute"),
        description="Whom to stop when memory is short, and what becomes of its KV",
    )
    swap_space: float = Field(
        4, ge=0, description="Host memory of each worker for swapped KV, GiB; with --preemption swap"
    )
    placement: PolicyChoice = Field(
        PolicyChoice(name="least_load"), description="Where a request is prefilled and decoded"
    )
    rebalance: PolicyChoice | None = Field(
        None, description="Which running sequences move to another instance [default: none]"
    )
    roles: PolicyChoice | None = Field(
        None, description="Which instances lean to prefill or decode now [default: as they began]"
    )
    evict: PolicyChoice = Field(PolicyChoice(name="lru"), description="Which cached block goes first")

    @field_validator("host_cache", "disk_cache_size")
    @classmethod
    def _cache_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator(
        "batching",
        "admission",
        "scheduling_policy",
        "preemption",
        "placement",
        "roles",
        "rebalance",
        "evict",
        mode="before",
    )
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return by_name(value)


class EngineOptions(DeploymentOptions):
    """What every command that runs a model can be told."""

    lend_kv: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of its pool a worker lends to others for contexts longer than theirs "
        "(with --separate-pools)",
    )

    threads: int = Field(0, ge=0, description="CPU threads of each worker; 0: the cores, shared out")
    transport: str = transferring.TRANSPORT
    transfer_path: transferring.TransferPath = transferring.TRANSFER_PATH
    transfer_lanes: int = transferring.TRANSFER_LANES
    transfer_hosts: str | None = transferring.TRANSFER_HOSTS
    transfer_pace: int = transferring.TRANSFER_PACE
    transfer_timeout: float = transferring.TRANSFER_TIMEOUT
    transfer_tls: str | None = transferring.TRANSFER_TLS
    memory: MemoryKind = MEMORY
    shared_prefixes: bool = SHARED_PREFIXES
    mixed_numerics: bool = Field(
        False, description="Admit workers whose arithmetic differs (drops the promise of equal bits)"
    )
    worker_timeout: float = Field(
        300, gt=0, description="Seconds a worker may take to start, or for one step"
    )
    record: Path | None = Field(
        None, description="New folder to keep each core's journal and the trace of all requests in"
    )
    record_text: bool = Field(False, description="Keep the tokens of prompts and answers in it, too")


class ServeOptions(EngineOptions):
    """What `headrace serve` can be told beyond the engine's."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: all")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one")
    uds: Path | None = Field(None, description="Listen on a Unix socket instead")
    api_key: str | None = Field(None, description="Clients must send it as a bearer token")
    push_key: str | None = Field(None, description="Who knows it may push new weights [default: nobody]")
    served_model_name: str | None = Field(None, description="Model's name in the API [default: its folder's]")
    chat_template: Path | None = Field(
        None, description="Jinja file in place of the checkpoint's chat template"
    )
    request_timeout: float = Field(
        3600, gt=0, description="Seconds until an unfinished request is ended with an error"
    )
    max_requests: int = Field(
        4096, ge=1, description="Unfinished continuations at most; more are answered 503"
    )
    shutdown_timeout: float = Field(
        60, ge=0, description="Seconds that streams at hand may take after SIGTERM"
    )
    allowed_origins: str = Field(
        "", description="Web origins (CORS) that may call the API, separated by commas; *: all"
    )
    access_log: bool = Field(False, description="Log every HTTP request")
    listen: str | None = Field(
        None, description="HOST:PORT for workers of other hosts (headrace worker --join); needs a secret"
    )
    secret_file: Path | None = Field(
        None, description="File with the secret that all hosts share [default: the variable HEADRACE_SECRET]"
    )


class WorkerOptions(ModelOptions):
    """What `headrace worker` can be told. What is not here it hears from the service."""

    join: str = Field(
        "", description="HOST:PORT where `headrace serve --listen` takes workers of other hosts"
    )
    secret_file: Path | None = Field(
        None, description="File with the secret that all hosts share [default: the variable HEADRACE_SECRET]"
    )
    name: str = Field("", description="Its name in the service [default: from its leaning and host]")
    leaning: Literal["prefill", "decode", "mixed"] = Field(
        "mixed", description="What it is preferred for: prefill, decode or mixed; each can do all"
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0: the cores")
    memory: MemoryKind = MEMORY
    shared_prefixes: bool = SHARED_PREFIXES
    join_timeout: float = Field(
        300, ge=0, description="Seconds to wait for the service, which may start later"
    )
    shutdown_timeout: float = Field(
        60, ge=0, description="Seconds that work at hand may take after SIGTERM; then it goes on elsewhere"
    )
    transfer_hosts: str | None = transferring.TRANSFER_HOSTS
    transfer_tls: str | None = transferring.TRANSFER_TLS


class Kill(BaseModel):
    """Something that happens to one instance."""

    model_config = ConfigDict(extra="forbid")
    at: float = Field(ge=0, description="Seconds from the trace's begin")
    instance: str


class Faults(BaseModel):
    """What goes wrong in a simulation."""

    model_config = ConfigDict(extra="forbid")
    kills: list[Kill] = []
    drains: list[Kill] = []
    slow: dict[str, float] = Field(default={}, description="Factor on all step times, by instance")
    restart: float = Field(
        default=10, gt=0, description="Seconds from a death's discovery to the next incarnation"
    )
    notice: float = Field(default=0.1, ge=0, description="Seconds until a death is known to others")


class Hosts(BaseModel):
    """How instances lie on machines. What is left out follows from the hardware; None for a unit: all in one."""

    model_config = ConfigDict(extra="forbid")
    count: int | None = Field(default=None, ge=1, description="[default: as many as are needed]")
    instances: int | None = Field(
        default=None, ge=1, description="On one host [default: its devices / tensor_parallel]"
    )
    per_rack: int | None = Field(default=None, ge=1)
    racks_per_cluster: int | None = Field(default=None, ge=1)
    clusters_per_datacentre: int | None = Field(default=None, ge=1)


SECTIONS: dict[str, type[BaseModel]] = {"faults": Faults, "hosts": Hosts, "network": Network}


class ClusterOptions(DeploymentOptions):
    """A deployment that is simulated: what `serve` would be told, and what only a simulation has to be told."""

    model: Path | None = Field(
        None,
        description="Checkpoint folder or config.json, or the name of a known shape such as llama-3.1-8b",
    )
    separate_pools: bool | None = Field(
        None, description="One KV pool per instance [default: yes, but with --profile as in serve]"
    )
    hardware: str | dict[str, str] | None = Field(
        None, description='Device of the catalogue, or by role: {"prefill": "h100-sxm", "decode": "h20"}'
    )
    tensor_parallel: int | dict[str, int] = Field(1, description="Devices of an instance, or by role")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a device's memory that is used, with --kv-memory auto"
    )
    profile: Path | None = Field(
        None,
        description="What `headrace profile` measured, in place of --hardware: instances on that machine",
    )
    hosts: Hosts | None = Field(
        None, description="How instances lie on hosts and racks, as JSON [default: by the hardware]"
    )
    network: Network | None = Field(None, description="Links by level, as JSON [default: by the hardware]")
    faults: Faults | None = Field(None, description="Kills, drains and slow instances, as JSON")
    max_tokens: int | None = Field(
        None, ge=1, description="What requests ask for at most [default: exactly what they will get]"
    )
    max_requests: int | None = Field(
        None,
        ge=1,
        description="Unfinished requests at most [default: 4096, or --max-num-seqs for each instance]",
    )
    deadline: float | None = Field(None, gt=0, description="Seconds until a request is given up")
    report_interval: float = Field(0.05, gt=0, description="Seconds between two reports of an instance")
    swap_bandwidth: float = Field(
        25e9, gt=0, description="Bytes/s between an instance and its host memory, for swapping"
    )
    swap_latency: float = Field(1e-5, ge=0, description="Seconds that each copy to or from there takes more")
    message_latency: float | None = Field(
        None, gt=0, description="Seconds of a message inside a host [default: the profile's, or 50 us]"
    )

    @field_validator(*SECTIONS, "hardware", "tensor_parallel", mode="before")
    @classmethod
    def _nested(cls, value: Any) -> Any:
        return from_json(value)

    @field_validator("hardware", "tensor_parallel")
    @classmethod
    def _by_role(cls, value: Any) -> Any:
        if isinstance(value, dict) and (wrong := [role for role in value if role not in ROLES]):
            raise ValueError(f"{wrong[0]!r} is not a role; roles are {', '.join(ROLES)}")
        return value


class SimulationOptions(ClusterOptions):
    """A deployment and what it is to serve."""

    trace: str | None = Field(
        None,
        description="A file, a name below the data folder, or a generator: synthetic:rate=5,requests=1000",
    )


TEAMS = frozenset(("prefill", "decode"))
ROLES = ("prefill", "decode", "mixed")

AXES = {
    "batching": "engine.batching",
    "admission": "engine.admission",
    "scheduling_policy": "engine.ordering",
    "preemption": "engine.preemption",
    "placement": "cluster.placement",
    "roles": "cluster.roles",
    "rebalance": "cluster.rebalance",
    "evict": "kv.evict",
}
"""The axis of each policy. Its name is another name of the key."""

Options = TypeVar("Options", bound=ModelOptions)


def by_name(value: Any) -> Any:
    """A policy as text, as its model takes it."""
    found = from_json(value)
    return {"name": found} if isinstance(found, str) else found


def from_json(value: Any) -> Any:
    """Text that begins with a brace as what it says. Raises ValueError."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"what begins with a brace is a JSON object: {error}") from error


def resolve(
    options: type[Options], file: Path | None, given: dict[str, Any], source: str = "--config"
) -> Options:
    """Flags and variables over the file over defaults. Raises ConfigError naming the flag or the file's key.

    `source`: how messages call the file.
    """
    said = read(file, source)
    stated = {name: value for name, value in said.items() if name in options.model_fields}
    return validated(options, over(stated, given), given, source)


def over(stated: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given wins; how many workers there are of one kind takes the place of how many there were of another."""
    gone = ("prefill", "decode") if "instances" in given else ("instances",) if TEAMS & set(given) else ()
    return {name: value for name, value in stated.items() if name not in gone} | given


def validated(options: type[Options], stated: dict[str, Any], given: dict[str, Any], source: str) -> Options:
    """The options from settings by key; those in `given` came as flags. Raises ConfigError."""
    try:
        return options.model_validate(stated)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(dict.fromkeys(_explain(e, given, source) for e in error.errors()))
        ) from error


def check_policies(options: DeploymentOptions) -> None:
    """Raises ConfigError naming the flag whose policy does not exist or does not take its settings."""
    for name, axis in AXES.items():
        choice: PolicyChoice | None = getattr(options, name, None)
        if choice is None:
            continue
        try:
            registry.load(axis, choice.name, choice.config)
        except ConfigError as error:
            raise ConfigError(f"{flag(name)}: {error}") from error


def flag(name: str) -> str:
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def read(file: Path | None, source: str = "--config") -> dict[str, Any]:
    """What a settings file says, by field. Raises ConfigError for a key that no command knows, with the nearest one."""
    if file is None:
        return {}
    where = source if source == str(file) else f"{source} {file}"
    try:
        stated = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if not isinstance(stated, dict):
        raise ConfigError(f"{where}: expected `key: value` lines, keys as the flags are named")
    return {field_of(str(key), f"{source}:"): value for key, value in stated.items()}


def field_of(key: str, where: str) -> str:
    """The field that a key means: its own name, with dashes, or a policy's axis. Raises ConfigError with the nearest one."""
    name = ALIASES.get(key, key.replace("-", "_"))
    if name not in KNOWN:
        near = get_close_matches(name, [*KNOWN, *ALIASES], 1)
        meant = f"; did you mean {near[0].replace('_', '-')}?" if near else "; `--help` lists them"
        raise ConfigError(f"{where} {key.replace('_', '-')} is not a setting{meant}")
    return name


def _explain(error: Any, given: dict[str, Any], source: str) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    where = flag(name) if name in given else f"{source}: {name.replace('_', '-')}"
    if error["type"] == "extra_forbidden":
        return _unknown(where, [str(part) for part in error["loc"]])
    inner = ".".join(str(part) for part in error["loc"][1:] if name in SECTIONS)
    return f"{where}: {f'{inner}: ' if inner else ''}{error['msg'].removeprefix('Value error, ')}"


def _unknown(where: str, path: list[str]) -> str:
    section = SECTIONS.get(path[0])
    if section is None or len(path) < 2:
        return f"{where} is not a setting; `--help` lists them"
    near = get_close_matches(path[-1], section.model_fields, 1) if len(path) == 2 else []
    hint = f"did you mean {near[0]}?" if near else f"{path[0]} has {', '.join(section.model_fields)}"
    return f"{where}: {'.'.join(path[1:])} is not a setting of it; {hint}"


KNOWN = (
    *dict.fromkeys(
        (*ServeOptions.model_fields, *SimulationOptions.model_fields, *WorkerOptions.model_fields)
    ),
)
"""Every key of any command."""
ALIASES = {axis: name for name, axis in AXES.items()}
