import hashlib
from collections.abc import Iterator
from fractions import Fraction
from random import Random

import pytest

from headrace.sim.flows import SECOND_NS, Flow, Flows
from headrace.sim.loop import Loop

GB = 1_000_000_000


class Bench:
    """A loop, its flows, and when each flow was done."""

    def __init__(self, *capacities: int) -> None:
        self.loop = Loop()
        self.flows = Flows(self.loop, capacities)
        self.done_ns: dict[int, int] = {}
        """By name of the flow."""

    def start(self, name: int, links: tuple[int, ...], nbytes: int, latency_ns: int = 0) -> Flow:
        def done() -> None:
            assert name not in self.done_ns
            self.done_ns[name] = self.loop.now_ns

        return self.flows.start(links, nbytes, done, latency_ns)

    def run(self, until_ns: int | None = None) -> None:
        for _ in self.instants(until_ns):
            pass

    def instants(self, until_ns: int | None = None) -> Iterator[int]:
        stopped = [until_ns is None]
        if until_ns is not None:
            self.loop.at(until_ns, stopped.append, True)
        while not (until_ns is not None and stopped[-1]) and self.loop.instant():
            yield self.loop.now_ns


# Analytic cases


def test_a_lone_flow_has_the_lowest_capacity_of_its_path():
    bench = Bench(10 * GB, 4 * GB, 20 * GB)
    bench.start(1, (0, 1, 2), 4_000)
    assert bench.flows.bytes_in_flight == 4_000
    bench.run()
    assert bench.done_ns == {1: 1_000}
    assert bench.flows.sharings == 0 and bench.flows.bytes_in_flight == 0


def test_two_flows_share_one_link_and_the_second_has_it_alone_afterwards():
    bench = Bench(2 * GB)
    bench.start(1, (0,), 1_000)
    bench.start(2, (0,), 3_000)
    bench.run()
    # Flow 1: alone for 1 ns at 2 bytes/ns, then at 1: 998 ns. Flow 2: 998 bytes by then, 1 ns more before it hears, then 2 bytes/ns.
    assert bench.done_ns == {1: 999, 2: 1_000 + -(-(3_000 - 999) // 2)}


def test_parking_lot():
    """One flow over all links, one over each: on the narrowest link each has half, and the others take what that leaves."""
    bench = Bench(6 * GB, 2 * GB, 8 * GB)
    long = bench.start(0, (0, 1, 2), 10**9)
    short = [bench.start(1 + link, (link,), 10**9) for link in range(3)]
    bench.run(until_ns=10)
    assert long.rate == GB
    assert [flow.rate for flow in short] == [5 * GB, GB, 7 * GB]
    assert [bench.flows.used(link) for link in range(3)] == [6 * GB, 2 * GB, 8 * GB]


def test_a_trunk_wide_enough_for_all_joins_nobody():
    """Four pairs over one trunk: what one pair does concerns the others only when the trunk is narrower than their links together."""
    wide, narrow = Bench(*[GB] * 8, 4 * GB), Bench(*[GB] * 8, 4 * GB - 1)
    for bench in (wide, narrow):
        for pair in range(4):
            bench.start(pair, (pair, 8, 4 + pair), 1_000)
        bench.run()
    assert wide.flows.sharings == 0 and wide.done_ns == dict.fromkeys(range(4), 1_000)
    assert narrow.flows.sharings >= 1 and max(narrow.done_ns.values()) > 1_000


def test_a_change_is_shared_out_only_among_those_it_can_reach():
    bench = Bench(GB, GB, 10 * GB)
    near = [bench.start(i, (0, 2), 10**6) for i in range(3)]
    far = [bench.start(3 + i, (1, 2), 10**6) for i in range(3)]  # link 2 is theirs too, but it is wide
    bench.run(until_ns=5)
    before = [flow.mark for flow in far]
    bench.flows.cancel(near[0])
    bench.run(until_ns=10)
    assert [flow.mark for flow in far] == before and all(flow.mark > max(before) for flow in near[1:])
    assert [flow.rate for flow in near[1:]] == [GB // 2] * 2


def test_a_capacity_that_changes_in_mid_flow():
    bench = Bench(4 * GB)
    bench.start(1, (0,), 8_000)
    bench.loop.at(999, bench.flows.set_capacity, 0, GB)
    bench.run()
    assert bench.done_ns == {1: 1_000 + 4_000}


def test_a_capacity_that_grows_beyond_another_link():
    """The link that was narrow is wide: its flow now competes elsewhere."""
    bench = Bench(GB, 4 * GB)
    first, second = bench.start(1, (0, 1), 10**6), bench.start(2, (1,), 10**6)
    bench.run(until_ns=10)
    assert (first.rate, second.rate) == (GB, 3 * GB)
    bench.flows.set_capacity(0, 4 * GB)
    bench.run(until_ns=20)
    assert (first.rate, second.rate) == (2 * GB, 2 * GB)
    bench.flows.set_capacity(0, GB // 2)
    bench.run(until_ns=30)
    assert (first.rate, second.rate) == (GB // 2, 3 * GB + GB // 2)


def test_a_link_that_is_down_stops_its_flows_and_no_others():
    bench = Bench(GB, GB)
    bench.start(1, (0,), 1_000)
    bench.start(2, (1,), 1_000)
    bench.flows.follow([(0, 1, GB), (499, 0, 0), (1_499, 0, GB)])
    bench.run()
    assert bench.done_ns == {1: 2_000, 2: 1_000}


def test_a_link_down_at_a_flows_end_does_not_hold_it():
    bench = Bench(GB)
    bench.start(1, (0,), 1_000)
    bench.loop.at(999, bench.flows.set_capacity, 0, 0)
    bench.run()
    assert bench.done_ns == {1: 1_000}
    held = Bench(2 * GB)
    held.start(1, (0,), 1_000)
    held.start(2, (0,), 1_000)
    held.loop.at(999, held.flows.set_capacity, 0, 0)  # the second has sent 999 by then
    held.run()
    assert list(held.done_ns) == [1] and held.flows.bytes_in_flight == 1_000
    held.flows.set_capacity(0, GB)
    held.run()
    assert list(held.done_ns) == [1, 2] and held.flows.bytes_in_flight == 0


def test_a_last_byte_that_comes_with_the_sharing_that_stops_its_link_is_there():
    bench = Bench(2 * GB)
    bench.start(1, (0,), 1_000)  # alone for 1 ns: ends at 999
    bench.start(2, (0,), 999)
    bench.loop.at(999, bench.flows.set_capacity, 0, 0)
    bench.run()
    assert bench.done_ns == {1: 999, 2: 1_001}


def test_cancel_gives_the_rest_to_the_others_and_says_what_has_left():
    bench = Bench(2 * GB)
    first, second = bench.start(1, (0,), 10_000), bench.start(2, (0,), 10_000)
    bench.run(until_ns=1_001)
    assert bench.flows.cancel(first) == 1_002  # 1 ns alone
    assert bench.flows.cancel(first) == 1_002
    assert bench.flows.bytes_in_flight == 10_000
    bench.run(until_ns=2_000)
    assert second.rate == 2 * GB
    bench.run()
    assert bench.done_ns == {2: 1_002 + -(-(10_000 - 1_001) // 2)}
    assert bench.flows.cancel(second) == 10_000 and bench.flows.bytes_in_flight == 0


def test_a_flow_cancelled_in_the_instant_of_its_end_has_sent_no_more_than_it_had():
    bench = Bench(3 * GB)
    sent: list[int] = []
    bench.loop.at(4, lambda: sent.append(bench.flows.cancel(flow)))
    flow = bench.start(1, (0,), 10)  # 12 could have left by 4
    bench.run()
    assert sent == [10] and bench.done_ns == {}


def test_latency_comes_after_the_last_byte_and_holds_no_link():
    bench = Bench(GB)
    late = bench.start(1, (0,), 1_000, latency_ns=500)
    bench.start(2, (), 77, latency_ns=30)
    bench.start(3, (0,), 0)
    bench.run(until_ns=1_200)
    assert bench.done_ns == {2: 30, 3: 1} and bench.flows.used(0) == 0
    assert not late.over and bench.flows.bytes_in_flight == 1_000
    bench.run(until_ns=1_499)
    assert 1 not in bench.done_ns
    bench.run()
    assert bench.done_ns[1] == 1_500


def test_a_flow_cancelled_between_last_byte_and_done_is_not_done():
    bench = Bench(GB)
    flow = bench.start(1, (0,), 1_000, latency_ns=500)
    bench.run(until_ns=1_200)
    assert bench.flows.cancel(flow) == 1_000
    bench.run()
    assert bench.done_ns == {} and bench.flows.bytes_in_flight == 0


def test_changes_of_one_instant_are_shared_out_once():
    bench = Bench(8 * GB, GB)
    for i in range(8):
        bench.start(i, (0,), 1_000_000)
    bench.flows.set_capacity(1, 2 * GB)
    bench.run(until_ns=5)
    assert bench.flows.sharings == 1
    bench.run()
    assert max(bench.done_ns.values()) == 1_000_001, (
        "only the first nanosecond was not shared, and that one was used"
    )
    assert min(bench.done_ns.values()) >= 1_000_000 - 8


def test_what_rounding_leaves_goes_to_the_oldest():
    bench = Bench(100)
    flows = [bench.start(i, (0,), 10**6) for i in range(2)]
    bench.run(until_ns=5)
    flows.append(bench.start(2, (0,), 10**6))
    bench.run(until_ns=10)
    assert [flow.rate for flow in flows] == [34, 33, 33]


def test_even_shares_that_differ_by_less_than_a_byte_are_told_apart():
    """Link 1 gives three flows 3.33 each, link 0 two flows 3.5: link 1 comes first, so the flow that link 0 has alone gains."""
    bench = Bench(7, 10)
    flows = [bench.start(i, path, 10**6) for i, path in enumerate([(0, 1), (0,), (1,), (1,)])]
    bench.run(until_ns=5)
    assert [flow.rate for flow in flows] == [3, 4, 4, 3]


def test_more_flows_than_bytes_per_second_still_come_to_an_end():
    bench = Bench(3)
    for i in range(10):
        bench.start(i, (0,), 6)
    bench.run()
    assert sorted(bench.done_ns) == list(range(10))
    assert max(bench.done_ns.values()) <= 20 * SECOND_NS + 100


# Against plain arithmetic


def exact_shares(paths: list[tuple[int, ...]], capacities: list[int]) -> list[Fraction]:
    """Max-min fair rates by rounds over everything, without rounding, ceilings or components."""
    room = [Fraction(capacity) for capacity in capacities]
    shares: list[Fraction | None] = [None] * len(paths)
    while None in shares:
        still = [
            [i for i, path in enumerate(paths) if link in path and shares[i] is None]
            for link in range(len(room))
        ]
        share, link = min((room[link] / len(still[link]), link) for link in range(len(room)) if still[link])
        for i in still[link]:
            shares[i] = share
            for other in paths[i]:
                room[other] -= share
    return [share for share in shares if share is not None]


def random_paths(rng: Random, links: int, count: int) -> list[tuple[int, ...]]:
    return [tuple(rng.sample(range(links), rng.randint(1, min(4, links)))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(60))
def test_shares_are_the_exact_ones(seed: int):
    """With capacities that are multiples of a number that small counts divide, all shares are whole: equal to the last byte."""
    rng = Random(seed)
    links = rng.randint(1, 7)
    paths = random_paths(rng, links, rng.randint(1, 9))
    capacities = [rng.randint(1, 12) * 2520**5 for _ in range(links)]
    bench = Bench(*capacities)
    flows = [bench.start(i, path, 10**18) for i, path in enumerate(paths)]
    bench.run(until_ns=3)
    exact = exact_shares(paths, capacities)
    assert all(share.denominator == 1 for share in exact)
    assert [flow.rate for flow in flows] == exact


@pytest.mark.parametrize("seed", range(60))
def test_nobody_has_more_on_a_full_link_of_each_flow(seed: int):
    """That is what max-min fair means; to within a byte per second for each flow, where nothing divides the capacities."""
    rng = Random(1_000 + seed)
    links = rng.randint(1, 8)
    capacities = [rng.randint(1, 1_000_000) for _ in range(links)]
    bench = Bench(*capacities)
    paths = random_paths(rng, links, 12)
    flows = [bench.start(i, path, 10**12) for i, path in enumerate(paths)]
    bench.run(until_ns=3)
    for flow in flows:
        assert full(bench.flows, flow)
        near = [link for link in flow.links if capacities[link] - bench.flows.used(link) <= len(flows)]
        most = [max(other.rate for other in flows if link in other.links) for link in near]
        assert min(most) - flow.rate <= len(flows)
    for flow, share in zip(flows, exact_shares(paths, capacities), strict=True):
        assert abs(flow.rate - share) <= 2 * len(flows)


def exact_ends_ns(starts: list[tuple[int, tuple[int, ...], int]], capacities: list[int]) -> list[Fraction]:
    """When each of (at_ns, path, bytes), in order of time, ends: everything worked out anew at every start and end."""
    left: dict[int, Fraction] = {}
    ends: dict[int, Fraction] = {}
    now, at = Fraction(0), 0
    while left or at < len(starts):
        shares = exact_shares([starts[i][1] for i in left], capacities)
        rates = {i: share / SECOND_NS for i, share in zip(left, shares, strict=True)}
        times = [now + left[i] / rates[i] for i in left]
        if at < len(starts):
            times.append(Fraction(starts[at][0]))
        span = min(times) - now
        now += span
        for i in list(left):
            left[i] -= rates[i] * span
            if left[i] == 0:
                ends[i] = now
                del left[i]
        while at < len(starts) and starts[at][0] == now:
            left[at] = Fraction(starts[at][2])
            at += 1
    return [ends[i] for i in range(len(starts))]


@pytest.mark.parametrize("seed", range(12))
def test_ends_are_the_exact_ones_to_a_few_nanoseconds(seed: int):
    rng = Random(2_000 + seed)
    links = 6
    capacities = [rng.randint(1, 9) * GB for _ in range(links)]
    paths = random_paths(rng, links, 10)
    starts = sorted((rng.randint(1, 200_000), path, rng.randint(1, 300_000)) for path in paths)
    bench = Bench(*capacities)
    for i, (at_ns, path, nbytes) in enumerate(starts):
        bench.loop.at(at_ns, bench.start, i, path, nbytes)
    bench.run()
    for i, end_ns in enumerate(exact_ends_ns(starts, capacities)):
        # Every start and end may put others off by the nanosecond after which it is heard, times the ratio of two rates.
        assert abs(bench.done_ns[i] - end_ns) <= 3 * 2 * len(starts), i


# Invariants of long random runs


def full(flows: Flows, flow: Flow) -> bool:
    return any(flows.used(link) == flows.capacity(link) for link in flow.links)


def churn(seed: int, check: bool) -> str:
    """Flows start, end and are cancelled and links change, for a while. The digest of all ends."""
    rng = Random(seed)
    links = 12
    bench = Bench(*[rng.randint(1, 10) * GB // 3 for _ in range(links)])
    flows, all_flows = bench.flows, []
    at_ns = 1
    for i, path in enumerate(random_paths(rng, links, 80)):
        at_ns += rng.choice((0, 1, 2, rng.randint(0, 50_000)))
        bench.loop.at(at_ns, lambda *it: all_flows.append(bench.start(*it)), i, path, rng.randint(0, 200_000))
        if rng.random() < 0.2:
            bench.loop.at(
                at_ns + rng.randint(1, 40_000), lambda i: flows.cancel(all_flows[i]), rng.randint(0, i)
            )
        if rng.random() < 0.2:
            bench.loop.at(at_ns, flows.set_capacity, rng.randrange(links), rng.choice((0, GB, 5 * GB + 1)))
    for link in range(links):
        bench.loop.at(10_000_000, flows.set_capacity, link, GB)
    digest = hashlib.blake2b(digest_size=16)
    before_ns, settled = 0, True
    sent: dict[int, int] = {}
    rates: dict[int, int] = {}
    for now_ns in bench.instants():
        if check:
            assert settled or now_ns == before_ns + 1, "a link was not used though a flow could have used it"
            for number, rate in rates.items():
                sent[number] = sent.get(number, 0) + rate * (now_ns - before_ns)
            assert all(flows.used(link) <= flows.capacity(link) for link in range(links))
            rates = {flow.number: flow.rate for flow in all_flows if flow.moving}
            settled = all(full(flows, flow) for flow in all_flows if flow.moving)
            assert flows.bytes_in_flight == sum(flow.nbytes for flow in all_flows if not flow.over)
            before_ns = now_ns
        digest.update(repr((now_ns, flows.bytes_in_flight, sorted(bench.done_ns.items()))).encode())
    assert flows.bytes_in_flight == 0 and all(flow.over for flow in all_flows)
    for i, flow in enumerate(all_flows):
        if check and i in bench.done_ns and flow.nbytes:
            over = sent[flow.number] - flow.nbytes * SECOND_NS
            assert 0 <= over <= 2 * 4 * GB, (
                "what was sent is what was asked, rounded up to a nanosecond or two"
            )
    assert len(bench.done_ns) > 40
    return digest.hexdigest()


@pytest.mark.parametrize("seed", range(20))
def test_all_bytes_arrive_no_link_is_over_and_none_idle(seed: int):
    churn(seed, check=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_changes_give_the_same_ends(seed: int):
    assert churn(seed, check=False) == churn(seed, check=False)
    assert churn(seed, check=False) != churn(seed + 100, check=False)


def test_a_done_may_start_and_cancel():
    bench = Bench(GB)
    log: list[tuple[int, str]] = []
    others: list[Flow] = []

    def first() -> None:
        log.append((bench.loop.now_ns, "first"))
        assert bench.flows.cancel(others[0]) == 499  # it stood still for 1 ns
        bench.flows.start((0,), 100, lambda: log.append((bench.loop.now_ns, "third")))

    bench.flows.set_capacity(0, GB)
    bench.run()
    bench.flows.start((0,), 500, first)
    others.append(bench.flows.start((0,), 10_000, lambda: log.append((bench.loop.now_ns, "second"))))
    bench.run()
    assert [name for _, name in log] == ["first", "third"]
    assert log[1][0] - log[0][0] == 100
