"""What `headrace profile` measured on a live engine, as JSON. `cost.measured` makes a cost model of it."""

from typing import Any

import msgspec

FORMAT = 1


class StepSample(msgspec.Struct, frozen=True):
    """One batch shape: chunks as (tokens, context before them), and decode rows whose contexts sum to `context`."""

    prefills: tuple[tuple[int, int], ...]
    decodes: int
    context: int
    seconds: tuple[float, ...]


class PairSample(msgspec.Struct, frozen=True):
    """Two workers of one host at once: how many times longer a step of `kind` takes while the other runs steps of `beside`."""

    kind: str
    """"prefill" | "decode"."""
    beside: str
    slowdown: float


class CopySample(msgspec.Struct, frozen=True):
    """KV moved between two workers' pools."""

    nbytes: int
    writes: int
    seconds: tuple[float, ...]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    format: int = FORMAT
    model: str
    config: dict[str, Any]
    """The checkpoint's config.json."""
    engine_version: str
    device: str
    threads: int
    """Of each worker."""
    dtype: str
    block_size: int
    steps: tuple[StepSample, ...]
    pairs: tuple[PairSample, ...] = ()
    copies: tuple[CopySample, ...] = ()
    message_s: float = 0.0
    """From one process's core to another's, one way."""
    step_overhead_s: float = 0.0
    """Between the end of a step and the begin of the next that was planned on it, beyond the model's own time."""
    request_overhead_s: float = 0.0
    """From a client's request to the router's `Submitted`, and from the first token to the client, together."""
    notes: str = ""
