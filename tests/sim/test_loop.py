from headrace.sim.loop import Loop


class Recorder:
    """A node that notes when it settles."""

    def __init__(self, index: int, log: list[tuple[int, str]], loop: Loop | None = None) -> None:
        self.index = index
        self.log = log
        self.loop = loop

    def wake(self, now_ns: int) -> None:
        assert self.loop is not None
        self.loop.touch(self)

    def settle(self, now_ns: int) -> None:
        self.log.append((now_ns, f"settle {self.index}"))


def test_an_instant_is_all_events_of_one_time_then_one_settle_each_in_order():
    loop, log = Loop(), []
    nodes = [Recorder(i, log, loop) for i in range(3)]

    def event(name: str, node: Recorder) -> None:
        log.append((loop.now_ns, name))
        loop.touch(node)

    loop.at(5, event, "b", nodes[2])
    loop.at(5, event, "c", nodes[0])
    loop.at(5, event, "d", nodes[2])
    loop.at(3, event, "a", nodes[1])
    while loop.instant():
        pass
    assert log == [(3, "a"), (3, "settle 1"), (5, "b"), (5, "c"), (5, "d"), (5, "settle 0"), (5, "settle 2")]


def test_a_later_wake_replaces_the_earlier_one():
    loop, log = Loop(), []
    node = Recorder(0, log, loop)
    loop.wake_at(node, 10)
    loop.wake_at(node, 20)
    loop.wake_at(node, 15)
    while loop.instant():
        pass
    assert log == [(15, "settle 0")]


def test_a_wake_in_the_past_comes_at_once_but_not_in_this_instant():
    loop, log = Loop(), []
    node = Recorder(0, log, loop)
    loop.at(7, loop.wake_at, node, 2)
    while loop.instant():
        pass
    assert log == [(8, "settle 0")]


def test_a_forgotten_node_settles_no_more():
    loop, log = Loop(), []
    node = Recorder(0, log, loop)
    loop.wake_at(node, 10)
    loop.at(10, loop.touch, node)
    loop.at(10, loop.forget, node)
    while loop.instant():
        pass
    assert log == []
