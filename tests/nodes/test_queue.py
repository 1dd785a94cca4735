"""Who is asked for in a settle, in which order, and how often."""

from headrace.nodes.choices import Choice, Stage
from headrace.nodes.queue import REASKED_MAX, Queue
from headrace.types.ids import RequestId
from headrace.types.request import Request, Timeline


def choice(n: int) -> Choice:
    return Choice(Request(RequestId(n), 1, (), 1), 0, Stage.QUEUED, Timeline(), [])


class Bench:
    """A policy that makes all wait but those in `lucky`."""

    def __init__(self) -> None:
        self.queue = Queue()
        self.lucky: set[int] = set()
        self.asked: list[int] = []

    def put(self, *numbers: int, not_before_ns: int = 0) -> list[Choice]:
        choices = [choice(n) for n in numbers]
        for one in choices:
            self.queue.put(one, not_before_ns)
        return choices

    def serve(self, version: int = 0, now_ns: int = 1) -> list[int]:
        """Who was asked for."""
        self.asked = []
        self.queue.serve(version, now_ns, self._waits)
        return self.asked

    def _waits(self, one: Choice, now_ns: int) -> bool:
        self.asked.append(one.request.id)
        if one.request.id in self.lucky:
            one.stage = Stage.DECODE
            return False
        return True


def test_who_waits_is_asked_for_again_when_the_fleet_has_changed():
    bench = Bench()
    bench.put(1, 2, 3)
    assert bench.serve() == [1, 2, 3] and bench.serve() == []
    bench.lucky = {2}
    assert bench.serve(version=1) == [1, 2, 3]
    bench.put(4)
    assert bench.serve(version=1) == [4], "new ones always"
    assert bench.serve(version=2) == [1, 3, 4]


def test_a_long_queue_is_asked_for_while_places_are_found():
    bench = Bench()
    count = 3 * REASKED_MAX
    bench.put(*range(count))
    assert len(bench.serve()) == count
    assert bench.serve(version=1) == list(range(REASKED_MAX)), "the oldest"
    assert bench.serve(version=1) == list(range(REASKED_MAX, 2 * REASKED_MAX)), "and then the next"
    bench.lucky = {REASKED_MAX - 1}
    assert bench.serve(version=2) == list(range(2 * REASKED_MAX))


def test_a_pause_ends_in_time_and_keeps_the_order():
    bench = Bench()
    bench.put(1, not_before_ns=50)
    bench.put(2)
    assert bench.queue.due_ns() == 50
    assert bench.serve(now_ns=49) == [2]
    assert bench.serve(now_ns=50) == [1] and bench.queue.due_ns() == 0
    assert bench.serve(version=1, now_ns=51) == [1, 2]


def test_who_is_put_again_or_has_ended_is_asked_for_in_its_last_place_only():
    bench = Bench()
    one, two, three = bench.put(1, 2, 3)
    bench.queue.put(one)
    two.stage = Stage.DONE
    assert bench.serve() == [3, 1]
    bench.queue.put(three, 100)
    assert bench.serve(version=1) == [1] and bench.queue.due_ns() == 100
    three.stage = Stage.DONE
    assert bench.queue.due_ns() == 0
