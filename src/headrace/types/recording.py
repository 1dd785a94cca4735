"""What `headrace serve --record DIR` keeps: `DIR/trace.jsonl` has a `RecordedRequest` a line, `DIR/meta.json` is a `Recording`.

Beside them lie `DIR/cluster.yaml` (the service's settings, keys named as the flags of `serve`) and `DIR/journal/` (each core's journal).

Nothing of a text can be found again from block names or tenants: they are digests under a random key that is kept nowhere, so they can be
compared within one recording only.
"""

from typing import Any

import msgspec

from headrace.types.kv import KVSpec
from headrace.types.request import FinishReason

FORMAT = 1

CANCELLED = "cancelled"
"""The client left."""
REJECTED = "rejected"
"""Refused as overload: another time it might have been served."""
FAILED = "failed"
FINISHES = (*(reason.value for reason in FinishReason), CANCELLED, REJECTED, FAILED)
"""How a choice may end; "stop" and "length" are good ends."""


class RecordedChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happened to one continuation. Instants are nanoseconds from the recording's begin; 0: it did not happen, or was not seen."""

    placed_ns: int = 0
    prefill_ns: int = 0
    """Its first chunk was planned."""
    prefilled_ns: int = 0
    """The whole prompt had KV, on the worker's side."""
    first_ns: int = 0
    """Its first token was handed to the API."""
    joined_ns: int = 0
    """The decode worker held all KV."""
    finished_ns: int = 0
    """Its last token was handed to the API; for what ended otherwise, when it ended."""
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
    attempts: int = 0
    """0: it was never placed."""
    prefill: str = ""
    """Name of the worker of its last attempt; empty: none."""
    decode: str = ""


class RecordedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Its line is written when it ends; when the service ends the lines are put in order of `(arrival_ns, number)`.

    `output`, `output_blocks`, `finish`, `choices` and `output_ids` have an entry a choice.
    """

    number: int
    """Counts the service's requests, from 1, by arrival. A request that had not ended when the service was killed is missing."""
    arrival_ns: int
    """From the recording's begin: when the API had read it. Its body and its connection are not in it."""
    prompt: int
    """Tokens."""
    output: tuple[int, ...]
    """Tokens that came out, the one that ended it included; 0: it failed before."""
    block_size: int
    """Tokens."""
    prompt_blocks: tuple[int, ...]
    """Names (0 .. 2**63-1) of the full blocks of the prompt; equal names mean an equal block behind equal ones."""
    output_blocks: tuple[tuple[int, ...], ...]
    """Names of the full blocks behind those: logical blocks `prompt // block_size` up to `(prompt + output) // block_size`. A later
    request that begins with this prompt and answer has the same names in its `prompt_blocks`."""
    finish: tuple[str, ...]
    """Of `FINISHES`."""
    tokens_max: int
    """New tokens at most, of each choice."""
    choices: tuple[RecordedChoice, ...]
    category: str = ""
    tenant: str = ""
    """Not what the client said, but a name that is the same for the same tenant. With `--record-text` it is what the client said."""
    priority: int = 0
    ttft_ns: int | None = None
    """Goals."""
    tpot_ns: int | None = None
    error: str = ""
    """What the client was told, if it was rejected or failed."""
    prompt_ids: tuple[int, ...] = ()
    """With `--record-text` only."""
    output_ids: tuple[tuple[int, ...], ...] = ()
    """With `--record-text` only."""


class RecordedInstance(msgspec.Struct, frozen=True):
    """One worker."""

    name: str
    leaning: str
    pool: int
    """Index into `Recording.pools`."""


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """How the recording was made, and the facts of the deployment that its settings alone do not tell."""

    format: int = FORMAT
    version: str
    """Of Headrace."""
    started: str
    """Wall time of the begin, ISO 8601, UTC."""
    started_ns: int
    """The same instant on the service's clock: journals use that clock, the trace counts from here."""
    device: str
    """What the workers run on."""
    threads: int
    """Of each worker."""
    model: str
    """Name under which it was served."""
    config: dict[str, Any]
    """The checkpoint's config.json."""
    fingerprint: str
    """Of configuration and weights."""
    numerics: str
    """Id of the workers' arithmetic; empty: workers need not have agreed."""
    spec: KVSpec
    vocabulary: int
    length_max: int
    """Prompt plus new tokens, at most."""
    pools: tuple[tuple[int, ...], ...]
    """Blocks of each pool, per group."""
    instances: tuple[RecordedInstance, ...]
    text: bool = False
    """Token ids were kept."""
