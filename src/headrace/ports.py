"""L1: what the cores and shells need from outside, as protocols. Each has a live and a simulated implementation."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from headrace.types.events import Command, Event, Write
from headrace.types.ids import Address, BlockHash, RequestId, SequenceKey
from headrace.types.messages import AnyMessage, Report
from headrace.types.payload import Chunk, Emission, SequencePayload, Submission
from headrace.types.plan import StepPlan, StepResult
from headrace.types.service import ServiceInfo, ServiceStatus
from headrace.types.weights import Pushed, Running, Tensor, Ticket, WeightsStatus


class Core(Protocol):
    """Everything that decides. Synchronous, deterministic, without I/O."""

    def handle(self, event: Event, now_ns: int) -> None:
        """Record what happened."""
        ...

    def settle(self, now_ns: int) -> list[Command]:
        """Decide, once per instant, after every event of that instant is in."""
        ...

    def observe(self, now_ns: int) -> Report | None:
        """What others may know of this node now. Pure."""
        ...


class Executor(Protocol):
    """Runs steps. Plans are executed in the order given; at most two are given and not answered."""

    def open(self, key: SequenceKey, payload: SequencePayload) -> None:
        """Keep the ids and sampling of a sequence until `close`. Plans name it after this."""
        ...

    def append(self, emission: Emission) -> None:
        """Add tokens that another instance drew for an opened sequence."""
        ...

    def execute(
        self, plan: StepPlan, layers_done: Callable[[int], None] | None = None
    ) -> tuple[StepResult, tuple[Emission, ...]]:
        """Run one step. A plan whose `base` is not the last one executed raises ValueError.

        For a `layered` plan `layers_done(n)` is called when the step's KV is written for the model's first n layers, n ascending.
        """
        ...

    def close(self, key: SequenceKey) -> None:
        """Forget a sequence. Unknown keys are ignored."""
        ...


class HolderLost(Exception):
    """A peer that lends memory is gone, or did not answer in time."""


class Answer(Protocol):
    def wait(self) -> memoryview:
        """What the holder says, writable. Raises HolderLost."""
        ...


class Partials(Protocol):
    """Asks holders for partial results. One question at a time may be open with each."""

    def ask(self, holder: Address, query: Sequence[memoryview]) -> Answer:
        """Send a query, in parts. Raises HolderLost."""
        ...


class Transport(Protocol):
    """Moves blocks into a peer's pool: reliable, unordered, never doubled."""

    def write(self, write: Write) -> None:
        """Start it; `Written` (here) and `Landed` (there) are reported as events."""
        ...

    def distrust(self, peer: Address, why: str) -> None:
        """It counted what cannot be: take nothing of it any more."""
        ...

    def forget(self, peer: Address, then: Callable[[], None]) -> None:
        """The peer has ended: complete or fail every write to it. `then` no write of it can land here any more."""
        ...


class Bus(Protocol):
    """Messages between incarnations, in order per pair."""

    def send(self, target: Address, message: AnyMessage, payload: bytes = b"") -> None: ...


class Store(Protocol):
    """A tier for blocks below a pool's memory: host memory, disk. One thread uses it."""

    def put(self, key: BlockHash, value: memoryview) -> None:
        """Raises OSError or MemoryError if it takes no more."""
        ...

    def get(self, key: BlockHash, target: memoryview) -> bool:
        """Fill `target`; False if the key is absent or its content does not verify: then nobody may use what is in `target`."""
        ...

    def delete(self, key: BlockHash) -> None:
        """Absent keys are ignored."""
        ...


class Launcher(Protocol):
    """Starts and ends workers."""

    def start(self, name: str, epoch: int) -> None: ...
    def kill(self, address: Address) -> None: ...


class Rng(Protocol):
    """Keyed draws: the same key gives the same number, whatever was drawn before."""

    def uniform(self, stream: str, *key: int) -> float:
        """In [0, 1)."""
        ...


class Gateway(Protocol):
    """What the API needs of the service."""

    def submit(self, submission: Submission) -> AsyncIterator[Chunk]:
        """Stream of chunks of all choices; each choice's last one has `finish`. Raises Overloaded or RequestFailed.

        Closing the iterator cancels what is unfinished, wherever it runs.
        """
        ...

    def withdraw(self, request: RequestId, choice: int) -> None:
        """The API found a stop string: this choice needs no more tokens. Its stream ends without a further chunk."""
        ...

    def next_id(self) -> RequestId:
        """A number no other request of this service has."""
        ...

    def now_ns(self) -> int:
        """The service's clock, for `Request.arrival_ns` and `deadline_ns`."""
        ...

    def root(self, salt: str) -> BlockHash:
        """Root of the hash chain for requests with this cache salt."""
        ...

    def info(self) -> ServiceInfo:
        """What is served. Constant after start."""
        ...

    def status(self) -> ServiceStatus:
        """What goes on now, for readiness and metrics."""
        ...


class WeightsDoor(Protocol):
    """What the API needs of the service to let a trainer in. One push at a time."""

    def status(self) -> WeightsStatus: ...

    def begin(self, tensors: Sequence[Tensor], running: Running, hold_ns: int) -> Ticket:
        """Raises PushRefused naming the tensor that does not fit."""
        ...

    async def commit(self, number: int, digests: Sequence[str]) -> Pushed:
        """Raises PushRefused saying why the old weights go on serving."""
        ...

    def drop(self, number: int) -> None:
        """Raises PushRefused if there is no such push, or it is too late."""
        ...
