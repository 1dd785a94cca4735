"""A worker that only measures: the executor of `live.worker` on its own thread, run on shapes that it is asked for over the bus.

Questions come attached to a `Ping`, answers go attached to a `Pong`; one at a time. To wire it: as `live.worker`.
"""

import asyncio
from collections.abc import Coroutine
from functools import partial
from time import monotonic_ns
from typing import Any, NoReturn

import msgspec

from headrace.live import wire
from headrace.live.bus import HUB, Link
from headrace.live.pools import Pool
from headrace.live.settings import WorkerConfig
from headrace.live.shapes import Shape, Stage
from headrace.live.steps import Steps
from headrace.live.transfer.kv import KVTransport
from headrace.live.worker import Loaded, MakeExecutor, end_with, greeting, open_engine, open_kv
from headrace.types.errors import IncompatiblePeer
from headrace.types.events import Landed, Write, Written
from headrace.types.ids import Address, Slot, StepId, WriteId
from headrace.types.messages import AnyMessage
from headrace.types.payload import Emission
from headrace.types.plan import StepResult


class RunSteps(msgspec.Struct, frozen=True, tag=True):
    """How long do steps of this shape take?"""

    shape: Shape
    warmups: int
    repeats: int


class KeepRunning(msgspec.Struct, frozen=True, tag=True):
    """Run steps of this shape until told to rest; answered when the first one has run."""

    shape: Shape


class Rest(msgspec.Struct, frozen=True, tag=True):
    """Answered when nothing runs any more."""


class Copy(msgspec.Struct, frozen=True, tag=True):
    """How long do so many writes of so many blocks each into the peer's pool take, until the last is answered?"""

    peer: Address
    writes: int
    blocks: int
    repeats: int


class Echo(msgspec.Struct, frozen=True, tag=True):
    """Answer at once."""


Question = RunSteps | KeepRunning | Rest | Copy | Echo
Answer = tuple[float, ...]
"""Seconds of each repeat."""


def run(config: WorkerConfig, make_executor: MakeExecutor) -> NoReturn:
    """Measure until told to leave; ends the process."""

    async def measure() -> None:
        await Measuring(config, make_executor).ended

    end_with(measure)


class Measuring:
    """See the module. Everything but the executor runs on the loop's thread."""

    def __init__(self, config: WorkerConfig, make_executor: MakeExecutor) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._pool = Pool(config.pool.fd, config.pool.layout)
        self._engine = open_engine(config)
        self._transport: KVTransport
        buffers = self._pool.buffers()
        self._link = Link(config.address, config.endpoint, self._receive, self._fail)
        self._steps = Steps(
            partial(make_executor, config, buffers), self._loaded, self._step_done, self._fail
        )
        self._done: asyncio.Future[StepResult] = self._loop.create_future()
        self._written: asyncio.Future[None] = self._loop.create_future()
        self._unwritten = 0
        self._step = StepId(0)
        self._serial = 1
        self._resting = False
        self._busy: asyncio.Task[None] | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}

    def _fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)

    def _loaded(self, loaded: Loaded) -> None:
        self._transport = open_kv(self._config, self._engine, self._pool, loaded, self._moved)
        self._link.send(HUB, greeting(self._config, loaded, self._transport.place))

    def _receive(
        self, source: Address, target: Address, message: AnyMessage | wire.Control, payload: bytes
    ) -> None:
        match message:
            case wire.Ping():
                self._start(self._answer(msgspec.msgpack.decode(payload, type=Question)))
            case wire.PeerJoined(peer):
                self._transport.join(peer.address, peer.place)
            case wire.NotWelcome(reason):
                self._fail(IncompatiblePeer(f"{self._config.address} was refused: {reason}"))
            case wire.Leave():
                self.ended.set_result(None)
            case _:
                pass

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._fail(error)

    async def _answer(self, question: Question) -> None:
        answer: Answer = ()
        match question:
            case RunSteps(shape, warmups, repeats):
                answer = (await self._run(shape, warmups + repeats))[warmups:]
            case KeepRunning(shape):
                await self._run(shape, 1)
                self._resting = False
                self._busy = self._start(self._keep_running(shape))
            case Rest():
                await self._rest()
            case Copy():
                answer = tuple([await self._copy(question) for _ in range(question.repeats)])
            case Echo():
                pass
        self._link.send(HUB, wire.Pong(0), msgspec.msgpack.encode(answer))

    async def _run(self, shape: Shape, repeats: int) -> Answer:
        """Seconds of each step."""
        model = self._config.model
        stage = Stage(shape, model.spec, model.vocabulary, self._serial, repeats)
        seconds: list[float] = []
        for number in range(repeats):
            for key, payload in stage.opened():
                self._steps.open(key, payload)
            self._steps.execute(stage.plan(self._step))
            result = await self._done
            self._done = self._loop.create_future()
            self._step = result.step
            for key in stage.closed(last=number == repeats - 1):
                self._steps.close(key)
            seconds.append((result.ended_ns - result.started_ns) * 1e-9)
        self._serial = stage.serial
        return tuple(seconds)

    def _step_done(self, result: StepResult, _: tuple[Emission, ...]) -> None:
        self._done.set_result(result)

    async def _keep_running(self, shape: Shape) -> None:
        while not self._resting:
            await self._run(shape, 8)

    async def _rest(self) -> None:
        self._resting = True
        if self._busy is not None:
            await self._busy
            self._busy = None

    async def _copy(self, question: Copy) -> float:
        blocks = question.blocks
        self._unwritten = question.writes
        began_ns = monotonic_ns()
        for number in range(question.writes):
            # Every second run, so that no two could be merged.
            first = 2 * number * blocks
            write = Write(WriteId(number), question.peer, Slot(0), 0, first, first, blocks, 1)
            self._transport.write(write)
        await self._written
        self._written = self._loop.create_future()
        return (monotonic_ns() - began_ns) * 1e-9

    def _moved(self, event: Landed | Written) -> None:
        if isinstance(event, Landed):
            return
        if not event.ok:
            self._fail(RuntimeError("a copy into the peer's pool failed"))
            return
        self._unwritten -= 1
        if not self._unwritten:
            self._written.set_result(None)
