"""What a live engine's steps, copies and messages cost: two measuring workers, started as `serve` starts its own.

Each has a KV pool and as many threads as a worker of the deployment has. One measures alone while the other waits; for pairs the other one
runs steps meanwhile. Between workers, everything goes the ways of the service: its bus, its transport, its executor's thread.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from statistics import median
from time import monotonic_ns
from typing import TypeVar

import msgspec

from headrace.live import wire
from headrace.live.bus import HUB, Hub
from headrace.live.launch.local import Launcher, worker_environment
from headrace.live.measuring import Answer, Copy, Echo, KeepRunning, Question, Rest, RunSteps
from headrace.live.pools import Pool, check_memory, layout_of
from headrace.live.settings import Model, ServiceConfig, SharedPool, WorkerConfig
from headrace.live.shapes import Limits, Shape, pair_shapes
from headrace.live.transfer.kv import Place
from headrace.types.errors import HeadraceError
from headrace.types.ids import Address, PoolId
from headrace.types.messages import AnyMessage, InstanceInfo
from headrace.types.profile import CopySample, PairSample, StepSample

T = TypeVar("T")

FIRST, SECOND = Address("first"), Address("second")
WARMUPS = 2
REPEATS = 7
PAIR_ROUNDS, PAIR_REPEATS = 3, 5
"""In turn alone and beside the other, so that a machine that gets slower or faster meanwhile does so for both."""
ECHOES = 200
COPIES = ((1, 1), (1, 4), (1, 16), (1, 64), (1, 256), (4, 1), (16, 1), (64, 1), (16, 4))
"""(writes, blocks of each)."""
FILL_S = 600.0


class Rig:
    """The two workers, and how they are asked."""

    def __init__(self, config: ServiceConfig, model: Model, command: Sequence[str]) -> None:
        """Of `config` count: threads, transport, environment, options. `command` starts a process of `live.measuring`."""
        self._config = config
        self._model = model
        self._secret = secrets.token_hex(16)
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[Answer] = self._loop.create_future()
        self._greeted: dict[Address, asyncio.Future[None]] = {}
        self._places: dict[Address, Place] = {}
        self._answers: dict[Address, asyncio.Future[Answer]] = {}
        self._pools: dict[PoolId, Pool] = {}
        self._ending = False
        self._hub = Hub(self._greet, self._receive, self._fail)
        environment = {**worker_environment(config.threads), **config.environment}
        self._launcher = Launcher(command, environment, self._configure, self._ended)

    async def start(self, blocks: int) -> None:
        """`blocks`: of each pool and group. Raises ConfigError for memory that is not there, HeadraceError."""
        layout = layout_of(self._model.spec, (blocks,) * len(self._model.spec.groups))
        check_memory(layout.total, 2)
        for index, worker in enumerate((FIRST, SECOND)):
            pool = self._pools[PoolId(index)] = Pool.create(worker.name, layout)
            pool.fill()
        for worker in (FIRST, SECOND):
            self._greeted[worker] = self._loop.create_future()
            self._launcher.start(worker.name, worker.epoch)
        await self._first_of(asyncio.gather(*self._greeted.values()))
        info = InstanceInfo(PoolId(1), HUB, "mixed", self._config.instance.sequences_max, layout.blocks)
        peer = wire.Member(SECOND, info, self._places[SECOND])
        self._hub.send(HUB, FIRST, wire.PeerJoined(peer))
        for pool in self._pools.values():
            await asyncio.to_thread(pool.filled, FILL_S)

    async def ask(self, worker: Address, question: Question) -> Answer:
        """Raises HeadraceError if a worker has ended."""
        self._answers[worker] = self._loop.create_future()
        self._hub.send(HUB, worker, wire.Ping(), msgspec.msgpack.encode(question))
        return await self._first_of(self._answers[worker])

    async def stop(self) -> None:
        self._ending = True
        self._launcher.kill_all()
        await self._launcher.empty.wait()
        self._hub.close()
        for pool in self._pools.values():
            pool.close()
        self._failed.cancel()

    async def _first_of(self, wanted: asyncio.Future[T]) -> T:
        await asyncio.wait((wanted, self._failed), return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            wanted.cancel()
            # One of several answers has an exception of its own by that, which nobody else asks for.
            await asyncio.gather(wanted, return_exceptions=True)
            self._failed.result()
        return wanted.result()

    def _configure(self, address: Address) -> WorkerConfig:
        config, mine = self._config, PoolId(0 if address == FIRST else 1)
        blocks = self._pools[mine].layout.blocks
        return WorkerConfig(
            address=address,
            parent=os.getpid(),
            endpoint=self._hub.endpoint,
            secret=self._secret,
            router=HUB,
            info=InstanceInfo(mine, HUB, "mixed", config.instance.sequences_max, blocks),
            model=self._model,
            pool=SharedPool(mine, self._pools[mine].fd, self._pools[mine].layout),
            engine=config.engine,
            instance=config.instance,
            transfer=config.transfer,
            threads=config.threads,
            report_ns=config.report_ns,
            journals="",
            options=config.options,
        )

    def _greet(self, source: Address, hello: wire.Hello) -> None:
        if hello.secret == self._secret and source in self._greeted:
            self._hub.admit(source)
            self._places[source] = hello.place
            self._greeted[source].set_result(None)

    def _receive(
        self, source: Address, target: Address, message: AnyMessage | wire.Control, payload: bytes
    ) -> None:
        if isinstance(message, wire.Pong):
            self._answers[source].set_result(wire.decode_payload(payload, Answer))

    def _ended(self, address: Address, status: int, lines: list[str]) -> None:
        if not self._ending:
            said = "".join(f"\n  {line}" for line in lines)
            self._fail(HeadraceError(f"the worker that was measured has ended (status {status}):{said}"))

    def _fail(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)


@asynccontextmanager
async def rig(config: ServiceConfig, model: Model, command: Sequence[str], blocks: int) -> AsyncIterator[Rig]:
    """Started on entry; on exit its processes have ended."""
    made = Rig(config, model, command)
    try:
        await made.start(blocks)
        yield made
    finally:
        await made.stop()


async def measure_steps(rig: Rig, shapes: Sequence[Shape], tick: Callable[[], None]) -> list[StepSample]:
    """Alone on the machine; `tick` is called after each shape."""
    samples: list[StepSample] = []
    for shape in shapes:
        samples.append(shape.sample(await rig.ask(FIRST, RunSteps(shape, WARMUPS, REPEATS))))
        tick()
    return samples


async def measure_pairs(rig: Rig, limits: Limits, tick: Callable[[], None]) -> list[PairSample]:
    """Medians of steps beside another worker's, over medians of the same steps alone, in turn."""
    pairs: list[PairSample] = []
    shapes = pair_shapes(limits)
    for kind, shape in shapes.items():
        wanted = RunSteps(shape, WARMUPS, PAIR_REPEATS)
        for beside, other in shapes.items():
            alone: list[float] = []
            together: list[float] = []
            for _ in range(PAIR_ROUNDS):
                alone += await rig.ask(FIRST, wanted)
                await rig.ask(SECOND, KeepRunning(other))
                together += await rig.ask(FIRST, wanted)
                await rig.ask(SECOND, Rest())
            pairs.append(PairSample(kind, beside, median(together) / median(alone)))
            tick()
    return pairs


async def measure_copies(rig: Rig, model: Model, blocks: int, tick: Callable[[], None]) -> list[CopySample]:
    """From one pool of `blocks` blocks into the other, the first of them not counted."""
    samples: list[CopySample] = []
    for writes, each in COPIES:
        if 2 * writes * each <= blocks:
            seconds = await rig.ask(FIRST, Copy(SECOND, writes, each, WARMUPS + REPEATS))
            nbytes = writes * each * model.spec.block_bytes(0)
            samples.append(CopySample(nbytes, writes, seconds[WARMUPS:]))
        tick()
    return samples


async def measure_message(rig: Rig) -> float:
    """Seconds from one process's core to another's: half of the way there and back."""
    seconds: list[float] = []
    for _ in range(ECHOES):
        began_ns = monotonic_ns()
        await rig.ask(FIRST, Echo())
        seconds.append((monotonic_ns() - began_ns) * 1e-9 / 2)
    return median(seconds)
