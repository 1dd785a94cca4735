"""Transfers as fluid: flows share links max-min fairly (progressive filling: Bertsekas and Gallager, Data Networks, 6.5.2).

Rates change only when a flow starts, ends or is cancelled or a link's capacity changes, and then only those of flows that a chain of links
that can be full joins to the change. A link can be full if what its flows could use at most comes to more than its capacity. A flow can
use at most its ceiling, the lowest capacity on its path; where none of its links can be full it runs at that, and nobody else is asked.

1. `start`, `cancel`, `set_capacity` and ends note what they change. Nothing happens in the instant that asked for it, so new rates hold
   from 1 ns later, one sharing for all changes of an instant. Until then a new flow that has to share stands still.
2. Flows whose rates were worked out together are a group, with one pending event: the end of those that end first. A new sharing breaks
   every group it meets, and works out all flows of a broken group again; the event of a broken group is void.
3. All is in integers: rates are bytes per second, what is left of a flow is counted in bytes times 10**9 (rate times nanoseconds). Shares
   are rounded down, and what that leaves of a link (less than a byte per second for each flow) goes to its oldest flow that can use it.
   So every flow has a full link, and no link is over its capacity. A flow ends at the first nanosecond by which all its bytes are there,
   or 1 ns after a sharing that falls on that.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from operator import attrgetter

from headrace.sim.loop import Loop

SECOND_NS = 1_000_000_000
KEY_BITS = 32
"""Fraction bits by which shares of links are told apart: exact for up to 65,536 flows of a link."""


@dataclass(slots=True, eq=False)
class Group:
    flows: list["Flow"]
    firsts: list["Flow"]
    """Those that end first, all at one time. None of them: all stand still."""
    whole: bool = True


@dataclass(slots=True, eq=False)
class Flow:
    """One transfer. To be read by others: `number`, `nbytes`, `links`, `rate`, `over`."""

    number: int
    """From 1, in the order in which they started."""
    links: tuple[int, ...]
    nbytes: int
    latency_ns: int
    done: Callable[[], object]
    left: int
    """Bytes times 10**9, at `since_ns`."""
    since_ns: int
    rate: int = 0
    """Bytes per second, since then."""
    end_ns: int = 0
    """At this rate, if it is not 0."""
    ceiling: int = 0
    """Lowest capacity of its links."""
    moving: bool = False
    """It holds its links."""
    over: bool = False
    """Done or cancelled."""
    group: Group | None = field(default=None, repr=False)
    mark: int = 0
    """The latest sharing that has met it."""
    tight: Sequence[int] = ()
    """Its tight links then."""
    share: int = 0
    """Its rate in the sharing that is being worked out; -1: open."""


class Flows:
    """Flows over links numbered from 0, with capacities in bytes per second.

    What became void stays in the loop until its time: the loop's last instant may come after the last flow is done.
    """

    def __init__(self, loop: Loop, capacities: Sequence[int]) -> None:
        self.bytes_in_flight = 0
        """Of flows that are not over: all their bytes, also those that are there already."""
        self.sharings = 0
        """Times that rates were worked out anew."""
        self._loop = loop
        self._capacity = list(capacities)
        self._members: list[dict[int, Flow]] = [{} for _ in capacities]
        """By link, by number of the flow, ascending."""
        self._demand = [0] * len(self._capacity)
        """Sum of the ceilings of a link's flows. A link is tight if that is over its capacity."""
        self._met = [0] * len(self._capacity)
        """The latest sharing that has met this link."""
        self._number = 0
        self._started: list[Flow] = []
        self._broken: list[Group] = []
        self._pending: dict[int, int] = {}
        self._asked = False

    def start(
        self, links: tuple[int, ...], nbytes: int, done: Callable[[], object], latency_ns: int = 0
    ) -> Flow:
        """`nbytes` begin to flow over these links, each named once. `done()` is called `latency_ns` after the last byte has left.

        No links, or no bytes: done after the latency alone, 1 ns at least.
        """
        now_ns = self._loop.now_ns
        self._number += 1
        flow = Flow(self._number, links, nbytes, latency_ns, done, nbytes * SECOND_NS, now_ns)
        self.bytes_in_flight += nbytes
        if not links or not nbytes:
            flow.left = 0
            self._loop.at(now_ns + max(1, latency_ns), self._finish, flow)
            return flow
        if self._join(flow):
            self._started.append(flow)
            self._ask()
        else:
            flow.share = flow.ceiling
            self._run([flow])
        return flow

    def cancel(self, flow: Flow) -> int:
        """`done` will not be called. Returns how many whole bytes have left; one that is over has sent all it will, and nothing changes."""
        if not flow.over:
            flow.over = True
            self.bytes_in_flight -= flow.nbytes
            if flow.moving:
                self._settle(flow)
                if flow.group is not None:
                    self._break(flow.group)
                self._leave(flow)
        return flow.nbytes - -(-flow.left // SECOND_NS)

    def set_capacity(self, link: int, bytes_per_s: int) -> None:
        """From 1 ns later on. 0: flows over this link stand still."""
        self._pending[link] = bytes_per_s
        self._ask()

    def follow(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Capacities that vary: (at_ns, link, bytes per second), by time. Each holds from 1 ns later on. One event is pending at most."""
        self._follow(list(changes), 0)

    def used(self, link: int) -> int:
        """Bytes per second over this link now."""
        return sum(flow.rate for flow in self._members[link].values())

    def capacity(self, link: int) -> int:
        return self._capacity[link]

    def _follow(self, changes: list[tuple[int, int, int]], at: int) -> None:
        while at < len(changes) and changes[at][0] <= self._loop.now_ns:
            self.set_capacity(changes[at][1], changes[at][2])
            at += 1
        if at < len(changes):
            self._loop.at(changes[at][0], self._follow, changes, at)

    # Links

    def _join(self, flow: Flow) -> bool:
        """Is one of its links tight now?"""
        capacity, demand = self._capacity, self._demand
        flow.moving = True
        flow.ceiling = ceiling = min([capacity[link] for link in flow.links])
        tight = False
        for link in flow.links:
            self._members[link][flow.number] = flow
            demand[link] += ceiling
            tight |= demand[link] > capacity[link]
        return tight

    def _leave(self, flow: Flow) -> None:
        flow.moving = False
        flow.group = None  # a flow that a caller keeps keeps no others
        for link in flow.links:
            del self._members[link][flow.number]
            self._demand[link] -= flow.ceiling
        flow.rate = 0

    def _settle(self, flow: Flow) -> None:
        """Bring `left` up to now."""
        now_ns = self._loop.now_ns
        flow.left = max(0, flow.left - flow.rate * (now_ns - flow.since_ns))
        flow.since_ns = now_ns

    def _resize(self, link: int, bytes_per_s: int) -> list[Flow]:
        """Its flows, whose ceilings are brought up to date, and with them what is asked of their other links."""
        self._capacity[link] = bytes_per_s
        flows = list(self._members[link].values())
        for flow in flows:
            ceiling = min([self._capacity[other] for other in flow.links])
            for other in flow.links:
                self._demand[other] += ceiling - flow.ceiling
            flow.ceiling = ceiling
        return flows

    # Ends

    def _end(self, group: Group) -> None:
        """The first flows of a group have sent their last byte."""
        if not group.whole:
            return
        self._break(group)
        for flow in group.firsts:
            if flow.moving:
                flow.left = 0
                self._leave(flow)
                if flow.latency_ns:
                    self._loop.at(self._loop.now_ns + flow.latency_ns, self._finish, flow)
                else:
                    self._finish(flow)

    def _finish(self, flow: Flow) -> None:
        if not flow.over:
            flow.over = True
            self.bytes_in_flight -= flow.nbytes
            flow.done()

    def _break(self, group: Group) -> None:
        """One of its flows goes. The others are to be shared out again; until then they still run, and end, as they did."""
        if len(group.flows) > 1:
            self._broken.append(group)
            self._ask()

    # Sharing

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self._loop.at(self._loop.now_ns + 1, self._share)

    def _share(self) -> None:
        """Work out the rates of all that the latest changes can reach."""
        self._asked = False
        self.sharings += 1
        todo, self._started = self._started, []
        for link, bytes_per_s in self._pending.items():
            todo += self._resize(link, bytes_per_s)
        self._pending.clear()
        for group in self._broken:
            todo += group.flows
        self._broken.clear()
        for flow in todo:  # grows: groups that are met here are broken too
            if not flow.moving or flow.mark == self.sharings:
                continue
            flows, tight = self._reach(flow)
            for met in flows:
                if met.group is not None and met.group.whole:
                    met.group.whole = False
                    todo += met.group.flows
            fill(flows, [(link, self._capacity[link], self._members[link]) for link in tight])
            self._run(flows)

    def _reach(self, first: Flow) -> tuple[list[Flow], list[int]]:
        """All flows that tight links join to this one, by number, and those links."""
        serial, capacity, demand, met = self.sharings, self._capacity, self._demand, self._met
        first.mark = serial
        flows, tight = [first], []
        for flow in flows:
            flow.tight = [link for link in flow.links if demand[link] > capacity[link]]
            for link in flow.tight:
                if met[link] != serial:
                    met[link] = serial
                    tight.append(link)
                    for other in self._members[link].values():
                        if other.mark != serial:
                            other.mark = serial
                            flows.append(other)
        flows.sort(key=attrgetter("number"))
        return flows, tight

    def _run(self, flows: list[Flow]) -> None:
        """These are a group now, each with its share as its rate."""
        soonest_ns = self._loop.now_ns + 1
        first_ns = 0
        firsts: list[Flow] = []
        for flow in flows:
            if flow.share != flow.rate:
                self._settle(flow)
                flow.rate = flow.share
                flow.end_ns = flow.since_ns - (-flow.left // flow.rate) if flow.rate else 0
            if flow.left and not flow.rate:
                continue
            end_ns = max(flow.end_ns, soonest_ns)
            if not firsts or end_ns < first_ns:
                first_ns, firsts = end_ns, [flow]
            elif end_ns == first_ns:
                firsts.append(flow)
        group = Group(flows, firsts)
        for flow in flows:
            flow.group = group
        if firsts:
            self._loop.at(first_ns, self._end, group)


def fill(flows: list[Flow], links: Sequence[tuple[int, int, dict[int, Flow]]]) -> None:
    """Give each flow its max-min fair `share`. Flows are all of these links (number, capacity, flows by number) and have ceilings.

    Rounds: the lowest of all ceilings of open flows and all even shares of links closes its flows. Shares of links only grow as flows
    close, so a heap whose top is brought up to date finds the lowest.
    """
    room = {link: capacity for link, capacity, _ in links}
    open_flows = {link: len(members) for link, _, members in links}
    members_of = {link: members for link, _, members in links}

    def close(flow: Flow, share: int) -> None:
        flow.share = share
        for link in flow.tight:
            room[link] -= share
            open_flows[link] -= 1

    heap = [((capacity << KEY_BITS) // len(members), link) for link, capacity, members in links]
    heapify(heap)
    for flow in flows:
        flow.share = -1
    for flow in sorted(flows, key=attrgetter("ceiling")):
        while flow.share < 0:
            share, link = _lowest(heap, room, open_flows)
            if link < 0 or flow.ceiling <= share:
                close(flow, flow.ceiling)
            else:
                for member in members_of[link].values():
                    if member.share < 0:
                        close(member, share)
    _top_up(flows, room)


def _lowest(heap: list[tuple[int, int]], room: dict[int, int], open_flows: dict[int, int]) -> tuple[int, int]:
    """Even share, rounded down, of the link where that is lowest; and the link. -1: no link has open flows."""
    while heap:
        key, link = heap[0]
        count = open_flows[link]
        if not count:
            heappop(heap)
            continue
        now = (room[link] << KEY_BITS) // count
        if now == key:
            return key >> KEY_BITS, link
        heapreplace(heap, (now, link))
    return 0, -1


def _top_up(flows: list[Flow], room: dict[int, int]) -> None:
    """What rounding left, oldest flow first."""
    for flow in flows:
        more = flow.ceiling - flow.share
        for link in flow.tight:
            if room[link] < more:
                more = room[link]
        if more:
            flow.share += more
            for link in flow.tight:
                room[link] -= more
