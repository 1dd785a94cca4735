"""The router core: every request's life, and the truth of what its client was sent.

Life cycle of a choice (`Stage`):
 1. BEHIND    waits for choice 0 of its request to draw a token: then the prompt is in the prefill instance's cache.
 2. QUEUED    waits for a placement, until the request's deadline.
 3. PREFILL   one attempt runs: `Start` was sent to the prefill instance, and to the decode instance if it is chosen already.
 4. BINDING   prefilled and held; placement is asked for the decode instance.
 5. TRANSFER  the decode instance was told; until it says `Joined`.
 6. DECODE    runs to its end on one instance (a WHOLE sequence is here from its first token on); it may move meanwhile (`nodes.moves`).
 7. DONE      finished, withdrawn, or failed.
An attempt is a `SequenceKey`; what comes of any other attempt is ignored. When an instance that an attempt needs is lost, or says
`Refused` or `Failed(retry)`, all of the attempt is cancelled and the choice is QUEUED again, with what was already delivered as history.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from headrace.cluster.policies import PlacementPolicy, RebalancePolicy, RolesPolicy
from headrace.cluster.prefixes import Prefixes
from headrace.nodes.choices import Choice, Stage
from headrace.nodes.control import Control
from headrace.nodes.deadlines import Deadlines
from headrace.nodes.fleet import Fleet
from headrace.nodes.limits import RouterConfig
from headrace.nodes.moves import Moves
from headrace.nodes.queue import Queue
from headrace.nodes.switching import Switching
from headrace.types.costs import Costs
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
from headrace.types.ids import Address, RequestId, SequenceKey
from headrace.types.messages import (
    AnyMessage,
    Begun,
    Cancel,
    Drain,
    Failed,
    Indexed,
    Joined,
    Moved,
    Offer,
    Prefilled,
    Refused,
    Report,
    Resume,
    Returned,
    Role,
    Stayed,
    TokenRun,
    Tokens,
    Unfenced,
)
from headrace.types.request import Request, Timeline
from headrace.types.views import Decline, Placement, PlacementRequest, Wait
from headrace.types.weights import SwitchAsked, SwitchDropped, Switched


class Router:
    """See the module.

    `roles` and `rebalance` are asked every period of theirs. `costs`: what steps and transfers cost, by an instance's name, for policies.
    """

    def __init__(
        self,
        address: Address,
        placement: PlacementPolicy,
        config: RouterConfig,
        *,
        roles: RolesPolicy | None = None,
        rebalance: RebalancePolicy | None = None,
        costs: Mapping[str, Costs] | None = None,
    ) -> None:
        self.address = address
        self.choices: dict[RequestId, list[Choice]] = {}
        self.counters: dict[str, int] = {}
        """Counts since the start, by the names of `types.service.ServiceStatus.counters`."""
        self.fleet = Fleet(costs, Prefixes() if placement.reads_prefixes else None)
        self._placement = placement
        self._config = config
        self._control = Control(self.fleet, roles, rebalance, self._send, self._count)
        self._moving = Moves(self.fleet, self._send, self._count)
        self._queue = Queue()
        self._unfinished = 0
        self._serial = 0
        self._deadlines = Deadlines()
        self._draining = False
        self._wake_ns = 0
        self._out: list[Command] = []
        self.switching = Switching(self.fleet, self.choices, self._again, self._send, self._emit)
        self._moving.bars = self.switching.bars

    # The core's three verbs

    def handle(self, event: Event, now_ns: int) -> None:
        match event:
            case Received(source, message):
                if source in self.fleet:
                    self._message(source, message, now_ns)
                elif isinstance(message, Indexed) and self.fleet.has_pool(source):
                    self.fleet.indexed(source, message)
            case Submitted(request):
                self._submit(request)
            case Withdrawn(request, index):
                self._withdraw(request, index)
            case PeerUp(peer, info):
                self.fleet.add(peer, info)
                self.switching.joined(peer, info)
            case PeerLost(peer):
                self._peer_lost(peer, now_ns)
            case DrainAsked(peer):
                self._drain(peer)
            case SwitchAsked() | SwitchDropped():
                self.switching.told(event, now_ns)
            case _:
                raise TypeError(f"a router has no use for {event!r}")

    def settle(self, now_ns: int) -> list[Command]:
        self._expire(now_ns)
        self._control.settle(now_ns, busy=bool(self.choices))
        self.switching.settle(now_ns)
        self._queue.serve(self.fleet.version, now_ns, self._ask)
        self._wake()
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
            Choice(
                request,
                i,
                Stage.BEHIND if i else Stage.QUEUED,
                timeline,
                list(request.hashes),
                request.version,
            )
            for i in range(request.choices)
        ]
        self.choices[request.id] = group
        self._unfinished += len(group)
        self._queue.put(group[0])
        self._deadlines.add(request)

    def _withdraw(self, request: RequestId, index: int | None) -> None:
        for choice in list(self.choices.get(request, ())):
            if choice.stage is not Stage.DONE and index in (None, choice.index):
                self._count("choices_withdrawn")
                self._cancel(choice)
                # A stop string ends one choice; a client that leaves ends all, and nothing is finished by that.
                self._done(choice, finished=index is not None)

    def _reject(self, request: RequestId, reason: str, *, overloaded: bool) -> None:
        """End a request with an error, whatever its choices are at."""
        self._count("requests_failed")
        self._out.append(Reject(request, reason, overloaded))
        for choice in list(self.choices.get(request, ())):
            self._cancel(choice)
            self._done(choice, finished=False)

    def _done(self, choice: Choice, *, finished: bool = True) -> None:
        if choice.stage is Stage.DONE:
            return
        choice.unassign(self.fleet)
        choice.stage = Stage.DONE
        self._unfinished -= 1
        group = self.choices[choice.request.id]
        if all(c.stage is Stage.DONE for c in group):
            del self.choices[choice.request.id]
            self._count("requests_finished", finished)
        elif choice.index == 0:
            self._release_followers(group)

    def _release_followers(self, group: list[Choice]) -> None:
        for choice in group:
            if choice.stage is Stage.BEHIND:
                choice.stage = Stage.QUEUED
                self._queue.put(choice)

    def _expire(self, now_ns: int) -> None:
        for request in self._deadlines.expired(now_ns):
            if request in self.choices:
                self._reject(request, "the request's deadline has passed", overloaded=False)

    # Placement

    def _ask(self, choice: Choice, now_ns: int) -> bool:
        """True if it has to wait."""
        return self._place(choice, now_ns) if choice.stage is Stage.QUEUED else self._bind(choice, now_ns)

    def _place(self, choice: Choice, now_ns: int) -> bool:
        """Ask for a placement and start the attempt. True if it has to wait."""
        if self.switching.holds:
            return True
        self.switching.renew(choice)
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
        role = Role.WHOLE if choice.joined else Role.PREFILL
        self._start(choice, placed.prefill, role, fetch=self._other(placed.fetch, placed.prefill))
        if choice.decode is not None and not choice.joined:
            self._start(choice, choice.decode, Role.DECODE, source=choice.prefill)
        return False

    def _other(self, fetch: Address | None, prefill: Address) -> Address | None:
        """Who is asked for a prefix, if he is there."""
        return fetch if fetch is not None and fetch != prefill and fetch in self.fleet else None

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
            self._start(choice, decode, Role.DECODE, source=choice.prefill)
        return False

    def _question(self, choice: Choice) -> PlacementRequest:
        self._serial += 1
        return PlacementRequest(choice.request, choice.total, choice.attempt, self._serial - 1)

    def _start(
        self,
        choice: Choice,
        target: Address,
        role: Role,
        *,
        source: Address | None = None,
        history: int | None = None,
        fetch: Address | None = None,
    ) -> None:
        """Start the attempt on an instance, with so many tokens as history."""
        choice.assigned[target] = choice.total
        choice.seen[target] = None
        if source is None:
            choice.unprefilled = choice.total
        self.fleet.assign(target, 1, choice.total, choice.total if source is None else 0)
        history = choice.history if history is None else history
        self._send(target, choice.start(role, history, source, fetch))

    # What instances say

    def _message(self, source: Address, message: AnyMessage, now_ns: int) -> None:
        match message:
            case Tokens(runs):
                for run in runs:
                    self._tokens(run, now_ns)
            case Report():
                self.fleet.report(source, message)
            case Returned(_, tokens, moved):
                self._count("tokens_returned", tokens)
                self._count("returned_bytes", moved)
            case Switched(version):
                self.switching.switched(source, version)
            case Unfenced(peer):
                if peer in self.fleet:
                    self._out.append(Kill(peer))
            case Begun(key) | Prefilled(key) | Joined(key):
                choice = self._current(key)
                if choice is not None:
                    self._goes_on(choice, message)
            case Refused(key) | Failed(key):
                choice = self._current(key)
                # Who has no part in it any more cannot end it.
                if choice is not None and source in choice.assigned:
                    self._gives_up(choice, source, message, now_ns)
            case Offer(key) | Stayed(key) | Moved(key):
                choice = self._current(key)
                if choice is not None:
                    self._moves(choice, source, message)
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

    def _goes_on(self, choice: Choice, message: Begun | Prefilled | Joined) -> None:
        match message:
            case Begun(_, _, cached, fetched):
                choice.note(message)
                choice.prefilled(cached, self.fleet)
                self._count("tokens_prompt_hit", cached)
                self._count("tokens_prompt_fetched", fetched)
                self._count("tokens_prompt_computed", choice.request.prompt + choice.history - cached)
            case Prefilled():
                choice.note(message)
                choice.prefilled(choice.unprefilled, self.fleet)
                if choice.stage is Stage.PREFILL:
                    choice.stage = Stage.TRANSFER if choice.decode is not None else Stage.BINDING
                    if choice.stage is Stage.BINDING:
                        self._queue.put(choice)
            case Joined():
                self._joined(choice, message)

    def _gives_up(self, choice: Choice, source: Address, message: Refused | Failed, now_ns: int) -> None:
        """An instance that has part in the attempt."""
        if isinstance(message, Refused) and message.reason == "draining":
            self.fleet.drain(source)
        if source == choice.moving:
            self._moving.refused(choice, source)
            return
        if isinstance(message, Failed) and not (message.alone and self.fleet.awaits(now_ns)):
            choice.failures += 1
            if not message.retry or choice.failures >= self._config.attempts_max:
                self._reject(choice.request.id, message.reason, overloaded=False)
                return
        # An instance may know of a death that we have not heard of: asking at once would ask the dead again.
        self._again(choice, now_ns + choice.pauses() * self._config.refused_ns)

    def _moves(self, choice: Choice, source: Address, message: Offer | Stayed | Moved) -> None:
        """What the owner says of a live migration."""
        match message:
            case Offer(_, target):
                if self._moving.begins(choice, source, message):
                    # What the owner draws meanwhile comes with the tail, one token at least.
                    self._start(choice, target, Role.DECODE, source=source, history=choice.next - 1)
            case Stayed(_, target):
                self._moving.ends(choice, target)
            case Moved(_, target):
                self._count("transfer_bytes", message.bytes)
                self._count("transfer_writes", message.writes)
                choice.note(message)
                if not self._moving.moved(choice, target):
                    self._again(choice)

    def _joined(self, choice: Choice, message: Joined) -> None:
        choice.joined = True
        choice.stage = Stage.DECODE
        choice.note(message)
        self._count("transfer_bytes", message.bytes)
        self._count("transfer_writes", message.writes)
        if message.bytes:
            self._count("tokens_transferred", choice.request.prompt + choice.history - message.cached)
        if choice.prefill in choice.assigned:
            choice.prefilled(choice.unprefilled, self.fleet)
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
            if choice.moving is not None:
                self._moving.ends(choice, choice.moving)
            if not choice.joined:
                # It ended with the first token: nobody needs to decode it.
                self._cancel(choice, but=choice.prefill)
            self._done(choice)
        elif choice.index == 0 and first == 0:
            self._release_followers(self.choices[request])

    # Attempts

    def _again(self, choice: Choice, not_before_ns: int = 0) -> None:
        """Give this attempt up and queue the choice, with what was delivered as history."""
        self._queue.put(choice, not_before_ns)
        self._cancel(choice)
        choice.unassign(self.fleet)
        choice.attempt += 1
        choice.stage = Stage.QUEUED
        choice.prefill = choice.decode = choice.moving = None
        choice.joined = False
        choice.seen.clear()
        choice.ahead.clear()

    def _cancel(self, choice: Choice, but: Address | None = None) -> None:
        for target in choice.assigned:
            if target != but and target in self.fleet:
                self._send(target, Cancel(choice.key))

    def _peer_lost(self, peer: Address, now_ns: int) -> None:
        if peer not in self.fleet:
            self.fleet.lost_pool(peer)
            return
        self.fleet.remove(peer, now_ns + self._config.away_ns)
        self.switching.lost(peer)
        for group in list(self.choices.values()):
            for choice in group:
                choice.assigned.pop(peer, None)
                self._moving.ends(choice, peer)
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

    def _wake(self) -> None:
        due = [self._queue.due_ns(), self._control.due_ns(), self._deadlines.due_ns(self.choices)]
        due.append(self.switching.due_ns())
        wake_ns = min((at_ns for at_ns in due if at_ns), default=0)
        if wake_ns and wake_ns != self._wake_ns:
            self._out.append(WakeAt(wake_ns))
        self._wake_ns = wake_ns

    def _count(self, name: str, by: int = 1) -> None:
        if by:
            self.counters[name] = self.counters.get(name, 0) + by

    def _send(self, target: Address, message: AnyMessage) -> None:
        self._out.append(Send(target, message))

    def _emit(self, command: Command) -> None:
        self._out.append(command)
