from dataclasses import replace

import pytest

from headrace.sim.loop import Loop
from headrace.sim.memory import Memory
from headrace.sim.network import UNHEARD_MAX, Network, NetworkConfig, Partition
from headrace.sim.nodes import ContentWorker, Node
from headrace.sim.rng import Draws, KeyedRng
from headrace.types.events import Landed, Received, Write, Written
from headrace.types.ids import Address, PoolId, RequestId, SequenceKey, Slot, WriteId
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from headrace.types.messages import Cancel, InstanceInfo, Recall, Report

SPEC = KVSpec((KVGroup(GroupKind.FULL, (0, 1), 1, 1),), 2, "float32")
LATE = NetworkConfig(latency_ns=100, late_ns=5_000, late_share=0.3, write_ns=1_000)


class Core:
    """Keeps what it is told, and when."""

    def __init__(self) -> None:
        self.got: list[tuple[int, object]] = []

    def handle(self, event, now_ns: int) -> None:
        self.got.append((now_ns, event))

    def settle(self, now_ns: int):
        return []

    def observe(self, now_ns: int):
        return None


class Net:
    """Two instances, each with a pool of its own, and a network between them."""

    def __init__(self, seed: int = 1, config: NetworkConfig = LATE) -> None:
        self.loop = Loop()
        self.network = Network(self.loop, KeyedRng(seed), config)
        self.network.deliver = self._deliver
        self.left, self.right = self.worker(0, "a"), self.worker(1, "b")

    def worker(self, index: int, name: str) -> ContentWorker:
        info = InstanceInfo(PoolId(index), Address("pool"), "mixed", 1, (16,))
        memory = Memory(SPEC, (16,))
        return ContentWorker(
            index,
            Address(name),
            Core(),
            self.loop,
            info,
            memory=memory,
            duration_ns=lambda i, plan: 1,
            depth=1,
            broken={},
        )

    def _deliver(self, source: Node, target: Node, message, attachment) -> None:
        target.receive(Received(source.address, message), self.loop.now_ns)

    def run(self) -> None:
        while self.loop.instant():
            pass

    def say(self, count: int, every_ns: int = 7) -> None:
        """The left one tells the right one 0, 1, 2, ..., and the other way round."""
        for number in range(count):
            at_ns = self.loop.now_ns + 1 + number * every_ns
            for source, target in ((self.left, self.right), (self.right, self.left)):
                self.loop.at(at_ns, self.network.send, source, target, numbered(number), None)

    def write(self, number: int, count: int = 4) -> None:
        self.network.write(
            self.left,
            self.right,
            Write(WriteId(number), self.right.address, Slot(7), 0, 0, 8, count, 2 * count),
        )


def numbered(number: int) -> Cancel:
    return Cancel(SequenceKey(RequestId(number)))


def told(node: Node) -> list[int]:
    """The numbers that it has heard."""
    return [event.message.key.request for _, event in got(node, Received)]


def got(node: Node, kind: type) -> list:
    return [(at, event) for at, event in node.state.got if isinstance(event, kind)]


def test_messages_of_one_pair_stay_in_order_and_take_time():
    net = Net()
    for _ in range(50):
        net.network.send(net.left, net.right, Recall(True, False), None)
        net.network.send(net.left, net.right, Recall(False, False), None)
    net.run()
    received = got(net.right, Received)
    assert [event.message.on for _, event in received] == [True, False] * 50
    assert received[0][0] >= 1 and received[-1][0] > LATE.latency_ns


def test_messages_of_two_pairs_overtake_each_other():
    net = Net()
    third = net.worker(2, "c")
    for _ in range(20):
        net.network.send(net.left, third, Recall(True, False), None)
        net.network.send(net.right, third, Recall(True, False), None)
    net.run()
    sources = [event.source.name for _, event in got(third, Received)]
    assert sources != ["a", "b"] * 20 and sorted(sources) == ["a"] * 20 + ["b"] * 20


def test_a_dead_node_hears_nothing_and_its_last_words_are_cut_off_somewhere():
    counts = set()
    for seed in range(30):
        net = Net(seed)
        for _ in range(20):
            net.network.send(net.left, net.right, Recall(True, False), None)
            net.network.send(net.right, net.left, Recall(True, False), None)
        net.loop.at(60, net.left.die, 60, 70)
        net.run()
        assert all(at <= 60 for at, _ in got(net.left, Received))
        counts.add(len(got(net.right, Received)))
    assert len(counts) > 3, "sometimes all of them, sometimes few"


@pytest.mark.parametrize("seed", range(20))
def test_a_write_lands_before_it_is_told_here_or_there(seed: int):
    net = Net(seed)
    net.left.memory.groups[0][:64] = bytes(range(64))
    copied: list[int] = []
    net.network.on_copy = lambda target, write: copied.append(net.loop.now_ns)
    net.write(3)
    net.run()
    [(landed_ns, landed)], [(written_ns, written)] = got(net.right, Landed), got(net.left, Written)
    assert landed == Landed(Slot(7), 8, net.left.address) and written == Written(WriteId(3), True)
    assert 1 <= copied[0] <= landed_ns <= written_ns
    assert net.right.memory.groups[0][8 * 16 : 12 * 16] == bytes(range(64))


def test_writes_overtake_each_other():
    net = Net()
    for number in range(20):
        net.write(number)
    net.run()
    order = [event.write for _, event in got(net.left, Written)]
    assert order != sorted(order) and sorted(order) == list(range(20))


def test_a_failed_write_leaves_a_part_or_all_and_only_then_tells_the_target():
    parts, landings = set(), 0
    for seed in range(80):
        net = Net(seed, replace(LATE, failed_share=1.0))
        net.left.memory.groups[0][:64] = bytes(64)
        net.write(1)
        net.run()
        assert [event.ok for _, event in got(net.left, Written)] == [False]
        part = net.right.memory.groups[0].count(0)
        parts.add(part)
        if got(net.right, Landed):
            assert part == 64
            landings += 1
    assert parts == {0, 16, 32, 48, 64}
    assert 0 < landings < 40


def test_writes_of_the_dead_land_before_anybody_hears_of_it_or_never():
    late = 0
    for seed in range(60):
        net = Net(seed)
        moments: list[int] = []
        net.network.on_copy = lambda target, write, net=net, moments=moments: moments.append(net.loop.now_ns)
        for number in range(10):
            net.write(number)
        net.loop.at(200, net.left.die, 200, 900)
        net.run()
        assert all(at <= 900 for at in moments)
        assert all(at <= 900 for at, _ in got(net.right, Landed))
        assert all(at <= 200 for at, _ in got(net.left, Written))
        late += sum(at > 200 for at in moments)
    assert late, "some land after the death"


def test_a_healed_network_has_no_late_message_and_no_failed_write():
    net = Net(1, replace(LATE, failed_share=1.0))
    net.network.heal()
    net.write(1)
    for _ in range(50):
        net.network.send(net.left, net.right, Recall(True, False), None)
    net.run()
    assert [event.ok for _, event in got(net.left, Written)] == [True]
    assert all(at <= LATE.latency_ns + 1 for at, _ in got(net.right, Received))


# Sessions


@pytest.mark.parametrize("seed", range(20))
def test_a_broken_session_loses_nothing_doubles_nothing_and_keeps_the_order(seed: int):
    net = Net(seed)
    net.say(200)
    for at_ns in (50, 300, 301, 900):
        net.loop.at(at_ns, net.network.break_sessions, ("a",), ("b",), at_ns + 200)
    net.run()
    assert told(net.left) == told(net.right) == list(range(200))
    counts = net.network.counts
    assert counts["sessions broken"] == 6 and counts["messages lost"], (
        "one that is broken already cannot break"
    )


def test_some_of_what_is_sent_again_had_been_heard():
    doubled = 0
    for seed in range(10):
        net = Net(seed)
        net.say(100)
        net.loop.at(500, net.network.break_sessions, ("a",), ("b",), 600)
        net.run()
        doubled += net.network.counts["messages doubled"]
    assert doubled > 10


def test_a_sender_keeps_only_what_may_be_unheard():
    net = Net(1)
    net.say(500)
    net.run()
    net.network.break_sessions(("a",), ("b",), net.loop.now_ns + 10)
    assert net.network.heard_all(net.left, net.right)
    net.run()
    assert net.network.counts["messages doubled"] <= 2 * (UNHEARD_MAX + 1)


def test_while_a_session_is_broken_nothing_passes_and_others_do():
    net = Net(1)
    third = net.worker(2, "c")
    net.network.send(net.left, net.right, numbered(0), None)
    net.loop.at(1, net.network.break_sessions, ("a",), ("b",), 90_000)
    net.loop.at(2, net.network.send, net.left, net.right, numbered(1), None)
    net.loop.at(2, net.network.send, net.left, third, numbered(2), None)
    net.run()
    assert told(net.right) == [0, 1] and told(third) == [2]
    assert [at for at, _ in got(net.right, Received) if at < 90_000] == []
    assert got(third, Received)[0][0] < 90_000


def test_the_dead_resume_no_session():
    net = Net(1)
    net.say(50)
    net.loop.at(100, net.network.break_sessions, ("a",), ("b",), 200)
    net.loop.at(150, net.left.die, 150, 160)
    net.run()
    heard = told(net.right)
    assert heard == list(range(len(heard))) and all(at < 100 for at, _ in got(net.right, Received))


def test_pairs_that_are_far_apart_are_overtaken():
    net = Net(1, replace(LATE, late_share=0.0, skew_ns=100_000))
    spread = set()
    for index in range(2, 30):
        other = net.worker(index, f"n{index}")
        net.network.send(net.left, other, numbered(1), None)
        net.run()
        spread.add((net.loop.now_ns + 999) // 1000)
        net.loop.now_ns = 0
    assert min(spread) <= 2 and max(spread) > 50


def test_stale_reports_come_late_and_hold_nobody_up():
    net = Net(3, replace(LATE, late_share=0.0, stale_ns=1_000_000))
    report = Report(0, 0, 0, 0, 0, 0, 16, 16, 0, False)
    net.network.send(net.left, net.right, report, None)
    net.network.send(net.left, net.right, numbered(1), None)
    net.run()
    order = [type(event.message) for _, event in got(net.right, Received)]
    assert order == [Cancel, Report] and net.loop.now_ns > 10_000


# Partitions


def test_a_partition_stops_one_direction_or_both_and_loses_nothing():
    for both in (True, False):
        net = Net(1, replace(LATE, late_share=0.0))
        net.network.part(Partition(200, 50_000, ("a",), ("b", "c"), both))
        net.say(100)
        net.run()
        assert told(net.right) == told(net.left) == list(range(100))
        assert not [at for at, _ in got(net.right, Received) if 200 <= at < 50_000]
        assert bool([at for at, _ in got(net.left, Received) if 200 <= at < 50_000]) is not both


def test_what_meets_one_partition_after_another_waits_for_the_last():
    net = Net(1)
    for start_ns, end_ns in ((900, 990), (50, 300), (0, 100)):
        net.network.part(Partition(start_ns, end_ns, ("a",), ("b",)))
    assert net.network.open_ns(net.left, net.right, 40) >= 300
    assert net.network.open_ns(net.left, net.right, 500) == 500
    assert net.network.open_ns(net.left, net.left, 40) == 40


def test_writes_that_meet_a_partition_wait_or_fail_and_land_once():
    ends = set()
    for seed in range(60):
        net = Net(seed, replace(LATE, late_share=0.0))
        net.left.memory.groups[0][:64] = bytes(64)
        net.network.part(Partition(1, 900_000, ("a",), ("b",)))
        copied: list[int] = []
        net.network.on_copy = lambda target, write, net=net, copied=copied: copied.append(net.loop.now_ns)
        net.write(1)
        net.run()
        [(written_ns, written)], landed = got(net.left, Written), got(net.right, Landed)
        assert len(landed) <= 1 and len(copied) == 1 and copied[0] <= written_ns
        if written.ok:
            assert landed and written_ns >= 900_000 <= landed[0][0] <= written_ns
            assert net.right.memory.groups[0].count(0) == 64
        else:
            assert not landed and written_ns < 900_000
        ends.add(written.ok)
    assert ends == {True, False}


def test_a_write_whose_way_back_is_cut_lands_and_is_told_late_or_as_failed():
    ends = set()
    for seed in range(60):
        net = Net(seed, replace(LATE, late_share=0.0))
        net.network.part(Partition(1, 900_000, ("b",), ("a",), both=False))
        net.write(1)
        net.run()
        [(written_ns, written)], landed = got(net.left, Written), got(net.right, Landed)
        assert not written.ok or (landed[0][0] < 900_000 <= written_ns)
        ends.add((written.ok, bool(landed)))
    assert ends == {(True, True), (False, True), (False, False)}


def test_draws_depend_on_their_key_alone():
    rng, other = KeyedRng(5), KeyedRng(5)
    first = [rng.uniform("a", i) for i in range(5)]
    other.uniform("b", 1)
    assert [other.uniform("a", i) for i in reversed(range(5))] == first[::-1]
    assert KeyedRng(6).uniform("a", 0) != first[0]
    assert len(set(first)) == 5 and all(0 <= x < 1 for x in first)


def test_draws_in_sequence():
    draws = Draws(KeyedRng(1), "x")
    picked = [draws.between(3, 5) for _ in range(60)]
    assert set(picked) == {3, 4, 5}
    assert [Draws(KeyedRng(1), "x").between(3, 5)] == picked[:1]
    assert {draws.pick("ab") for _ in range(30)} == {"a", "b"}
    assert not draws.chance(0.0) and draws.chance(1.0)
