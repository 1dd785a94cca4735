"""A worker: one process with one instance core, one executor, and a link to `serve`.

Life cycle:
 1. `read_config`: tie this process's life to its parent's, before anything heavy is imported.
 2. The executor is made, on its own thread (imports, weights, self-test); then `Hello`.
 3. `Welcome`: the core is made, and told of its peers. From here on it does what the router says.
 4. It ends by `Leave`, by `NotWelcome`, by an error that is not one sequence's own (status 1, so that it is restarted), or with its parent.
One that joined from another host (`live.joining`) has no parent: it ends when its connection does, too, and by `retire`, in order.

To wire it (`cli/worker.py`):

    def make_executor(config: WorkerConfig, buffers: list[memoryview]) -> Loaded:
        from headrace.compute...            # torch is imported here, on the executor's thread
        return Loaded(executor, fingerprint=..., spec=..., vocabulary=..., numerics=...)

    sys.exit(run(read_config(), make_executor))
"""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic_ns
from typing import Any, NoReturn

import msgspec
import uvloop

from headrace.live import wire
from headrace.live.bus import HUB, Link
from headrace.live.clock import Clock
from headrace.live.drawn import Drawn
from headrace.live.journal import Header, InstanceSettings, Journal, remake_instance
from headrace.live.lending import Desk
from headrace.live.loop import CoreLoop, Node
from headrace.live.pools import Pool
from headrace.live.renewal import Prepare, Renewals
from headrace.live.settings import WorkerConfig
from headrace.live.steps import Steps
from headrace.live.swaps import Swaps
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.gather import Settings as GatherSettings
from headrace.live.transfer.kv import KVTransport, Place, layout_id
from headrace.live.transports import Settings, open_transports
from headrace.nodes.instance import Instance
from headrace.ports import Core, Executor
from headrace.types.errors import HeadraceError, IncompatiblePeer
from headrace.types.events import (
    Close,
    Command,
    Distrust,
    Event,
    Execute,
    Landed,
    PeerLost,
    PeerUp,
    Received,
    Send,
    StepDone,
    Write,
    Written,
)
from headrace.types.ids import Address, SequenceKey
from headrace.types.kv import KVSpec
from headrace.types.messages import AnyMessage, Start, Tail, Tokens
from headrace.types.payload import Emission, SequencePayload
from headrace.types.plan import StepPlan, StepResult
from headrace.types.ranges import RangeCounts
from headrace.types.swaps import SwapIn, SwapOut
from headrace.types.weights import UseWeights, WeightsReady

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """An executor, and what it has loaded."""

    executor: Executor
    fingerprint: str
    """Of configuration and weights."""
    spec: KVSpec
    vocabulary: int
    numerics: str = ""
    """Id of the arithmetic (`compute.numerics`)."""
    promise: str = ""
    """What is promised in place of equal bits, if it is less."""
    ahead: Callable[[StepPlan], None] | None = None
    """Tell the executor of a plan that waits behind the one that runs. Called on the loop's thread."""
    counts: Callable[[], RangeCounts | None] | None = None
    """What virtual KV ranges did and hold."""
    prepare: Prepare | None = None
    """Makes other weights ready; None: they cannot be changed."""
    answer: Callable[[memoryview], memoryview] | None = None
    """Says what peers ask about KV that lies here; may be called on any thread. None: it cannot lend."""


MakeExecutor = Callable[[WorkerConfig, list[memoryview]], Loaded]
"""From the configuration and the memory of the worker's pool, per group. Called on the executor's thread."""


def read_config() -> WorkerConfig:
    """What the parent says on standard input. From now on this process ends when its parent does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerConfig)
    if os.getppid() != config.parent:
        # It died before we asked to be told.
        sys.exit("the parent process has ended")
    return config


def run(config: WorkerConfig, make_executor: MakeExecutor) -> NoReturn:
    """Serve until told to leave; ends the process."""
    end_with(lambda: _serve(config, make_executor))


def end_with(serve: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
    """Run it on a loop, then end the process: with status 1 if it raised."""
    # The parent decides when workers end: a Ctrl-C or a stop of the whole group must not cut its draining short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        uvloop.run(serve())
        status = 0
    except HeadraceError as error:
        log.error("%s", error)
        status = 1
    except Exception:
        log.exception("the worker failed")
        status = 1
    leave(status)


def leave(status: int) -> NoReturn:
    """End the process past the interpreter's own end: the executor's thread may stand in native code."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


def open_engine(config: WorkerConfig) -> TransferEngine:
    """On the running loop. Raises ConfigError."""
    transfer = config.transfer
    settings = Settings(
        config.address, config.secret, transfer.lanes, transfer.hosts, transfer.pace, transfer.tls
    )
    return TransferEngine(
        config.address,
        open_transports(transfer.transport, settings),
        asyncio.get_running_loop(),
        lanes=transfer.lanes,
        stall_ns=transfer.stall_ns,
        stall_name="--transfer-timeout",
    )


def open_kv(
    config: WorkerConfig,
    engine: TransferEngine,
    pool: Pool,
    loaded: Loaded,
    post: Callable[[Landed | Written], None],
) -> KVTransport:
    """On the running loop."""
    # Pushed weights change what KV means, not how it lies: the hash root keeps versions apart.
    layout = layout_id(config.model.fingerprint, loaded.spec)
    region = engine.register(pool.memory, layout, pool.fd)
    gathering = GatherSettings() if config.transfer.path == "gather" else None
    turns = asyncio.get_running_loop()
    return KVTransport(engine, region, loaded.spec, pool.layout, post, turns, gathering)


def greeting(config: WorkerConfig, loaded: Loaded, place: Place) -> wire.Hello:
    spec = config.model.spec
    return wire.Hello(
        secret=config.secret,
        fingerprint=loaded.fingerprint,
        dtype=spec.dtype,
        block_size=spec.block_size,
        spec=loaded.spec,
        vocabulary=loaded.vocabulary,
        numerics=loaded.numerics,
        promise=loaded.promise,
        place=place,
        version=config.info.version,
    )


async def _serve(config: WorkerConfig, make_executor: MakeExecutor) -> None:
    worker = Worker(config, make_executor)
    asyncio.get_running_loop().set_exception_handler(worker.lost)
    await worker.ended


class Dismissal(HeadraceError):
    """The service goes on without this worker."""


class Worker:
    """See the module. Everything but the executor runs on the loop's thread."""

    def __init__(
        self,
        config: WorkerConfig,
        make_executor: MakeExecutor,
        link: Link | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`link` and `clock`: of one that joined."""
        self._config = config
        self._clock = clock
        self._now_ns: Callable[[], int] = clock or monotonic_ns
        self._retiring = False
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._pool = Pool(config.pool.fd, config.pool.layout)
        self._drawn = Drawn()
        self._started: dict[SequenceKey, None] = {}
        self._preemptions = 0
        self._ranges: Callable[[], RangeCounts | None] | None = None
        self._reporting: asyncio.TimerHandle | None = None
        self._renewals = Renewals(lambda message: self._link.send(HUB, message))
        buffers = self._pool.buffers()
        self._engine = open_engine(config)
        self._transport: KVTransport
        blocks = config.instance.swap_blocks
        self._swaps = (
            Swaps(config.model.spec, blocks, buffers, self._post, self.fail) if any(blocks) else None
        )
        self._link = link or Link(config.address, config.endpoint, self._receive, self.fail)
        self._link.receive = self._receive
        self._steps = Steps(partial(make_executor, config, buffers), self._loaded, self._step_done, self.fail)
        self._node: Node | None = None
        """From `Welcome` on."""
        self._instance: Instance

    def lost(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback failed: nobody knows what it left undone."""
        self.fail(context.get("exception") or RuntimeError(context["message"]))

    def fail(self, error: Exception) -> None:
        """The worker ends with this error."""
        if not self.ended.done():
            self.ended.set_exception(error)

    def retire(self, within_ns: int) -> None:
        """Take nothing new, finish what is here, and end; what is not finished in time goes on elsewhere."""
        if self._retiring or self._node is None:
            self._end()
            return
        self._retiring = True
        self._link.send(HUB, wire.Retire())
        self._loop.call_later(within_ns / 1e9, self._farewell)
        self._report_soon()

    def _farewell(self) -> None:
        if not self.ended.done():
            self._link.send(HUB, wire.Farewell())
            self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _post(self, event: Event) -> None:
        assert self._node is not None, f"{event} before the core is made"
        self._node.post(event)

    # Joining

    def _loaded(self, loaded: Loaded) -> None:
        self._ranges = loaded.counts
        self._renewals.prepare = loaded.prepare
        config = self._config
        if config.instance.lend_share and loaded.answer is not None:
            # Before anybody hears of this worker.
            Desk(config.secret, config.address, loaded.answer)
        self._transport = open_kv(self._config, self._engine, self._pool, loaded, self._post)
        self._link.send(HUB, greeting(self._config, loaded, self._transport.place))

    def _welcome(self, message: wire.Welcome) -> None:
        config = self._config
        header = Header(
            config.address,
            InstanceSettings(config.router, config.info, config.model.spec, config.engine, config.instance),
        )
        self._instance = remake_instance(header)
        core: Core = self._instance
        if config.journals:
            core = Journal(core, Path(config.journals), header)
        self._hear(message.now_ns)
        self._node = CoreLoop(self.fail, self._now_ns).add(core, self._carry)
        for peer in message.peers:
            self._joined(peer)
        self._report_soon()

    def _hear(self, now_ns: int) -> None:
        if self._clock is not None:
            self._clock.hear(now_ns)

    def _joined(self, peer: wire.Member) -> None:
        self._transport.join(peer.address, peer.place)
        self._post(PeerUp(peer.address, peer.info))

    def _left(self, peer: wire.Member) -> None:
        # The core frees what the peer could write into: so it hears of the end when it cannot any more.
        self._transport.forget(peer.address, lambda: self._post(PeerLost(peer.address, peer.info)))

    # What comes in

    def _receive(
        self, source: Address, target: Address, message: AnyMessage | wire.Control, payload: bytes
    ) -> None:
        if source != HUB and isinstance(message, wire.Control):
            # Only the hub says who joins, leaves, or what to load.
            log.warning("%s says %s, which is the hub's to say: dropped", source, type(message).__name__)
            return
        match message:
            case wire.Ping(now_ns):
                self._hear(now_ns)
                since_ns = self._steps.since_ns
                self._link.send(HUB, wire.Pong(monotonic_ns() - since_ns if since_ns else 0))
            case wire.Pulse():
                pass
            case wire.Dismissed(reason):
                self.fail(Dismissal(f"{self._config.address} was dismissed from the service: {reason}"))
            case wire.Welcome():
                self._welcome(message)
            case wire.NotWelcome(reason):
                self.fail(IncompatiblePeer(f"{self._config.address} was refused: {reason}"))
            case wire.PeerJoined(peer):
                self._joined(peer)
            case wire.PeerLeft(peer):
                self._left(peer)
            case wire.Leave():
                log.info("the service ends, and %s with it", self._config.address)
                self._end()
            case wire.Prepare(staged):
                self._renewals.stage(staged)
            case wire.Forget(version):
                self._renewals.drop(version)
            case (
                wire.Hello()
                | wire.Prepared()
                | wire.Pong()
                | wire.Apply()
                | wire.Invitation()
                | wire.Retire()
                | wire.Farewell()
            ):
                log.warning("a %s has no business here", type(message).__name__)
            case _:
                self._attached(message, payload)
                self._post(Received(source, message))
                self._report_soon()

    def _attached(self, message: AnyMessage, payload: bytes) -> None:
        """What the message carries for the executor."""
        match message:
            case Start(key):
                self._drawn.open(key, message.history)
                self._steps.open(key, wire.decode_payload(payload, SequencePayload))
            case Tail(key) if key in self._drawn:
                emissions = wire.decode_payload(payload, tuple[Emission, ...])
                self._drawn.received(emissions)
                for emission in emissions:
                    self._steps.append(emission)
            case _:
                pass

    def _step_done(self, result: StepResult, emissions: tuple[Emission, ...]) -> None:
        self._drawn.add(emissions)
        self._post(StepDone(result))
        self._report_soon()

    def _renewed(self, version: int) -> None:
        """Steps are computed with these weights from now on."""
        self._post(WeightsReady(version))
        self._report_soon()

    # What the core wants

    def _carry(self, command: Command) -> None:
        match command:
            case Send(target, message):
                self._link.send(target, message, self._attach(message))
            case Execute(plan):
                self._count_preemptions(plan)
                self._steps.execute(plan, self._post)
            case Close(key):
                self._steps.close(key)
                self._drawn.close(key)
                self._started.pop(key, None)
            case UseWeights(version):
                use = partial(self._renewals.use, version)
                self._steps.between(use, partial(self._renewed, version))
            case Write():
                self._transport.write(command)
            case Distrust(peer, why):
                self._transport.distrust(peer, why)
            case SwapOut() | SwapIn():
                assert self._swaps is not None, "without a host area nothing is swapped"
                self._swaps.give(command)
            case _:
                raise TypeError(f"a worker has no use for {command!r}")

    def _attach(self, message: AnyMessage) -> bytes:
        match message:
            case Tokens():
                return wire.encode_payload(self._drawn.for_tokens(message))
            case Tail():
                return wire.encode_payload(self._drawn.for_tail(message))
            case _:
                return b""

    def _count_preemptions(self, plan: StepPlan) -> None:
        for start in plan.starts:
            self._preemptions += start.key in self._started
            self._started[start.key] = None

    def _report_soon(self) -> None:
        """While something happens the router hears how it goes, not too often; the last report is of the end state."""
        if self._reporting is None:
            self._reporting = self._loop.call_later(self._config.report_ns / 1e9, self._report)

    def _counts(self) -> wire.WorkerCounts:
        swaps, copied = self._instance.swapping.counts, self._swaps
        return wire.WorkerCounts(
            self._preemptions,
            swaps.out,
            swaps.back,
            swaps.full,
            copied.copies if copied is not None else 0,
            copied.bytes if copied is not None else 0,
            self._ranges() if self._ranges is not None else None,
        )

    def _report(self) -> None:
        self._reporting = None
        assert self._node is not None
        report = self._node.core.observe(self._now_ns())
        assert report is not None
        self._link.send(self._config.router, report, wire.encode_payload(self._counts()))
        busy = report.waiting or report.running or report.held or report.receiving or report.sending
        if self._retiring and report.draining and not busy:
            self._farewell()
        elif busy or self._retiring:
            # Not everything that ends work is a message or a step: writes and deadlines do, too.
            self._report_soon()
