"""Ways to get it wrong, each a small change to the real cores; `test_mutants` asserts that some seed notices."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from headrace.engine import memory
from headrace.engine.memory import Memory
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence
from headrace.kv import frames
from headrace.kv.pool import BlockPool
from headrace.kv.segments import Segments
from headrace.nodes import switching
from headrace.nodes.choices import Choice
from headrace.nodes.handing import Handing
from headrace.nodes.instance import Instance
from headrace.nodes.limits import Stream
from headrace.nodes.pool import PoolCore
from headrace.nodes.receiving import Incoming, Receiving
from headrace.nodes.router import Router, Stage
from headrace.nodes.sending import Sending
from headrace.nodes.tiering import Tiering
from headrace.sim.network import Network, Session
from headrace.sim.scenarios import World
from headrace.transfer.source import Outgoing
from headrace.transfer.target import Expectation, Expectations
from headrace.types.events import Received, Reject, Send
from headrace.types.ids import Address
from headrace.types.messages import Quiet

Mutant = Callable[[pytest.MonkeyPatch], None]
Likely = Callable[[World], bool]

MUTANTS: dict[str, tuple[Mutant, Likely]] = {}


def mutant(likely: Likely) -> Callable[[Mutant], Mutant]:
    """Registers it. `likely`: worlds worth a try."""

    def register(change: Mutant) -> Mutant:
        MUTANTS[change.__name__] = (change, likely)
        return change

    return register


def splits(world: World) -> bool:
    """KV may have to move between pools."""
    return len(world.pools) > 1


def leaves(world: World) -> bool:
    return "client leaves" in world.kinds


def dies(world: World) -> bool:
    return "crash" in world.kinds


def late(world: World) -> bool:
    """Words of the dead arrive after the news of their death."""
    network = world.network
    return network.late_share * network.late_ns >= 10_000 or network.skew_ns > 20_000


def breaks(world: World) -> bool:
    return "break" in world.kinds


def writes_ill(world: World) -> bool:
    """Writes take long, wait for the end of a partition, or fail."""
    kinds = {"slow write", "failed write", "partition"}
    return splits(world) and bool(kinds.intersection(world.kinds))


def shares(world: World) -> bool:
    return len(world.places) > len(world.pools)


def _forgiving_count(patch: pytest.MonkeyPatch) -> None:
    """Landings in slots that nobody expects are overlooked, as a careless implementer would."""
    land = Expectations.land

    def forgiving(self: Expectations, slot: int, weight: int, *, owed: int = 0) -> Expectation:
        if slot not in self._open or self._open[slot].landed + weight > self._open[slot].expected:
            return Expectation(None, -1, None, 0)
        return land(self, slot, weight, owed=owed)

    patch.setattr(Expectations, "land", forgiving)
    patch.setattr(Expectations, "refusal", lambda *_, **__: "")


@mutant(lambda world: splits(world) and leaves(world))
def freed_at_cancel_without_a_fence(patch: pytest.MonkeyPatch) -> None:
    _forgiving_count(patch)
    abandon = Receiving.abandon

    def at_once(self: Receiving, key) -> bool:
        if abandon(self, key):
            self.close(key)
        return False

    patch.setattr(Receiving, "abandon", at_once)


@mutant(lambda world: leaves(world) and world.instance.depth == 2)
def freed_while_a_plan_in_flight_names_it(patch: pytest.MonkeyPatch) -> None:
    stop = Scheduler.stop

    def at_once(self: Scheduler, sequence: Sequence, *, ends: bool) -> None:
        stop(self, sequence, ends=ends)
        for run in self.memory.private(sequence):
            self.memory.spare[run.group].add(run.first, run.count)
            sequence.published[run.group] = run.at + run.count

    patch.setattr(Scheduler, "stop", at_once)


@mutant(splits)
def transfer_is_complete_when_its_tail_comes(patch: pytest.MonkeyPatch) -> None:
    _forgiving_count(patch)
    tail = Receiving.tail

    def trusting(self: Receiving, message) -> Incoming | None:
        tail(self, message)
        return self._sessions.get(message.key)

    patch.setattr(Receiving, "tail", trusting)


@mutant(splits)
def transfer_counts_calls(patch: pytest.MonkeyPatch) -> None:
    """One call a run of the target is expected, and each call counts one, however much it carries."""
    _forgiving_count(patch)
    land, open_ = Expectations.land, Expectations.open
    patch.setattr(Expectations, "land", lambda self, slot, _, owed=0: land(self, slot, 1, owed=owed))
    patch.setattr(
        Expectations, "open", lambda self, key, n, by, owed=0: open_(self, key, min(n, 2), by, owed=owed)
    )


@mutant(lambda world: splits(world) and world.instance.stream is Stream.LAYER)
def a_layer_is_sent_before_it_is_there(patch: pytest.MonkeyPatch) -> None:
    push = Sending.push

    def hasty(self: Sending, sequence: Sequence, session: Outgoing, ready: int, layers: int | None = None):
        push(self, sequence, session, ready, None if layers is None else layers + 1)

    patch.setattr(Sending, "push", hasty)


@mutant(lambda world: dies(world) and splits(world) and late(world))
def instance_hears_the_dead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Instance, "_gone", lambda self, peer: False)


@mutant(lambda world: dies(world) and shares(world) and late(world))
def pool_hears_the_dead(patch: pytest.MonkeyPatch) -> None:
    """It takes the name for the incarnation: what an earlier one says counts for the living one."""
    handle = PoolCore.handle

    def by_name(self: PoolCore, event, now_ns: int) -> None:
        if isinstance(event, Received):
            living = [a for a in self._peers if a.name == event.source.name]
            event = Received(living[0] if living else event.source, event.message)
        handle(self, event, now_ns)

    patch.setattr(PoolCore, "handle", by_name)


@mutant(lambda world: dies(world) and shares(world))
def a_lease_is_trusted_after_its_epoch(patch: pytest.MonkeyPatch) -> None:
    """Who comes back under a name is taken to have what the dead one had leased."""
    forget, join = BlockPool.forget, BlockPool.join

    def kept(self: BlockPool, holder: Address, now_ns: int) -> None:
        forget(self, holder, now_ns)
        self.leases[holder], self.quarantine[holder] = (
            self.quarantine[holder],
            [Segments() for _ in self.blocks],
        )

    def inherited(self: BlockPool, holder: Address) -> None:
        join(self, holder)
        for old in [a for a in self.leases if a.name == holder.name and a.epoch < holder.epoch]:
            self.leases[holder] = self.leases.pop(old)

    patch.setattr(BlockPool, "forget", kept)
    patch.setattr(BlockPool, "join", inherited)


@mutant(dies)
def router_takes_any_attempt_for_the_current_one(patch: pytest.MonkeyPatch) -> None:
    def careless(self: Router, key):
        group = self.choices.get(key.request)
        choice = group[key.choice] if group else None
        waits = (Stage.BEHIND, Stage.QUEUED, Stage.DONE)
        return None if choice is None or choice.stage in waits else choice

    patch.setattr(Router, "_current", careless)


@mutant(shares)
def pool_forgets_who_is_short(patch: pytest.MonkeyPatch) -> None:
    """The lost wake-up: whoever was told to wait is never told more."""
    serve = PoolCore._serve

    def forgetful(self: PoolCore) -> None:
        serve(self)
        self._queue.clear()

    patch.setattr(PoolCore, "_serve", forgetful)


@mutant(lambda world: dies(world) and splits(world))
def no_quarantine(patch: pytest.MonkeyPatch) -> None:
    forget, end = BlockPool.forget, BlockPool.end_quarantine

    def at_once(self: BlockPool, holder: Address, now_ns: int) -> None:
        forget(self, holder, now_ns)
        end(self, holder)
        self.quarantine[holder] = []

    patch.setattr(BlockPool, "forget", at_once)
    patch.setattr(BlockPool, "end_quarantine", lambda self, holder: self.quarantine.pop(holder))
    patch.setattr(BlockPool, "audit", lambda self: None)


@mutant(lambda world: any(group.window for group in world.spec.groups))
def a_window_is_trimmed_one_block_too_early(patch: pytest.MonkeyPatch) -> None:
    needed = memory.first_block_needed
    patch.setattr(memory, "first_block_needed", lambda window, *rest: needed(window, *rest) + (window > 0))


@mutant(lambda world: world.instance.depth == 2)
def published_before_its_step_has_run(patch: pytest.MonkeyPatch) -> None:
    publish = Memory.publish

    def early(self: Memory, sequence: Sequence):
        computed, sequence.computed = sequence.computed, sequence.scheduled
        message = publish(self, sequence)
        sequence.computed = computed
        return message

    patch.setattr(Memory, "publish", early)


@mutant(lambda world: True)
def a_hit_is_not_locked(patch: pytest.MonkeyPatch) -> None:
    match = BlockPool.match

    def loose(self: BlockPool, holder: Address, key, *rest):
        found = match(self, holder, key, *rest)
        for group, locks in enumerate(self.handles.get((holder, key), [])):
            for entry in locks.entries:
                self._unlock(group, entry, 0)
            locks.at += len(locks.entries)
            locks.entries.clear()
        return found

    patch.setattr(BlockPool, "match", loose)


# The network, as the design describes it: what the cores may rely on.


@mutant(breaks)
def a_session_is_resumed_without_the_filter(patch: pytest.MonkeyPatch) -> None:
    """What was heard and sent again is heard again."""

    def all_of_them(self: Session, number: int) -> bool:
        self.heard = max(self.heard, number)
        return True

    patch.setattr(Session, "takes", all_of_them)


@mutant(dies)
def numbers_are_filtered_without_the_epoch(patch: pytest.MonkeyPatch) -> None:
    """The first messages of a new incarnation look like those of the one before."""
    session_of = Network._session

    def by_name(self: Network, source, target) -> Session:
        known = (source.index, target.index) in self._sessions
        session = session_of(self, source, target)
        if not known:
            before = [s for s in self._sessions.values() if s.target is target and s is not session]
            heard = [s.heard for s in before if s.source.address.name == source.address.name]
            session.heard = max(heard, default=0)
        return session

    def any_later_one(self: Session, number: int) -> bool:
        news = number > self.heard
        self.heard = max(self.heard, number)
        return news

    patch.setattr(Network, "_session", by_name)
    patch.setattr(Session, "takes", any_later_one)


@mutant(breaks)
def a_broken_session_loses_what_was_under_way(patch: pytest.MonkeyPatch) -> None:
    def any_later_one(self: Session, number: int) -> bool:
        news = number > self.heard
        self.heard = max(self.heard, number)
        return news

    def afresh(self: Network, session: Session) -> None:
        session.kept.clear()
        session.heard, session.up = session.number, True

    patch.setattr(Session, "takes", any_later_one)
    patch.setattr(Network, "_resume", afresh)


@mutant(lambda world: splits(world) and "partition" in world.kinds)
def a_partition_doubles_a_write(patch: pytest.MonkeyPatch) -> None:
    write = Network.write

    def twice(self: Network, source, target, command) -> None:
        stalled = self.counts["writes stalled"]
        write(self, source, target, command)
        if self.counts["writes stalled"] > stalled:
            ended_ns = max(
                self.open_ns(a, b, self._loop.now_ns + 1) for a, b in ((source, target), (target, source))
            )
            self._loop.at(ended_ns + 1, self._landed, source, target, command)

    patch.setattr(Network, "write", twice)


# Writes that take long, or fail.


@mutant(lambda world: splits(world) and "failed write" in world.kinds)
def a_failed_write_is_sent_again_into_its_slot(patch: pytest.MonkeyPatch) -> None:
    """Perhaps all of it has landed, and only the word of it was lost."""
    write, written = Outgoing._write, Sending.written
    issued = {}

    def noted(self: Outgoing, *rest):
        command = issued[(self.dispatch.key, rest[-1])] = write(self, *rest)
        return command

    def again(self: Sending, number, ok: bool):
        key = self._writes[number]
        session = self._sessions[key]
        if ok or session.stopped:
            return written(self, number, ok)
        later = self._next_write()
        issued[(key, later)] = replace(issued[(key, number)], write=later)
        self._writes[later] = self._writes.pop(number)
        session.inflight[later] = session.inflight.pop(number)
        self._out(issued[(key, later)])
        return key, False

    patch.setattr(Outgoing, "_write", noted)
    patch.setattr(Sending, "written", again)


@mutant(lambda world: writes_ill(world) and leaves(world))
def a_fence_is_told_before_the_writes_have_ended(patch: pytest.MonkeyPatch) -> None:
    _forgiving_count(patch)
    answer = Sending._answer_fence

    def at_once(self: Sending, key) -> None:
        patient, self.busy = self.busy, lambda key: False
        answer(self, key)
        self.busy = patient

    patch.setattr(Sending, "_answer_fence", at_once)


@mutant(lambda world: writes_ill(world) and dies(world))
def quiet_is_told_before_the_writes_have_ended(patch: pytest.MonkeyPatch) -> None:
    def at_once(self: Sending) -> None:
        for peer, pool in self._quiet_due.items():
            self._out(Send(pool, Quiet(peer)))
        self._quiet_due.clear()

    patch.setattr(Sending, "tell_quiet", at_once)


@mutant(writes_ill)
def blocks_are_free_as_soon_as_their_writes_are_issued(patch: pytest.MonkeyPatch) -> None:
    close, written = Sending.close, Handing.written

    def later(self: Sending, key) -> None:
        if key not in self._sessions or self._sessions[key].quiet:
            close(self, key)

    def perhaps_gone(self: Handing, key, failed: bool, now_ns: int) -> None:
        if key in self._parts.sequences:
            written(self, key, failed, now_ns)
        else:
            self._parts.sending.close(key)

    patch.setattr(Outgoing, "done", property(lambda self: self.tail_sent))
    patch.setattr(Sending, "close", later)
    patch.setattr(Handing, "written", perhaps_gone)


# The ends of requests.


@mutant(lambda world: "deadline" in world.kinds)
def a_request_that_is_too_late_runs_on(patch: pytest.MonkeyPatch) -> None:
    reject = Router._reject

    def only_said(self: Router, request, reason: str, *, overloaded: bool) -> None:
        if "deadline" in reason:
            self._out.append(Reject(request, reason, overloaded))
        else:
            reject(self, request, reason, overloaded=overloaded)

    patch.setattr(Router, "_reject", only_said)


@mutant(leaves)
def a_client_that_left_leaves_work_running(patch: pytest.MonkeyPatch) -> None:
    cancel = Router._cancel

    def not_told(self: Router, choice, but=None) -> None:
        if but is not None:
            cancel(self, choice, but)

    patch.setattr(Router, "_cancel", not_told)


# New weights.


def pushes(world: World) -> bool:
    return "new weights" in world.kinds


@mutant(lambda world: pushes(world) and len(world.places) > 1)
def weights_change_while_kv_is_on_its_way(patch: pytest.MonkeyPatch) -> None:
    """Nobody waits for handovers and migrations, and none is given up."""
    patch.setattr(switching, "_rests", lambda choice: True)


@mutant(pushes)
def what_was_cached_is_found_under_new_weights(patch: pytest.MonkeyPatch) -> None:
    def as_before(self: Choice, version: int) -> None:
        self.version = version

    patch.setattr(Choice, "renew", as_before)


@mutant(lambda world: pushes(world) and "cluster.rebalance" in world.policies)
def what_is_kept_migrates(patch: pytest.MonkeyPatch) -> None:
    """And its target does not look at the version."""
    patch.setattr(switching.Switching, "bars", lambda self, choice: False)
    patch.setattr(Instance, "_refusal", lambda self, message: None)


@mutant(lambda world: pushes(world) and dies(world))
def who_joins_later_has_the_old_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(switching.Switching, "joined", lambda self, instance, info: None)
    patch.setattr(Instance, "_refusal", lambda self, message: None)


@mutant(pushes)
def what_newer_weights_made_is_published_under_the_old_root(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "outlive", lambda self: None)


# Tiers below a pool.


def tiered(world: World) -> bool:
    return world.tiers is not None


@mutant(tiered)
def a_block_is_free_before_its_copy_is_made(patch: pytest.MonkeyPatch) -> None:
    demote, come_back = BlockPool.demote, BlockPool.come_back

    def at_once(self: BlockPool):
        entry = demote(self)
        come_back(self, entry.block)
        return entry

    def if_away(self: BlockPool, block: int) -> None:
        if any(first <= block < first + count for first, count in self.away[0].runs()):
            come_back(self, block)

    patch.setattr(BlockPool, "demote", at_once)
    patch.setattr(BlockPool, "come_back", if_away)


@mutant(tiered)
def a_copy_is_made_before_the_one_whose_place_it_takes_is_dropped(patch: pytest.MonkeyPatch) -> None:
    """As it was, until a small host memory was full."""
    settle, drop = Tiering.settle, Tiering._drop

    def late(self: Tiering, now_ns: int) -> None:
        settle(self, now_ns)
        drop(self)

    patch.setattr(Tiering, "_drop", lambda self: None)
    patch.setattr(Tiering, "settle", late)


@mutant(lambda world: tiered(world) and world.tier_faults.torn_share > 0)
def what_comes_from_disk_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(frames, "verify", lambda *_: frames.Verdict.GOOD)


@mutant(lambda world: tiered(world) and "failed tier" in world.kinds)
def a_load_that_failed_is_served(patch: pytest.MonkeyPatch) -> None:
    loaded = Tiering._loaded

    def trusting(self: Tiering, promotion, load, ok, now_ns: int) -> None:
        loaded(self, promotion, load, (True,) * len(ok), now_ns)

    patch.setattr(Tiering, "_loaded", trusting)


@mutant(tiered)
def a_look_up_is_answered_before_its_blocks_are_filled(patch: pytest.MonkeyPatch) -> None:
    begin = Tiering._begin

    def trusting(self: Tiering, chain, here: int, now_ns: int):
        promotion = begin(self, chain, here, now_ns)
        if promotion is not None:
            promotion.good = {name: self.tiers.where(name) for name in promotion.names}
            self._end(promotion, now_ns)
        return

    def late(self: Tiering, promotion, load, ok, now_ns: int) -> None:
        for piece in load.pieces:
            self.tiers.shelf(load.tier).unpin(piece.name)
        del promotion.tickets[load.ticket]

    patch.setattr(Tiering, "_begin", trusting)
    patch.setattr(Tiering, "_loaded", late)
