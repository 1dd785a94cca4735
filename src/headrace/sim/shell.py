"""The shell: feeds cores with events and carries out their commands, on virtual time, with births and deaths of instances.

One process serves clients, router and pools and lives on; every instance is a process of its own that may die at any moment and comes back
under a higher epoch. Everybody hears of births and deaths at his own time, but all in one order, as they come from one process.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from headrace.ports import Core
from headrace.sim.clients import Clients
from headrace.sim.loop import Loop
from headrace.sim.memory import Memory
from headrace.sim.network import Attachment, Network, NetworkConfig
from headrace.sim.nodes import Node, Watch, Worker
from headrace.sim.rng import KeyedRng
from headrace.types.events import (
    Close,
    Command,
    Deliver,
    Execute,
    Kill,
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
from headrace.types.kv import KVSpec
from headrace.types.messages import AnyMessage, Dispatch, InstanceInfo, Start, Tail, Tokens
from headrace.types.payload import SequencePayload
from headrace.types.plan import StepPlan
from headrace.types.request import Request

ROUTER = Address("router")


@dataclass(frozen=True, slots=True)
class ShellConfig:
    depth: int = 2
    report_ns: int = 50_000
    """Instances tell how they are this often."""
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


@dataclass(frozen=True, slots=True)
class Place:
    """An instance's place in the fleet: what each of its incarnations is made from."""

    name: str
    info: InstanceInfo
    make: Callable[[Address], Core]


class Shell:
    def __init__(self, spec: KVSpec, seed: int, config: ShellConfig, network: NetworkConfig) -> None:
        self.config = config
        self.rng = KeyedRng(seed)
        self.loop = Loop()
        self.network = Network(self.loop, self.rng, network)
        self.network.deliver = self._deliver
        self.clients = Clients(spec)
        self.nodes: list[Node] = []
        """Every incarnation that ever was; the index in a list is the order of settling."""
        self.pools: dict[PoolId, tuple[Node, Memory]] = {}
        self.workers: dict[Address, Worker] = {}
        """Live or not."""
        self._spec = spec
        self._by_address: dict[Address, Node] = {}
        self._heard: dict[int, int] = {}
        """Receiver -> when it hears the latest news."""
        self._places: dict[str, Place] = {}
        self._slow: dict[str, float] = {}
        self.watch: Watch | None = None
        self.on_dispatch: Callable[[Address, Address, Dispatch], None] = lambda target, source, message: None
        """Told when an instance asks another for KV."""
        self.counts: Counter[str] = Counter()

    # The fleet

    def add_router(self, core: Core) -> Node:
        node = self._add(Node(len(self.nodes), ROUTER, core, self.loop))
        self.router = node
        return node

    def add_pool(self, pool: PoolId, blocks: tuple[int, ...], core: Core) -> Node:
        node = self._add(Node(len(self.nodes), pool_address(pool), core, self.loop))
        self.pools[pool] = (node, Memory(self._spec, blocks))
        return node

    def start(self, place: Place, epoch: int = 0) -> Worker:
        """A new incarnation. Pools hear of it first, then all others, and it of them, before any message passes between them."""
        if place.name not in self._places:
            self._places[place.name] = place
            self._slow[place.name] = self.config.slow[len(self._slow)] if self.config.slow else 1.0
        address = Address(place.name, epoch)
        core = place.make(address)
        memory = self.pools[place.info.pool][1]
        worker = Worker(
            len(self.nodes),
            address,
            core,
            self.loop,
            place.info,
            memory,
            self._duration_ns,
            self.config.depth,
            self.clients.doomed,
        )
        self._add(worker)
        self.workers[address] = worker
        known_ns = [self._introduce(worker, pool) for pool, _ in self.pools.values()]
        self.loop.at(max(known_ns) + 1, self._join, worker)
        return worker

    def kill(self, address: Address) -> None:
        worker = self.workers[address]
        if not worker.alive:
            return
        self.counts["deaths"] += 1
        now_ns = self.loop.now_ns
        found_ns = now_ns + self.rng.between(1, self.config.notice_ns, "found", worker.index)
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
            if other.joined and undiscovered:
                self._introduce(other, worker)
                self._introduce(worker, other)
        worker.joined = True
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
        at_ns = max(self._heard.get(to.index, 0), self.loop.now_ns + delay_ns)
        self._heard[to.index] = at_ns
        return at_ns

    def _tell(self, node: Node, news: PeerUp | PeerLost) -> None:
        if isinstance(news, PeerLost) and isinstance(node, Worker):
            node.lost_peers[news.peer] = None
        node.receive(news, self.loop.now_ns)

    def _duration_ns(self, index: int, plan: StepPlan) -> int:
        config = self.config
        tokens = sum(work.count for work in plan.work)
        jitter = self.rng.uniform("step", index, plan.step)
        factor = self._slow[self.nodes[index].address.name]
        return 1 + int((config.step_ns + config.token_ns * tokens) * (0.5 + jitter) * factor)

    def _report(self, worker: Worker) -> None:
        """What is known of an instance is as old as the message that says it."""
        if not worker.alive or not self.clients.unfinished:
            return
        report = worker.core.observe(self.loop.now_ns)
        if report is not None:
            self.network.send(worker, self.router, report, None)
        # Rarer as time goes by, or a run that waits for a timer consists of reports.
        self.loop.at(
            self.loop.now_ns + max(self.config.report_ns, self.loop.now_ns // 30), self._report, worker
        )

    # Clients

    def submit(self, request: Request, payload: SequencePayload) -> None:
        self.clients.submit(request, payload)
        self.loop.at(max(request.arrival_ns, self.loop.now_ns + 1), self._submitted, request)

    def _submitted(self, request: Request) -> None:
        self.router.receive(Submitted(request), self.loop.now_ns)

    def withdraw(self, request: RequestId, choice: int | None) -> None:
        """The client wants no more of it, as of now."""
        if self.clients.withdraw(request, choice):
            self.router.receive(Withdrawn(request, choice), self.loop.now_ns)

    # Messages and commands

    def _deliver(self, source: Node, target: Node, message: AnyMessage, attachment: Attachment) -> None:
        """Ids go to the executor or the client's store, the message to the core."""
        match message:
            case Start(key):
                assert isinstance(target, Worker) and isinstance(attachment, SequencePayload)
                target.executor.open(key, attachment)
            case Tail(key):
                assert isinstance(target, Worker) and isinstance(attachment, tuple)
                if key in target.executor.opened:
                    target.executor.append(attachment[0])
            case Tokens():
                assert isinstance(attachment, tuple)
                self.clients.drawn(attachment)
            case _:
                pass
        target.receive(Received(source.address, message), self.loop.now_ns)

    def _carry(self, node: Node, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(target, message):
                    receiver = self._by_address[target]
                    if isinstance(message, Dispatch):
                        self.on_dispatch(node.address, target, message)
                    self.network.send(node, receiver, message, self._attachment(node, message))
                case WakeAt(at_ns):
                    self.loop.wake_at(node, at_ns)
                case Deliver():
                    self.clients.deliver(command)
                case Reject():
                    self.clients.reject(command, self.loop.now_ns)
                case Kill(peer):
                    self.loop.at(
                        self.loop.now_ns + self.network.delay_ns(node.index, self.loop.now_ns),
                        self.kill,
                        peer,
                    )
                case Execute() | Close() | Write():
                    assert isinstance(node, Worker)
                    self._carry_work(node, command)
                case _:
                    assert_never(command)

    def _carry_work(self, worker: Worker, command: Execute | Close | Write) -> None:
        match command:
            case Execute(plan):
                worker.execute(plan, self.loop.now_ns)
            case Close(key):
                worker.close(key)
            case Write():
                assert command.target not in worker.lost_peers, (
                    f"{worker.address} writes to a dead {command.target}"
                )
                self.network.write(worker, self.workers[command.target], command)

    def _attachment(self, node: Node, message: AnyMessage) -> Attachment:
        match message:
            case Start():
                return self.clients.payload_for(message)
            case Tail(key, _, emitted):
                assert isinstance(node, Worker)
                held = node.executor.opened[key]
                first = len(held.token_ids) - held.prompt - emitted
                return (node.executor.tokens(key, first, emitted),)
            case Tokens(runs):
                assert isinstance(node, Worker)
                return tuple(node.executor.tokens(r.key, r.first, r.count) for r in runs if r.count)
            case _:
                return None


def pool_address(pool: PoolId) -> Address:
    return Address(f"pool{pool}")
