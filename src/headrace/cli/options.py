"""Settings as users know them: one pydantic model is the flags, the `HEADRACE_*` variables and the keys of `--config` alike.

Flags win over variables, variables over the file, the file over defaults.
"""

import inspect
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from headrace import registry
from headrace.types.errors import ConfigError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class PolicyChoice(BaseModel):
    """A policy and its settings: a bare name, or `{"name": ..., setting: ...}`."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EngineOptions(BaseModel):
    """What every command that runs a model can be told."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: Path | None = Field(
        None, description="Checkpoint folder (Hugging Face format); default: the bundled one"
    )
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
    dtype: Dtype = Field("auto", description="Element type of weights and KV; auto: the checkpoint's")
    max_model_len: int | None = Field(
        None, ge=2, description="Prompt plus new tokens at most [default: the model's]"
    )
    max_num_seqs: int = Field(256, ge=1, description="Sequences in a step of one worker")
    max_num_batched_tokens: int = Field(512, ge=1, description="Tokens in a step of one worker")
    block_size: int = Field(32, ge=16, le=512, description="Tokens in a KV block, a multiple of 16")
    kv_memory: str = Field(
        "auto", description="KV memory of each pool, e.g. 2GiB; auto: by model and free memory"
    )
    threads: int = Field(0, ge=0, description="CPU threads of each worker; 0: the cores, shared out")
    transport: str = Field("shm", description="How KV moves between separate pools")
    batching: PolicyChoice = Field(PolicyChoice(name="splitfuse"), description="What goes into a step")
    admission: PolicyChoice = Field(PolicyChoice(name="aggressive"), description="When a sequence may start")
    scheduling_policy: PolicyChoice = Field(PolicyChoice(name="fcfs"), description="Who is looked at first")
    preemption: PolicyChoice = Field(
        PolicyChoice(name="recompute"), description="Whom to stop when memory is short"
    )
    placement: PolicyChoice = Field(
        PolicyChoice(name="least_load"), description="Where a request is prefilled and decoded"
    )
    evict: PolicyChoice = Field(PolicyChoice(name="lru"), description="Which cached block goes first")
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

    @field_validator(
        "batching", "admission", "scheduling_policy", "preemption", "placement", "evict", mode="before"
    )
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return json.loads(value) if value.lstrip().startswith("{") else {"name": value}
        return value

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


class ServeOptions(EngineOptions):
    """What `headrace serve` can be told beyond the engine's."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: all")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one")
    uds: Path | None = Field(None, description="Listen on a Unix socket instead")
    api_key: str | None = Field(None, description="Clients must send it as a bearer token")
    served_model_name: str | None = Field(
        None, description="Name of the model in the API [default: its folder's name]"
    )
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


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2G", "1073741824". Raises ValueError."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in UNITS and number[-1:] else ""
    try:
        size = int(float(number.removesuffix(unit)) * UNITS[unit])
    except ValueError as error:
        raise ValueError(f"{text!r} is not a size; write e.g. 512MiB or 2GiB") from error
    if size <= 0:
        raise ValueError(f"{text!r} is not a size above zero")
    return size


Options = TypeVar("Options", bound=EngineOptions)
Command = Callable[..., None]


def takes(options: type[Options], arguments: tuple[str, ...] = ("model",)) -> Callable[[Command], Command]:
    """Give a command one flag per field of `options`; it gets them resolved, as its first parameter."""

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command).parameters.values())[1:]

        @wraps(command)
        def run(**given: Any) -> None:
            named = {name: given.pop(name) for name in options.model_fields}
            resolved = resolve(
                options, given.pop("config"), {k: v for k, v in named.items() if v is not None}
            )
            command(resolved, **given)

        flags = [
            _parameter(name, field.annotation, field, name in arguments)
            for name, field in options.model_fields.items()
        ]
        run.__signature__ = inspect.Signature(sorted([*own, _config(), *flags], key=lambda p: p.kind))  # type: ignore[attr-defined]
        return run

    return decorate


def resolve(options: type[Options], file: Path | None, given: dict[str, Any]) -> Options:
    """Flags and variables over the file over defaults. Raises ConfigError naming the flag or the file's key."""
    stated = {**_read(file), **given}
    try:
        return options.model_validate(stated)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, given) for e in error.errors())) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"a policy is a name or a JSON object: {error}") from error


def check_policies(options: EngineOptions) -> None:
    """Raises ConfigError naming the flag whose policy does not exist or does not take its settings."""
    axes = {
        "batching": "engine.batching",
        "admission": "engine.admission",
        "scheduling_policy": "engine.ordering",
        "preemption": "engine.preemption",
        "placement": "cluster.placement",
        "evict": "kv.evict",
    }
    for field, axis in axes.items():
        choice: PolicyChoice = getattr(options, field)
        try:
            registry.load(axis, choice.name, choice.config)
        except ConfigError as error:
            raise ConfigError(f"{_flag(field)}: {error}") from error


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def _explain(error: Any, given: dict[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    where = _flag(name) if name in given else f"--config: {name.replace('_', '-')}"
    if error["type"] == "extra_forbidden":
        return f"{where} is not a setting; `--help` lists them"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        stated = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {error}") from error
    if not isinstance(stated, dict):
        raise ConfigError(f"--config {file}: expected `key: value` lines, keys as the flags are named")
    return {str(key).replace("-", "_"): value for key, value in stated.items()}


def _parameter(name: str, annotation: Any, field: Any, positional: bool) -> inspect.Parameter:
    default = field.get_default(call_default_factory=True)
    shown = default.name if isinstance(default, PolicyChoice) else default
    text = f"{field.description}" + (f" [default: {shown}]" if shown not in (None, False, "") else "")
    kind: Any = str if annotation is PolicyChoice or annotation == Dtype else annotation
    variable = f"HEADRACE_{name.upper()}"
    if positional:
        info: Any = typer.Argument(help=text, envvar=variable, show_default=False, show_envvar=False)
    else:
        flag = _flag(name)
        declared = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
        info = typer.Option(declared, help=text, envvar=variable, show_default=False, show_envvar=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_optional(kind), info]
    )


def _optional(kind: Any) -> Any:
    return kind if type(None) in getattr(kind, "__args__", ()) else kind | None


def _config() -> inspect.Parameter:
    info = typer.Option(
        "--config", help="YAML file of settings, keys named as the flags", envvar="HEADRACE_CONFIG"
    )
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, info]
    )
