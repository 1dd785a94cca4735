"""What the router knows of one choice: its stage, its attempt, what was delivered. See `nodes.router` for the life cycle."""

from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from headrace.nodes.fleet import Fleet
from headrace.types.ids import Address, BlockHash, SequenceKey
from headrace.types.messages import Begun, Joined, Moved, Prefilled, Role, Start, TokenRun
from headrace.types.request import Request, Timeline

DOUBLINGS_MAX = 4
"""Of the pause after a refusal."""


class Stage(Enum):
    BEHIND = "behind"
    QUEUED = "queued"
    PREFILL = "prefill"
    BINDING = "binding"
    TRANSFER = "transfer"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Choice:
    """One of a request's `n` continuations."""

    request: Request
    index: int
    stage: Stage
    timeline: Timeline
    hashes: list[BlockHash]
    """Chain over the full blocks of the prompt and of what was delivered."""
    version: int = 0
    """Of the weights: of these hashes, and of the latest attempt."""
    attempt: int = 0
    next: int = 0
    """Tokens delivered: the index of the next one."""
    history: int = 0
    """`next` when this attempt began."""
    ahead: dict[int, TokenRun] = field(default_factory=dict[int, TokenRun])
    """Runs that came before one that goes first (they come from two instances), by their first index."""
    prefill: Address | None = None
    decode: Address | None = None
    joined: bool = False
    moving: Address | None = None
    """Where the attempt is on its way to, while `decode` still runs it."""
    seen: dict[Address, None] = field(default_factory=dict[Address, None])
    """Instances on which this attempt was started."""
    failures: int = 0
    deaths: int = 0
    """Instances that ended while they ran it."""
    refusals: int = 0
    """Since its latest attempt that began."""
    ticket: int = 0
    """Of its latest place in the queue; earlier ones are void."""
    assigned: dict[Address, int] = field(default_factory=dict[Address, int])
    """Tokens that this attempt counts for in the fleet's columns,"""
    unprefilled: int = 0
    """and those of them that `prefill` has still to prefill."""

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(self.request.id, self.index, self.attempt)

    @property
    def total(self) -> int:
        return self.request.prompt + self.next

    @property
    def waits(self) -> bool:
        """For the placement policy."""
        return self.stage is Stage.QUEUED or self.stage is Stage.BINDING

    def start(self, role: Role, history: int, source: Address | None, fetch: Address | None) -> Start:
        """What starts this attempt on an instance, with so many tokens as history."""
        request = self.request
        return Start(
            key=self.key,
            role=role,
            total=request.prompt + history,
            history=history,
            emits_max=request.tokens_max - history,
            hashes=tuple(self.hashes),
            arrival_ns=request.arrival_ns,
            deadline_ns=request.deadline_ns,
            priority=request.priority,
            source=source,
            fetch=fetch,
            version=self.version,
            tenant=request.tenant,
        )

    def pauses(self) -> int:
        """It was refused: how many pauses long it waits before it is asked for again."""
        self.refusals += 1
        return 1 << min(self.refusals - 1, DOUBLINGS_MAX)

    def prefilled(self, tokens: int, fleet: Fleet) -> None:
        """So many tokens of the prompt need no prefill any more."""
        tokens = min(tokens, self.unprefilled)
        self.unprefilled -= tokens
        if tokens and self.prefill is not None:
            fleet.assign(self.prefill, 0, 0, -tokens)

    def unassign(self, fleet: Fleet) -> None:
        """Nobody works for it any more."""
        self.prefilled(self.unprefilled, fleet)
        for target, tokens in self.assigned.items():
            fleet.assign(target, -1, -tokens)
        self.assigned.clear()

    def renew(self, version: int) -> None:
        """Its next attempt is under other weights: what it knows of blocks is void, and its instances name them anew."""
        self.version = version
        self.hashes.clear()
        self.request = replace(self.request, hashes=())

    def note(self, message: Begun | Prefilled | Joined | Moved) -> None:
        """What the timeline says of it."""
        timeline = self.timeline
        match message:
            case Begun(_, at_ns, cached):
                self.refusals = 0
                again = self.request.prompt + self.history - cached if self.attempt else 0
                self.timeline = replace(
                    timeline, prefill_ns=at_ns, cached=cached, recomputed=timeline.recomputed + again
                )
            case Prefilled(_, at_ns):
                self.timeline = replace(timeline, prefilled_ns=at_ns)
            case Joined(_, at_ns, cached, blocks, moved, writes):
                self.timeline = replace(
                    timeline,
                    joined_ns=at_ns,
                    cached_decode=cached,
                    blocks_moved=blocks,
                    bytes_moved=moved,
                    writes=writes,
                )
            case Moved():
                self.timeline = replace(timeline, recomputed=timeline.recomputed + message.recomputed)

    def needs(self, peer: Address) -> bool:
        """Does this attempt need that instance? The prefill one until all of its work, the first token included, is here."""
        if self.stage not in (Stage.PREFILL, Stage.BINDING, Stage.TRANSFER, Stage.DECODE):
            return False
        return peer == self.decode or (
            peer == self.prefill and (not self.joined or self.next == self.history)
        )
