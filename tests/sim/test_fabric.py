"""The timing simulation's network: order and distance of messages, and writes that end with their last byte."""

from typing import Any

import pytest

from headrace.sim.fabric import Fabric
from headrace.sim.loop import Loop
from headrace.sim.nodes import Node, Worker
from headrace.sim.topology import Level, Links, regular
from headrace.types.events import Event, Landed, Write, Written
from headrace.types.ids import Address, PoolId, RequestId, SequenceKey, Slot, WriteId
from headrace.types.messages import Cancel, InstanceInfo

MESSAGE_NS = 1_000
RATE = 1_000_000_000
"""Bytes per second: one a nanosecond."""
INFO = InstanceInfo(PoolId(0), Address("pool0"), "mixed", 8, (64,))


class Core:
    def __init__(self, log: list[tuple[int, str, Event]], name: str) -> None:
        self._log = log
        self._name = name

    def handle(self, event: Event, now_ns: int) -> None:
        self._log.append((now_ns, self._name, event))

    def settle(self, now_ns: int) -> list[Any]:
        return []

    def observe(self, now_ns: int) -> None:
        return None


class Bench:
    """A router and four workers: two devices on each of two hosts."""

    def __init__(self) -> None:
        self.loop = Loop()
        levels = (Level("device", RATE, RATE, 20), Level("host", RATE, RATE, 300))
        places = {f"i{i}": (i // 2, i % 2) for i in range(4)}
        self.fabric = Fabric(
            self.loop,
            Links(regular(levels, 2, 2)),
            places,
            message_ns=MESSAGE_NS,
            block_bytes=(500, 100),
            layers=(5, 2),
        )
        self.log: list[tuple[int, str, Event]] = []
        """What workers' cores were told."""
        self.said: list[tuple[int, str, int]] = []
        """When, to whom, which request a message is about."""
        self.fabric.deliver = self._deliver
        self.router = Node(0, Address("router"), Core(self.log, "router"), self.loop, journal=False)
        self.workers = [
            Worker(i + 1, Address(f"i{i}"), Core(self.log, f"i{i}"), self.loop, INFO, journal=False)
            for i in range(4)
        ]

    def _deliver(self, source: Node, target: Node, message: Any, attachment: Any) -> None:
        self.said.append((self.loop.now_ns, str(target.address), message.key.request))
        assert attachment == message.key.request

    def send(self, source: Node, target: Node, *numbers: int) -> None:
        for number in numbers:
            self.fabric.send(source, target, Cancel(SequenceKey(RequestId(number))), number)

    def play(self) -> None:
        while self.loop.instant():
            pass


def write(group: int, count: int, number: int = 1) -> Write:
    return Write(WriteId(number), Address("i1"), Slot(5), group, 0, 0, count, 3)


def test_messages_of_one_instant_travel_together_in_order():
    bench = Bench()
    one, two = bench.workers[:2]
    bench.send(one, two, 1, 2, 3)
    bench.loop.at(10, bench.send, one, two, 4)
    bench.play()
    assert bench.said == [(1000, "i1#0", n) for n in (1, 2, 3)] + [(1010, "i1#0", 4)]
    assert bench.loop.events == 3, "one envelope for what travels together"


def test_farther_takes_longer_and_the_router_is_near():
    bench = Bench()
    one, two, three, _ = bench.workers
    bench.send(one, two, 1)
    bench.send(one, three, 2)
    bench.send(bench.router, three, 3)
    bench.send(three, bench.router, 4)
    bench.play()
    assert sorted(bench.said) == [
        (1000, "i1#0", 1),
        (1000, "i2#0", 3),
        (1000, "router#0", 4),
        (1300, "i2#0", 2),
    ]


def test_nothing_comes_before_the_news_of_who_sends_it():
    bench = Bench()
    one, two = bench.workers[:2]
    bench.fabric.hold_until(one, two, 5_000)
    bench.send(one, two, 1)
    bench.send(two, one, 2)
    bench.loop.at(4_500, bench.send, one, two, 3)
    bench.play()
    assert bench.said == [(1000, "i0#0", 2), (5000, "i1#0", 1), (5500, "i1#0", 3)]


def test_the_dead_hear_nothing():
    bench = Bench()
    one, two = bench.workers[:2]
    bench.send(one, two, 1)
    bench.loop.at(500, two.die, 500, 600)
    bench.play()
    assert bench.said == []


def test_what_the_dead_had_said_arrives():
    bench = Bench()
    one, two = bench.workers[:2]
    bench.send(one, two, 1)
    bench.loop.at(500, one.die, 500, 600)
    bench.play()
    assert bench.said == [(1000, "i1#0", 1)]


def test_a_write_lands_with_its_last_byte_and_the_source_hears_of_it_later():
    bench = Bench()
    one, two = bench.workers[:2]
    bench.fabric.write(one, two, write(0, 4))
    bench.play()
    # 4 blocks of 500 bytes at a byte a nanosecond, after the latency of one hop between devices.
    assert bench.log == [
        (2020, "i1", Landed(Slot(5), 3, one.address)),
        (3020, "i0", Written(WriteId(1), ok=True)),
    ]


def test_writes_share_links_and_count_the_bytes_of_their_group():
    bench = Bench()
    one, two, three, _ = bench.workers
    bench.fabric.write(one, two, write(0, 2, 1))
    bench.fabric.write(three, two, write(1, 10, 2))
    bench.play()
    landed = [at for at, name, event in bench.log if isinstance(event, Landed)]
    # One kilobyte each. Within the host and between hosts they share no link.
    assert landed == [1020, 1300]


@pytest.mark.parametrize("who", ["source", "target"])
def test_a_write_whose_end_has_died_tells_nobody_who_is_dead(who: str):
    bench = Bench()
    one, two = bench.workers[:2]
    bench.fabric.write(one, two, write(0, 4))
    victim = one if who == "source" else two
    bench.loop.at(1000, victim.die, 1000, 1100)
    bench.play()
    names = [name for _, name, _ in bench.log]
    # From a dead source nothing lands; the source of a dead target gets its answer, as its memory may go now.
    assert names == ([] if who == "source" else ["i0"])
