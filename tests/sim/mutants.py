"""Ways to get it wrong, each a small change to the real cores; `test_mutants` asserts that some seed notices."""

from collections.abc import Callable

import pytest

from headrace.engine import memory
from headrace.engine.memory import Memory
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence
from headrace.kv.pool import BlockPool
from headrace.nodes.instance import Instance
from headrace.nodes.pool import PoolCore
from headrace.nodes.receiving import Incoming, Receiving
from headrace.nodes.router import Router, Stage
from headrace.sim.scenarios import World
from headrace.transfer.target import Expectation, Expectations
from headrace.types.events import Received
from headrace.types.ids import Address

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
    return bool(world.faults.leaves or world.faults.ambushes)


def dies(world: World) -> bool:
    return bool(world.faults.kills or world.faults.ambushes)


def late(world: World) -> bool:
    """Words of the dead arrive after the news of their death."""
    return world.network.late_share * world.network.late_ns >= 10_000


def shares(world: World) -> bool:
    return len(world.places) > len(world.pools)


def _forgiving_count(patch: pytest.MonkeyPatch) -> None:
    """Landings in slots that nobody expects are overlooked, as a careless implementer would."""
    land = Expectations.land

    def forgiving(self: Expectations, slot: int, weight: int) -> Expectation:
        if slot not in self._open or self._open[slot].landed + weight > self._open[slot].expected:
            return Expectation(None, -1)
        return land(self, slot, weight)

    patch.setattr(Expectations, "land", forgiving)


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
    patch.setattr(Expectations, "land", lambda self, slot, weight: land(self, slot, 1))
    patch.setattr(Expectations, "open", lambda self, key, expected: open_(self, key, min(expected, 2)))


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


@mutant(lambda world: bool(world.faults.ambushes) and splits(world))
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
