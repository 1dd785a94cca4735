"""What nodes say to each other. In order per pair of incarnations; handlers are idempotent by `SequenceKey`, slot or ticket."""

from enum import Enum

import msgspec

from headrace.types.ids import Address, BlockHash, PoolId, SequenceKey, Slot
from headrace.types.kv import BlockRun, TableRun
from headrace.types.lending import LendingMessage
from headrace.types.request import FinishReason
from headrace.types.weights import Switch, Switched


class Role(Enum):
    """What an instance does for one sequence. Not a property of the instance: each can do all."""

    WHOLE = "whole"
    PREFILL = "prefill"
    """Prefill, draw the first token, hold the KV until a decode instance asks for it."""
    DECODE = "decode"
    """Reserve, receive the KV from `Start.source`, go on from the token in its tail."""


class Message(msgspec.Struct, frozen=True, tag=True):
    """Root of all messages; the tag on the wire is the class's name."""


# Router to instance


class Start(Message, frozen=True):
    """Begin a sequence. Its shell attaches the `SequencePayload`."""

    key: SequenceKey
    role: Role
    total: int
    """Prompt plus history, tokens."""
    history: int
    """Tokens already emitted to the user."""
    emits_max: int
    """New tokens at most, beyond the history."""
    hashes: tuple[BlockHash, ...]
    """Chain over the full blocks of `total` that the router knows."""
    arrival_ns: int
    deadline_ns: int
    priority: int = 0
    source: Address | None = None
    """For DECODE: who prefills."""
    fetch: Address | None = None
    """Who sends what more of the prefix it has cached, before the rest is computed."""
    version: int = 0
    """Of the weights: the hashes are under its root, and the instance must have it."""
    tenant: str = ""


class Resume(Message, frozen=True):
    """To an instance that holds a prefilled sequence: decode it yourself."""

    key: SequenceKey


class Cancel(Message, frozen=True):
    """Stop a sequence and free what it holds. Unknown keys are ignored."""

    key: SequenceKey


class Drain(Message, frozen=True):
    """Refuse new sequences, finish the ones at hand."""


class Stay(Message, frozen=True):
    """The sequence that you offered to `target` is not wanted there (any more): keep it."""

    key: SequenceKey
    target: Address


class Migrate(Message, frozen=True):
    """Hand one running sequence, of your choice, to `target` while it runs."""

    target: Address


# Instance to router


class Refused(Message, frozen=True):
    """The instance will not start this sequence now; the router asks again elsewhere until the deadline."""

    key: SequenceKey
    reason: str


class Failed(Message, frozen=True):
    """The sequence ended here without a result."""

    key: SequenceKey
    reason: str
    retry: bool
    """Another attempt may succeed (a peer was lost, a deadline of a stage passed); else the request itself cannot be served."""
    alone: bool = False
    """Those peers that are up lend too little for it: no failure as long as one that has ended may come back."""


class Begun(Message, frozen=True):
    """The first chunk is planned."""

    key: SequenceKey
    at_ns: int
    cached: int
    """Tokens found in this instance's pool,"""
    fetched: int = 0
    """and those of them that were fetched into it for this sequence."""


class Prefilled(Message, frozen=True):
    """Every known token has KV here and the first new token is drawn; a PREFILL sequence is now held."""

    key: SequenceKey
    at_ns: int


class Joined(Message, frozen=True):
    """The decode instance holds all KV: the prefill instance is out of the picture."""

    key: SequenceKey
    at_ns: int
    cached: int
    blocks: int
    bytes: int
    writes: int


class TokenRun(msgspec.Struct, frozen=True, array_like=True):
    """`count` new tokens of a sequence, from index `first` of its choice's output."""

    key: SequenceKey
    first: int
    count: int
    finish: FinishReason | None = None
    hashes: tuple[BlockHash, ...] = ()
    """Of blocks completed by these tokens, continuing the chain of `Start.hashes`."""
    recomputed: int = 0
    """With `finish`: tokens computed again on this instance after preemption."""


class Tokens(Message, frozen=True):
    """All that one step emitted. Its shell attaches the `Emission`s."""

    runs: tuple[TokenRun, ...]


class Offer(Message, frozen=True):
    """The sender would hand this running sequence to `target`: start it there as DECODE, with the sender as its source, or say `Stay`."""

    key: SequenceKey
    target: Address


class Stayed(Message, frozen=True):
    """The sender keeps a sequence that it had offered to `target`: end it there."""

    key: SequenceKey
    target: Address


class Moved(Message, frozen=True):
    """From now on the sequence is `target`'s. All tokens that the sender drew were told before."""

    key: SequenceKey
    target: Address
    blocks: int
    bytes: int
    writes: int
    recomputed: int
    """Tokens computed again on the sender after preemption."""


class Returned(Message, frozen=True):
    """What another instance had generated is cached here now, for a next turn."""

    key: SequenceKey
    tokens: int
    bytes: int


class Unfenced(Message, frozen=True):
    """`peer` did not confirm in time that it stopped writing; only its end can prove that now."""

    peer: Address


class Report(Message, frozen=True):
    """What others may know of an instance. Counts at `observed_at_ns`."""

    observed_at_ns: int
    waiting: int
    running: int
    held: int
    receiving: int
    tokens_waiting: int
    """Tokens still to prefill."""
    blocks_total: int
    """In its pool, over all groups."""
    blocks_free: int
    """Free or evictable in its pool as last heard, over all groups; -1 unknown."""
    steps: int
    draining: bool
    sending: int = 0
    """Sequences whose KV is being sent elsewhere."""
    blocks_demand: int = 0
    """That the first waiting sequence needs to start, over all groups; 0 if nothing waits."""
    tokens_running: int = 0
    """Context of the running sequences."""
    urgent: int = 0
    """Running sequences of a priority below 0."""
    preemptions: int = 0
    """Since its start."""
    version: int = 0
    """Of the weights with which it computes."""


# Decode instance to prefill instance, and back


class Dispatch(Message, frozen=True):
    """Where the target wants the KV of `key`."""

    key: SequenceKey
    slot: Slot
    table: tuple[TableRun, ...]
    """Target blocks, beyond the target's own hit. Empty when both use one pool: then blocks are handed over by the pool."""
    shared: bool
    expected: int
    """Block-layers plus one for the tail: what the target's counter will reach."""
    known: int = 0
    """Tokens of the sequence that the target knows."""


class More(Message, frozen=True):
    """To the target: the sequence, which still runs here, has grown to so many tokens. Answered by a further `Dispatch` of the same slot,
    whose `table` is what has been added, or by giving up.
    """

    key: SequenceKey
    slot: Slot
    tokens: int


class Abandon(Message, frozen=True):
    """The target gives up: answer `Fenced` once no write into this slot can land any more."""

    key: SequenceKey
    slot: Slot


class Fenced(Message, frozen=True):
    key: SequenceKey
    slot: Slot


class Tail(Message, frozen=True):
    """The last piece, of weight 1: the tokens that the target does not know (its shell attaches the `Emission`) and what the source did."""

    key: SequenceKey
    slot: Slot
    emitted: int
    """The last so many tokens; of a prefilled sequence the first one."""
    hashes: tuple[BlockHash, ...]
    """Chain over all full blocks of the prompt and history."""
    blocks: int
    bytes: int
    writes: int
    skipped: int = 0
    """Block-layers that are not sent, as windows have passed them: they count with the tail."""
    moved: bool = False
    """The sequence ran at the source until now: with this message it is the target's."""


# Between instances, about cached blocks


class Fetch(Message, frozen=True):
    """Write what your pool has of this chain into `table`, and say `Found`. The key is of this errand, not of a sequence."""

    key: SequenceKey
    slot: Slot
    table: tuple[TableRun, ...]
    """Of the blocks that are wanted."""
    hashes: tuple[BlockHash, ...]
    """From the first block on, to the last one wanted."""


class Found(Message, frozen=True):
    """Of weight 1: what the sender's pool has, which it writes."""

    key: SequenceKey
    slot: Slot
    blocks: int
    """Leading blocks of the chain."""
    skipped: int
    """Block-layers of the table that it does not write: they count with this."""
    bytes: int = 0
    """That it writes."""


class Keep(Message, frozen=True):
    """The sender's pool has this chain, of a request that you prefilled and that has ended: fetch what you lack, if you have room."""

    key: SequenceKey
    hashes: tuple[BlockHash, ...]
    """From the first block on."""


# Instance to pool


class Lease(Message, frozen=True):
    """Ask for blocks, per group. Replaces this holder's earlier unmet request."""

    need: tuple[int, ...]
    """Work waits for these."""
    want: tuple[int, ...]
    """With these the next request can wait (low water)."""
    since_ns: int = 0
    """Arrival of the request that waits: of all that are short, the oldest is served first."""


class Return(Message, frozen=True):
    """Leased blocks that the holder does not need."""

    runs: tuple[BlockRun, ...]


class Match(Message, frozen=True):
    """Find and lock the longest served prefix of at most `limit` tokens for `key`."""

    key: SequenceKey
    hashes: tuple[BlockHash, ...]
    limit: int


class Publish(Message, frozen=True):
    """Full, immutable blocks of `key`, whose steps have retired: from the lease into the index, locked by `key`."""

    key: SequenceKey
    table: tuple[TableRun, ...]
    hashes: tuple[BlockHash, ...]
    """Of logical blocks `first`, `first + 1`, ... to the last published one; the block before the first published one is among them."""
    first: int = 0


class Release(Message, frozen=True):
    """Drop all locks of `key`."""

    key: SequenceKey


class Trim(Message, frozen=True):
    """Drop the locks of `key` on a window group's blocks before logical block `below`."""

    key: SequenceKey
    group: int
    below: int


class Handover(Message, frozen=True):
    """Move the locks of `key`, and its unpublished blocks (`private`), to `target`, which uses the same pool."""

    key: SequenceKey
    target: Address
    private: tuple[TableRun, ...]


class Quiet(Message, frozen=True):
    """The sender has no write in flight into memory of `lost`, and starts none."""

    lost: Address


# Pool to instance


class Leased(Message, frozen=True):
    runs: tuple[BlockRun, ...]
    short: bool
    """The need is not met; the pool remembers, and sends more when it has more."""
    free: tuple[int, ...]
    """Free or evictable blocks left in the pool, per group."""


class Recall(Message, frozen=True):
    """`on`: another holder is short, keep nothing spare until told otherwise. `force`: stop the lowest-ranked sequence, too."""

    on: bool
    force: bool


class Matched(Message, frozen=True):
    key: SequenceKey
    tokens: int
    table: tuple[TableRun, ...]


class Indexed(Message, frozen=True):
    """To the router: what entered the pool's prefix index, and what left it, since the message numbered one less."""

    number: int
    stored: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...]


class Adopted(Message, frozen=True):
    """`key`'s blocks are now the receiver's: `table` in all; the first `published[group]` logical blocks are locked, the rest leased."""

    key: SequenceKey
    table: tuple[TableRun, ...]
    published: tuple[int, ...]


AnyMessage = (
    Start
    | Resume
    | Cancel
    | Drain
    | Stay
    | Migrate
    | Refused
    | Failed
    | Begun
    | Prefilled
    | Joined
    | Tokens
    | Offer
    | Stayed
    | Moved
    | Unfenced
    | Report
    | Dispatch
    | More
    | Fetch
    | Found
    | Keep
    | Returned
    | Abandon
    | Fenced
    | Tail
    | Lease
    | Return
    | Match
    | Publish
    | Release
    | Trim
    | Handover
    | Quiet
    | Leased
    | Recall
    | Matched
    | Adopted
    | Indexed
    | Switch
    | Switched
    | LendingMessage
)


class InstanceInfo(msgspec.Struct, frozen=True):
    """What an instance says of itself when it joins."""

    pool: PoolId
    pool_address: Address
    leaning: str
    """"prefill" | "decode" | "mixed": where a placement prefers it. Each instance can do all."""
    sequences_max: int
    blocks_total: tuple[int, ...]
    """Of its pool, per group."""
    host: str = "local"
    block_size: int = 1
    """Tokens of a block."""
    block_bytes: int = 0
    """KV of one block, over all groups; 0: not known."""
    version: int = 0
    """Of the weights that it has when it joins."""
