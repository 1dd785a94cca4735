"""The loop that drives cores: instants, timers, errors, and no work without events."""

import asyncio
from time import monotonic_ns

from headrace.live.loop import CoreLoop
from headrace.types.events import Command, DrainAsked, Event, PeerLost, Send, Submitted, WakeAt, Withdrawn
from headrace.types.ids import Address, RequestId
from headrace.types.messages import Drain
from tests.live.serving import run


class Recorder:
    """A core that keeps what it is told and says what it was given to say."""

    def __init__(self, *answers: list[Command]) -> None:
        self.instants: list[tuple[int, list[Event]]] = []
        self.changed = asyncio.Event()
        self._answers = list(answers)
        self._batch: list[Event] = []

    def handle(self, event: Event, now_ns: int) -> None:
        if isinstance(event, DrainAsked):
            raise RuntimeError("asked to fail")
        self._batch.append(event)

    def settle(self, now_ns: int) -> list[Command]:
        self.instants.append((now_ns, self._batch))
        self._batch = []
        self.changed.set()
        return self._answers.pop(0) if self._answers else []

    def observe(self, now_ns: int) -> None:
        return None

    async def settled(self, count: int) -> None:
        while len(self.instants) < count:
            self.changed.clear()
            await self.changed.wait()


def gone(number: int) -> Event:
    return Withdrawn(RequestId(number))


def refuse(error: Exception) -> None:
    raise error


def carry(command: Command) -> None:
    raise AssertionError(command)


def test_one_drain_is_one_instant() -> None:
    async def scenario() -> None:
        loop = CoreLoop(refuse)
        first, second, idle = Recorder(), Recorder(), Recorder()
        one, two = loop.add(first, carry), loop.add(second, carry)
        loop.add(idle, carry)
        one.post(gone(1))
        two.post(gone(2))
        one.post(gone(3))
        await second.settled(1)
        assert [events for _, events in first.instants] == [[gone(1), gone(3)]]
        assert [events for _, events in second.instants] == [[gone(2)]]
        assert first.instants[0][0] == second.instants[0][0]
        assert idle.instants == []

    run(scenario())


def test_what_a_command_causes_comes_in_the_next_instant() -> None:
    async def scenario() -> None:
        loop = CoreLoop(refuse)
        target = Recorder()
        to = loop.add(target, carry)
        source = Recorder([Send(Address("x"), Drain())])
        loop.add(source, lambda command: to.post(gone(9))).post(gone(1))
        await target.settled(1)
        assert source.instants[0][0] <= target.instants[0][0]
        assert target.instants[0][1] == [gone(9)]

    run(scenario())


def test_a_timer_settles_not_before_its_time_and_the_latest_counts() -> None:
    async def scenario() -> None:
        for delay_ns in (100_000, 700_000, 1_500_000, 3_300_000):
            loop = CoreLoop(refuse)
            at_ns = monotonic_ns() + delay_ns
            # The first one is so late that it never rings.
            core = Recorder([WakeAt(at_ns + 10**12)], [WakeAt(at_ns)])
            node = loop.add(core, carry)
            node.post(gone(1))
            await core.settled(1)
            node.post(gone(2))
            await core.settled(3)
            now_ns, events = core.instants[2]
            assert events == [] and at_ns <= now_ns
            await asyncio.sleep(0.005)
            assert len(core.instants) == 3

    run(scenario())


def test_a_timer_that_was_replaced_does_not_ring() -> None:
    async def scenario() -> None:
        loop = CoreLoop(refuse)
        wakes = [monotonic_ns() + later_ns for later_ns in (5_000_000, 20_000_000)]
        core = Recorder([WakeAt(wakes[0]), Send(Address("x"), Drain())], [WakeAt(wakes[1])])
        # The second instant follows the first at once; if not even that is soon enough, the first timer has rung in its place.
        node = loop.add(core, lambda command: node.post(gone(2)))
        node.post(gone(1))
        await core.settled(3)
        for number, (now_ns, events) in enumerate(core.instants[:3]):
            assert events or now_ns >= wakes[number - 1]

    run(scenario())


def test_a_core_that_fails_ends_it_all() -> None:
    async def scenario() -> None:
        errors: list[Exception] = []
        loop = CoreLoop(errors.append)
        core = Recorder()
        node = loop.add(core, carry)
        node.post(DrainAsked())
        await asyncio.sleep(0.01)
        node.post(gone(1))
        await asyncio.sleep(0.01)
        assert [str(error) for error in errors] == ["asked to fail"]
        assert core.instants == []

    run(scenario())


def test_events_are_what_the_cores_know() -> None:
    assert {PeerLost, Submitted} <= set(Event.__args__)
