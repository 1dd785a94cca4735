"""What a running service says of itself to its API."""

import msgspec

from headrace.types.messages import Report
from headrace.types.ranges import RangeCounts


class ServiceInfo(msgspec.Struct, frozen=True):
    """Constant after start; without a worker, what depends on its arithmetic is not known yet."""

    model: str
    """Name under which the model is served."""
    length_max: int
    """Prompt plus new tokens, at most."""
    block_size: int
    vocabulary: int
    numerics: str
    """Id of the workers' arithmetic: equal ids promise equal bits. Empty: no such promise (the text of `promise` says why)."""
    promise: str = ""


class InstanceStatus(msgspec.Struct, frozen=True):
    """One worker as `/ready`, `/metrics` and the dashboard show it."""

    name: str
    epoch: int
    leaning: str
    state: str
    """"starting" | "ready" | "draining" | "restarting" | "failed"."""
    pid: int | None = None
    """Its process, while there is one."""
    report: Report | None = None
    host: str = ""
    """Of one that joined from elsewhere; empty: the service's own."""
    ranges: RangeCounts | None = None
    """Of its present incarnation, where memory is virtual."""


class ServiceStatus(msgspec.Struct, frozen=True):
    """A snapshot."""

    ready: bool
    reason: str
    """Why not ready; empty if it is."""
    instances: tuple[InstanceStatus, ...]
    requests_waiting: int
    requests_running: int
    counters: dict[str, int]
    """Counts since start by name: requests_finished, requests_failed, tokens_prompt_computed, tokens_prompt_hit, tokens_transferred,
    tokens_generated, preemptions, failovers, worker_restarts, transfer_bytes, transfer_writes, tokens_prompt_fetched, roles_turned,
    migrations, migrations_aborted, tokens_returned, returned_bytes, swaps_out, swaps_in, swaps_full, swap_copies, swap_bytes."""
    blocks_total: int
    blocks_free: int
    """Free or evictable, over all pools and groups."""
    weights: int = 0
    """Version of the weights with which sequences are started now; 0: what the service began with."""
