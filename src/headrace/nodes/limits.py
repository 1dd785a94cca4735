"""Limits of the cores, each with its default. Times are nanoseconds."""

from enum import Enum

import msgspec

SECOND = 1_000_000_000

PARTITION = 1024
"""Tokens: attention over fewer is never divided (see docs/decisions/0004)."""


class Stream(Enum):
    """In what pieces a prompt's KV leaves for its decode instance."""

    CHUNK = "chunk"
    """What a chunk finished, all layers, when it has run."""
    LAYER = "layer"
    """The same layer by layer, while the chunk runs."""
    REQUEST = "request"
    """All of it, when the whole prompt is computed."""


class Caching(Enum):
    """Who keeps what has been computed: four steps, each with those before it (MemServe, arXiv 2406.17565, section 5)."""

    NONE = "none"
    """Nobody: every prompt is computed, and all of it travels."""
    PREFILL = "prefill"
    """Whoever prefills. A decode instance is sent everything each turn."""
    INCREMENT = "increment"
    """Decode instances, too: only what they lack travels."""
    RETURN = "return"
    """When a request ends, what its decode instance has generated goes back to where it was prefilled, for the next turn."""


class InstanceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one instance."""

    tokens_max: int = 2048
    """Tokens of one step (`--max-num-batched-tokens`)."""
    sequences_max: int = 256
    """Sequences running at once (`--max-num-seqs`)."""
    waiting_max: int = 4096
    """Sequences waiting; more are refused."""
    depth: int = 2
    """Plans in flight."""
    repeats_max: int = 1
    """How often the executor may run one plan; more than 1 is for executors that keep no block tables."""
    overheard: bool = False
    """Somebody beside the instance follows what is published; a repeated plan ends where a block is filled."""
    caching: Caching = Caching.INCREMENT
    """Who matches and publishes cached blocks (`--caching`)."""
    stream_interval: int = 1
    """New tokens of a sequence are told in groups of so many; the first and the last ones at once (`--stream-interval`)."""
    stream: Stream = Stream.CHUNK
    """In what pieces KV is sent (`--kv-stream`)."""
    lease_blocks: int = 32
    """Blocks kept in hand beyond what work waits for."""
    swap_blocks: tuple[int, ...] = ()
    """Blocks of the host area, per group (`--swap-space`); empty: there is none."""
    hold_ns: int = 60 * SECOND
    """A prefilled sequence waits so long for its KV to be fetched."""
    receive_ns: int = 300 * SECOND
    """From the dispatch until all KV is here, the source's queue included."""
    fetch_ns: int = 2 * SECOND
    """So long a cached prefix is waited for; then it is computed."""
    move_ns: int = 10 * SECOND
    """A sequence that is to move waits so long for its target to make room, then it stays."""
    move_blocks_last: int = 16
    """A sequence that moves leaves the batch when no more blocks than these are left to send,"""
    move_stages_max: int = 3
    """or after so many stages in which it ran on."""
    lend_share: float = 0.0
    """Of its pool an instance lends so much to peers whose sequences are too long for theirs. 0: none lends, and none borrows."""
    lend_ns: int = 5 * SECOND
    """A partition has so long to reach its holder; then another one is asked."""
    lend_retry_ns: int = SECOND // 20
    """A peer that would not lend is asked again after this."""
    lend_wait_ns: int = 30 * SECOND
    """A sequence that stands still for want of memory to borrow is given up after this."""
    lend_answer_ns: int = 10 * SECOND
    """A holder has so long for each piece of an answer; then the sequences that need it start over."""
    lend_blocks_step: int = 1
    """Blocks written to a holder per step, while steps go on (Infinite-LLM: more than 16 tokens cannot be hidden)."""
    partition_tokens: int = PARTITION
    """What is lent at once: the attention kernels cut there. Other values are for executors that compute nothing."""
    fence_ns: int = 5 * SECOND
    """A source has so long to confirm that it writes no more; then its end is asked for."""
    stuck_ns: int = SECOND
    """Where nothing has moved for so long and something waits for memory, what came last is given up."""


class TierConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The tiers below one pool. Counts are blocks."""

    host_blocks: int
    """Of host memory (`--host-cache`); what goes to disk goes through it."""
    disk_blocks: int = 0
    """Of local disk (`--disk-cache-size`)."""
    ahead_blocks: int = 1
    """Cached blocks are moved to host memory while fewer than these are free, so that leases find free ones."""
    batch_blocks: int = 32
    """At most so many are on their way into one tier at a time."""
    load_ns: int = SECOND
    """Whoever looks up a prefix waits so long for what is in a tier; then it is told of what is in the pool."""
    recompute_ns: int = 0
    """What computing one block takes; 0: not known. A tier that takes longer is not read."""


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the router."""

    choices_max: int = 4096
    """Unfinished choices; further requests are rejected as overload (`--max-requests`)."""
    attempts_max: int = 16
    """Attempts at one choice before its request fails."""
    split_failures_max: int = 2
    """After so many failed handovers a choice is kept whole on one instance."""
    deaths_max: int = 8
    """A request fails when so many of its workers have ended under it: it may be the cause."""
    refused_ns: int = SECOND // 100
    """Pause before asking again after a refusal; twice as long after the next one, up to sixteen times, until something begins."""
    away_ns: int = 60 * SECOND
    """So long after an instance's end a request that needs what it lends waits for it to come back."""
