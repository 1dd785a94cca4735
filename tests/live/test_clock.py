"""The service's clock on another host."""

from headrace.live.clock import GUESSES, Clock

MS = 1_000_000


class Own:
    def __init__(self) -> None:
        self.now_ns = 1000 * MS

    def __call__(self) -> int:
        return self.now_ns


def test_it_follows_the_service_by_the_shortest_way() -> None:
    own = Own()
    clock = Clock(own)
    assert clock() == own.now_ns
    ahead_ns = 5_000_000 * MS
    for way_ns in (3 * MS, MS, 8 * MS):
        own.now_ns += 10 * MS
        clock.hear(own.now_ns + ahead_ns - way_ns)
    assert clock() == own.now_ns + ahead_ns - MS


def test_it_never_goes_back_and_follows_a_drift() -> None:
    own = Own()
    clock = Clock(own)
    clock.hear(own.now_ns + 100 * MS)
    before = clock()
    for _ in range(2 * GUESSES):
        own.now_ns += MS
        clock.hear(own.now_ns + 50 * MS)
        assert clock() >= before
        before = clock()
    own.now_ns += 100 * MS
    assert clock() == own.now_ns + 50 * MS
