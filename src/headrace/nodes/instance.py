"""The instance core: one scheduler, its sequences' lives, and both halves of transfers. See `engine.sequence` for a sequence's states.

Life of a sequence here, by role (`Start.role`):
 WHOLE    match, admit, run to the end.
 PREFILL  match, admit, run until the first token; HELD until a `Dispatch` has come and everything is sent (or handed over), or until
          `Resume` makes it WHOLE. A `Dispatch` may come first; blocks are sent as chunks finish.
 DECODE   match, reserve, register the expectation, `Dispatch` to the source; RECEIVING until the counter is complete; then as WHOLE.
          With one pool for both: no reservation, the pool hands the blocks over.
A WHOLE sequence may leave for another instance while it runs (`nodes.migrating`), to which it is a DECODE one. One that is to prefill may
fetch cached blocks first (`nodes.fetching`).
Whatever happens (cancel, a lost peer, a failed write, a stage's deadline), a sequence leaves through STOPPING (plans in flight and writes
in flight retire first) or FENCING (the source confirms that it writes no more, or has ended).
"""

from msgspec.structs import replace

from headrace.engine.memory import Memory
from headrace.engine.policies import EnginePolicies
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, Status, sequence_from
from headrace.nodes.fetching import Fetching
from headrace.nodes.handing import Handing
from headrace.nodes.leaving import Leaving
from headrace.nodes.limits import Caching, InstanceConfig, Stream
from headrace.nodes.loans import Loans
from headrace.nodes.migrating import Migrating
from headrace.nodes.parts import Parts
from headrace.nodes.receiving import Receiving
from headrace.nodes.results import Results
from headrace.nodes.returning import Returning
from headrace.nodes.sending import Sending
from headrace.nodes.standstill import Standstill
from headrace.nodes.swapping import Swapping
from headrace.types.events import (
    Close,
    Command,
    Event,
    Execute,
    Landed,
    LayersDone,
    Once,
    PeerLost,
    PeerUp,
    Received,
    Send,
    StepDone,
    WakeAt,
    Written,
)
from headrace.types.ids import Address, SequenceKey, StepId
from headrace.types.kv import KVSpec
from headrace.types.lending import Borrow, CallIn, Holding, Lent, Repay, Unlent
from headrace.types.messages import (
    Abandon,
    Adopted,
    AnyMessage,
    Begun,
    Cancel,
    Dispatch,
    Drain,
    Failed,
    Fenced,
    Fetch,
    Found,
    InstanceInfo,
    Keep,
    Leased,
    Match,
    Matched,
    Migrate,
    More,
    Recall,
    Refused,
    Release,
    Report,
    Resume,
    Role,
    Start,
    Stay,
    Tail,
)
from headrace.types.swaps import Swapped
from headrace.types.weights import Switch, Switched, UseWeights, WeightsReady


class Instance:
    """See the module. Peers with another pool are reached by writes, those of the same pool by handover."""

    def __init__(
        self,
        address: Address,
        router: Address,
        info: InstanceInfo,
        spec: KVSpec,
        policies: EnginePolicies,
        config: InstanceConfig,
    ) -> None:
        self.address = address
        self.memory = Memory(spec, info.pool, info.blocks_total, config.lease_blocks)
        limits = config.tokens_max, config.sequences_max, config.depth, config.repeats_max
        self.scheduler = Scheduler(policies, self.memory, *limits, layered=config.stream is Stream.LAYER)
        self.scheduler.overheard |= config.overheard
        self._out: list[Command] = []
        self._closes: list[Command] = []
        """Carried out last: what is sent in the same settle may still need a sequence's ids."""
        self.sending = Sending(spec, self.memory, info.pool_address, config.stream, self._emit)
        self.receiving = Receiving(spec, self.memory, self._emit)
        self.swapping = Swapping(self.scheduler, config.swap_blocks, self.sending.busy, self._emit)
        own = self.memory, self.scheduler, self.sending, self.receiving, self.swapping
        parts = Parts(router, info.pool_address, spec, config, *own, self._send)
        self.sequences = parts.sequences
        self._deadlines = parts.deadlines
        self.fetching = Fetching(
            router,
            info,
            config,
            self.memory,
            self.sending,
            self.receiving,
            self._send,
            self._goes_on,
        )
        self.loans = Loans(parts)
        self.leaving = Leaving(parts, self.fetching.dropped, self.loans.freed, self._closes.append)
        self._peers: dict[Address, InstanceInfo] = {}
        self.loans.open(self.leaving, info, self._peers)
        self.standstill = Standstill(self.scheduler, self.sending, config.stuck_ns)
        self.returning = Returning(router, self.memory, self.fetching, self._send, self.leaving.free)
        self.results = Results(parts, self.leaving, self._hold, self.returning.ended)
        self.handing = Handing(
            parts, self.leaving, self.standstill, self.results.publish, self.fetching.arrived
        )
        self.migrating = Migrating(
            router,
            config,
            self.scheduler,
            self.sending,
            self.receiving,
            self._send,
            self.results.flush,
            self.leaving.leave,
        )
        self._router = router
        self._info = info
        self._spec = spec
        self._config = config
        self._lost: dict[str, int] = {}
        """Name -> its highest epoch that has ended."""
        self._draining = False
        self.version = info.version
        """Of the weights with which plans given from now on are computed."""
        self._wake_ns = 0

    # The core's three verbs

    def handle(self, event: Event, now_ns: int) -> None:
        self.scheduler.changed |= not isinstance(event, StepDone | LayersDone)
        match event:
            case Received(source, message):
                if not self._gone(source):
                    self._message(source, message, now_ns)
            case StepDone(result):
                self.results.take(result, now_ns)
            case LayersDone(step, layers):
                self._layers_done(step, layers)
            case Landed(slot, weight, source):
                self.standstill.moved()
                if not self.receiving.admits(slot, weight, source) or self.loans.lending.landed(slot, weight):
                    return
                self.handing.complete(self.receiving.landed(slot, weight), now_ns)
            case Written(write, ok):
                key, failed = self.sending.written(write, ok)
                if self.fetching.is_about(key):
                    self.fetching.written(key, failed)
                elif self.loans.borrowing.is_about(key):
                    self.loans.borrowing.written(failed)
                elif not self.migrating.is_about(key):
                    self.handing.written(key, failed, now_ns)
                elif failed:
                    self.migrating.failed()
            case Swapped():
                self._swapped(event)
            case PeerUp(peer, info):
                self._peers[peer] = info
                self.scheduler.overheard |= peer != self.address and info.pool == self._info.pool
            case PeerLost(peer, info):
                self._peer_lost(peer, info, now_ns)
            case WeightsReady(version):
                self._send(self._router, Switched(version))
            case _:
                raise TypeError(f"an instance has no use for {event!r}")

    def settle(self, now_ns: int) -> list[Command]:
        if self._deadlines:
            self.leaving.expire(now_ns)
        self.fetching.expire(now_ns)
        self.leaving.reap()
        self.migrating.settle(now_ns)
        self.loans.before_plan(now_ns)
        self._plan(now_ns)
        stuck = self.standstill.victim(self.sequences.values(), now_ns)
        if stuck is not None:
            self._send(self._router, Refused(stuck.key, "memory is short"))
            self.leaving.drop(stuck, now_ns)
        self.loans.borrowing.give_up(now_ns)
        while self.leaving.reap():
            # What was stopped just now and is in no plan is free at once: others may go on with it.
            self._plan(now_ns)
        self.fetching.settle(self._peers, now_ns)
        if self.loans.after_plan(now_ns):
            self._plan(now_ns)
        self.migrating.check(now_ns)
        self.swapping.settle()
        self._tell_pool()
        self.sending.tell_quiet()
        self.scheduler.settled()
        wake_ns = self._next_wake_ns()
        if wake_ns and wake_ns != self._wake_ns:
            self._out.append(WakeAt(wake_ns))
        self._wake_ns = wake_ns
        out = self._out + self._closes
        self._out.clear()
        self._closes.clear()
        return out

    def _next_wake_ns(self) -> int:
        """The next timer; 0: none."""
        pieces = (self.fetching, self.migrating, self.loans)
        due = (self.standstill.due_ns, *(piece.due_ns() for piece in pieces))
        first_ns = min((at_ns for at_ns in due if at_ns), default=0)
        if not self._deadlines:
            return first_ns
        next_ns = min(self._deadlines.values())
        return min(next_ns, first_ns) if first_ns else next_ns

    def observe(self, now_ns: int) -> Report:
        held = sum(s.status is Status.HELD for s in self.sequences.values())
        report = self.scheduler.report(now_ns, held, self.sending.sessions, self._draining)
        return replace(report, version=self.version) if self.version else report

    def gauges(self) -> tuple[float, int, int, int]:
        """Share of its pool that is in use, as far as it knows, and sequences waiting, running and receiving."""
        scheduler = self.scheduler
        return self.memory.used, len(scheduler.waiting), len(scheduler.running), len(scheduler.receiving)

    @property
    def idle(self) -> bool:
        """Nothing is held for anyone."""
        pieces = (self.sending, self.receiving, self.fetching, self.returning, self.swapping, self.loans)
        return not self.sequences and all(piece.idle for piece in pieces)

    # Messages

    def _message(self, source: Address, message: AnyMessage, now_ns: int) -> None:
        match message:
            case Start():
                self._start(message, now_ns)
            case Cancel(key):
                self._cancel(key, now_ns)
            case Resume(key):
                self._resume(key)
            case Drain():
                self._draining = self.loans.lending.draining = True
            case Switch(version):
                self.version = version
                for sequence in self.sequences.values():
                    sequence.outlive()
                self._out.append(UseWeights(version))
            case Migrate(target):
                if target in self._peers:
                    self.migrating.choose(target, now_ns)
            case Stay():
                self.migrating.stay(message)
            case More():
                full = self.migrating.extend(message, self.sequences)
                if full is not None:
                    self.leaving.fail(full, "memory is short", now_ns, retry=True)
            case Matched():
                self._matched(message, now_ns)
            case Leased():
                self.memory.leased(message)
                self.fetching.leased(self._peers, now_ns)
                self.loans.lending.leased(now_ns)
            case Recall(on, force):
                self.scheduler.recalled(on=on, force=force)
            case Dispatch():
                if not self.migrating.dispatched(source, message):
                    self.handing.dispatched(source, message, now_ns)
            case Abandon(key):
                self.sending.abandoned(source, message)
                self.fetching.abandoned(key)
            case Fenced(key, slot):
                if not self.fetching.fenced(key, slot) and self.receiving.fenced(key, slot):
                    self.leaving.leave(self.sequences[key])
            case Fetch():
                self.fetching.asked(source, message)
            case Keep():
                if not self._draining:
                    self.returning.keep(source, message, self._peers.get(source))
            case Found():
                self.handing.complete(self.receiving.found(message), now_ns)
            case Tail():
                self.handing.complete(self.receiving.tail(message), now_ns)
            case Adopted():
                self.handing.adopted(message, now_ns)
            case Borrow() | Lent() | Unlent() | Holding() | Repay() | CallIn():
                self.loans.heard(source, message, now_ns)
            case _:
                raise TypeError(f"an instance has no use for {message!r}")

    def _start(self, message: Start, now_ns: int) -> None:
        key = message.key
        assert key not in self.sequences, f"{key} is started twice"
        refusal = self._refusal(message)
        if refusal is not None:
            self._send(self._router, refusal)
            self._closes.append(Close(key))
            return
        sequence = sequence_from(message, len(self._spec.groups))
        sequence.long = not self.loans.fits(message)
        sequence.caches = self._caches(message.role) and not sequence.long
        self.sequences[key] = sequence
        if self.scheduler.shares is not None:
            self.scheduler.shares.enter(sequence)
        if message.role is Role.PREFILL:
            self.sending.started(sequence)
        if message.role is Role.DECODE:
            self._deadlines[key] = now_ns + self._config.receive_ns
            peer = self._peers.get(message.source) if message.source else None
            if peer is not None and peer.pool == self._info.pool:
                # The blocks are in our pool already: nothing to reserve, nothing to queue for.
                sequence.status = Status.RECEIVING
                self.scheduler.receiving.append(sequence)
                self.receiving.expect(sequence, shared=True)
                return
        elif (
            message.fetch is not None
            and sequence.caches
            and self.fetching.begin(sequence, message.fetch, self._peers.get(message.fetch))
        ):
            return
        self.scheduler.enqueue(sequence)

    def _caches(self, role: Role) -> bool:
        """Does a sequence of this role match and publish here?"""
        match self._config.caching:
            case Caching.NONE:
                return False
            case Caching.PREFILL:
                return role is not Role.DECODE
            case Caching.INCREMENT | Caching.RETURN:
                return True

    def _refusal(self, message: Start) -> Refused | Failed | None:
        if self._draining:
            return Refused(message.key, "draining")
        if message.version != self.version:
            return Refused(
                message.key, f"the weights here have version {self.version}, not {message.version}"
            )
        if len(self.scheduler.waiting) >= self._config.waiting_max:
            return Refused(message.key, "queue full")
        if message.source is not None and self._gone(message.source):
            return Failed(message.key, f"{message.source} was lost", retry=True)
        return self.loans.refusal(message)

    def _resume(self, key: SequenceKey) -> None:
        sequence = self.sequences.get(key)
        if sequence is None or sequence.role is not Role.PREFILL or key in self.sending:
            return
        sequence.role = Role.WHOLE
        self._deadlines.pop(key, None)
        if sequence.status is Status.HELD:
            self.scheduler.join(sequence)

    def _cancel(self, key: SequenceKey, now_ns: int) -> None:
        self.sending.stop(key)
        sequence = self.sequences.get(key)
        if sequence is not None:
            # Perhaps for a stop string: then its client comes back with what it has said.
            self.returning.ended(sequence)
            self.leaving.drop(sequence, now_ns)

    def _matched(self, message: Matched, now_ns: int) -> None:
        sequence = self.sequences.get(message.key) or self.returning.get(message.key)
        if self.fetching.looked_up(message):
            return
        if sequence is not None and sequence.status is Status.FETCHING:
            self.fetching.matched(sequence, message, self._peers, now_ns)
            return
        if sequence is None or sequence.status is not Status.MATCHING:
            self._to_pool(Release(message.key))
            return
        sequence.published = [message.tokens // self._spec.block_size] * len(self._spec.groups)
        self.memory.adopt(sequence, message.table, sequence.published)
        sequence.status = Status.MATCHED
        sequence.scheduled = sequence.computed = message.tokens
        self.swapping.found(sequence)
        if self.memory.pressed:
            self.scheduler.unmatch(sequence)
            return
        sequence.recomputed += max(0, sequence.lost - max(message.tokens, sequence.kept))
        sequence.lost = 0
        if sequence.role is Role.DECODE or sequence.kept > message.tokens:
            for trim in self.memory.trim(sequence, sequence.kept or sequence.total):
                self._to_pool(trim)

    def _goes_on(self, sequence: Sequence, tokens: int) -> None:
        """Into the queue, with so many tokens of its prefix locked."""
        if sequence is self.returning.get(sequence.key):
            self.returning.came(sequence)
            return
        sequence.scheduled = sequence.computed = tokens
        self.scheduler.enqueue(sequence)
        sequence.status = Status.MATCHED
        if self.memory.pressed:
            self.scheduler.unmatch(sequence)

    def _swapped(self, event: Swapped) -> None:
        """Copies to or from host memory have ended."""
        done = self.swapping.ended(event)
        if done is None:
            return
        sequence, ok = done
        if ok:
            self.results.publish(sequence)
            self.scheduler.join(sequence)
        else:
            self.leaving.free(sequence)
            self.scheduler.unload(sequence)

    # Steps

    def _plan(self, now_ns: int) -> None:
        while (plan := self.scheduler.plan(now_ns)) is not None:
            self._once()
            for start in plan.starts:
                sequence = self.sequences[start.key]
                if not sequence.begun:
                    sequence.begun = True
                    fetched = self.fetching.brought(start.key)
                    self._send(self._router, Begun(start.key, now_ns, start.computed, fetched))
            self._out.append(Execute(plan))
        self._once()

    def _once(self) -> None:
        """Before what follows it is given, an open plan is told not to repeat."""
        self._out += [Once(step) for step in self.scheduler.once]
        self.scheduler.once.clear()

    def _layers_done(self, step: StepId, layers: int) -> None:
        issued = self.scheduler.inflight[0]
        assert issued.plan.step == step, "layers are told of before their step's result"
        for work, sequence in zip(issued.plan.work, issued.rows, strict=True):
            self.sending.stream(sequence, work.first + work.count, layers, last=work.emits)

    def _hold(self, sequence: Sequence, now_ns: int) -> None:
        self.handing.hold(sequence, now_ns)

    # Peers

    def _gone(self, peer: Address) -> bool:
        return peer.epoch <= self._lost.get(peer.name, -1)

    def _peer_lost(self, peer: Address, info: InstanceInfo, now_ns: int) -> None:
        self._lost[peer.name] = max(peer.epoch, self._lost.get(peer.name, -1))
        self._peers.pop(peer, None)
        self.migrating.lost(peer)
        self.fetching.lost(peer)
        self.loans.lost(peer)
        self.handing.lost(peer, info, now_ns)

    # Saying it

    def _tell_pool(self) -> None:
        wishes = self.scheduler.wishes
        for sequence in wishes.unlock:
            self.leaving.free(sequence)
        for sequence in wishes.match:
            limit = sequence.total - (sequence.role is not Role.DECODE)
            self._to_pool(Match(sequence.key, tuple(sequence.hashes), limit))
        for sequence in wishes.receive:
            if sequence.status is Status.RECEIVING:  # else it was given up in this very instant
                self.receiving.expect(sequence, shared=False)
        for sequence in wishes.load:
            if sequence.status is Status.LOADING:
                self.swapping.load(sequence)
        wishes.clear()
        for message in self.memory.messages():
            self._to_pool(message)

    def _to_pool(self, message: AnyMessage) -> None:
        self._send(self._info.pool_address, message)

    def _send(self, target: Address, message: AnyMessage) -> None:
        self._out.append(Send(target, message))

    def _emit(self, command: Command) -> None:
        self._out.append(command)
