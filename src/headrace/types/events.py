"""What a core is told (events) and what it asks its shell to do (commands). Matched exhaustively."""

import msgspec

from headrace.types.ids import Address, RequestId, SequenceKey, Slot, StepId, WriteId
from headrace.types.messages import AnyMessage, InstanceInfo
from headrace.types.plan import StepPlan, StepResult
from headrace.types.request import FinishReason, Request, Timeline
from headrace.types.swaps import SwapIn, SwapOut, Swapped
from headrace.types.tiers import TierCommand, TierEvent
from headrace.types.weights import (
    Committed,
    Completed,
    SwitchAsked,
    SwitchDropped,
    UseWeights,
    WeightsReady,
)


class Received(msgspec.Struct, frozen=True, tag=True):
    """A message of a peer's incarnation."""

    source: Address
    message: AnyMessage


class PeerUp(msgspec.Struct, frozen=True, tag=True):
    """An instance joined; a higher epoch of a name replaces the lower one, which was reported lost before.

    Pools hear of it before the router and other instances do, and before the instance's own core starts: so no message of a holder is ever
    unknown to its pool, and no peer can write before every pool knows it as a writer.
    """

    peer: Address
    info: InstanceInfo


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """That incarnation has ended: it sends, writes and reads nothing any more. `info` is what it said when it joined."""

    peer: Address
    info: InstanceInfo


class StepDone(msgspec.Struct, frozen=True, tag=True):
    result: StepResult


class LayersDone(msgspec.Struct, frozen=True, tag=True):
    """Of a plan that asked for it (`StepPlan.layered`) and is being run: the KV of its tokens is there for the model's first layers."""

    step: StepId
    layers: int
    """How many, 1 to all of them."""


class Written(msgspec.Struct, frozen=True, tag=True):
    """At the source: this write has completed, or failed; either way it can no longer land."""

    write: WriteId
    ok: bool


class Landed(msgspec.Struct, frozen=True, tag=True):
    """At the target: a write of `source` with this immediate is in memory."""

    slot: Slot
    weight: int
    source: Address


class Submitted(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Withdrawn(msgspec.Struct, frozen=True, tag=True):
    """The client left, or the API found a stop string: no more of this choice (of all, if None) is wanted."""

    request: RequestId
    choice: int | None = None


class DrainAsked(msgspec.Struct, frozen=True, tag=True):
    """The operator wants `peer` (everything, if None) to finish what it has and take nothing new."""

    peer: Address | None = None


Event = (
    Received
    | PeerUp
    | PeerLost
    | StepDone
    | LayersDone
    | Written
    | Landed
    | Swapped
    | Submitted
    | Withdrawn
    | DrainAsked
    | SwitchAsked
    | SwitchDropped
    | WeightsReady
    | TierEvent
)


class Send(msgspec.Struct, frozen=True, tag=True):
    target: Address
    message: AnyMessage


class Execute(msgspec.Struct, frozen=True, tag=True):
    """Run a plan after those already given."""

    plan: StepPlan


class Once(msgspec.Struct, frozen=True, tag=True):
    """The plan `step`, given before as one that may repeat, is to run once: what follows it differs."""

    step: StepId


class Close(msgspec.Struct, frozen=True, tag=True):
    """The sequence has left this instance: the executor may forget its ids once the plans given so far have run."""

    key: SequenceKey


class Write(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks, or some successive layers of them, into a peer's pool, with a 32-bit immediate of slot and weight.

    Answered by one `Written` here and, if it succeeded, one `Landed` there.
    """

    write: WriteId
    target: Address
    slot: Slot
    group: int
    source_first: int
    target_first: int
    count: int
    weight: int
    """Block-layers completed, 1..65535."""
    layer: int = 0
    """The first layer, by its index in the group,"""
    layers: int = 0
    """and how many; 0: all, so that a run is one piece of memory."""


class WakeAt(msgspec.Struct, frozen=True, tag=True):
    """Settle at this time at the latest, even if nothing happens. A later `WakeAt` replaces it."""

    at_ns: int


class Deliver(msgspec.Struct, frozen=True, tag=True):
    """To the client: the next tokens of a choice, each exactly once and in order."""

    request: RequestId
    choice: int
    key: SequenceKey
    """Whose emission holds the ids."""
    first: int
    count: int
    finish: FinishReason | None
    timeline: Timeline | None
    """With the first tokens, as far as it has come, and with `finish`."""


class Reject(msgspec.Struct, frozen=True, tag=True):
    """To the client: the request ends without (more) tokens."""

    request: RequestId
    reason: str
    overloaded: bool
    """True: try again later (503); False: it cannot be served."""


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End this incarnation; `PeerLost` follows when it has ended."""

    peer: Address


class Distrust(msgspec.Struct, frozen=True, tag=True):
    """This peer counted what it cannot have written: take nothing of it any more."""

    peer: Address
    why: str


Command = (
    Send
    | Execute
    | Once
    | Close
    | Write
    | SwapOut
    | SwapIn
    | WakeAt
    | Deliver
    | Reject
    | Kill
    | Distrust
    | UseWeights
    | Committed
    | Completed
    | TierCommand
)
