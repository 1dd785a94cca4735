"""A request as a core may know it: lengths, hashes, limits. Token ids and sampling live in `types.payload`."""

from enum import Enum

import msgspec

from headrace.types.ids import BlockHash, RequestId

NEVER_NS = 2**62
"""A deadline that does not come."""


class FinishReason(Enum):
    STOP = "stop"
    """An end-of-text or stop token was drawn (the executor sees it), or a stop string was found (the API sees it)."""
    LENGTH = "length"
    """The limit of new tokens was reached."""


class Slo(msgspec.Struct, frozen=True):
    """Latency goals, nanoseconds; None is unset."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None


class Request(msgspec.Struct, frozen=True):
    """What the user asked. Immutable."""

    id: RequestId
    prompt: int
    """Prompt length, tokens (>= 1)."""
    hashes: tuple[BlockHash, ...]
    """Hash of every full block of the prompt."""
    tokens_max: int
    """New tokens at most, per choice (>= 1)."""
    choices: int = 1
    arrival_ns: int = 0
    deadline_ns: int = NEVER_NS
    """Instant after which the request is ended with an error."""
    priority: int = 0
    """Lower runs first (as in vLLM)."""
    tenant: str = ""
    category: str = ""
    slo: Slo = Slo()
    version: int = 0
    """Of the weights under whose root the hashes are."""


class Timeline(msgspec.Struct, frozen=True):
    """When one choice passed each stage, on its workers' clocks (one clock on one host), and what moved. 0 = has not happened."""

    arrival_ns: int = 0
    placed_ns: int = 0
    prefill_ns: int = 0
    """First chunk planned."""
    prefilled_ns: int = 0
    """The whole prompt has KV, and the first token is drawn."""
    joined_ns: int = 0
    """The decode worker holds all KV."""
    finished_ns: int = 0
    cached: int = 0
    """Prompt tokens found in the prefill worker's cache."""
    cached_decode: int = 0
    """Prompt tokens found in the decode worker's own cache, hence not sent."""
    blocks_moved: int = 0
    bytes_moved: int = 0
    writes: int = 0
    """Calls that moved them."""
    recomputed: int = 0
    """Tokens computed a second time: preemption, failover."""
    attempts: int = 1
