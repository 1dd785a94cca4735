from dataclasses import replace

import pytest

from headrace.sim.loop import Loop
from headrace.sim.memory import Memory
from headrace.sim.network import Network, NetworkConfig
from headrace.sim.nodes import Node, Worker
from headrace.sim.rng import Draws, KeyedRng
from headrace.types.events import Landed, Received, Write, Written
from headrace.types.ids import Address, PoolId, Slot, WriteId
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from headrace.types.messages import InstanceInfo, Recall

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

    def worker(self, index: int, name: str) -> Worker:
        info = InstanceInfo(PoolId(index), Address("pool"), "mixed", 1, (16,))
        memory = Memory(SPEC, (16,))
        return Worker(index, Address(name), Core(), self.loop, info, memory, lambda i, plan: 1, 1, {})

    def _deliver(self, source: Node, target: Node, message, attachment) -> None:
        target.receive(Received(source.address, message), self.loop.now_ns)

    def run(self) -> None:
        while self.loop.instant():
            pass

    def write(self, number: int, count: int = 4) -> None:
        self.network.write(
            self.left,
            self.right,
            Write(WriteId(number), self.right.address, Slot(7), 0, 0, 8, count, 2 * count),
        )


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
    assert landed == Landed(Slot(7), 8) and written == Written(WriteId(3), True)
    assert 1 <= copied[0] <= landed_ns <= written_ns
    assert net.right.memory.groups[0][8 * 16 : 12 * 16] == bytes(range(64))


def test_writes_overtake_each_other():
    net = Net()
    for number in range(20):
        net.write(number)
    net.run()
    order = [event.write for _, event in got(net.left, Written)]
    assert order != sorted(order) and sorted(order) == list(range(20))


def test_a_failed_write_is_told_at_the_source_alone_and_may_leave_a_part():
    parts = set()
    for seed in range(40):
        net = Net(seed, replace(LATE, failed_share=1.0))
        net.left.memory.groups[0][:64] = bytes(64)
        net.write(1)
        net.run()
        assert got(net.right, Landed) == []
        assert [event.ok for _, event in got(net.left, Written)] == [False]
        parts.add(net.right.memory.groups[0].count(0))
    assert parts == {0, 16, 32, 48, 64}


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
