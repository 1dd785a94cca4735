"""One core at a time, told by hand what happens, and asked what it wants."""

from typing import Any, TypeVar

from headrace.engine.admission import aggressive
from headrace.engine.batching import splitfuse
from headrace.engine.ordering import fcfs
from headrace.engine.policies import EnginePolicies, Preemption
from headrace.engine.preemption import recompute
from headrace.kv.evict import lru
from headrace.nodes.instance import Instance
from headrace.nodes.limits import InstanceConfig, RouterConfig
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.types.events import (
    Close,
    Command,
    Deliver,
    Event,
    Execute,
    PeerLost,
    PeerUp,
    Received,
    Send,
    StepDone,
    Submitted,
)
from headrace.types.ids import Address, BlockHash, PoolId, RequestId, SequenceKey
from headrace.types.kv import BlockRun, GroupKind, KVGroup, KVSpec, TableRun
from headrace.types.messages import AnyMessage, InstanceInfo, Leased, Matched, Role, Start, TokenRun, Tokens
from headrace.types.plan import Output, StepPlan, StepResult
from headrace.types.request import NEVER_NS, FinishReason, Request
from headrace.types.views import ClusterView, Decline, Placement, PlacementRequest, Wait

ROUTER = Address("router")
POOL, OTHER_POOL = Address("pool0"), Address("pool1")
P, D = Address("p"), Address("d")
SIZE = 4
SPEC = KVSpec((KVGroup(GroupKind.FULL, (0, 1), 1, 8),), SIZE, "float32")
BLOCKS = (64,)
Kind = TypeVar("Kind")


def info(pool: int = 0, leaning: str = "mixed") -> InstanceInfo:
    return InstanceInfo(PoolId(pool), POOL if pool == 0 else OTHER_POOL, leaning, 8, BLOCKS)


def key(n: int = 1, choice: int = 0, attempt: int = 0) -> SequenceKey:
    return SequenceKey(RequestId(n), choice, attempt)


def hashes(n: int, blocks: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(bytes([n, i])) for i in range(blocks))


def start(n: int = 1, total: int = 10, role: Role = Role.WHOLE, **settings: Any) -> Start:
    fields: dict[str, Any] = {
        "key": key(n),
        "history": 0,
        "emits_max": 8,
        "hashes": hashes(n, total // SIZE),
        "arrival_ns": n,
        "deadline_ns": NEVER_NS,
        "source": P if role is Role.DECODE else None,
    }
    return Start(**{**fields, "total": total, "role": role, **settings})


class Bench:
    """A core and what it has said since last asked."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.now_ns = 1
        self.said: list[Command] = []

    def tell(self, *events: Event, at_ns: int | None = None) -> list[Command]:
        """One instant."""
        self.now_ns = self.now_ns + 1 if at_ns is None else at_ns
        for event in events:
            self.core.handle(event, self.now_ns)
        self.said = self.core.settle(self.now_ns)
        return self.said

    def hear(self, source: Address, *messages: AnyMessage) -> list[Command]:
        return self.tell(*(Received(source, message) for message in messages))

    def sent(self, kind: type[Kind], to: Address | None = None) -> list[Kind]:
        """Messages of one kind in the last instant."""
        return [
            c.message
            for c in self.said
            if isinstance(c, Send) and isinstance(c.message, kind) and to in (None, c.target)
        ]

    def one(self, kind: type[Kind], to: Address | None = None) -> Kind:
        (message,) = self.sent(kind, to)
        return message

    def commands(self, kind: type[Kind]) -> list[Kind]:
        return [c for c in self.said if isinstance(c, kind)]


class InstanceBench(Bench):
    """An instance whose pool, peers and executor are played by the test."""

    core: Instance

    def __init__(
        self,
        address: Address = P,
        spare: int = 32,
        pool: int = 0,
        preemption: Preemption | None = None,
        **limits: Any,
    ) -> None:
        policies = EnginePolicies(
            splitfuse.Policy(splitfuse.Config()),
            aggressive.Policy(aggressive.Config()),
            fcfs.Policy(fcfs.Config()),
            preemption or recompute.Policy(recompute.Config()),
        )
        config = InstanceConfig(**{"tokens_max": 16, "depth": 1, "lease_blocks": spare, **limits})
        super().__init__(Instance(address, ROUTER, info(pool), SPEC, policies, config))
        self.pool = info(pool).pool_address
        if spare:
            self.hear(self.pool, Leased((BlockRun(PoolId(pool), 0, 0, spare),), False, (0,)))

    def meet(self, *peers: tuple[Address, int]) -> None:
        self.tell(*(PeerUp(peer, info(pool)) for peer, pool in peers))

    def lose(self, peer: Address, pool: int = 1) -> list[Command]:
        return self.tell(PeerLost(peer, info(pool)))

    def begin(self, message: Start, tokens: int = 0, table: tuple[TableRun, ...] = ()) -> list[Command]:
        """A start, and the pool's answer to its look-up."""
        self.hear(ROUTER, message)
        return self.hear(self.pool, Matched(message.key, tokens, table))

    def begin_all(self, *messages: Start) -> list[Command]:
        """Several at once, none of which finds a prefix."""
        self.hear(ROUTER, *messages)
        return self.hear(self.pool, *(Matched(message.key, 0, ()) for message in messages))

    def step(
        self, *, finish: dict[int, FinishReason] | None = None, error: dict[int, str] | None = None
    ) -> list[Command]:
        """The oldest plan in flight has run: what draws draws one token."""
        plan = self.core.scheduler.inflight[0].plan
        outputs = [
            Output(
                w.key,
                int(w.emits),
                self._filled(w.key, w.first + w.count),
                (finish or {}).get(w.key.request) if w.emits else None,
                error=(error or {}).get(w.key.request, ""),
            )
            for w in plan.work
        ]
        return self.tell(StepDone(StepResult(plan.step, tuple(outputs))))

    def _filled(self, name: SequenceKey, computed: int) -> tuple[BlockHash, ...]:
        sequence = self.core.sequences[name]
        return hashes(name.request, computed // SIZE)[len(sequence.hashes) :]

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @property
    def plans(self) -> list[StepPlan]:
        return [c.plan for c in self.commands(Execute)]

    @property
    def closed(self) -> list[SequenceKey]:
        return [c.key for c in self.commands(Close)]

    @property
    def free(self) -> int:
        """Blocks in hand."""
        return self.core.memory.spare[0].total


class Scripted:
    """A placement that says what the test wants."""

    reads_reports = True
    reads_prefixes = False

    def __init__(self, place: Placement | Wait | Decline, bind: Address | Wait = D) -> None:
        self.answer = place
        self.bound = bind
        self.asked: list[PlacementRequest] = []
        self.views: list[ClusterView] = []

    def place(self, request: PlacementRequest, view: ClusterView) -> Placement | Wait | Decline:
        self.asked.append(request)
        self.views.append(view)
        return self.answer

    def bind(self, request: PlacementRequest, view: ClusterView, prefill: Address) -> Address | Wait:
        self.asked.append(request)
        return self.bound

    def horizon(self, view: ClusterView) -> int:
        return 1


class RouterBench(Bench):
    """A router whose instances are played by the test."""

    core: Router

    def __init__(
        self,
        prefill: Address = P,
        decode: Address | None = D,
        peers: tuple[Address, ...] = (P, D),
        **limits: int,
    ) -> None:
        self.placement = Scripted(Placement(prefill, decode))
        super().__init__(Router(ROUTER, self.placement, RouterConfig(**limits)))
        self.tell(*(PeerUp(peer, info()) for peer in peers))

    def submit(self, n: int = 1, **settings: Any) -> list[Command]:
        fields: dict[str, Any] = {"prompt": 10, "hashes": hashes(n, 2), "tokens_max": 4, "arrival_ns": n}
        return self.tell(Submitted(Request(RequestId(n), **{**fields, **settings})))

    def tokens(self, source: Address, *runs: TokenRun) -> list[Command]:
        return self.hear(source, Tokens(runs))

    @property
    def delivered(self) -> list[tuple[int, int, int, FinishReason | None]]:
        """(choice, first, count, finish) of the last instant."""
        return [(c.choice, c.first, c.count, c.finish) for c in self.commands(Deliver)]

    def loads(self) -> dict[str, tuple[int, int]]:
        """Sequences and tokens assigned, by instance."""
        view = self.core.fleet.view(self.now_ns)
        return {
            a.name: (int(view.assigned[i]), int(view.assigned_tokens[i]))
            for i, a in enumerate(view.addresses)
        }


class PoolBench(Bench):
    """A pool whose holders are played by the test."""

    core: PoolCore

    def __init__(
        self, blocks: int = 16, holders: tuple[Address, ...] = (P, D), listener: Address | None = None
    ) -> None:
        eviction = lru.Policy(lru.Config())
        super().__init__(PoolCore(POOL, PoolId(0), SPEC, (blocks,), eviction, listener=listener))
        self.tell(*(PeerUp(holder, info()) for holder in holders))

    def tell(self, *events: Event, at_ns: int | None = None) -> list[Command]:
        commands = super().tell(*events, at_ns=at_ns)
        self.core.blocks.audit()
        return commands

    def leased(self, holder: Address) -> int:
        return self.core.blocks.leases[holder][0].total
