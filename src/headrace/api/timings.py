"""Where the time of one choice went, for clients that ask (`return_timings`)."""

import msgspec

from headrace.types.request import Timeline

MS_NS = 1e6


class Timings(msgspec.Struct, frozen=True):
    """Stages follow each other: queue, prefill, transfer, decode. Milliseconds, by the clocks of the workers and the router."""

    queue_ms: float
    """From arrival until the first chunk was planned."""
    prefill_ms: float
    """Until the first token was drawn."""
    transfer_ms: float
    """Until the decode worker held all KV; 0 if it is the same worker."""
    decode_ms: float
    """Until the last token."""
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens found in the prefill worker's cache,"""
    cached_tokens_decode: int
    """and in the decode worker's own."""
    blocks_moved: int
    bytes_moved: int
    writes: int
    recomputed_tokens: int
    """Computed again after preemption or failover."""
    attempts: int


def timings_of(timeline: Timeline | None, tokens: int) -> Timings:
    """A choice that a stop string ended has no time after its first token; what is unknown is 0."""
    t = timeline or Timeline()
    ready_ns = t.joined_ns or t.prefilled_ns
    return Timings(
        queue_ms=_span_ms(t.arrival_ns, t.prefill_ns),
        prefill_ms=_span_ms(t.prefill_ns, t.prefilled_ns),
        transfer_ms=_span_ms(t.prefilled_ns, t.joined_ns),
        decode_ms=_span_ms(ready_ns, t.finished_ns),
        completion_tokens=tokens,
        cached_tokens=t.cached,
        cached_tokens_decode=t.cached_decode,
        blocks_moved=t.blocks_moved,
        bytes_moved=t.bytes_moved,
        writes=t.writes,
        recomputed_tokens=t.recomputed,
        attempts=t.attempts,
    )


def _span_ms(begin_ns: int, end_ns: int) -> float:
    return round((end_ns - begin_ns) / MS_NS, 3) if begin_ns and end_ns else 0.0
