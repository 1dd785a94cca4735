"""The shell: feeds cores with events and carries out their commands, on virtual time, with births and deaths of instances.

One process serves clients, router and pools and lives on; every instance is a process of its own that may die at any moment and comes back
under a higher epoch. Everybody hears of births and deaths at his own time, but all in one order, as they come from one process.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, assert_never

from headrace.ports import Core
from headrace.sim.loop import Loop
from headrace.sim.nodes import Node, Watch, Worker
from headrace.sim.rng import KeyedRng
from headrace.types.events import (
    Close,
    Command,
    Deliver,
    Distrust,
    Execute,
    Kill,
    Once,
    PeerLost,
    PeerUp,
    Received,
    Reject,
    Send,
    Submitted,
    WakeAt,
    Withdrawn,
    Write,
)
from headrace.types.ids import Address, PoolId, RequestId
from headrace.types.messages import AnyMessage, InstanceInfo, Start, Tail, Tokens
from headrace.types.request import Request
from headrace.types.swaps import SwapIn, SwapOut
from headrace.types.tiers import Drop, Flushed, Load, Save, Spill, TierCommand
from headrace.types.weights import Committed, Completed, UseWeights

ROUTER = Address("router")


@dataclass(frozen=True, slots=True)
class ShellConfig:
    depth: int = 2
    report_ns: int = 50_000
    """Instances tell how they are this often; 0: never."""
    last_words_ns: int = 0
    """What the dead had sent has arrived by then; nobody hears of a death before."""
    report_growth: int = 30
    """In a run of length t they do so every t / this at least."""

    step_ns: int = 20_000
    """A step takes this,"""
    token_ns: int = 500
    """and this per token."""
    notice_ns: int = 30_000
    """From a death until the others begin to hear of it, at most; and from the first to the last that hears."""
    restart_ns: int = 200_000
    """From a death's discovery to the next incarnation, at least."""
    slow: tuple[float, ...] = ()
    """Factor on step times, by instance; empty: 1 for all."""
    switch_ns: int = 1
    """A change of weights takes this."""
    copy_ns: int = 10_000
    """One copy to or from host memory takes so long on average,"""
    slow_copy_share: float = 0
    """a hundred times that where it is slow,"""
    failed_copy_share: float = 0
    """and so many swaps fail."""


@dataclass(frozen=True, slots=True)
class Place:
    """An instance's place in the fleet: what each of its incarnations is made from."""

    name: str
    info: InstanceInfo
    make: Callable[[Address], Core]


class Users(Protocol):
    """Who asks and is answered, as the shell knows them."""

    unfinished: int

    def payload_for(self, start: Start, target: Address) -> Any:
        """What the sequence starts from, beside what cores see."""
        ...

    def drawn(self, emissions: Any) -> None:
        """What came with a `Tokens` message to the router."""
        ...

    def deliver(self, command: Deliver, now_ns: int) -> None: ...

    def reject(self, command: Reject, now_ns: int) -> None: ...

    def withdraw(self, request: RequestId, choice: int | None) -> bool:
        """The client leaves. False: it had its answer already."""
        ...


class BelowPool(Protocol):
    """The tiers of one pool."""

    def carry(self, command: TierCommand) -> None: ...


class Carrier(Protocol):
    """Messages and block writes between nodes; see `sim.network` for what they may do."""

    deliver: Callable[[Node, Node, AnyMessage, Any], None]

    def send(self, source: Node, target: Node, message: AnyMessage, attachment: Any) -> None: ...

    def write(self, source: Any, target: Any, write: Write) -> None: ...

    def hold_until(self, source: Node, target: Node, at_ns: int) -> None: ...

    def delay_ns(self, *key: int) -> int: ...


U = TypeVar("U", bound=Users)
C = TypeVar("C", bound=Carrier)
W = TypeVar("W", bound=Worker)


class Shell(Generic[U, C, W]):
    """Kinds of clients, network and workers are given; births, deaths, news and commands are the same for all."""

    def __init__(
        self,
        loop: Loop,
        rng: KeyedRng,
        config: ShellConfig,
        clients: U,
        network: C,
        make_worker: Callable[[int, Address, Core, InstanceInfo], W],
        *,
        journal: bool = True,
        acquainted: Callable[[Worker, Node], bool] = lambda worker, node: True,
    ) -> None:
        self.config = config
        self.rng = rng
        self.loop = loop
        self.network = network
        self.network.deliver = self._deliver
        self.clients = clients
        self.nodes: list[Node] = []
        """Every incarnation that ever was; the index in a list is the order of settling."""
        self.pools: dict[PoolId, tuple[Node, Any]] = {}
        """Each core, and what stands in its blocks, if anything does."""
        self.tiers: dict[Address, BelowPool] = {}
        """By address of the pool's core."""
        self.workers: dict[Address, W] = {}
        """Live or not."""
        self._make_worker = make_worker
        self._journal = journal
        self._acquainted = acquainted
        """Does the node ever deal with the worker? Else it need not hear of it."""
        self._by_address: dict[Address, Node] = {}
        self._heard: dict[int, int] = {}
        """Receiver -> when it hears the latest news."""
        self._places: dict[str, Place] = {}
        self.slow: dict[str, float] = {}
        """Factor on step times, by name of an instance."""
        self.watch: Watch | None = None
        self.when_heard: Callable[[Node, int], int] = lambda to, at_ns: at_ns
        """When a node hears the news that would come to it at some time."""
        self.on_swap: Callable[[Worker, Worker, SwapOut | SwapIn], None] = lambda worker, same, command: None
        """Told of each swap that begins."""
        self.counts: Counter[str] = Counter()
        self.switched: Callable[[Committed | Completed], None] = lambda command: None
        """Told what the router says of a change of weights."""

    # The fleet

    def add_router(self, core: Core) -> Node:
        node = self._add(Node(len(self.nodes), ROUTER, core, self.loop, journal=self._journal))
        self.router = node
        return node

    def add_pool(self, pool: PoolId, core: Core, memory: Any = None) -> Node:
        node = self._add(Node(len(self.nodes), pool_address(pool), core, self.loop, journal=self._journal))
        self.pools[pool] = (node, memory)
        return node

    def start(self, place: Place, epoch: int = 0) -> W:
        """A new incarnation. Pools hear of it first, then all others, and it of them, before any message passes between them."""
        if place.name not in self._places:
            self._places[place.name] = place
            self.slow[place.name] = self.config.slow[len(self.slow)] if self.config.slow else 1.0
        address = Address(place.name, epoch)
        worker = self._make_worker(len(self.nodes), address, place.make(address), place.info)
        self._add(worker)
        self.workers[address] = worker
        pools = [pool for pool, _ in self.pools.values() if self._acquainted(worker, pool)]
        known_ns = [self._introduce(worker, pool) for pool in pools]
        self.loop.at(max(known_ns) + 1, self._join, worker)
        return worker

    def kill(self, address: Address) -> None:
        worker = self.workers[address]
        if not worker.alive:
            return
        self.counts["deaths"] += 1
        now_ns = self.loop.now_ns
        notice_ns = self.rng.between(1, self.config.notice_ns, "found", worker.index)
        found_ns = now_ns + self.config.last_words_ns + notice_ns
        worker.die(now_ns, found_ns)
        self.loop.at(found_ns, self._found, worker)

    def _add(self, node: Node) -> Node:
        node.carry = self._carry
        node.watch = self.watch
        self.nodes.append(node)
        self._by_address[node.address] = node
        return node

    def _join(self, worker: Worker) -> None:
        """All pools know it: now it and the others hear of each other."""
        if not worker.alive:
            return
        self._introduce(worker, self.router)
        for other in self.workers.values():
            undiscovered = other.alive or other.found_ns > self.loop.now_ns
            if other.joined and undiscovered and self._acquainted(worker, other):
                self._introduce(other, worker)
                self._introduce(worker, other)
        worker.joined = True
        if self.config.report_ns:
            self.loop.at(self.loop.now_ns + self.config.report_ns, self._report, worker)

    def _introduce(self, worker: Worker, to: Node) -> int:
        """`to` hears that the worker is up, and when; what the worker sends it comes later."""
        at_ns = self._news_at(worker, to)
        self.loop.at(at_ns, self._tell, to, PeerUp(worker.address, worker.info))
        self.network.hold_until(worker, to, at_ns)
        return at_ns

    def _found(self, worker: Worker) -> None:
        last_ns = self.loop.now_ns
        for node in self.nodes:
            if node.alive:
                at_ns = self._news_at(worker, node)
                last_ns = max(last_ns, at_ns)
                self.loop.at(at_ns, self._tell, node, PeerLost(worker.address, worker.info))
        backoff_ns = self.rng.between(1, self.config.restart_ns, "backoff", worker.index)
        place = self._places[worker.address.name]
        self.loop.at(last_ns + backoff_ns, self.start, place, worker.address.epoch + 1)

    def _news_at(self, about: Worker, to: Node) -> int:
        delay_ns = self.rng.between(1, self.config.notice_ns, "news", to.index, about.index, about.alive)
        at_ns = max(self._heard.get(to.index, 0), self.when_heard(to, self.loop.now_ns + delay_ns))
        self._heard[to.index] = at_ns
        return at_ns

    def _tell(self, node: Node, news: PeerUp | PeerLost) -> None:
        if isinstance(news, PeerLost) and isinstance(node, Worker):
            node.lost_peers[news.peer] = None
        node.receive(news, self.loop.now_ns)

    def _report(self, worker: Worker) -> None:
        """What is known of an instance is as old as the message that says it."""
        if not worker.alive or not self.clients.unfinished:
            return
        report = worker.observe(self.loop.now_ns)
        if report is not None:
            self.network.send(worker, self.router, report, None)
        # Rarer as time goes by, or a run that waits for a timer consists of reports.
        self.loop.at(
            self.loop.now_ns + max(self.config.report_ns, self.loop.now_ns // self.config.report_growth),
            self._report,
            worker,
        )

    # Clients

    def submit(self, request: Request) -> None:
        """Its time has come, or will."""
        self.loop.at(max(request.arrival_ns, self.loop.now_ns + 1), self.ask, request)

    def ask(self, request: Request) -> None:
        """Its time has come."""
        self.router.receive(Submitted(request), self.loop.now_ns)

    def withdraw(self, request: RequestId, choice: int | None) -> None:
        """The client wants no more of it, as of now."""
        if self.clients.withdraw(request, choice):
            self.router.receive(Withdrawn(request, choice), self.loop.now_ns)

    # Messages and commands

    def _deliver(self, source: Node, target: Node, message: AnyMessage, attachment: Any) -> None:
        """What was attached goes to the executor or the clients, the message to the core."""
        if isinstance(message, Start | Tail):
            assert isinstance(target, Worker)
            target.accept(message, attachment)
        elif isinstance(message, Tokens):
            self.clients.drawn(attachment)
        target.receive(Received(source.address, message), self.loop.now_ns)

    def _carry(self, node: Node, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(target, message):
                    receiver = self._by_address[target]
                    self.network.send(node, receiver, message, self._attachment(node, target, message))
                case WakeAt(at_ns):
                    self.loop.wake_at(node, at_ns)
                case Deliver():
                    self.clients.deliver(command, self.loop.now_ns)
                case Reject():
                    self.clients.reject(command, self.loop.now_ns)
                case Kill(peer):
                    self.loop.at(
                        self.loop.now_ns + self.network.delay_ns(node.index, self.loop.now_ns),
                        self.kill,
                        peer,
                    )
                case Distrust(peer, why):
                    raise AssertionError(f"{node.address} distrusts {peer}, which is honest: {why}")
                case Committed() | Completed():
                    self.counts[type(command).__name__] += 1
                    self.switched(command)
                case Save() | Load() | Spill() | Drop() | Flushed():
                    self.tiers[node.address].carry(command)
                case Execute() | Once() | Close() | Write() | UseWeights() | SwapOut() | SwapIn():
                    assert isinstance(node, Worker)
                    self._carry_work(node, command)
                case _:
                    assert_never(command)

    def _carry_work(
        self, worker: Worker, command: Execute | Once | Close | Write | UseWeights | SwapOut | SwapIn
    ) -> None:
        match command:
            case Execute(plan):
                worker.execute(plan, self.loop.now_ns)
            case Once(step):
                worker.once(step)
            case Close(key):
                worker.close(key)
            case UseWeights(version):
                worker.use_weights(version, self.loop.now_ns)
            case SwapOut() | SwapIn():
                worker.swap(command)
                self.on_swap(worker, worker, command)
            case Write():
                assert command.target not in worker.lost_peers, (
                    f"{worker.address} writes to a dead {command.target}"
                )
                self.network.write(worker, self.workers[command.target], command)

    def _attachment(self, node: Node, target: Address, message: AnyMessage) -> Any:
        if isinstance(message, Start):
            return self.clients.payload_for(message, target)
        if isinstance(message, Tail | Tokens):
            assert isinstance(node, Worker)
            return node.attach(message)
        return None


def pool_address(pool: PoolId) -> Address:
    return Address(f"pool{pool}")
