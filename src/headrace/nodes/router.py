"""The router core: every request's life, and the truth of what its client was sent.

Life cycle of a choice (`Stage`):
 1. BEHIND    waits for choice 0 of its request to draw a token: then the prompt is in the prefill instance's cache.
 2. QUEUED    waits for a placement, until the request's deadline.
 3. PREFILL   one attempt runs: `Start` was sent to the prefill instance, and to the decode instance if it is chosen already.
 4. BINDING   prefilled and held; placement is asked for the decode instance.
 5. TRANSFER  the decode instance was told; until it says `Joined`.
 6. DECODE    runs to its end on one instance (a WHOLE sequence is here from its first token on).
 7. DONE      finished, withdrawn, or failed.
An attempt is a `SequenceKey`; what comes of any other attempt is ignored. When an instance that an attempt needs is lost, or says
`Refused` or `Failed(retry)`, all of the attempt is cancelled and the choice is QUEUED again, with what was already delivered as history.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush

from msgspec.structs import replace

from headrace.cluster.policies import PlacementPolicy
from headrace.nodes.fleet import Fleet
from headrace.nodes.limits import RouterConfig
from headrace.types.events import (
    Command,
    Deliver,
    DrainAsked,
    Event,
    Kill,
    PeerLost,
    PeerUp,
    Received,
    Reject,
    Send,
    Submitted,
    WakeAt,
    Withdrawn,
)
from headrace.types.ids import Address, BlockHash, RequestId, SequenceKey
from headrace.types.messages import (
    AnyMessage,
    Begun,
    Cancel,
    Drain,
    Failed,
    Joined,
    Prefilled,
    Refused,
    Report,
    Resume,
    Role,
    Start,
    TokenRun,
    Tokens,
    Unfenced,
)
from headrace.types.request import NEVER_NS, Request, Timeline
from headrace.types.views import Decline, Placement, PlacementRequest, Wait


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
    failures: int = 0
    deaths: int = 0
    """Instances that ended while they ran it."""
    not_before_ns: int = 0
    assigned: dict[Address, int] = field(default_factory=dict[Address, int])
    """Tokens that this attempt counts for in the fleet's columns."""

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(self.request.id, self.index, self.attempt)

    @property
    def total(self) -> int:
        return self.request.prompt + self.next

    def needs(self, peer: Address) -> bool:
        """Does this attempt need that instance? The prefill one until all of its work, the first token included, is here."""
        if self.stage not in (Stage.PREFILL, Stage.BINDING, Stage.TRANSFER, Stage.DECODE):
            return False
        return peer == self.decode or (
            peer == self.prefill and (not self.joined or self.next == self.history)
        )


class Router:
    """See the module."""

    def __init__(self, address: Address, placement: PlacementPolicy, config: RouterConfig) -> None:
        self.address = address
        self.choices: dict[RequestId, list[Choice]] = {}
        self.counters: dict[str, int] = {}
        """Counts since the start, by the names of `types.service.ServiceStatus.counters`."""
        self._placement = placement
        self._config = config
        self.fleet = Fleet()
        self._queue: deque[Choice] = deque()
        """Choices that wait for the placement policy: QUEUED or BINDING."""
        self._unfinished = 0
        self._serial = 0
        self._deadlines: list[tuple[int, RequestId]] = []
        self._draining = False
        self._wake_ns = 0
        self._out: list[Command] = []

    # The core's three verbs

    def handle(self, event: Event, now_ns: int) -> None:
        match event:
            case Received(source, message):
                if source in self.fleet:
                    self._message(source, message, now_ns)
            case Submitted(request):
                self._submit(request)
            case Withdrawn(request, index):
                self._withdraw(request, index)
            case PeerUp(peer, info):
                self.fleet.add(peer, info)
            case PeerLost(peer):
                self._peer_lost(peer)
            case DrainAsked(peer):
                self._drain(peer)
            case _:
                raise TypeError(f"a router has no use for {event!r}")

    def settle(self, now_ns: int) -> list[Command]:
        self._expire(now_ns)
        self._place_all(now_ns)
        self._wake(now_ns)
        out, self._out = self._out, []
        return out

    def observe(self, now_ns: int) -> Report | None:
        return None

    @property
    def idle(self) -> bool:
        return not self.choices

    @property
    def waiting(self) -> int:
        """Choices that have no instance yet."""
        return sum(c.stage in (Stage.QUEUED, Stage.BEHIND) for group in self.choices.values() for c in group)

    @property
    def unfinished(self) -> int:
        return self._unfinished

    # Requests

    def _submit(self, request: Request) -> None:
        assert request.id not in self.choices, f"request {request.id} is submitted twice"
        if self._draining or self._unfinished + request.choices > self._config.choices_max:
            reason = "the service is shutting down" if self._draining else "too many requests are unfinished"
            self._out.append(Reject(request.id, reason, overloaded=True))
            return
        timeline = Timeline(arrival_ns=request.arrival_ns)
        group = [
            Choice(request, i, Stage.BEHIND if i else Stage.QUEUED, timeline, list(request.hashes))
            for i in range(request.choices)
        ]
        self.choices[request.id] = group
        self._unfinished += len(group)
        self._queue.append(group[0])
        if request.deadline_ns < NEVER_NS:
            heappush(self._deadlines, (request.deadline_ns, request.id))

    def _withdraw(self, request: RequestId, index: int | None) -> None:
        for choice in list(self.choices.get(request, ())):
            if choice.stage is not Stage.DONE and index in (None, choice.index):
                self._count("choices_withdrawn")
                self._cancel(choice)
                self._done(choice)

    def _reject(self, request: RequestId, reason: str, *, overloaded: bool) -> None:
        """End a request with an error, whatever its choices are at."""
        self._count("requests_failed")
        self._out.append(Reject(request, reason, overloaded))
        for choice in list(self.choices.get(request, ())):
            self._cancel(choice)
            self._done(choice)

    def _done(self, choice: Choice) -> None:
        if choice.stage is Stage.DONE:
            return
        self._unassign(choice)
        choice.stage = Stage.DONE
        self._unfinished -= 1
        group = self.choices[choice.request.id]
        if all(c.stage is Stage.DONE for c in group):
            del self.choices[choice.request.id]
        elif choice.index == 0:
            self._release_followers(group)

    def _release_followers(self, group: list[Choice]) -> None:
        for choice in group:
            if choice.stage is Stage.BEHIND:
                choice.stage = Stage.QUEUED
                self._queue.append(choice)

    def _expire(self, now_ns: int) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, request = heappop(self._deadlines)
            if request in self.choices:
                self._reject(request, "the request's deadline has passed", overloaded=False)

    # Placement

    def _place_all(self, now_ns: int) -> None:
        for _ in range(len(self._queue)):
            choice = self._queue.popleft()
            waits = False
            if choice.stage is Stage.QUEUED:
                waits = choice.not_before_ns > now_ns or self._place(choice, now_ns)
            elif choice.stage is Stage.BINDING:
                waits = self._bind(choice, now_ns)
            if waits:
                self._queue.append(choice)

    def _place(self, choice: Choice, now_ns: int) -> bool:
        """Ask for a placement and start the attempt. True if it has to wait."""
        placed = self._placement.place(self._question(choice), self.fleet.view(now_ns))
        if isinstance(placed, Wait):
            return True
        if isinstance(placed, Decline):
            self._reject(choice.request.id, placed.reason, overloaded=placed.overloaded)
            return False
        choice.prefill = placed.prefill
        choice.decode = self._whole_or(choice, placed)
        choice.history = choice.next
        choice.joined = choice.prefill == choice.decode
        choice.stage = Stage.DECODE if choice.joined else Stage.PREFILL
        placed_ns = choice.timeline.placed_ns or now_ns
        choice.timeline = replace(choice.timeline, placed_ns=placed_ns, attempts=choice.attempt + 1)
        self._start(choice, placed.prefill, Role.WHOLE if choice.joined else Role.PREFILL)
        if choice.decode is not None and not choice.joined:
            self._start(choice, choice.decode, Role.DECODE)
        return False

    def _whole_or(self, choice: Choice, placed: Placement) -> Address | None:
        """Handovers that keep failing are not tried for ever."""
        return placed.prefill if choice.failures >= self._config.split_failures_max else placed.decode

    def _bind(self, choice: Choice, now_ns: int) -> bool:
        assert choice.prefill is not None
        decode = self._placement.bind(self._question(choice), self.fleet.view(now_ns), choice.prefill)
        if isinstance(decode, Wait):
            return True
        choice.decode = decode
        if decode == choice.prefill:
            choice.joined = True
            choice.stage = Stage.DECODE
            self._send(decode, Resume(choice.key))
        else:
            choice.stage = Stage.TRANSFER
            self._start(choice, decode, Role.DECODE)
        return False

    def _question(self, choice: Choice) -> PlacementRequest:
        self._serial += 1
        return PlacementRequest(choice.request, choice.total, choice.attempt, self._serial - 1)

    def _start(self, choice: Choice, target: Address, role: Role) -> None:
        request = choice.request
        choice.assigned[target] = choice.total
        self.fleet.assign(target, 1, choice.total)
        start = Start(
            key=choice.key,
            role=role,
            total=request.prompt + choice.history,
            history=choice.history,
            emits_max=request.tokens_max - choice.history,
            hashes=tuple(choice.hashes),
            arrival_ns=request.arrival_ns,
            deadline_ns=request.deadline_ns,
            priority=request.priority,
            source=choice.prefill if role is Role.DECODE else None,
        )
        self._send(target, start)

    # What instances say

    def _message(self, source: Address, message: AnyMessage, now_ns: int) -> None:
        match message:
            case Tokens(runs):
                for run in runs:
                    self._tokens(run, now_ns)
            case Report():
                self.fleet.report(source, message)
            case Unfenced(peer):
                if peer in self.fleet:
                    self._out.append(Kill(peer))
            case Begun(key) | Prefilled(key) | Joined(key) | Refused(key) | Failed(key):
                choice = self._current(key)
                if choice is not None:
                    self._about(choice, source, message, now_ns)
            case _:
                raise TypeError(f"a router has no use for {message!r}")

    def _current(self, key: SequenceKey) -> Choice | None:
        """The choice whose running attempt this is."""
        group = self.choices.get(key.request)
        if group is None:
            return None
        choice = group[key.choice]
        waits = choice.stage in (Stage.BEHIND, Stage.QUEUED, Stage.DONE)
        return choice if choice.attempt == key.attempt and not waits else None

    def _about(
        self,
        choice: Choice,
        source: Address,
        message: Begun | Prefilled | Joined | Refused | Failed,
        now_ns: int,
    ) -> None:
        match message:
            case Begun(_, at_ns, cached):
                again = choice.request.prompt + choice.history - cached if choice.attempt else 0
                choice.timeline = replace(
                    choice.timeline,
                    prefill_ns=at_ns,
                    cached=cached,
                    recomputed=choice.timeline.recomputed + again,
                )
                self._count("tokens_prompt_hit", cached)
                self._count("tokens_prompt_computed", choice.request.prompt + choice.history - cached)
            case Prefilled(_, at_ns):
                choice.timeline = replace(choice.timeline, prefilled_ns=at_ns)
                if choice.stage is Stage.PREFILL:
                    choice.stage = Stage.TRANSFER if choice.decode is not None else Stage.BINDING
                    if choice.stage is Stage.BINDING:
                        self._queue.append(choice)
            case Joined():
                self._joined(choice, message)
            case Refused(_, reason):
                if reason == "draining":
                    self.fleet.drain(source)
                self._again(choice)
                choice.not_before_ns = now_ns + self._config.refused_ns
            case Failed(_, reason, retry):
                choice.failures += 1
                if retry and choice.failures < self._config.attempts_max:
                    self._again(choice)
                    # An instance may know of a death that we have not heard of: asking at once would ask the dead again.
                    choice.not_before_ns = now_ns + self._config.refused_ns
                else:
                    self._reject(choice.request.id, reason, overloaded=False)

    def _joined(self, choice: Choice, message: Joined) -> None:
        choice.joined = True
        choice.stage = Stage.DECODE
        choice.timeline = replace(
            choice.timeline,
            joined_ns=message.at_ns,
            cached_decode=message.cached,
            blocks_moved=message.blocks,
            bytes_moved=message.bytes,
            writes=message.writes,
        )
        self._count("transfer_bytes", message.bytes)
        self._count("transfer_writes", message.writes)
        if message.bytes:
            self._count("tokens_transferred", choice.request.prompt + choice.history - message.cached)
        if choice.prefill in choice.assigned:
            self.fleet.assign(choice.prefill, -1, -choice.assigned.pop(choice.prefill))

    def _tokens(self, run: TokenRun, now_ns: int) -> None:
        choice = self._current(run.key)
        if choice is None:
            return
        choice.ahead[run.first] = run
        while (ready := choice.ahead.pop(choice.next, None)) is not None:
            self._deliver(choice, ready, now_ns)

    def _deliver(self, choice: Choice, run: TokenRun, now_ns: int) -> None:
        first = choice.next
        choice.next += run.count
        choice.hashes.extend(run.hashes)
        self._count("tokens_generated", run.count)
        timeline = choice.timeline if first == 0 else None
        if run.finish is not None:
            recomputed = choice.timeline.recomputed + run.recomputed
            timeline = replace(choice.timeline, finished_ns=now_ns, recomputed=recomputed)
        request = choice.request.id
        self._out.append(Deliver(request, choice.index, run.key, first, run.count, run.finish, timeline))
        if run.finish is not None:
            self._count("requests_finished", choice.index == 0)
            if not choice.joined:
                # It ended with the first token: nobody needs to decode it.
                self._cancel(choice, but=choice.prefill)
            self._done(choice)
        elif choice.index == 0 and first == 0:
            self._release_followers(self.choices[request])

    # Attempts

    def _again(self, choice: Choice) -> None:
        """Give this attempt up and queue the choice, with what was delivered as history."""
        if choice.stage is not Stage.BINDING:
            self._queue.append(choice)
        self._cancel(choice)
        self._unassign(choice)
        choice.attempt += 1
        choice.stage = Stage.QUEUED
        choice.prefill = choice.decode = None
        choice.joined = False
        choice.ahead.clear()
        choice.not_before_ns = 0

    def _cancel(self, choice: Choice, but: Address | None = None) -> None:
        for target in choice.assigned:
            if target != but and target in self.fleet:
                self._send(target, Cancel(choice.key))

    def _unassign(self, choice: Choice) -> None:
        for target, tokens in choice.assigned.items():
            self.fleet.assign(target, -1, -tokens)
        choice.assigned.clear()

    def _peer_lost(self, peer: Address) -> None:
        if peer not in self.fleet:
            return
        self.fleet.remove(peer)
        for group in list(self.choices.values()):
            for choice in group:
                choice.assigned.pop(peer, None)
                if choice.needs(peer):
                    self._bereave(choice, peer)

    def _bereave(self, choice: Choice, peer: Address) -> None:
        """An instance that its attempt needs has ended: it goes on elsewhere, unless it seems to be what ends them."""
        choice.deaths += 1
        if choice.deaths >= self._config.deaths_max:
            reason = f"{choice.deaths} workers ended while they ran this request, the last was {peer}"
            self._reject(choice.request.id, reason, overloaded=False)
        else:
            self._count("failovers")
            self._again(choice)

    def _drain(self, peer: Address | None) -> None:
        if peer is None:
            self._draining = True
            return
        self.fleet.drain(peer)
        if peer in self.fleet:
            self._send(peer, Drain())

    # Saying it

    def _wake(self, now_ns: int) -> None:
        pauses = [c.not_before_ns for c in self._queue if c.not_before_ns > now_ns]
        while self._deadlines and self._deadlines[0][1] not in self.choices:
            heappop(self._deadlines)
        if self._deadlines:
            pauses.append(self._deadlines[0][0])
        wake_ns = min(pauses, default=0)
        if wake_ns and wake_ns != self._wake_ns:
            self._out.append(WakeAt(wake_ns))
        self._wake_ns = wake_ns

    def _count(self, name: str, by: int = 1) -> None:
        if by:
            self.counters[name] = self.counters.get(name, 0) + by

    def _send(self, target: Address, message: AnyMessage) -> None:
        self._out.append(Send(target, message))
